"""What FP8 training computes with, as an interface, and its reference: emulation in plain PyTorch, on any device.

The emulation multiplies by the scales first and sums in fp32 by one product. `multiply_by_tiles` is the arithmetic of the
hardware step by step: products of E4M3 numbers, summed over one tile, promoted to fp32, scaled, added up. The two differ by
roundings of fp32 alone, since a product of two E4M3 numbers is exact there; the second is the oracle of the first, and of kernels.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fp8.products import EMULATION, Chosen
from model.ops.fp8.quantize import (
    E4M3,
    TILE,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    requantize_columns,
    transpose_blocks,
)
from model.ops.operation import operation


class Hidden(NamedTuple):
    """What is made of gate and up [M, F] after their products, all in rows."""

    product: Quantized  # w · silu(gate) · up
    gate: Quantized  # and up: kept for the backward pass
    up: Quantized


class SwiGLUGradients(NamedTuple):
    """What the backward products around a SwiGLU multiply with."""

    product: Quantized  # columns of w · silu(gate) · up, computed again
    gate: Quantized  # rows of the gradient of gate
    gate_columns: Quantized
    up: Quantized
    up_columns: Quantized
    weights: Tensor  # [M] fp32, the gradient of w; [0] where there are none


class Kernels(Protocol):
    """The operations; rows, columns and blocks as of `model.ops.fp8.quantize`. M rows lie in groups of `counts` [E] where given."""

    default: str  # names them in `KERNELS`

    def quantize_rows(self, x: Tensor, power_of_two: bool) -> Quantized:
        """x [M, K]."""
        ...

    def quantize_rows_and_columns(self, x: Tensor) -> tuple[Quantized, Quantized]:
        """Both of x [M, K], from one reading."""
        ...

    def quantize_columns(self, x: Tensor) -> Quantized:
        """x [M, K]."""
        ...

    def requantize_columns(self, rows: Quantized, counts: Tensor | None) -> Quantized:
        """Columns of what lies in rows, both with powers of two."""
        ...

    def quantize_blocks(self, weight: Tensor, compute_dtype: torch.dtype, transpose: bool) -> Quantized:
        """Blocks of weight [..., N, K] as it is in the compute dtype, or of its transpose [..., K, N]."""
        ...

    def multiply(self, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        """a bᵀ: rows or columns [M, K] times blocks or columns [N, K] → [M, N]."""
        ...

    def multiply_groups(self, a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """Each group's rows of a [M, K] times its matrix of b, blocks [E, N, K] → [M, N]."""
        ...

    def multiply_within_groups(self, a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """a bᵀ over the rows of each group apart: columns [N, P] and [K, P] → [E, N, K]; zero for a group without rows."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor, weights: Tensor | None) -> Quantized:
        """Rows of w · silu(gate) · up; both [M, F], perhaps with a stride; weights w [M] fp32, or 1."""
        ...

    def swiglu_backward(
        self, grad: Tensor, gate: Quantized, up: Quantized, weights: Tensor | None, counts: Tensor | None
    ) -> SwiGLUGradients:
        """From the gradient of w · silu(gate) · up [M, F], both factors in rows, and the weights."""
        ...


class Reference(Chosen):
    """`Kernels` in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__(EMULATION)

    def quantize_rows(self, x: Tensor, power_of_two: bool) -> Quantized:
        return quantize_rows(x, power_of_two)

    def quantize_rows_and_columns(self, x: Tensor) -> tuple[Quantized, Quantized]:
        return quantize_rows(x), quantize_columns(x)

    def quantize_columns(self, x: Tensor) -> Quantized:
        return quantize_columns(x)

    def requantize_columns(self, rows: Quantized, counts: Tensor | None) -> Quantized:
        return requantize_columns(rows, counts)

    def quantize_blocks(self, weight: Tensor, compute_dtype: torch.dtype, transpose: bool) -> Quantized:
        blocks = quantize_blocks(weight.to(compute_dtype))
        return transpose_blocks(blocks) if transpose else blocks

    def swiglu(self, gate: Tensor, up: Tensor, weights: Tensor | None) -> Quantized:
        product = F.silu(gate.float()) * up.float()
        return quantize_rows(product if weights is None else product.mul_(weights.unsqueeze(1)))

    def swiglu_backward(
        self, grad: Tensor, gate: Quantized, up: Quantized, weights: Tensor | None, counts: Tensor | None
    ) -> SwiGLUGradients:
        g, u, d = dequantize(gate), dequantize(up), grad.float()
        sigmoid = g.sigmoid()
        silu = g * sigmoid
        product = silu * u
        d_weights = grad.new_empty(0, dtype=torch.float32)
        if weights is not None:
            d_weights = (d * product).sum(1)
            product, d = product * weights.unsqueeze(1), d * weights.unsqueeze(1)
        d_gate = d * u * sigmoid * (1 + g * (1 - sigmoid))
        d_up = d * silu
        return SwiGLUGradients(
            quantize_columns(product, counts),
            quantize_rows(d_gate),
            quantize_columns(d_gate, counts),
            quantize_rows(d_up),
            quantize_columns(d_up, counts),
            d_weights,
        )


KERNELS: dict[str, Kernels] = {EMULATION: Reference()}


def hidden(kernels: Kernels, gate: Tensor, up: Tensor, weights: Tensor | None) -> Hidden:
    """`Kernels.swiglu`, and its factors as its backward pass takes them.

    An operation, so that recomputation can recall the factors, and make neither the products that they are of nor these again.
    """
    product, product_scale, *factors = torch.ops.rorqual.fp8_swiglu(gate, up, weights, kernels.default)
    return Hidden(Quantized(product, product_scale), Quantized(*factors[:2]), Quantized(*factors[2:]))


def _empty_rows(gate: Tensor, *_: Any) -> list[Tensor]:
    shape = len(gate), -(-gate.shape[1] // TILE)
    data, scale = (lambda: gate.new_empty(gate.shape, dtype=E4M3)), (lambda: gate.new_empty(shape, dtype=torch.float32))
    return [data(), scale(), data(), scale(), data(), scale()]


@operation(
    "fp8_swiglu(Tensor gate, Tensor up, Tensor? weights, str by) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _empty_rows,
)
def _hidden(gate: Tensor, up: Tensor, weights: Tensor | None, by: str) -> tuple[Tensor, ...]:
    kernels = KERNELS[by]
    product, *factors = kernels.swiglu(gate, up, weights), *(kernels.quantize_rows(t, False) for t in (gate, up))
    return *product, *factors[0], *factors[1]


def multiply_by_tiles(a: Quantized, b: Quantized) -> Tensor:
    """a bᵀ as the hardware computes it, a tile of 128 at a time.

    a: rows or columns [M, K]. b: blocks or columns [N, K]. → [M, N] fp32.
    """
    total = a.scale.new_zeros(len(a.data), len(b.data))
    b_scale = b.scale if len(b.scale) == len(b.data) else b.scale.repeat_interleave(TILE, 0)[: len(b.data)]
    for tile in range(a.scale.shape[1]):
        inside = slice(tile * TILE, (tile + 1) * TILE)
        partial = a.data[:, inside].float() @ b.data[:, inside].float().T  # of unscaled numbers
        total += partial * a.scale[:, tile, None] * b_scale[None, :, tile]
    return total
