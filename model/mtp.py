"""Multi-token prediction, DeepSeek-V3 §2.2, Eqs. 21–25.

Module k predicts token t_{i+k+1} at position i from the state of the depth before and the embedding of t_{i+k}:

    h'^k_i = M_k [norm(Emb(t_{i+k})) ; norm(h^{k-1}_i)]        (the released weights have the embedding first)
    h^k    = norm(TRM_k(h'^k))                                 (one full MoE block with its own gate and bias)
    p^k    = OutHead(h^k)

Embedding and output head are the main model's. h^0 is the main model's state after its final norm, and each depth hands on its own
normed state, as vLLM, Megatron-LM and transformers do.
"""

import torch
from torch import Tensor, nn

from model.attention import LatentCache
from model.block import Block
from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from model.moe import LayerStats
from model.ops.attention import AttentionBackend
from model.ops.experts import ExpertsBackend
from model.rope import Rotation


class MTPBlock(Block):
    """One prediction depth: a block with its entry (`enorm`, `hnorm`, `eh_proj`) and its own final norm."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionBackend, experts: ExpertsBackend):
        super().__init__(config, layer, attention, experts)
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = Linear(2 * dim, dim)
        self.shared_head = SharedHead(dim, eps)

    def forward(  # type: ignore[override]  # a block with a second input
        self, hidden: Tensor, embedding: Tensor, rotation: Rotation, starts: Tensor | None
    ) -> tuple[Tensor, LayerStats | None]:
        """States of the depth before [B, T, D], embeddings k tokens ahead [B, T, D] → (h^k [B, T, D], stats)."""
        x, stats = super().forward(self._entry(hidden, embedding), rotation, starts)
        return self.shared_head.norm(x), stats

    def decode(  # type: ignore[override]
        self, hidden: Tensor, embedding: Tensor, rotation: Rotation, cache: LatentCache
    ) -> Tensor:
        """`forward` for new positions after those in the cache."""
        return self.shared_head.norm(super().decode(self._entry(hidden, embedding), rotation, cache))

    def _entry(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))


class SharedHead(nn.Module):
    """The norm before the shared output head; a module of its own because the checkpoint names it so."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = RMSNorm(dim, eps)
