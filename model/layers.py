"""The small parts that every block is made of: linear map, RMSNorm, SwiGLU.

Parameters stay in the dtype they are stored in (fp32 master weights); each layer computes in the dtype of its input, so that the
dtype in which the embedding hands out its rows decides for the whole model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.fp8.arithmetic import Fp8
from model.ops.rms_norm import rms_norm
from model.ops.swiglu import swiglu_linear
from model.ops.weight_gradient import leaf_of, weight_gradient


class Linear(nn.Linear):
    """y = x Wᵀ without a bias, in x's dtype; its products in FP8 where `fp8` is set."""

    fp8: Fp8 | None = None
    splits_backward = False  # its weight's gradient can be put aside; in FP8 it always can

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            return self.fp8.linear(x, self.weight)[0]
        weight = self.weight.to(x.dtype)
        if self.splits_backward:
            return _SplitLinear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return F.linear(x, weight)


def split_backward(model: nn.Module) -> None:
    """Let the backward pass of every linear map put its weight's gradient aside where somebody asks for it."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.splits_backward = True


class _SplitLinear(torch.autograd.Function):
    """F.linear, [N, in] → [N, out], by the same products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf_of(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, weight_gradient(ctx.leaf, lambda grad, x: grad.T @ x, grad, x)


def read_by(x: Tensor, *maps: Linear) -> tuple[Tensor, ...]:
    """The outputs of several linear maps of the same x, which FP8 then quantises and keeps once."""
    first, *others = (m.fp8 for m in maps)
    if first:
        return first.linear(x, *(m.weight for m in maps), others=[fp8 for fp8 in others if fp8])
    return tuple(m(x) for m in maps)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · w, normalised in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.float(), self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). [..., D] → [..., D]."""

    fp8: Fp8 | None = None

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            return self.fp8.feed_forward(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return swiglu_linear(self.gate_proj(x), self.up_proj(x), self.down_proj.weight.to(x.dtype))
