"""RMSNorm, x / √(mean(x²) + eps) · w, keeping x in its own dtype and one number a row for the backward pass.

Whatever x is, sums and products are in fp32: no copy of x in fp32 exists but in registers, where there is a kernel.
"""

from ctypes import c_float
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import cpu
from model.ops.operation import operation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · w over the last dimension, in fp32. x [..., D], weight [D] fp32 → [..., D] in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by PyTorch's operation and its autograd."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return *_rms_norm_backward(grad, *ctx.saved_tensors), None


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operation(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (_contiguous_like(x), weight.new_empty(x.shape[:-1])),
)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and 1/rms of each."""
    rows = _rows(x)
    if x.is_cuda:
        from model.ops.triton import rms_norm as kernels

        normed, inverse = kernels.rms_norm(rows, weight, eps)
        return normed.view(x.shape), inverse.view(x.shape[:-1])
    if cpu.takes(x, weight) and (library := cpu.library("rms_norm")):
        normed, inverse = _contiguous_like(x), weight.new_empty(x.shape[:-1])
        library.rms_norm(
            *cpu.numbers(*rows.shape, rows.stride(0)),
            c_float(eps),
            *map(cpu.address, (rows, weight, normed, inverse)),
            cpu.threads(),
        )
        return normed, inverse
    wide = x.float()
    inverse = (wide.square().mean(-1) + eps).rsqrt_()
    return (wide * inverse.unsqueeze(-1)).mul_(weight).to(x.dtype), inverse


@operation(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
    lambda grad, x, weight, inverse: (_contiguous_like(x), torch.empty_like(weight)),
)
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """With n = x/rms and g the gradient of n:  ∂x = (g − n · mean(g · n)) / rms."""
    rows, grad = _rows(x), grad.contiguous()
    if x.is_cuda:
        from model.ops.triton import rms_norm as kernels

        d_rows, d_weight = kernels.rms_norm_backward(grad, rows, weight, inverse)
        return d_rows.view(x.shape), d_weight
    if cpu.takes(grad, x, weight) and (library := cpu.library("rms_norm")):
        dx, d_weight = _contiguous_like(x), torch.empty_like(weight)
        library.rms_norm_backward(
            *cpu.numbers(*rows.shape, rows.stride(0)),
            *map(cpu.address, (rows, weight, inverse, grad, dx, d_weight)),
            cpu.threads(),
        )
        return dx, d_weight
    inverse, grad = inverse.unsqueeze(-1), grad.float()  # [..., 1]
    n = x.float() * inverse
    g = grad * weight
    mean = torch.linalg.vecdot(g, n).unsqueeze(-1) / x.shape[-1]  # [..., 1]
    return g.addcmul_(n, mean, value=-1).mul_(inverse).to(x.dtype), (grad * n).flatten(0, -2).sum(0)


def _rows(x: Tensor) -> Tensor:
    """[..., D] → [N, D] without a copy where rows lie at equal distances, each of them whole."""
    return cpu.unit_stride(x.flatten(0, -2))
