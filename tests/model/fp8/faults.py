"""Mistakes that FP8 stacks have made, planted one at a time: the comparison with float64 must catch each of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from model.ops.fp8 import kernels, products, quantize
from model.ops.fp8.kernels import Reference
from model.ops.fp8.quantize import TILE, Quantized, dequantize, quantize_columns, quantize_rows

Fault = Callable[[], AbstractContextManager[Any]]


def scales_of_rows_along_tokens_in_wgrad() -> AbstractContextManager[Any]:
    """The data of rows transposed as it is, a tile of tokens under the scale of its first token's row."""

    def quantize_rows_and_columns(self: Reference, x: Tensor) -> tuple[Quantized, Quantized]:
        rows, honest = quantize_rows(x), quantize_columns(x)
        data = torch.zeros_like(honest.data)
        data.view(torch.uint8)[:, : len(x)] = rows.data.view(torch.uint8).T
        scale = rows.scale[::TILE].T.repeat_interleave(TILE, 0)[: x.shape[1]].contiguous()
        return rows, Quantized(data, scale)

    return patch.object(Reference, "quantize_rows_and_columns", quantize_rows_and_columns)


def scale_of_the_next_tile() -> AbstractContextManager[Any]:
    def dequantize_with_next(x: Quantized) -> Tensor:
        return dequantize(Quantized(x.data, x.scale.roll(-1, -1)))

    return patch.object(products, "dequantize", dequantize_with_next)


def blocks_transposed_without_their_scales() -> AbstractContextManager[Any]:
    """Unnoticed by any check of shapes where a matrix is square."""
    return patch.object(kernels, "transpose_blocks", lambda weight: weight._replace(data=weight.data.mT.contiguous()))


def gradients_in_tiles_along_tokens_in_dgrad() -> AbstractContextManager[Any]:
    """What is small in a tile of 128 tokens is lost to what is large: DeepSeek-V3's appendix B.2."""

    def quantize_rows_and_columns(self: Reference, x: Tensor) -> tuple[Quantized, Quantized]:
        columns = quantize_columns(x)
        return quantize_rows(dequantize(columns).T[: len(x)]), columns

    return patch.object(Reference, "quantize_rows_and_columns", quantize_rows_and_columns)


def scale_of_a_whole_row_behind_the_sum() -> AbstractContextManager[Any]:
    """No promotion: one sum over all tiles, which only one scale can multiply."""

    def multiply(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        a, b = (x._replace(scale=x.scale[:, :1].expand_as(x.scale)) for x in (a, b))
        return (dequantize(a) @ dequantize(b).T).to(dtype)

    return _multiply_by(multiply)


def sums_of_14_bits() -> AbstractContextManager[Any]:
    """No promotion: partial sums stay in registers of which a Hopper's tensor cores keep 14 bits or so (DeepSeek-V3 §3.3.2)."""

    def multiply(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
        x, y = dequantize(a), dequantize(b)
        total = x.new_zeros(len(x), len(y))
        for part in range(0, x.shape[1], 32):
            total += x[:, part : part + 32] @ y[:, part : part + 32].T
            total = (total.view(torch.int32) & ~0x3FF).view(torch.float32)  # 1 + 13 of 24 bits
        return total.to(dtype)

    return _multiply_by(multiply)


def scales_of_powers_of_two_rounded_to_the_nearest() -> AbstractContextManager[Any]:
    """Down as often as up: numbers above 448 scales are cut off."""
    honest = quantize.scale_of

    def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
        scale = honest(largest, False)
        return torch.exp2(scale.log2().round()) if power_of_two else scale

    return patch.object(quantize, "scale_of", scale_of)


def _multiply_by(multiply: Callable[[Quantized, Quantized, torch.dtype], Tensor]) -> AbstractContextManager[Any]:
    emulation = products.IMPLEMENTATIONS[products.EMULATION]
    return patch.dict(products.IMPLEMENTATIONS, {products.EMULATION: emulation._replace(multiply=multiply)})


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        scales_of_rows_along_tokens_in_wgrad,
        scale_of_the_next_tile,
        blocks_transposed_without_their_scales,
        gradients_in_tiles_along_tokens_in_dgrad,
        scale_of_a_whole_row_behind_the_sum,
        sums_of_14_bits,
        scales_of_powers_of_two_rounded_to_the_nearest,
    )
}
