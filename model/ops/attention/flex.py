"""Attention by `flex_attention`: a kernel that PyTorch compiles for the mask, and that skips blocks in which nothing is seen.

A query block of 128 sees the key blocks from the one where its first query's document begins to its own. Those that all its
queries see wholly need no mask:

    first seen = starts[first query] // 128,      first wholly seen = ⌈starts[last query] / 128⌉,      own block: never wholly

since starts never fall within a sequence. So blocks are known from a few numbers, without a mask of T × T, and without the host.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from model.ops.attention.once import once_per_batch

BLOCK = 128
_causal: dict[tuple[int, torch.device], Any] = {}  # masks, by length


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    """`Attend`. It is compiled by itself where the model is not, unseen by what watches operations: the compiler stops at such."""
    mask = causal_blocks(q.shape[1], q.device) if starts is None else document_blocks(starts, BLOCK)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if torch.compiler.is_compiling():
        return attend(q, k, v, mask, scale).transpose(1, 2)
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        attend_compiled = compiled(q.shape, v.shape, starts is None, torch.is_grad_enabled())
        return attend_compiled(q, k, v, mask, scale).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Tensor = flex_attention(q, k, v, block_mask=mask, scale=scale)
    return out


@cache
def compiled(*key: Any) -> Any:
    """`attend` for one case alone, or an error: not compiled, it would hold all T × T scores.

    The compiler counts how often it compiles the code of a function, and refuses the ninth time. So each case has a copy of it.
    """
    copied = FunctionType(attend.__code__.replace(), globals(), "attend")
    return torch.compile(copied, dynamic=False, fullgraph=True)


def causal_blocks(length: int, device: torch.device) -> Any:
    """The `BlockMask` of causal attention, which all sequences, heads and layers share."""
    key = (length, device)
    if torch.compiler.is_compiling() or key not in _causal:
        starts = torch.zeros(1, length, dtype=torch.int32, device=device)
        made = make_blocks(starts, BLOCK, lambda b, h, q, k: k <= q)
        if torch.compiler.is_compiling():
            return made
        _causal[key] = made
    return _causal[key]


@once_per_batch
def document_blocks(starts: Tensor, block: int) -> Any:
    """The same inside documents, starts [B, T]; all heads share it."""
    return make_blocks(starts, block, lambda b, h, q, k: (k <= q) & (k >= starts[b, q]))


def make_blocks(starts: Tensor, block: int, is_seen_by: Callable[..., Tensor]) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    length = starts.shape[1]
    first = torch.arange(0, length, block, device=starts.device)  # position where each block begins
    last = (first + block - 1).clamp_max(length - 1)
    row, column = first.unsqueeze(1), first  # [n, 1] blocks of queries, [n] blocks of keys
    is_seen = (column + block > starts[:, first].unsqueeze(-1)) & (column <= row)  # [B, n, n]
    is_whole = (column >= starts[:, last].unsqueeze(-1)) & (column < row)
    return BlockMask.from_kv_blocks(
        *listed(is_seen & ~is_whole),
        *listed(is_whole),
        BLOCK_SIZE=block,
        mask_mod=is_seen_by,
        seq_lengths=(length, length),
    )


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first. [B, n, n] bool → [B, 1, n], [B, 1, n, n] int32."""
    which = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1)
