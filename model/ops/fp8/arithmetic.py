"""Linear maps and SwiGLU feed-forward networks whose matrix products are FP8, forward and backward. DeepSeek-V3 §3.3.

    Fprop   y  = x Wᵀ       x in rows (1 × 128 along the inputs),      W in blocks
    Dgrad   dx = dy W       dy in rows (1 × 128 along the outputs),    W in blocks, transposed
    Wgrad   dW = dyᵀ x      dy and x in columns (128 × 1 along the tokens)

Parameters stay as they are (fp32 master weights, or what an engine gathers) and are quantised where they are used. What is kept for
the backward pass:

| of                          | kept                        | in the backward pass                                    |
|-----------------------------|-----------------------------|---------------------------------------------------------|
| a linear map                | its input in rows, E4M3     | requantised to columns                                  |
| the map after attention     | its input as it is          | quantised to columns                                    |
| SwiGLU                      | gate and up in rows, E4M3   | silu(gate) · up is computed again, straight to columns  |

The report keeps the input after attention in E5M6, 12 bits, because attention's own backward pass uses it too. Here that pass is
PyTorch's, which keeps the tensor in bf16 by itself; to hold on to the same one costs nothing and is one mantissa bit finer, where a
second copy of 12 bits would cost 12 bits.

Rows of experts and the gradients of what experts hand out are quantised once, with powers of two, and requantised where columns are
needed: so it makes no difference whether they were quantised before they travelled between ranks or after (§3.3.3).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.ops.fp8.kernels import Kernels
from model.ops.fp8.quantize import Quantized

INPUT, WEIGHT, GRADIENT = range(3)


class Fp8:
    """The FP8 arithmetic of one module, and how large what it quantised has been.

    Args:
        kernels: what computes.
        keeps_input: keep the input of linear maps as it is, not in E4M3.
    """

    def __init__(self, kernels: Kernels, keeps_input: bool = False):
        self.kernels = kernels
        self.keeps_input = keeps_input
        self.largest_scales: Tensor | None = None  # [3] fp32 of inputs, weights, gradients since `reset`

    def linear(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """x [..., in] times the transpose of each weight [out_i, in] → [..., out_i], in x's dtype. x is quantised once."""
        outputs = _Linear.apply(self, x.flatten(0, -2), *weights)
        return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)

    def feed_forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """down(silu(gate(x)) · up(x)): x [..., D], weights [F, D], [F, D], [D, F] → [..., D]."""
        return _FeedForward.apply(self, x.flatten(0, -2), None, gate, up, down).view_as(x)

    def experts(self, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """`feed_forward` of each group of rows with weights of its own.

        Args:
            rows: [M, D] sorted by expert, `counts` [E] of each.
            gate_up: [E, 2F, D], gate first.
            down: [E, D, F].
        """
        return _FeedForward.apply(self, rows, counts, gate_up, down)

    def reset(self) -> None:
        """Forget how large scales have been."""
        if self.largest_scales is not None:
            self.largest_scales.zero_()

    @torch.no_grad()
    def note(self, role: int, *tensors: Quantized) -> None:
        """Remember the largest scale; NaN stays."""
        if self.largest_scales is None:
            self.largest_scales = tensors[0].scale.new_zeros(3)
        found = [t.scale.amax() for t in tensors if t.scale.numel()]
        if found:
            self.largest_scales[role] = torch.stack([self.largest_scales[role], *found]).amax()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fp8: Fp8, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        kernels = fp8.kernels
        rows = kernels.quantize_rows(x, power_of_two=not fp8.keeps_input)
        blocks = [kernels.quantize_blocks(w, x.dtype, transpose=False) for w in weights]
        fp8.note(INPUT, rows)
        fp8.note(WEIGHT, *blocks)
        ctx.fp8, ctx.dtype = fp8, x.dtype
        ctx.save_for_backward(*((x, None) if fp8.keeps_input else rows), *weights)
        return tuple(kernels.multiply(rows, w, x.dtype) for w in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        fp8, dtype, kernels = ctx.fp8, ctx.dtype, ctx.fp8.kernels
        data, scale, *weights = ctx.saved_tensors
        if fp8.keeps_input:
            inputs = kernels.quantize_columns(data)
        else:
            inputs = kernels.requantize_columns(Quantized(data, scale), None)
        d_x, d_weights = None, []
        for grad, weight in zip(grads, weights):
            rows, columns = kernels.quantize_rows_and_columns(grad)
            fp8.note(GRADIENT, rows)
            blocks = kernels.quantize_blocks(weight, dtype, transpose=True)
            part = kernels.multiply(rows, blocks, dtype if len(weights) == 1 else torch.float32)
            d_x = part if d_x is None else d_x.add_(part)
            d_weights.append(kernels.multiply(columns, inputs, dtype).to(weight.dtype))
        assert d_x is not None
        return None, d_x.to(dtype), *d_weights


class _FeedForward(torch.autograd.Function):
    """Weights are gate, up and down; or, with `counts`, gate and up one below the other, and down, of every expert."""

    @staticmethod
    def forward(ctx: Any, fp8: Fp8, x: Tensor, counts: Tensor | None, *weights: Tensor) -> Tensor:
        kernels, dtype = fp8.kernels, x.dtype
        gate_w, up_w, down_w = (kernels.quantize_blocks(w, dtype, transpose=False) for w in _three(weights))
        rows = kernels.quantize_rows(x, power_of_two=True)
        gate = _multiply(kernels, rows, gate_w, counts, dtype)
        up = _multiply(kernels, rows, up_w, counts, dtype)
        product = kernels.swiglu(gate, up)
        kept_gate, kept_up = kernels.quantize_rows(gate, False), kernels.quantize_rows(up, False)
        fp8.note(INPUT, rows, product, kept_gate, kept_up)
        fp8.note(WEIGHT, gate_w, up_w, down_w)
        ctx.fp8, ctx.dtype = fp8, dtype
        ctx.save_for_backward(*rows, *kept_gate, *kept_up, counts, *weights)
        return _multiply(kernels, product, down_w, counts, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        fp8, dtype, kernels = ctx.fp8, ctx.dtype, ctx.fp8.kernels
        rows, gate, up = (Quantized(*ctx.saved_tensors[i : i + 2]) for i in (0, 2, 4))
        counts, *weights = ctx.saved_tensors[6:]
        gate_w, up_w, down_w = (kernels.quantize_blocks(w, dtype, transpose=True) for w in _three(weights))
        if counts is None:
            d_rows, d_columns = kernels.quantize_rows_and_columns(grad)
        else:
            d_rows = kernels.quantize_rows(grad, power_of_two=True)
            d_columns = kernels.requantize_columns(d_rows, counts)
        d = kernels.swiglu_backward(_multiply(kernels, d_rows, down_w, counts, dtype), gate, up, counts)
        fp8.note(GRADIENT, d_rows, d.gate, d.up)
        d_x = _multiply(kernels, d.gate, gate_w, counts, torch.float32)
        d_x += _multiply(kernels, d.up, up_w, counts, torch.float32)
        inputs = kernels.requantize_columns(rows, counts)
        of_weights = [
            _multiply_columns(kernels, d_w, input, counts, dtype)
            for d_w, input in ((d.gate_columns, inputs), (d.up_columns, inputs), (d_columns, d.product))
        ]
        if counts is not None:
            of_weights[:2] = [torch.cat(of_weights[:2], dim=1)]
        return None, d_x.to(dtype), None, *(d_w.to(w.dtype) for d_w, w in zip(of_weights, weights))


def _three(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of a feed-forward network's two or three weights."""
    *gate_up, down = weights
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=1)
    return gate, up, down


def _multiply(kernels: Kernels, a: Quantized, b: Quantized, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Fprop and Dgrad."""
    return kernels.multiply(a, b, dtype) if counts is None else kernels.multiply_groups(a, b, counts, dtype)


def _multiply_columns(
    kernels: Kernels, a: Quantized, b: Quantized, counts: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Wgrad. Rounded to the compute dtype, in which `fsdp` takes gradients; they are summed in fp32."""
    return kernels.multiply(a, b, dtype) if counts is None else kernels.multiply_within_groups(a, b, counts, dtype)
