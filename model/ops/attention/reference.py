"""Attention as the equation says, in plain PyTorch."""

import torch
from torch import Tensor

from model.rope import Rotation, rotate


def reference_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None = None
) -> Tensor:
    """`AttentionBackend` by way of all Tq × Tk scores, in fp32 inside the softmax."""
    q, k, v = assemble(q, kv, k_rope, rotation)
    scores = (q @ k.transpose(-1, -2)).float() * scale  # [B, H, Tq, Tk]
    seen = visible(starts, q.shape[2], k.shape[2], q.device)
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
    return (p @ v).transpose(1, 2)  # [B, Tq, H, v]


def assemble(q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, Tq, nope + rope] and keys [B, H, Tk, nope + rope], rotated, and values [B, H, Tk, v]. In memory tokens
    come before heads.

    Args as of `AttentionBackend`.
    """
    rope = k_rope.shape[-1]
    nope = q.shape[-1] - rope
    q_nope, q_rope = q.split((nope, rope), dim=-1)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    turned = rotate(k_rope, rotation).unsqueeze(2).expand(-1, -1, q.shape[2], -1)  # [B, Tk, H, rope]
    q = torch.cat((q_nope, rotate(q_rope, of_queries(rotation, q.shape[1]))), dim=-1)
    k = torch.cat((k_nope, turned), dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def of_queries(rotation: Rotation, queries: int) -> Rotation:
    """The last positions' angles, the same for every head: [Tk, rope/2] → [Tq, 1, rope/2]."""
    return Rotation(*(part[len(part) - queries :].unsqueeze(-2) for part in rotation))


def visible(starts: Tensor | None, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Which keys a query sees: [B, 1, Tq, Tk] bool, [Tq, Tk] without starts."""
    positions = torch.arange(keys, device=device)
    causal = positions <= positions[keys - queries :].unsqueeze(1)
    return causal if starts is None else causal & (positions >= starts[:, None, :, None])
