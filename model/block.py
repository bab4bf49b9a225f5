"""One pre-norm transformer block: x + MLA(norm(x)), then x + FFN(norm(x)), the FFN dense in the first layers and MoE after."""

from torch import Tensor, nn

from model.attention import LatentCache, MultiHeadLatentAttention
from model.config import ModelConfig
from model.layers import MLP, RMSNorm
from model.moe import LayerStats, MoE
from model.ops.attention import AttentionBackend
from model.ops.experts import ExpertsBackend
from model.rope import Rotation


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, attention: AttentionBackend, experts: ExpertsBackend):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = MultiHeadLatentAttention(config, attention)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp = MoE(config, experts) if config.is_moe(layer) else MLP(dim, config.intermediate_size)

    def forward(self, x: Tensor, rotation: Rotation, starts: Tensor | None) -> tuple[Tensor, LayerStats | None]:
        """x [B, T, D], rotation of its T positions, starts [B, T] of their documents or None for one → ([B, T, D], MoE stats)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, starts)
        return self._feed_forward(x)

    def decode(self, x: Tensor, rotation: Rotation, cache: LatentCache) -> Tensor:
        """`forward` for new tokens after those in the cache. [B, T, D] → [B, T, D]."""
        x = x + self.self_attn.decode(self.input_layernorm(x), rotation, cache)
        return self._feed_forward(x)[0]

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, LayerStats | None]:
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(normed)
            return x + y, stats
        return x + self.mlp(normed), None
