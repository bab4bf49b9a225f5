"""SwiGLU's product, silu(gate) · up, keeping nothing for the backward pass but its two factors.

Autograd would keep silu(gate) too, beside gate, up and the product itself, which the next linear map needs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up. All [..., F]."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference_swiglu`, with silu(gate) computed again in the backward pass."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
