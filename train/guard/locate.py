"""Where in a step it went wrong: its sequences, each by itself, once more through the model, forward alone.

All ranks do it together, as they validate, so it is the same under every layout: each puts its own sequences through, one after the
other, and what they come to is summed. The sequence that stands out most is looked at once more, document by document, with all
others' targets left out. Where a loss is not finite, the first module is named whose output is not.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.samples import Batch, Samples
from model.transformer import Transformer
from train.ranks import Ranks

MOST = 4  # sequences, or documents of one, that are named
MOST_DOCUMENTS = 32  # of a sequence that are looked at one by one, the longest ones


@dataclass(frozen=True)
class Found:
    """A sequence or a document that stands out."""

    number: int  # of a sequence: its sample; of a document: as `rorqual data inspect` counts
    loss: float  # nats a token of its own


@dataclass(frozen=True)
class Located:
    """What stands out in a step; worst first."""

    of: int  # sequences of the global batch
    outstanding: int  # those of them above the limit, or not finite
    sequences: list[Found]
    source: str  # of the worst
    store: str
    documents: list[Found]  # of the worst; none where one is as good as the other
    not_finite: str | None  # the first module whose output is not

    def __str__(self) -> str:
        if not self.outstanding:
            return "in a replay every sequence is as usual"
        worst = self.sequences[0]
        name = "sample" if self.outstanding == 1 else "samples"
        samples = ", ".join(str(found.number) for found in self.sequences) + ", …" * (self.outstanding > MOST)
        parts = [
            f"{self.outstanding} of {self.of} sequences ({name} {samples}; the worst of source {self.source}: {worst.loss:.4g})"
        ]
        if self.not_finite:
            parts.append(f"first not finite: output of {self.not_finite}")
        if self.documents:
            found = self.documents[0]
            parts.append(
                f"its document {found.number} has {found.loss:.4g}: "
                f"rorqual data inspect {self.store} --document {found.number}"
            )
        return "; ".join(parts)


def locate(
    model: Transformer,
    batches: Sequence[Batch],
    samples: Samples,
    first_sample: int,
    limit: float,
    reader: tuple[int, int],
    ranks: Ranks,
) -> Located:
    """Collective.

    Args:
        model: at the positions of the step.
        batches: this rank's micro-batches of it.
        first_sample: of the step.
        limit: a sequence above it stands out; so does one that is not finite.
        reader: of the ranks that read different sequences, which one this is, and how many there are.
    """
    here = Batch(*(torch.cat(parts) for parts in zip(*batches)))
    mine, readers = reader
    rows = len(here.tokens)
    with torch.compiler.set_stance("force_eager"), _first_not_finite(model) as seen:
        losses = _losses(
            model,
            [here.tokens[i : i + 1] for i in range(rows)],
            [here.documents[i : i + 1] for i in range(rows)],
            mine * rows,
            readers * rows,
        )
    worst = sorted(range(len(losses)), key=lambda i: _badness(losses[i]), reverse=True)
    outstanding = sum(not loss <= limit for loss in losses)
    first = first_sample + worst[0]
    origin = samples.origin(first)
    documents: list[Found] = []
    if outstanding < len(losses) or math.isfinite(losses[worst[0]]):  # else it is not the text's fault
        documents = _documents(model, samples.batch(first, 1), mine == 0, limit)
    places = sorted(place for place in ranks.gather(seen) if place)
    return Located(
        of=len(losses),
        outstanding=outstanding,
        sequences=[Found(first_sample + i, losses[i]) for i in worst[: min(MOST, outstanding)]],
        source=origin.source,
        store=str(origin.store),
        documents=[Found(origin.first_document + found.number, found.loss) for found in documents],
        not_finite=places[0][-1] if places else None,
    )


def _documents(model: Transformer, batch: Batch, counts: bool, limit: float) -> list[Found]:
    """Documents of one sequence that stand out, numbered within their source. All ranks look at the same; one reader's counts."""
    numbers, lengths = batch.documents[batch.documents >= 0].unique(return_counts=True)
    chosen = numbers[lengths.argsort(descending=True, stable=True)[:MOST_DOCUMENTS]].tolist()
    device = model.device
    masks = [batch.documents.masked_fill(batch.documents != number, -1).to(device) for number in chosen]
    tokens = [batch.tokens.to(device)] * len(chosen)
    losses = _losses(model, tokens, masks, 0, len(chosen), counts)
    found = [Found(number, loss) for number, loss in zip(chosen, losses)]
    found.sort(key=lambda one: _badness(one.loss), reverse=True)
    return [one for one in found if not one.loss <= limit][:MOST]


def _losses(
    model: Transformer,
    tokens: Sequence[Tensor],
    documents: Sequence[Tensor],
    first: int,
    total: int,
    counts: bool = True,
) -> list[float]:
    """Mean loss of each of `total` sequences over all ranks; this rank has those from `first` on, if it counts."""
    sums = torch.zeros(total, 2, dtype=torch.float64, device=model.device)
    for i, (row, of_row) in enumerate(zip(tokens, documents)):
        scores = model.score(row, of_row)
        if counts:
            sums[first + i] = torch.stack([scores.nats.double(), scores.targets[0].double()])
    dist.all_reduce(sums)
    return [nats / max(targets, 1) for nats, targets in sums.tolist()]


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


@contextmanager
def _first_not_finite(model: Transformer) -> Iterator[list[Any]]:
    """Watch what modules put out: the layer (embedding −1) and the name of the first whose output is not finite, or nothing."""
    place: list[Any] = []

    def watch(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not place and not all(part.isfinite().all() for part in _tensors(output)):
            layer = re.search(r"layers\.(\d+)", name)
            before_or_behind = -1.0 if "embed" in name else math.inf
            place.extend((float(layer[1]) if layer else before_or_behind, name))

    handles = [module.register_forward_hook(partial(watch, name)) for name, module in model.named_modules() if name]
    try:
        yield place
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
