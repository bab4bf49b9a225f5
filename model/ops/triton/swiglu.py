# mypy: disallow-untyped-defs=False
"""SwiGLU between two products, in Triton: what goes in is read once, what comes out written once, fp32 in between.

    p = w g σ(g) u            dg = dp w u σ(g) (1 + g (1 − σ(g))),   du = dp w g σ(g),   dw = Σ dp g σ(g) u, in a fixed order

A program takes one row. Rows of gate and up may lie apart, as halves of one matrix do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a row at once; a thread has eight side by side


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """w · silu(gate) · up; [M, F], weights [M] or 1."""
    gate, up = unit_stride(gate), unit_stride(up)
    m, f = gate.shape
    product = gate.new_empty(m, f)
    if m:
        _swiglu[(m,)](gate, up, weights, product, f, gate.stride(0), up.stride(0), **block(f))
    return product


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up as one [M, 2F], the product again [M, F], the gradient of the weights [M], or [0]."""
    grad, gate, up = unit_stride(grad), unit_stride(gate), unit_stride(up)
    m, f = gate.shape
    d_gate_up, product = gate.new_empty(m, 2 * f), gate.new_empty(m, f)
    d_weights = gate.new_empty(0 if weights is None else m, dtype=torch.float32)
    if m:
        _swiglu_backward[(m,)](
            grad, gate, up, weights, d_gate_up, product, d_weights,
            f, grad.stride(0), gate.stride(0), up.stride(0), **block(f),
        )  # fmt: skip
    return d_gate_up, product, d_weights


def unit_stride(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block(width: int) -> dict[str, int]:
    """How a program goes along a row."""
    size = min(BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": size, "num_warps": max(size // 256, 1)}


@triton.jit
def _swiglu(gate, up, weights, product, F, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    w = 1.0
    if weights is not None:
        w = tl.load(weights + row).to(tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g = tl.load(gate + row * gate_stride + column, column < F, 0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, column < F, 0.0).to(tl.float32)
        tl.store(
            product + row * F + column,
            (g * (1.0 / (1.0 + tl.exp(-g))) * u * w).to(product.dtype.element_ty),
            column < F,
        )


@triton.jit
def _swiglu_backward(
    grad, gate, up, weights, d_gate_up, product, d_weights, F, grad_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = 1.0
    if weights is not None:
        w = tl.load(weights + row).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        d = tl.load(grad + row * grad_stride + column, column < F, 0.0).to(tl.float32)
        g = tl.load(gate + row * gate_stride + column, column < F, 0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, column < F, 0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-g))
        silu = g * s
        dw += d * silu * u
        d_gate = d * w * u * s * (1.0 + g * (1.0 - s))
        to = d_gate_up + row * 2 * F + column
        tl.store(to, d_gate.to(d_gate_up.dtype.element_ty), column < F)
        tl.store(to + F, (d * w * silu).to(d_gate_up.dtype.element_ty), column < F)
        tl.store(product + row * F + column, (silu * u * w).to(product.dtype.element_ty), column < F)
    if weights is not None:
        tl.store(d_weights + row, tl.sum(dw))
