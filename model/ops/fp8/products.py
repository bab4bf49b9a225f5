"""The three matrix products of FP8 training as operations of PyTorch: `rorqual::fp8_multiply`, `…_groups`, `…_within_groups`.

Under one name whoever computes them, so that what watches operations sees a product and not what it consists of: recomputation
keeps its output. `by` names the implementation: `IMPLEMENTATIONS` has those that were imported, `Chosen` knows who computes which
shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fp8.quantize import Quantized, dequantize, padded_ends
from model.ops.operation import operation


class Multiply(Protocol):
    def __call__(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor: ...


class MultiplyGroups(Protocol):
    def __call__(self, a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor: ...


class Products(NamedTuple):
    """One implementation, with the shapes of `model.ops.fp8.kernels.Kernels`; None where it has no such product."""

    multiply: Multiply | None
    multiply_groups: MultiplyGroups | None
    multiply_within_groups: MultiplyGroups | None


class Shape(NamedTuple):
    """What one choice is for: a bᵀ of so many columns and so long a sum, or, of columns times columns, rows and columns."""

    product: str  # one of the names below
    n: int
    k: int
    dtype: torch.dtype  # of the output


ROWS, COLUMNS = "rows × blocks", "columns × columns"
GROUPS, WITHIN_GROUPS = "grouped rows × blocks", "grouped columns × columns"


class Chosen:
    """The products of `model.ops.fp8.kernels.Kernels`, those of a shape by the implementation chosen for it."""

    def __init__(self, default: str):
        self.default = default
        self.choice: dict[Shape, str] = {}

    def multiply(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        n = len(b.data)
        shape = Shape(COLUMNS, len(a.data), n, dtype) if in_columns(b) else Shape(ROWS, n, a.data.shape[1], dtype)
        return multiply(a, b, dtype, self.choice.get(shape, self.default))

    def multiply_groups(self, a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
        shape = Shape(GROUPS, b.data.shape[1], b.data.shape[2], dtype)
        return multiply_groups(a, b, counts, dtype, self.choice.get(shape, self.default))

    def multiply_within_groups(self, a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
        shape = Shape(WITHIN_GROUPS, len(a.data), len(b.data), dtype)
        return multiply_within_groups(a, b, counts, dtype, self.choice.get(shape, self.default))


def in_columns(b: Quantized) -> bool:
    """Whether each row of a matrix has scales of its own, and not each block. Sizes tell; of one row both are the same."""
    return len(b.scale) == len(b.data)


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype, by: str) -> Tensor:
    """a bᵀ, [M, K] times [N, K] → [M, N]."""
    return torch.ops.rorqual.fp8_multiply(*a, *b, dtype, by)


def multiply_groups(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, by: str) -> Tensor:
    """Each group's rows of a [M, K] times its matrix of b [E, N, K] → [M, N]."""
    return torch.ops.rorqual.fp8_multiply_groups(*a, *b, counts, dtype, by)


def multiply_within_groups(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, by: str) -> Tensor:
    """a bᵀ over each group's columns apart, [N, P] and [K, P] → [E, N, K]."""
    return torch.ops.rorqual.fp8_multiply_within_groups(*a, *b, counts, dtype, by)


def _emulate(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    return (dequantize(a) @ dequantize(b).T).to(dtype)


def _emulate_groups(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
    return F.grouped_mm(dequantize(a), dequantize(b).mT, offs=counts.cumsum(0).to(torch.int32)).to(dtype)


def _emulate_within_groups(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
    return F.grouped_mm(dequantize(a), dequantize(b).T, offs=padded_ends(counts).to(torch.int32)).to(dtype)


EMULATION = "emulation"
IMPLEMENTATIONS = {EMULATION: Products(_emulate, _emulate_groups, _emulate_within_groups)}


def _by_name(product: str) -> Callable[..., Tensor]:
    """A product of `Products`, by the implementation that the operation's last argument names."""

    def run(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
        *counts_and_dtype, by = others
        return getattr(IMPLEMENTATIONS[by], product)(Quantized(a, a_scale), Quantized(b, b_scale), *counts_and_dtype)

    return run


def _of_rows(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[-2], dtype=others[-2])


def _of_columns(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, *others: Any) -> Tensor:
    return a.new_empty(len(counts), a.shape[0], b.shape[0], dtype=others[-2])


for _product, _counts, _shape in (
    ("multiply", "", _of_rows),
    ("multiply_groups", "Tensor counts, ", _of_rows),
    ("multiply_within_groups", "Tensor counts, ", _of_columns),
):
    _factors = "Tensor a, Tensor a_scale, Tensor b, Tensor b_scale"
    operation(f"fp8_{_product}({_factors}, {_counts}ScalarType dtype, str by) -> Tensor", _shape)(_by_name(_product))
