"""Multi-head latent attention (MLA), DeepSeek-V3 §2.1.1, Eqs. 1–11.

    c_Q  = norm(W_DQ x)                   q_C, q_R = W_UQ c_Q,   RoPE on q_R          (q_lora_rank; else straight from x)
    c_KV, k_R = W_DKV x                   k_C, v   = W_UK/UV norm(c_KV),   RoPE on k_R, which all heads share
    o = softmax([q_C ; q_R] · [k_C ; k_R] / √d) v,      y = W_O o

Training expands the latent into keys and values of every head. Decoding keeps only the latent and the rotary key, R + rope numbers
a token (576 at V3's size), and moves W_UK to the query's side and W_UV behind the softmax ("absorbed", V2 §2.1.2).
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import WHOLE, Context
from model.layers import Linear, RMSNorm, read_by
from model.ops.attention import AttentionBackend
from model.rope import Rotation, rotate, softmax_scale


class LatentCache:
    """What one layer remembers of the tokens it has seen: [B, length, R + rope]."""

    def __init__(self, batch: int, max_length: int, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.entries = torch.empty(batch, max_length, width, dtype=dtype, device=device)
        self.length = 0

    def append(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """Add T new tokens, [B, T, R] and [B, T, rope]; returns all entries so far, [B, length, R + rope]."""
        end = self.length + latent.shape[1]
        self.entries[:, self.length : end] = torch.cat((latent, k_rope), dim=-1)
        self.length = end
        return self.entries[:, :end]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)


class MultiHeadLatentAttention(nn.Module):
    """MLA over a sequence (`forward`) or over new tokens and a cache (`decode`)."""

    context: Context = WHOLE

    def __init__(self, config: ModelConfig, backend: AttentionBackend):
        super().__init__()
        c = config
        self.heads, self.rank = c.num_attention_heads, c.kv_lora_rank
        self.nope, self.rope, self.v_dim = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.scale = softmax_scale(c)
        self.backend = backend
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, self.heads * c.qk_head_dim)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = Linear(c.q_lora_rank, self.heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = Linear(self.rank, self.heads * (self.nope + self.v_dim))
        self.o_proj = Linear(self.heads * self.v_dim, c.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, starts: Tensor | None) -> Tensor:
        """x [B', L, D], rotation of the T positions, starts [B, T] of their documents or None for one → [B', L, D].

        B' = B and L = T unless others compute the rest of the sequences (`model.context`).
        """
        q, latent, k_rope = self._project(x)
        latent, k_rope = self.context.gather(latent, k_rope)  # [B, T, R], [B, T, rope]
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))  # [B, T, H, nope + v]
        attention = self.context.attention(self.backend)
        out = attention(q, kv, k_rope, rotation, self.scale, starts)  # [B', L, H, v]
        return self.o_proj(out.flatten(-2))

    def decode(self, x: Tensor, rotation: Rotation, cache: LatentCache) -> Tensor:
        """`forward` for T new tokens after those in the cache, in the latent space. [B, T, D] → [B, T, D]."""
        q, latent, k_rope = self._project(x)
        q_nope, q_rope = q.transpose(1, 2).split((self.nope, self.rope), dim=-1)  # [B, H, T, nope], [B, H, T, rope]
        entries = cache.append(latent, rotate(k_rope, rotation)).unsqueeze(
            1
        )  # [B, 1, L, R + rope], one key head for all
        up = self.kv_b_proj.weight.to(x.dtype).unflatten(0, (self.heads, -1))  # [H, nope + v, R]
        w_uk, w_uv = up.split((self.nope, self.v_dim), dim=1)
        q = torch.cat((q_nope @ w_uk, rotate(q_rope, rotation)), dim=-1)  # [B, H, T, R + rope]
        scores = (q @ entries.transpose(-1, -2)).float() * self.scale  # [B, H, T, L]
        new, seen = scores.shape[-2:]
        visible = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(x.dtype)
        out = p @ entries[..., : self.rank] @ w_uv.transpose(-1, -2)  # [B, H, T, v]
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, nope + rope], the latent [B, T, R], the rotary key [B, T, rope]; neither is rotated yet."""
        if hasattr(self, "q_proj"):
            q, kv = read_by(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q, kv = read_by(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q))
        latent, k_rope = kv.split((self.rank, self.rope), dim=-1)
        return q.unflatten(-1, (self.heads, -1)), self.kv_a_layernorm(latent), k_rope
