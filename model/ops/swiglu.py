"""SwiGLU's product, w · silu(gate) · up, of which nothing is kept but its two factors: the backward pass makes it again.

Autograd would keep silu(gate) and the product too, beside gate and up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import cpu
from model.ops.operation import operation
from model.ops.weight_gradient import leaf_of, weight_gradient


def swiglu(gate: Tensor, up: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """w · silu(gate) · up.

    Args:
        gate, up: [..., F] each, or both as one [..., 2F], gate first.
        weights: [...] fp32, how much each row counts; 1 where there are none.

    Returns:
        [..., F].
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    flat = (gate.flatten(0, -2), up.flatten(0, -2), None if weights is None else weights.flatten())
    return _SwiGLU.apply(*flat).view(gate.shape)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) · up) Wᵀ: gate, up [..., F], weight [D, F] → [..., D]."""
    return _SwiGLULinear.apply(gate.flatten(0, -2), up.flatten(0, -2), weight).unflatten(0, gate.shape[:-1])


def reference_swiglu(gate: Tensor, up: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """`swiglu`."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if weights is None else (product * weights.unsqueeze(-1)).to(product.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        return multiply(gate, up, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        gate, up, weights = ctx.saved_tensors
        d_gate_up, _, d_weights = multiply_backward(grad, gate, up, weights)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        return d_gate, d_up, None if weights is None else d_weights


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.leaf = leaf_of(weight)
        return multiply(gate, up, None) @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        gate, up, weight = ctx.saved_tensors
        d_gate_up, product, _ = multiply_backward(grad @ weight, gate, up, None)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        return d_gate, d_up, weight_gradient(ctx.leaf, lambda grad, product: grad.T @ product, grad, product)


@operation(
    "swiglu(Tensor gate, Tensor up, Tensor? weights) -> Tensor",
    lambda gate, up, weights: gate.new_empty(gate.shape),
)
def multiply(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """`swiglu` without a derivative, of rows [M, F] that may lie apart."""
    if gate.is_cuda:
        from model.ops.triton import swiglu as kernels

        return kernels.swiglu(gate, up, weights)
    library = cpu.library("swiglu") if cpu.takes(gate, up, weights) else None
    if library is None:
        return reference_swiglu(gate, up, weights)
    gate, up = cpu.unit_stride(gate), cpu.unit_stride(up)
    assert weights is None or weights.is_contiguous()
    product = gate.new_empty(gate.shape)
    library.swiglu(
        *cpu.numbers(*gate.shape),
        *cpu.rows(gate),
        *cpu.rows(up),
        cpu.address(weights),
        cpu.address(product),
        cpu.threads(),
    )
    return product


@operation(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, Tensor? weights) -> (Tensor, Tensor, Tensor)",
    lambda grad, gate, up, weights: (
        gate.new_empty(len(gate), 2 * gate.shape[1]),
        gate.new_empty(gate.shape),
        gate.new_empty(0 if weights is None else len(gate), dtype=torch.float32),
    ),
)
def multiply_backward(grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of `multiply`: those of gate and up as one [M, 2F], what it gave [M, F], that of weights [M], or [0]."""
    if gate.is_cuda:
        from model.ops.triton import swiglu as kernels

        return kernels.swiglu_backward(grad, gate, up, weights)
    library = cpu.library("swiglu") if cpu.takes(grad, gate, up, weights) else None
    if library is None:
        return _reference_backward(grad, gate, up, weights)
    grad, gate, up = cpu.unit_stride(grad), cpu.unit_stride(gate), cpu.unit_stride(up)
    assert weights is None or weights.is_contiguous()
    m, f = gate.shape
    d_gate_up, product = gate.new_empty(m, 2 * f), gate.new_empty(m, f)
    d_weights = gate.new_empty(0 if weights is None else m)
    library.swiglu_backward(
        *cpu.numbers(*gate.shape), *cpu.rows(grad), *cpu.rows(gate), *cpu.rows(up), cpu.address(weights),
        cpu.address(d_gate_up), cpu.address(product), cpu.address(None if weights is None else d_weights), cpu.threads(),
    )  # fmt: skip
    return d_gate_up, product, d_weights


def _reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    silu = F.silu(gate)
    product = silu * up
    if weights is None:
        d_weights, weighted = grad.new_empty(0, dtype=torch.float32), product
    else:
        d_weights = (grad * product).to(weights.dtype).sum(-1)
        grad, weighted = ((t * weights.unsqueeze(-1)).to(gate.dtype) for t in (grad, product))
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([d_gate, silu.mul_(grad)], dim=-1), weighted, d_weights
