"""Attention as the equation says, in plain PyTorch."""

import torch
from torch import Tensor

from model.rope import Rotation, rotate


def reference_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None = None
) -> Tensor:
    """`AttentionBackend` by way of all T × T scores, in fp32 inside the softmax."""
    q, k, v = assemble(q, kv, k_rope, rotation)
    scores = (q @ k.transpose(-1, -2)).float() * scale  # [B, H, T, T]
    p = scores.masked_fill(~visible(starts, q), float("-inf")).softmax(-1).to(v.dtype)
    return (p @ v).transpose(1, 2)  # [B, T, H, v]


def assemble(q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, T, nope + rope], rotated, and values [B, H, T, v]. In memory tokens come before heads.

    Args as of `AttentionBackend`.
    """
    rope = k_rope.shape[-1]
    nope = q.shape[-1] - rope
    q_nope, q_rope = q.split((nope, rope), dim=-1)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    of_all = Rotation(*(part.unsqueeze(-2) for part in rotation))  # [T, 1, rope/2]: the same for every head
    turned = rotate(k_rope, rotation).unsqueeze(2).expand(-1, -1, q.shape[2], -1)  # [B, T, H, rope]
    q = torch.cat((q_nope, rotate(q_rope, of_all)), dim=-1)
    k = torch.cat((k_nope, turned), dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def visible(starts: Tensor | None, q: Tensor) -> Tensor:
    """Which keys a query sees: [B, 1, T, T] bool, [T, T] without starts. q: [B, H, T, …]."""
    positions = torch.arange(q.shape[2], device=q.device)
    causal = positions <= positions.unsqueeze(1)
    return causal if starts is None else causal & (positions >= starts[:, None, :, None])
