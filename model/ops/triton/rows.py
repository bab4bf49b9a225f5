# mypy: disallow-untyped-defs=False
"""Rows of tokens and of (token, expert) pairs, in Triton: row place[n, k] belongs to token n (`model.ops.rows`).

Nothing is added where it scatters: a token sums its K rows in fp32, in the order of k.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.ops.triton.swiglu import block, unit_stride


def spread(tokens: Tensor, place: Tensor) -> Tensor:
    """rows[place[n, k]] = tokens[n]: [N, D], [N, K] → [N·K, D]. A token is read once."""
    tokens, place = unit_stride(tokens), place.contiguous()
    n, k = place.shape
    rows = tokens.new_empty(n * k, tokens.shape[1])
    if n:
        _spread[(n,)](tokens, place, rows, tokens.shape[1], tokens.stride(0), k, **block(tokens.shape[1]))
    return rows


def sum_up(rows: Tensor, place: Tensor) -> Tensor:
    """tokens[n] = Σ_k rows[place[n, k]]: [N·K, D], [N, K] → [N, D]."""
    rows, place = unit_stride(rows), place.contiguous()
    n, k = place.shape
    tokens = rows.new_empty(n, rows.shape[1])
    if n:
        _sum_up[(n,)](rows, place, tokens, rows.shape[1], rows.stride(0), k, **block(rows.shape[1]))
    return tokens


@triton.jit
def _spread(tokens, place, rows, D, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(tokens + token * stride + column, column < D)
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k)
            tl.store(rows + row * D + column, numbers, column < D)


@triton.jit
def _sum_up(rows, place, tokens, D, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k)
            total += tl.load(rows + row * stride + column, column < D, 0.0).to(tl.float32)
        tl.store(tokens + token * D + column, total.to(tokens.dtype.element_ty), column < D)
