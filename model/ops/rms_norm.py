"""RMSNorm, x / √(mean(x²) + eps) · w, keeping x and one number a row for the backward pass.

On a GPU PyTorch has a fused kernel that keeps no more than that. On a CPU it composes the norm of elementwise operations, and
autograd keeps the normalised x as well; there an autograd function takes its place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · w over the last dimension. x [..., D], weight [D], the same dtype → [..., D]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference_rms_norm` with the least kept for the backward pass."""
    return _RMSNorm.apply(x, weight, eps) if x.device.type == "cpu" else reference_rms_norm(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x/rms and g the gradient of n:  ∂x = (g − n · mean(g · n)) / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        n = x * inverse
        d_weight = (grad * n).flatten(0, -2).sum(0)
        g = grad * weight
        mean = torch.linalg.vecdot(g, n).unsqueeze(-1) / x.shape[-1]  # [..., 1]
        return g.addcmul_(n, mean, value=-1).mul_(inverse), d_weight, None
