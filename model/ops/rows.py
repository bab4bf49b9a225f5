"""Rows of tokens [N, D] and rows of (token, expert) pairs [M, D], M = N·K: row place[n, k] belongs to token n.

`spread_rows` and `sum_rows` are each other's transposes, so neither direction adds where it scatters: the same bits in every run.
"""

from typing import Any

import torch
from torch import Tensor

from model.ops import cpu
from model.ops.operation import operation


def spread_rows(tokens: Tensor, place: Tensor) -> Tensor:
    """rows[place[n, k]] = tokens[n]. tokens [N, D], place [N, K], a permutation of all M → [M, D]."""
    return _Spread.apply(tokens, place)


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """tokens[n] = Σ_k rows[place[n, k]]. rows [M, D], place [N, K] → [N, D]."""
    return _Sum.apply(rows, place)


def permute(numbers: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """numbers[order], all [M]; the gradient is gathered by the inverse."""
    return _Permute.apply(numbers, order, inverse)


def reference_spread_rows(tokens: Tensor, place: Tensor) -> Tensor:
    """`spread_rows`."""
    index = torch.empty_like(place).view(-1).scatter_(0, place.flatten(), _tokens_of_pairs(place))
    return tokens[index]


def reference_sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """`sum_rows`."""
    return rows[place].sum(1)


def _tokens_of_pairs(place: Tensor) -> Tensor:
    n, k = place.shape
    return torch.arange(n * k, device=place.device) // k


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return spread(tokens, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return sum_up(grad, place), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return sum_up(rows, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return spread(grad, place), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return numbers.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


@operation(
    "spread_rows(Tensor tokens, Tensor place) -> Tensor",
    lambda tokens, place: tokens.new_empty(place.numel(), tokens.shape[1]),
)
def spread(tokens: Tensor, place: Tensor) -> Tensor:
    """`spread_rows` without a derivative."""
    if tokens.is_cuda:
        from model.ops.triton import rows as kernels

        return kernels.spread(tokens, place)
    library = cpu.library("rows") if cpu.takes(tokens) else None
    if library is None:
        return reference_spread_rows(tokens, place)
    tokens, place = cpu.unit_stride(tokens), place.contiguous()
    rows = tokens.new_empty(place.numel(), tokens.shape[1])
    sizes = cpu.numbers(*place.shape, tokens.shape[1])
    library.spread_rows(*sizes, *cpu.rows(tokens), cpu.address(place), cpu.address(rows), cpu.threads())
    return rows


@operation(
    "sum_rows(Tensor rows, Tensor place) -> Tensor",
    lambda rows, place: rows.new_empty(len(place), rows.shape[1]),
)
def sum_up(rows: Tensor, place: Tensor) -> Tensor:
    """`sum_rows` without a derivative."""
    if rows.is_cuda:
        from model.ops.triton import rows as kernels

        return kernels.sum_up(rows, place)
    library = cpu.library("rows") if cpu.takes(rows) else None
    if library is None:
        return reference_sum_rows(rows, place)
    rows, place = rows.contiguous(), place.contiguous()
    tokens = rows.new_empty(len(place), rows.shape[1])
    sizes = cpu.numbers(*place.shape, rows.shape[1])
    library.sum_rows(*sizes, *map(cpu.address, (rows, place, tokens)), cpu.threads())
    return tokens
