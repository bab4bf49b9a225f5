"""Rotary position embedding on interleaved pairs (x0, x1), (x2, x3), … as in DeepSeek's released weights, and YaRN.

    pair j at position t turns by t · θ_j,      θ_j = rope_theta^(−2j/d)

YaRN (arXiv 2309.00071) lets a model see `factor` times its original context: frequencies that turn fewer than `beta_slow` times
over the original context are divided by `factor`, those that turn more than `beta_fast` times are kept, and a ramp joins the two.
It acts only in a model whose `max_position_embeddings` exceeds the original context; pretraining at the original length is plain
RoPE (DeepSeek-V3 §4.3).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig, YarnScaling


class Rotation(NamedTuple):
    """Angles of every position, as cosines and sines. Both [..., T, rope/2] fp32."""

    cos: Tensor
    sin: Tensor


def rotation(config: ModelConfig, positions: Tensor) -> Rotation:
    """The rotation of each position. positions: [..., T] integers."""
    angle = positions.unsqueeze(-1).float() * frequencies(config, positions.device)  # [..., T, rope/2]
    scale = _cos_sin_scale(config.yarn)
    return Rotation(angle.cos() * scale, angle.sin() * scale)


def rotate(x: Tensor, r: Rotation) -> Tensor:
    """Turn each pair of x by its position's angle; in fp32, returned in x's dtype. x: [..., T, rope]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., T, rope/2]
    turned = torch.stack((even * r.cos - odd * r.sin, odd * r.cos + even * r.sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """θ_j of each pair, [rope/2] fp32."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=device) - first
    divided = (steps / max(last - first, 1e-3)).clamp(0, 1)  # 0 keeps a frequency, 1 divides it
    return plain * (1 - divided) + plain / yarn.factor * divided


def softmax_scale(config: ModelConfig) -> float:
    """1/√d_qk, sharpened under YaRN by (0.1 · mscale_all_dim · ln(factor) + 1)²."""
    scale = config.qk_head_dim**-0.5
    yarn = config.yarn
    return scale if yarn is None else scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def _cos_sin_scale(yarn: YarnScaling | None) -> float:
    """1 wherever mscale equals mscale_all_dim, as in DeepSeek-V3."""
    return 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
