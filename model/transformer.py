"""The DeepSeek-V3 transformer: tokens in, summed losses and expert counts out.

Parameter names are those of `transformers`' in-memory DeepseekV3, so
`load_state_dict(hf_model.state_dict())` works; the MTP modules stand behind the main layers, at
`model.layers.{num_hidden_layers + k}`, as in the released weights.
"""

from dataclasses import replace
from itertools import chain
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from model.attention import LatentCache, MultiHeadLatentAttention
from model.block import Block
from model.config import ModelConfig
from model.context import WHOLE, Context
from model.layers import MLP, Linear, RMSNorm
from model.loss import Losses, count_targets, targets_at
from model.moe import Experts, LayerStats
from model.mtp import MTPBlock
from model.ops import attention as attention_ops
from model.ops import experts as experts_ops
from model.ops.attention import AttentionBackend
from model.ops.cross_entropy import IGNORE, count_hits, heads_cross_entropy, linear_cross_entropy
from model.ops.experts import ExpertsBackend
from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Kernels
from model.rope import Rotation, rotation, softmax_scale
from model.router import Router


class Output(NamedTuple):
    losses: Losses
    expert_counts: Tensor  # [MoE layers, E] int64, those of the MTP modules last


class Scores(NamedTuple):
    """How well a model predicts one micro-batch; sums over its valid targets."""

    nats: Tensor  # [] cross-entropy of the main head
    hits: Tensor  # [1 + D_mtp] int64 targets that the main head and each MTP depth put first
    targets: Tensor  # [1 + D_mtp] int64
    labels: Tensor  # [targets of the main head] int64, the tokens
    expert_counts: Tensor  # [MoE layers, E] int64


class Part(NamedTuple):
    """Consecutive layers of a model: what one stage of a pipeline computes."""

    layers: range  # of the main layers
    first: bool = True  # begins with the embedding
    last: bool = True  # ends with the final norm, the MTP modules and the heads


class Transformer(nn.Module):
    """A decoder with its output head.

    Args:
        config: the dimensions.
        compute_dtype: dtype of activations and matrix products; parameters keep their own.
        attention: "fused" (on a CPU in fp32 our kernel, else PyTorch's), "sdpa" (PyTorch's), "reference", or what
            `model.ops.attention.choose` has chosen for a GPU.
        experts: "grouped_mm" (one kernel for all experts) or "reference" (a loop over them).
        mask_documents: keep attention and targets inside a packed document. Rotary positions are relative, so
            with the mask they need no reset at a document's start.
        fp8: what computes the matrix products of blocks in FP8; None leaves them in the compute dtype. Embedding, head,
            gates, norms, attention itself and the entry of MTP modules stay as they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        attention: AttentionBackend | Literal["fused", "sdpa", "reference"] = "fused",
        experts: Literal["grouped_mm", "reference"] = "grouped_mm",
        mask_documents: bool = False,
        fp8: Kernels | None = None,
    ):
        super().__init__()
        self.config = config
        self.whole = Part(range(config.num_hidden_layers))
        self.context: Context = WHOLE
        self.compute_dtype = compute_dtype
        self.mask_documents = mask_documents
        backend = attention_ops.BACKENDS[attention] if isinstance(attention, str) else attention
        self.model = Decoder(config, backend, experts_ops.BACKENDS[experts])
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.fp8: dict[str, Fp8] = compute_in_fp8(self.model.layers, fp8) if fp8 else {}
        self.fp8_names = tuple(self.fp8)  # of the whole model, where only a part of it is here too

    @property
    def device(self) -> torch.device:
        """Where it computes. Parameters may lie elsewhere (offload), buffers do not."""
        return next(chain(self.buffers(), self.parameters())).device

    @property
    def main_layers(self) -> list[Block]:
        return cast(list[Block], list(self.model.layers)[: self.config.num_hidden_layers])

    @property
    def mtp_layers(self) -> list[MTPBlock]:
        return cast(list[MTPBlock], list(self.model.layers)[self.config.num_hidden_layers :])

    @property
    def blocks(self) -> list[Block]:
        """The layers that are here, those of the MTP modules last."""
        return [layer for layer in self.model.layers if isinstance(layer, Block)]

    def forward(self, tokens: Tensor, documents: Tensor, coefficients: Tensor | None = None) -> Output:
        """Summed losses of one micro-batch.

        Args:
            tokens, documents: [B, T + 1 + D_mtp]; every position of every depth has a real target.
            coefficients: [1 + D_mtp] what each head's sum counts in the objective (`model.loss.head_coefficients`), so that they
                share one gradient of the output head; None: not known yet, each has its own.
        """
        return self.forward_part(self.whole, None, tokens, documents, coefficients)[1]

    def forward_part(
        self, part: Part, x: Tensor | None, tokens: Tensor, documents: Tensor, coefficients: Tensor | None = None
    ) -> tuple[Tensor | None, Output]:
        """What a part adds to `forward`, from the states that the part before handed out, None for the first.

        Returns:
            States for the next part, [B, T, D] (of the pieces that are computed here: `hidden_shape`), None of the last; and losses
            and counts, in which everything that other parts compute is 0.
        """
        batch = self._read(tokens, documents)
        hidden, stats = self._through(part, x, batch)
        sums = tokens.new_zeros(1 + self.config.num_nextn_predict_layers, dtype=torch.float32)
        if part.last:
            sums = self._sum_losses([h.flatten(0, 1) for h in hidden], self._labels(batch), coefficients)
        losses = Losses(  # copies, since FSDP's hooks are not for views
            main=sums[0].clone(),
            mtp=sums[1:].clone(),
            balance=sum((s.balance for s in stats.values()), sums.new_zeros(())),
            counts=self.count_targets(tokens, documents),
        )
        return None if part.last else hidden[0], Output(losses, self._stack_counts(stats, tokens))

    def score(self, tokens: Tensor, documents: Tensor) -> Scores:
        """Evaluate the same micro-batch that `forward` would learn from. Both [B, T + 1 + D_mtp]."""
        return self.score_part(self.whole, None, tokens, documents)[1]

    @torch.no_grad()
    def score_part(
        self, part: Part, x: Tensor | None, tokens: Tensor, documents: Tensor
    ) -> tuple[Tensor | None, Scores]:
        """What a part adds to `score`; in and out as of `forward_part`."""
        batch = self._read(tokens, documents)
        hidden, stats = self._through(part, x, batch)
        counts = self._stack_counts(stats, tokens)
        if not part.last:
            heads = tokens.new_zeros(1 + self.config.num_nextn_predict_layers)
            return hidden[0], Scores(heads[0].float(), heads, heads, heads[:0], counts)
        labels, head = self._labels(batch), self.lm_head.weight
        hits = torch.stack([count_hits(h.flatten(0, 1), head, y) for h, y in zip(hidden, labels)])
        nats = linear_cross_entropy(hidden[0].flatten(0, 1), head, labels[0])
        targets = torch.stack([(y != IGNORE).sum() for y in labels])
        return None, Scores(nats, hits, targets, labels[0][labels[0] != IGNORE], counts)

    def hidden_states(self, tokens: Tensor, documents: Tensor) -> tuple[list[Tensor], list[LayerStats]]:
        """Normed states before the output head, [B, T, D] for the main head and each MTP depth, and the MoE layers' stats."""
        hidden, stats = self._through(self.whole, None, self._read(tokens, documents))
        return hidden, list(stats.values())

    def count_targets(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """[1 + D_mtp] int64 valid targets of each head in a micro-batch, those that are computed here."""
        depths = self.config.num_nextn_predict_layers
        tokens, documents = self.context.cut(tokens, 1 + depths), self.context.cut(documents, 1 + depths)
        return count_targets(tokens, documents, depths, self.mask_documents)

    def hidden_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """Of the states of a micro-batch's pieces that are computed here, [B', L, D]. tokens: [B, T + 1 + D_mtp]."""
        length = tokens.shape[1] - 1 - self.config.num_nextn_predict_layers
        return tokens.shape[0] * self.context.pieces_here, length // self.context.pieces, self.config.hidden_size

    def set_context(self, context: Context) -> None:
        """Let it compute pieces of sequences, and others the rest."""
        self.context = context
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention | Router):
                module.context = context

    def set_positions(self, config: ModelConfig) -> None:
        """Go on as the model of a config that differs in its context and YaRN only (`ModelConfig.at_length`)."""
        mine = self.config
        same = replace(config, max_position_embeddings=mine.max_position_embeddings, rope_scaling=mine.rope_scaling)
        assert same == mine, f"{config} is another model than {mine}"
        self.config = config
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.scale = softmax_scale(config)

    def _read(self, tokens: Tensor, documents: Tensor) -> "_Batch":
        """What a micro-batch [B, T + 1 + D_mtp] is to the layers."""
        ahead = 1 + self.config.num_nextn_predict_layers
        length = tokens.shape[1] - ahead
        return _Batch(
            self.context.cut(tokens, ahead),
            self.context.cut(documents, ahead),
            rotation(self.config, torch.arange(length, device=tokens.device)),
            attention_ops.document_starts(documents[:, :length]) if self.mask_documents else None,
        )

    def _through(self, part: Part, x: Tensor | None, batch: "_Batch") -> tuple[list[Tensor], dict[int, LayerStats]]:
        """States after a part, [B', L, D]: of the last one normed, for the main head and each MTP depth. MoE stats by layer."""
        depths = self.config.num_nextn_predict_layers
        length = batch.tokens.shape[1] - 1 - depths
        stats: dict[int, LayerStats | None] = {}
        embedded = self.embed(batch.tokens[:, : length + depths]) if part.first or (part.last and depths) else None
        if part.first:
            assert embedded is not None
            x = embedded[:, :length]
        blocks = self.main_layers
        for layer in part.layers:
            x, stats[layer] = blocks[layer](x, batch.rotation, batch.starts)
        assert x is not None
        if not part.last:
            return [x if part.layers else x.clone()], _of_moe(stats)  # no view of what is embedded, for FSDP's hooks
        hidden = [self.model.norm(x)]
        for depth, module in enumerate(self.mtp_layers, start=1):
            assert embedded is not None
            ahead = embedded[:, depth : depth + length]
            h, stats[part.layers.stop + depth - 1] = module(hidden[-1], ahead, batch.rotation, batch.starts)
            hidden.append(h)
        return hidden, _of_moe(stats)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] → [B, T, D] in the compute dtype; all later layers follow it."""
        return self.model.embed_tokens(tokens).to(self.compute_dtype)

    def decode(self, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        """Normed states of new tokens after those in the caches, one cache a main layer. [B, T] → [B, T, D]."""
        return self.decode_part(self.whole, None, tokens, caches)

    def decode_part(self, part: Part, x: Tensor | None, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        """What a part adds to `decode`, from the states x [B, T, D] that the part before handed out."""
        x = self.embed(tokens) if x is None else x
        for layer in part.layers:
            x = self.main_layers[layer].decode(x, self._positions_after(caches[layer], tokens.shape[1]), caches[layer])
        return self.model.norm(x) if part.last else x

    def decode_mtp(self, depth: int, hidden: Tensor, next_tokens: Tensor, cache: LatentCache) -> Tensor:
        """States of MTP module `depth` (1, 2, …) for new positions: hidden [B, T, D] of the depth before, and
        next_tokens [B, T], the tokens `depth` ahead of them. → [B, T, D]."""
        positions = self._positions_after(cache, next_tokens.shape[1])
        return self.mtp_layers[depth - 1].decode(hidden, self.embed(next_tokens), positions, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] normed states → [..., V]."""
        return self.lm_head(hidden)

    def new_caches(self, batch: int, max_length: int) -> list[LatentCache]:
        """Empty caches of every layer, those of the MTP modules last."""
        return [LatentCache(batch, max_length, self.config, self.compute_dtype, self.device) for _ in self.model.layers]

    def _positions_after(self, cache: LatentCache, new: int) -> Rotation:
        return rotation(self.config, torch.arange(cache.length, cache.length + new, device=cache.entries.device))

    def _labels(self, batch: "_Batch") -> list[Tensor]:
        """[B'·L] targets of the main head and of each MTP depth."""
        depths = self.config.num_nextn_predict_layers
        heads = range(1 + depths)
        return [targets_at(batch.tokens, batch.documents, k, depths, self.mask_documents).flatten() for k in heads]

    def _sum_losses(self, hidden: list[Tensor], labels: list[Tensor], coefficients: Tensor | None) -> Tensor:
        """[1 + D_mtp] summed cross-entropy of each head."""
        head = self.lm_head.weight
        if coefficients is not None:
            return heads_cross_entropy(hidden, head, labels, coefficients)
        return torch.stack([linear_cross_entropy(h, head, y) for h, y in zip(hidden, labels)])

    def _stack_counts(self, stats: dict[int, LayerStats], tokens: Tensor) -> Tensor:
        nothing = tokens.new_zeros(self.config.n_routed_experts)
        counts = [stats[n].expert_counts if n in stats else nothing for n in self.config.moe_layers]
        return torch.stack(counts) if counts else nothing[None][:0]


class _Batch(NamedTuple):
    """A micro-batch as the layers see it: pieces that are computed here, and what they must know of whole sequences."""

    tokens: Tensor  # [B', L + 1 + D_mtp]
    documents: Tensor  # [B', L + 1 + D_mtp]
    rotation: Rotation  # of the T positions
    starts: Tensor | None  # [B, T] of their documents


def _of_moe(stats: dict[int, LayerStats | None]) -> dict[int, LayerStats]:
    return {layer: of_layer for layer, of_layer in stats.items() if of_layer is not None}


class Decoder(nn.Module):
    """Everything below the output head, under the name `model` as in transformers: main layers, then the MTP modules."""

    def __init__(self, config: ModelConfig, attention: AttentionBackend, experts: ExpertsBackend):
        super().__init__()
        main, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, attention, experts) for layer in range(main))
        self.layers.extend(MTPBlock(config, main + depth, attention, experts) for depth in range(depths))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def compute_in_fp8(layers: nn.ModuleList, kernels: Kernels) -> dict[str, Fp8]:
    """Let attention's linear maps, feed-forward networks and experts multiply in FP8. Returns each one's arithmetic by its name."""
    arithmetic: dict[str, Fp8] = {}
    for name, module in layers.named_modules(prefix="model.layers"):
        of_attention = isinstance(module, Linear) and ".self_attn." in name
        if of_attention or isinstance(module, MLP | Experts):
            module.fp8 = arithmetic[name] = Fp8(kernels, keeps_input=name.endswith("o_proj"))
    return arithmetic
