"""Attention by kernels that read queries, keys and values as whole tensors: one kernel assembles these, another attends.

    q [B, Tq, H, nope + rope], kv [B, Tk, H, nope + v], k_rope [B, Tk, rope]
      → q [B, Tq, H, nope + rope] and k [B, Tk, H, nope + rope] rotated, v a view of kv, or padded with zeros for a kernel that
        wants equal head sizes
      → `attend` → [B, Tq, H, v]

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
from model.ops.attention.reference import visible
from model.ops.operation import operation
from model.rope import Rotation, rotate

Attend = Callable[
    [Tensor, Tensor, Tensor, float, Tensor | None], Tensor
]  # q [B, Tq, H, …], k, v [B, Tk, H, …], scale, starts → [B, Tq, H, v]


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
    """Rotated queries [B, Tq, H, nope + rope] and keys [B, Tk, H, nope + rope], and values [B, Tk, H, width], padded with zeros;
    if width is 0, as they lie in kv. Args as of `AttentionBackend`."""
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
    *of_keys, _ = kv.shape
    return q.new_empty(q.shape), q.new_empty(*of_keys, q.shape[-1]), q.new_empty(*of_keys, width)


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
    return queries, keys, F.pad(values, (0, width - values.shape[-1])) if width else q.new_empty(*kv.shape[:-1], 0)


def _empty_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rope: int, v: int
) -> tuple[Tensor, ...]:
    *tokens, heads, width = dk.shape
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
    nope = dq.shape[-1] - rope
    shared = rotate(dk[..., nope:].float().sum(2), back).to(dq.dtype)
    queries = torch.cat((dq[..., :nope], rotate(dq[..., nope:], reference.of_queries(back, dq.shape[1]))), dim=-1)
    return queries, torch.cat((dk[..., :nope], dv[..., :v]), dim=-1), shared


def sdpa(
    kernel: SDPBackend | list[SDPBackend], q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None
) -> Tensor:
    """`Attend` by one of PyTorch's kernels. Documents are a mask of Tq × Tk, which `FLASH_ATTENTION` refuses.

    SDPA's own causal mask is that of queries at the first positions, but some of its kernels have one of queries at the last.

    Raises:
        ValueError: fewer queries than keys and no documents, by `CUDNN_ATTENTION`, which has none: each layer would keep a mask.
    """
    if starts is None and q.shape[1] < k.shape[1]:
        if kernel == SDPBackend.CUDNN_ATTENTION:
            raise ValueError("it aligns queries with the first keys")
        if isinstance(kernel, SDPBackend) and kernel in OF_LAST:
            return OF_LAST[kernel](q, k, v, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = mask_of(starts, q, k)
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def flash_of_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`FLASH_ATTENTION` of queries at the last positions: what PyTorch calls for `torch.nn.attention.bias.causal_lower_right`,
    which the compiler does not take."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2)


def efficient_of_last(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same of `EFFICIENT_ATTENTION`."""
    no_lengths = dict.fromkeys(("bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    out, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, **no_lengths, dropout_p=0.0, custom_mask_type=2, compute_log_sumexp=True, scale=scale
    )
    return out


OF_LAST = {SDPBackend.FLASH_ATTENTION: flash_of_last, SDPBackend.EFFICIENT_ATTENTION: efficient_of_last}


def mask_of(starts: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What SDPA takes for a mask; None where its own causal one is right. q: [B, H, Tq, …], k: [B, H, Tk, …]."""
    queries, keys = q.shape[2], k.shape[2]
    if starts is not None:
        return additive_mask(starts, keys, q.dtype)
    return None if queries == keys else visible(None, queries, keys, q.device)


@once_per_batch
def additive_mask(starts: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, Tq, Tk] of 0 and −inf, which all layers share."""
    seen = visible(starts, starts.shape[1], keys, starts.device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
