"""Attention by kernels that read queries, keys and values as whole tensors: one kernel assembles these, another attends.

    q [B, T, H, nope + rope], kv [B, T, H, nope + v], k_rope [B, T, rope]
      → q, k [B, T, H, nope + rope] rotated, v a view of kv, or padded with zeros for a kernel that wants equal head sizes
      → `attend` → [B, T, H, v]

Which of them suits a device and a shape is measured (`model.ops.attention.choose`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.ops.attention import reference
from model.ops.attention.once import once_per_batch
from model.ops.operation import operation
from model.rope import Rotation, rotate

Attend = Callable[
    [Tensor, Tensor, Tensor, float, Tensor | None], Tensor
]  # q, k, v [B, T, H, …], scale, starts → [B, T, H, v]


class Assembled:
    """An `AttentionBackend` of a kernel that takes assembled tensors.

    Args:
        attend: the kernel.
        pads: it wants values as wide as keys.
        is_kept: `parallel.recompute` sees its operation, and can keep what it gives out; None: the kernel says.
    """

    def __init__(self, attend: Attend, pads: bool = False, is_kept: bool | None = None):
        self.attend, self.pads, self._is_kept = attend, pads, is_kept

    def is_kept(self) -> bool:
        says = getattr(self.attend, "is_kept", lambda: True)
        return bool(says()) if self._is_kept is None else self._is_kept

    def __call__(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None = None
    ) -> Tensor:
        keys, values = q.shape[-1], kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
        width = keys if self.pads and values < keys else 0
        out = self.attend(*assemble(q, kv, k_rope, rotation, width), scale, starts)
        return out if out.shape[-1] == values else out.narrow(-1, 0, values)


def assemble(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, width: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys [B, T, H, nope + rope], and values [B, T, H, width], padded with zeros; if width is 0, as they lie
    in kv. Args as of `AttentionBackend`."""
    assembled: tuple[Tensor, Tensor, Tensor] = _Assemble.apply(q, kv, k_rope, *rotation, width)  # type: ignore[no-untyped-call]
    return assembled


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        nope = q.shape[-1] - k_rope.shape[-1]
        ctx.save_for_backward(cos, sin)
        ctx.rope, ctx.v = k_rope.shape[-1], kv.shape[-1] - nope
        queries, keys, values = assemble_operation(q, kv, k_rope, cos, sin, width)
        return queries, keys, values if width else kv.narrow(-1, nope, ctx.v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *assemble_backward_operation(*grads, *ctx.saved_tensors, ctx.rope, ctx.v), None, None, None


def _empty(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, width: int) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(*q.shape[:-1], width)


@operation(
    "assemble(Tensor q, Tensor kv, Tensor k_rope, Tensor cos, Tensor sin, int width) -> (Tensor, Tensor, Tensor)",
    _empty,
)
def assemble_operation(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values of that width; those of width 0 are nothing."""
    if q.is_cuda:
        from model.ops.triton.assemble import assemble

        return assemble(q, kv, k_rope, cos, sin, width)
    queries, keys, values = (x.transpose(1, 2) for x in reference.assemble(q, kv, k_rope, Rotation(cos, sin)))
    return queries, keys, F.pad(values, (0, width - values.shape[-1])) if width else q.new_empty(*q.shape[:-1], 0)


def _empty_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rope: int, v: int
) -> tuple[Tensor, ...]:
    *tokens, heads, width = dq.shape
    return dq.new_empty(dq.shape), dq.new_empty(*tokens, heads, width - rope + v), dq.new_empty(*tokens, rope)


@operation(
    "assemble_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, int rope, int v) -> (Tensor, Tensor, Tensor)",
    _empty_gradients,
)
def assemble_backward_operation(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rope: int, v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope; the latter summed over heads in fp32."""
    if dq.is_cuda:
        from model.ops.triton.assemble import assemble_backward

        return assemble_backward(dq, dk, dv, cos, sin, rope, v)
    back = Rotation(cos, -sin)
    of_all = Rotation(*(part.unsqueeze(-2) for part in back))  # [T, 1, rope/2]: the same for every head
    nope = dq.shape[-1] - rope
    shared = rotate(dk[..., nope:].float().sum(2), back).to(dq.dtype)
    queries = torch.cat((dq[..., :nope], rotate(dq[..., nope:], of_all)), dim=-1)
    return queries, torch.cat((dk[..., :nope], dv[..., :v]), dim=-1), shared


def sdpa(
    kernel: SDPBackend | list[SDPBackend], q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None
) -> Tensor:
    """`Attend` by one of PyTorch's kernels. Documents are a mask of T × T, which `FLASH_ATTENTION` refuses."""
    mask = None if starts is None else additive_mask(starts, q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


@once_per_batch
def additive_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] of 0 and −inf, which all layers share."""
    positions = torch.arange(starts.shape[1], device=starts.device)
    hidden = (positions > positions.unsqueeze(1)) | (positions < starts[:, None, :, None])
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
