"""The DeepSeek-V3 transformer: tokens in, summed losses and expert counts out.

Parameter names are those of `transformers`' in-memory DeepseekV3, so
`load_state_dict(hf_model.state_dict())` works; the MTP modules stand behind the main layers, at
`model.layers.{num_hidden_layers + k}`, as in the released weights.
"""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from model.attention import LatentCache
from model.block import Block
from model.config import ModelConfig
from model.layers import MLP, Linear, RMSNorm
from model.loss import Losses, count_targets, targets_at
from model.moe import Experts, LayerStats
from model.mtp import MTPBlock
from model.ops import attention as attention_ops
from model.ops import experts as experts_ops
from model.ops.attention import AttentionBackend
from model.ops.cross_entropy import count_hits, heads_cross_entropy, linear_cross_entropy
from model.ops.experts import ExpertsBackend
from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Kernels
from model.rope import Rotation, rotation


class Output(NamedTuple):
    losses: Losses
    expert_counts: Tensor  # [MoE layers, E] int64, those of the MTP modules last


class Scores(NamedTuple):
    """How well a model predicts one micro-batch; sums over its valid targets."""

    nats: Tensor  # [] cross-entropy of the main head
    hits: Tensor  # [1 + D_mtp] int64 targets that the main head and each MTP depth put first
    expert_counts: Tensor  # [MoE layers, E] int64


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
        self.compute_dtype = compute_dtype
        self.mask_documents = mask_documents
        backend = attention_ops.BACKENDS[attention] if isinstance(attention, str) else attention
        self.model = Decoder(config, backend, experts_ops.BACKENDS[experts])
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.fp8: dict[str, Fp8] = compute_in_fp8(self.model.layers, fp8) if fp8 else {}

    @property
    def device(self) -> torch.device:
        """Where it computes. Parameters may lie elsewhere (offload), buffers do not."""
        return next(self.buffers(), self.lm_head.weight).device

    @property
    def main_layers(self) -> list[Block]:
        return cast(list[Block], list(self.model.layers)[: self.config.num_hidden_layers])

    @property
    def mtp_layers(self) -> list[MTPBlock]:
        return cast(list[MTPBlock], list(self.model.layers)[self.config.num_hidden_layers :])

    def forward(self, tokens: Tensor, documents: Tensor, coefficients: Tensor | None = None) -> Output:
        """Summed losses of one micro-batch.

        Args:
            tokens, documents: [B, T + 1 + D_mtp]; every position of every depth has a real target.
            coefficients: [1 + D_mtp] what each head's sum counts in the objective (`model.loss.head_coefficients`), so that they
                share one gradient of the output head; None: not known yet, each has its own.
        """
        depths = self.config.num_nextn_predict_layers
        hidden, stats = self.hidden_states(tokens, documents)
        labels = self._labels(tokens, documents)
        sums = self._sum_losses([h.flatten(0, 1) for h in hidden], labels, coefficients)
        losses = Losses(
            main=sums[0],
            mtp=sums[1:],
            balance=sum((s.balance for s in stats), sums.new_zeros(())),
            counts=count_targets(tokens, documents, depths, self.mask_documents),
        )
        return Output(losses, self._stack_counts(stats, tokens))

    @torch.no_grad()
    def score(self, tokens: Tensor, documents: Tensor) -> Scores:
        """Evaluate the same micro-batch that `forward` would learn from. Both [B, T + 1 + D_mtp]."""
        hidden, stats = self.hidden_states(tokens, documents)
        labels = self._labels(tokens, documents)
        head = self.lm_head.weight
        hits = [count_hits(h.flatten(0, 1), head, y) for h, y in zip(hidden, labels)]
        nats = linear_cross_entropy(hidden[0].flatten(0, 1), head, labels[0])
        return Scores(nats, torch.stack(hits), self._stack_counts(stats, tokens))

    def hidden_states(self, tokens: Tensor, documents: Tensor) -> tuple[list[Tensor], list[LayerStats]]:
        """Normed states before the output head, [B, T, D] for the main head and each MTP depth, and the MoE layers' stats."""
        depths = self.config.num_nextn_predict_layers
        length = tokens.shape[1] - 1 - depths
        embedded = self.embed(tokens[:, : length + depths])  # [B, T + D_mtp, D]
        positions = rotation(self.config, torch.arange(length, device=tokens.device))
        starts = attention_ops.document_starts(documents[:, :length]) if self.mask_documents else None

        x, stats = embedded[:, :length], []
        for block in self.main_layers:
            x, layer_stats = block(x, positions, starts)
            stats.append(layer_stats)
        hidden = [self.model.norm(x)]
        for depth, module in enumerate(self.mtp_layers, start=1):
            h, layer_stats = module(hidden[-1], embedded[:, depth : depth + length], positions, starts)
            hidden.append(h)
            stats.append(layer_stats)
        return hidden, [s for s in stats if s is not None]

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] → [B, T, D] in the compute dtype; all later layers follow it."""
        return self.model.embed_tokens(tokens).to(self.compute_dtype)

    def decode(self, tokens: Tensor, caches: list[LatentCache]) -> Tensor:
        """Normed states of new tokens after those in the caches, one cache a main layer. [B, T] → [B, T, D]."""
        x, positions = self.embed(tokens), self._positions_after(caches[0], tokens.shape[1])
        for block, cache in zip(self.main_layers, caches):
            x = block.decode(x, positions, cache)
        return self.model.norm(x)

    def decode_mtp(self, depth: int, hidden: Tensor, next_tokens: Tensor, cache: LatentCache) -> Tensor:
        """States of MTP module `depth` (1, 2, …) for new positions: hidden [B, T, D] of the depth before, and
        next_tokens [B, T], the tokens `depth` ahead of them. → [B, T, D]."""
        positions = self._positions_after(cache, next_tokens.shape[1])
        return self.mtp_layers[depth - 1].decode(hidden, self.embed(next_tokens), positions, cache)

    def new_caches(self, batch: int, max_length: int) -> list[LatentCache]:
        """Empty caches of every layer, those of the MTP modules last."""
        return [LatentCache(batch, max_length, self.config, self.compute_dtype, self.device) for _ in self.model.layers]

    def _positions_after(self, cache: LatentCache, new: int) -> Rotation:
        return rotation(self.config, torch.arange(cache.length, cache.length + new, device=cache.entries.device))

    def _labels(self, tokens: Tensor, documents: Tensor) -> list[Tensor]:
        """[B·T] targets of the main head and of each MTP depth."""
        depths = self.config.num_nextn_predict_layers
        return [targets_at(tokens, documents, k, depths, self.mask_documents).flatten() for k in range(1 + depths)]

    def _sum_losses(self, hidden: list[Tensor], labels: list[Tensor], coefficients: Tensor | None) -> Tensor:
        """[1 + D_mtp] summed cross-entropy of each head."""
        head = self.lm_head.weight
        if coefficients is not None:
            return heads_cross_entropy(hidden, head, labels, coefficients)
        return torch.stack([linear_cross_entropy(h, head, y) for h, y in zip(hidden, labels)])

    def _stack_counts(self, stats: list[LayerStats], tokens: Tensor) -> Tensor:
        counts = [s.expert_counts for s in stats]
        return torch.stack(counts) if counts else tokens.new_zeros(0, self.config.n_routed_experts)


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
