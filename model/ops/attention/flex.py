"""Attention by `flex_attention`: a kernel that PyTorch compiles for the mask, and that skips blocks in which nothing is seen.

A query block of 128 sees the key blocks from the one where its first query's document begins to that of its last query. Those
that all its queries see wholly need no mask:

    seen:   starts[first query] // 128    to  position of the last query // 128
    wholly: ⌈starts[last query] / 128⌉    to  before (position of the first query + 1) // 128

since starts never fall within a sequence. So blocks are known from a few numbers, without a mask of Tq × Tk, and without the host.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from model.ops.attention.once import once_per_batch

BLOCK = 128
_causal: dict[tuple[int, int, torch.device], Any] = {}  # masks, by numbers of queries and keys


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    """`Attend`. It is compiled by itself where the model is not, unseen by what watches operations: the compiler stops at such."""
    queries, keys = q.shape[1], k.shape[1]
    mask = causal_blocks(queries, keys, q.device) if starts is None else document_blocks(starts, keys, BLOCK)
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
    """`attend` for one case alone, or an error: not compiled, it would hold all Tq × Tk scores.

    The compiler counts how often it compiles the code of a function, and refuses the ninth time. So each case has a copy of it.
    """
    copied = FunctionType(attend.__code__.replace(), globals(), "attend")
    return torch.compile(copied, dynamic=False, fullgraph=True)


def causal_blocks(queries: int, keys: int, device: torch.device) -> Any:
    """The `BlockMask` of causal attention, which all sequences, heads and layers share."""
    key = (queries, keys, device)
    if torch.compiler.is_compiling() or key not in _causal:
        starts, before = torch.zeros(1, queries, dtype=torch.int32, device=device), keys - queries
        made = make_blocks(starts, keys, BLOCK, lambda b, h, q, k: k <= q + before)
        if torch.compiler.is_compiling():
            return made
        _causal[key] = made
    return _causal[key]


@once_per_batch
def document_blocks(starts: Tensor, keys: int, block: int) -> Any:
    """The same inside documents, starts [B, Tq]; all heads share it."""
    before = keys - starts.shape[1]
    return make_blocks(starts, keys, block, lambda b, h, q, k: (k <= q + before) & (k >= starts[b, q]))


def make_blocks(starts: Tensor, keys: int, block: int, is_seen_by: Callable[..., Tensor]) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    queries = starts.shape[1]
    first = torch.arange(0, queries, block, device=starts.device)  # of each block of queries, n_q of them
    last = (first + block - 1).clamp_max(queries - 1)
    own_first, own_last = (x.unsqueeze(1) + keys - queries for x in (first, last))  # [n_q, 1] positions among the keys
    begin = torch.arange(0, keys, block, device=starts.device)  # [n_k] position where each block of keys begins
    end = begin + block
    is_seen = (end > starts[:, first].unsqueeze(-1)) & (begin <= own_last)  # [B, n_q, n_k]
    is_whole = (begin >= starts[:, last].unsqueeze(-1)) & (end <= own_first + 1)
    return BlockMask.from_kv_blocks(
        *listed(is_seen & ~is_whole),
        *listed(is_whole),
        BLOCK_SIZE=block,
        mask_mod=is_seen_by,
        seq_lengths=(queries, keys),
    )


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first.

    [B, n_q, n_k] bool → [B, 1, n_q], [B, 1, n_q, n_k] int32.
    """
    which = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1)
