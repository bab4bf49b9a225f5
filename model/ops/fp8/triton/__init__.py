"""The operations of FP8 training in Triton, for GPUs that multiply E4M3 (Hopper and later)."""

import torch
from torch import Tensor

from model.ops.fp8.kernels import KERNELS, SwiGLUGradients
from model.ops.fp8.products import Chosen
from model.ops.fp8.quantize import Quantized
from model.ops.fp8.triton import products, quantize, swiglu


class TritonKernels(Chosen):
    """`model.ops.fp8.kernels.Kernels` in Triton."""

    def __init__(self) -> None:
        super().__init__(products.PLAIN)

    def quantize_rows(self, x: Tensor, power_of_two: bool) -> Quantized:
        return quantize.quantize_rows(x, power_of_two)

    def quantize_rows_and_columns(self, x: Tensor) -> tuple[Quantized, Quantized]:
        return quantize.quantize_rows_and_columns(x)

    def quantize_columns(self, x: Tensor) -> Quantized:
        return quantize.quantize_columns(x)

    def requantize_columns(self, rows: Quantized, counts: Tensor | None) -> Quantized:
        return quantize.requantize_columns(rows, counts)

    def quantize_blocks(self, weight: Tensor, compute_dtype: torch.dtype, transpose: bool) -> Quantized:
        return quantize.quantize_blocks(weight, compute_dtype, transpose)

    def swiglu(self, gate: Tensor, up: Tensor, weights: Tensor | None) -> Quantized:
        return swiglu.swiglu(gate, up, weights)

    def swiglu_backward(
        self, grad: Tensor, gate: Quantized, up: Quantized, weights: Tensor | None, counts: Tensor | None
    ) -> SwiGLUGradients:
        return swiglu.swiglu_backward(grad, gate, up, weights, counts)


KERNELS[products.PLAIN] = TritonKernels()
