"""Validation: nats a token and bits a byte of every source, how often each head is right, and how evenly the experts are used.

Bits per byte compare across tokenizers, nats per token do not:

    bits/byte = Σ nats of the targets / (ln 2 · Σ UTF-8 bytes of the targets)
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.samples import Batch
from data.store import Store
from data.tokenizer import fingerprint
from data.validation import validation_batches
from model.balance import max_violation
from model.transformer import Transformer
from train.config import RecipeError
from train.generate import load_model
from train.launch import process_group
from train.ranks import Ranks
from train.weights import open_weights


@dataclass(frozen=True)
class SourceResult:
    """What a model makes of one source."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    accuracy: list[float]  # share of targets that the main head and each MTP depth put first


@dataclass(frozen=True)
class Evaluation:
    sources: dict[str, SourceResult]
    max_vio: list[float]  # of each MoE layer over all of it: MaxVio_global

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `metrics.jsonl`."""
        return {
            "validation": {source: asdict(result) for source, result in self.sources.items()},
            "validation_max_vio": self.max_vio,
        }


def evaluate_source(source: Path, store: Path, sequence_length: int | None, max_tokens: int | None) -> Evaluation:
    """Evaluate a run, checkpoint or Hugging Face folder on the validation split of a store.

    Windows are as long as the sequences of the run's last step, unless `sequence_length` says otherwise, and masked at documents
    if its were.

    Raises:
        CheckpointError, ConfigError, DataError: the weights or the store cannot be read.
        RecipeError: they do not belong together, or the windows are longer than the model's context.
    """
    opened = Store.open(store)
    with process_group("auto") as process:
        dtype = torch.bfloat16 if process.device.type == "cuda" else torch.float32
        model, tokenizer = load_model(source, dtype, process.device)
        context = model.config.max_position_embeddings
        sequence_length = sequence_length or open_weights(source).sequence_length or min(512, context)
        if sequence_length > context:
            raise RecipeError(
                f"sequence_length = {sequence_length}: the model reads at most {context} tokens; lower it"
            )
        if tokenizer is not None and fingerprint(Path(tokenizer.name_or_path)) != opened.manifest.tokenizer_fingerprint:
            raise RecipeError(
                f"data = {store}: was made with another tokenizer than {source}; prepare it again with "
                f"`tokenizer: {{kind: folder, path: {tokenizer.name_or_path}}}` in its recipe"
            )
        if opened.vocab_size > model.config.vocab_size:  # weights may come without a tokenizer
            raise RecipeError(
                f"data = {store}: its tokenizer has {opened.vocab_size} tokens, the model {model.config.vocab_size} rows; "
                "prepare the text with the model's tokenizer"
            )
        depths = model.config.num_nextn_predict_layers
        batches = validation_batches(opened, sequence_length, depths, 8, max_tokens, process.rank, process.world_size)
        together = Ranks(dist.new_group(backend="gloo")).in_step(batches)
        return evaluate(model, together, torch.from_numpy(opened.token_bytes()))


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[tuple[str, Batch]], token_bytes: Tensor) -> Evaluation:
    """Evaluate on this rank's share of the validation windows; sums are taken over all ranks of the default group.

    Args:
        batches: (source, batch) pairs of this rank, as many on every rank; a batch may have no rows.
        token_bytes: [V] UTF-8 bytes of each token.
    """
    device = model.device
    depths = model.config.num_nextn_predict_layers
    token_bytes = token_bytes.to(device)
    sums: dict[str, Tensor] = {}  # of each source: nats, bytes, then targets and hits of every head
    counts = torch.zeros(model.config.n_moe_layers, model.config.n_routed_experts, dtype=torch.int64, device=device)
    for source, batch in batches:
        row = sums.setdefault(source, torch.zeros(2 + 2 * (depths + 1), dtype=torch.float64, device=device))
        is_empty = len(batch.tokens) == 0
        tokens, documents = (part.to(device) for part in (_padding(batch) if is_empty else batch))
        scores = model.score(tokens, documents)
        if is_empty:  # this rank took part because a model that is spread over ranks needs all of them
            continue
        size = token_bytes[scores.labels].sum()
        row += torch.cat([torch.stack([scores.nats, size]), scores.targets, scores.hits]).double()
        counts += scores.expert_counts
    results = {}
    for source, row in sums.items():
        dist.all_reduce(row)
        nats, size, *rest = row.tolist()
        targets, hits = rest[: depths + 1], rest[depths + 1 :]
        results[source] = SourceResult(
            nats_per_token=nats / max(targets[0], 1),
            bits_per_byte=nats / math.log(2) / max(size, 1),
            tokens=int(targets[0]),
            accuracy=[hit / max(n, 1) for hit, n in zip(hits, targets)],
        )
    dist.all_reduce(counts)
    return Evaluation(results, max_violation(counts).tolist())


def _padding(batch: Batch) -> Batch:
    """One sequence without a target, in place of none."""
    width = batch.tokens.shape[1]
    return Batch(batch.tokens.new_zeros(1, width), batch.documents.new_full((1, width), -1))
