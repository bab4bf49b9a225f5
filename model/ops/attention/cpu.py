"""Attention on a CPU in fp32, by a kernel in C++ (`model/ops/cpu/attention.cpp`), forward and backward.

It reads queries, keys and values as the linear maps wrote them, and rotates them on the way. For the backward pass it keeps these
outputs of linear maps, its own output and one number a query and head; PyTorch's kernel wants assembled queries and keys and
padded values beside them.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from model.ops import cpu
from model.ops.attention.sdpa import sdpa_attention
from model.ops.operation import operation
from model.rope import Rotation


def fused_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None = None
) -> Tensor:
    """`AttentionBackend` by the kernel where there is one: in fp32 on a CPU; elsewhere by PyTorch's."""
    if not cpu.takes(q, kv, k_rope):
        return sdpa_attention(q, kv, k_rope, rotation, scale, starts)
    out: Tensor = _Attention.apply(q, kv, k_rope, *rotation, scale, starts)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> Tensor:
        out, lse = attention(q, kv, k_rope, cos, sin, *options)
        scale, starts = options
        ctx.save_for_backward(q, kv, k_rope, cos, sin, starts, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, starts, out, lse = ctx.saved_tensors
        return *attention_backward(*inputs, ctx.scale, starts, out, lse, d_out), None, None, None, None


def _shape(q: Tensor, kv: Tensor, k_rope: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, h, width = q.shape
    return q.new_empty(b, t, h, kv.shape[-1] - width + k_rope.shape[-1]), q.new_empty(b, h, t, dtype=torch.float32)


def _shapes_of_gradients(q: Tensor, kv: Tensor, k_rope: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_rope.new_empty(k_rope.shape)


@operation(
    "attention(Tensor q, Tensor kv, Tensor k_rope, Tensor cos, Tensor sin, float scale, Tensor? starts)"
    " -> (Tensor, Tensor)",
    _shape,
)
def attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, Tq, H, v] and log-sum-exp of the scores [B, H, Tq]; arguments as of `AttentionBackend`."""
    out, lse = _shape(q, kv, k_rope)
    kernels = cpu.library("attention")
    if kernels is None:
        return sdpa_attention(q, kv, k_rope, Rotation(cos, sin), scale, starts).contiguous(), lse.zero_()
    inputs = _readable(q, kv, k_rope, cos, sin, starts)
    kernels.attention(
        _shape_of(inputs, out), *map(cpu.address, inputs), ctypes.c_float(scale), cpu.address(out), cpu.address(lse),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return out, lse


@operation(
    "attention_backward(Tensor q, Tensor kv, Tensor k_rope, Tensor cos, Tensor sin, float scale, Tensor? starts,"
    " Tensor out, Tensor lse, Tensor d_out) -> (Tensor, Tensor, Tensor)",
    _shapes_of_gradients,
)
def attention_backward(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, starts: Tensor | None,
    out: Tensor, lse: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope, each contiguous."""
    kernels = cpu.library("attention")
    if kernels is None:
        return _backward_of_sdpa((q, kv, k_rope), Rotation(cos, sin), scale, starts, d_out)
    gradients = _shapes_of_gradients(q, kv, k_rope)
    *inputs, d_out = _readable(q, kv, k_rope, cos, sin, starts, d_out)
    kernels.attention_backward(
        _shape_of(inputs, d_out), *map(cpu.address, inputs), ctypes.c_float(scale),
        *map(cpu.address, (out, lse, d_out, *gradients)), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return gradients


def _readable(*tensors: Tensor | None) -> list[Any]:
    """What the kernel reads with strides in all dimensions but the last; angles and starts as a whole."""
    q, kv, k_rope, cos, sin, starts, *others = tensors
    strided = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, kv, k_rope)]
    whole = [x if x is None else x.contiguous() for x in (cos, sin, starts)]
    return [*strided, *whole, *(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in others)]


def _shape_of(inputs: list[Any], out: Tensor) -> Any:
    """`Shape` of attention.cpp."""
    q, kv, k_rope, *_ = inputs
    rope, v = k_rope.shape[-1], out.shape[-1]
    numbers = (
        *q.shape[:2], *kv.shape[1:3], q.shape[-1] - rope, rope, v,
        *q.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2], *out.stride()[:3],
    )  # fmt: skip
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _backward_of_sdpa(
    inputs: tuple[Tensor, ...], rotation: Rotation, scale: float, starts: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, kv, k_rope = (x.detach().requires_grad_() for x in inputs)
        out = sdpa_attention(q, kv, k_rope, rotation, scale, starts)
    dq, dkv, dk_rope = torch.autograd.grad(out, (q, kv, k_rope), d_out)
    return dq, dkv, dk_rope
