# mypy: disallow-untyped-defs=False
"""Rows of tokens and of (token, expert) pairs, in Triton: row place[n, k] belongs to token n (`model.ops.rows`).

Nothing is added where it scatters: a token sums its K rows in fp32, in the order of k.
"""

import torch
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


def weighted_sum(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """tokens[n] = Σ_k weights[place[n, k]] · rows[place[n, k]]: [N·K, D] → [N, D]."""
    rows, place = unit_stride(rows), place.contiguous()
    n, k = place.shape
    tokens = rows.new_empty(n, rows.shape[1])
    if n:
        _weighted_sum[(n,)](rows, place, weights, tokens, rows.shape[1], rows.stride(0), k, **block(rows.shape[1]))
    return tokens


def weighted_sum_backward(grad: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `weighted_sum` [N, D]: those of rows [N·K, D] and of weights [N·K]."""
    grad, rows, place = unit_stride(grad), unit_stride(rows), place.contiguous()
    d_rows, d_weights = rows.new_empty(rows.shape), torch.empty_like(weights)
    if len(rows):
        _weighted_sum_backward[(len(rows),)](
            grad, rows, place, weights, d_rows, d_weights,
            rows.shape[1], grad.stride(0), rows.stride(0), place.shape[1], **block(rows.shape[1]),
        )  # fmt: skip
    return d_rows, d_weights


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
def _weighted_sum(rows, place, weights, tokens, D, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k)
            numbers = tl.load(rows + row * stride + column, column < D, 0.0).to(tl.float32)
            if weights is not None:
                numbers *= tl.load(weights + row).to(tl.float32)
            total += numbers
        tl.store(tokens + token * D + column, total.to(tokens.dtype.element_ty), column < D)


@triton.jit
def _weighted_sum_backward(
    grad, rows, place, weights, d_rows, d_weights, D, grad_stride, stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One (token, expert) pair; those of a token run side by side, and read its gradient from the L2 cache."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(place + pair)
    w = tl.load(weights + row).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g = tl.load(grad + pair // K * grad_stride + column, column < D, 0.0).to(tl.float32)
        dw += g * tl.load(rows + row * stride + column, column < D, 0.0).to(tl.float32)
        tl.store(d_rows + row * D + column, (g * w).to(d_rows.dtype.element_ty), column < D)
    tl.store(d_weights + row, tl.sum(dw).to(d_weights.dtype.element_ty))
