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
| how much rows count         | the numbers, fp32           | times what SwiGLU gives out; their gradient from that   |

The report keeps the input after attention in E5M6, 12 bits, because attention's own backward pass uses it too. Here that pass is
PyTorch's, which keeps its output in the compute dtype by itself, and the map holds on to that very tensor (`model.attention` lays
it out for that): no byte more, and in bf16 one mantissa bit finer, where a second copy of 12 bits would cost 12 bits.

Rows of experts and the gradients of what experts hand out are quantised once, with powers of two, and requantised where columns are
needed: so it makes no difference whether they were quantised before they travelled between ranks or after (§3.3.3).

The largest scale of every tensor that is quantised is remembered (`Fp8.note`): it shows a tensor that explodes, or has a NaN, where
that begins, and not where it ends, in the gradients of everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.ops.fp8.kernels import Kernels, hidden
from model.ops.fp8.quantize import Quantized
from model.ops.weight_gradient import leaf_of, weight_gradient

# The largest scale of each of some tensors, fp32 [tensors], by their names. A name is what follows the module's.
Scales = dict[tuple[str, ...], Tensor]


class Fp8:
    """The FP8 arithmetic of one module, and how large what it quantised has been.

    Args:
        kernels: what computes.
        keeps_input: keep the input of linear maps as it is, not in E4M3.
    """

    def __init__(self, kernels: Kernels, keeps_input: bool = False):
        self.kernels = kernels
        self.keeps_input = keeps_input
        self.scales: Scales = {}  # of inputs and weights, since they were last cleared
        self.gradient_scales: Scales = {}

    def linear(self, x: Tensor, *weights: Tensor, others: Sequence["Fp8"] = ()) -> tuple[Tensor, ...]:
        """x [..., in] times the transpose of each weight [out_i, in] → [..., out_i], in x's dtype. x is quantised once.

        others: the arithmetic of the maps behind the first, if that is to remember their weights' and gradients' scales.
        """
        maps = (self, *others) if others else (self,) * len(weights)
        outputs = _Linear.apply(maps, x.flatten(0, -2), *weights)
        return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)

    def feed_forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """down(silu(gate(x)) · up(x)): x [..., D], weights [F, D], [F, D], [D, F] → [..., D]."""
        rows = x.flatten(0, -2)
        return _FeedForward.apply(self, torch.is_grad_enabled(), rows, None, None, gate, up, down).view_as(x)

    def experts(
        self, rows: Tensor, counts: Tensor, row_weights: Tensor | None, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """`feed_forward` of each group of rows with weights of its own.

        Args:
            rows: [M, D] sorted by expert, `counts` [E] of each.
            row_weights: [M] fp32, how much what becomes of each row counts; 1 where there are none.
            gate_up: [E, 2F, D], gate first.
            down: [E, D, F].
        """
        return _FeedForward.apply(self, torch.is_grad_enabled(), rows, counts, row_weights, gate_up, down)

    @torch.no_grad()
    def note(self, scales: Scales, tensors: Mapping[str, Quantized]) -> None:
        """Remember the largest scale of each tensor in `scales` or `gradient_scales`. NaN stays; nothing waits for the device."""
        found = torch.stack([t.scale.amax() if t.scale.numel() else t.scale.new_zeros(()) for t in tensors.values()])
        names = tuple(tensors)
        scales[names] = torch.maximum(scales[names], found) if names in scales else found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: tuple[Fp8, ...], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        fp8, kernels = maps[0], maps[0].kernels
        rows = kernels.quantize_rows(x, power_of_two=not fp8.keeps_input)
        blocks = [kernels.quantize_blocks(w, x.dtype, transpose=False) for w in weights]
        fp8.note(fp8.scales, {" input": rows})
        for one, weight in zip(maps, blocks, strict=True):
            one.note(one.scales, {" weight": weight})
        ctx.maps, ctx.dtype, ctx.leaves = maps, x.dtype, [leaf_of(w) for w in weights]
        ctx.save_for_backward(*((x, None) if fp8.keeps_input else rows), *weights)
        return tuple(kernels.multiply(rows, w, x.dtype) for w in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        maps, dtype, kernels = ctx.maps, ctx.dtype, ctx.maps[0].kernels
        data, scale, *weights = ctx.saved_tensors
        if maps[0].keeps_input:
            inputs = kernels.quantize_columns(data)
        else:
            inputs = kernels.requantize_columns(Quantized(data, scale), None)
        d_x, d_weights = None, []
        for fp8, grad, weight, leaf in zip(maps, grads, weights, ctx.leaves, strict=True):
            rows, columns = kernels.quantize_rows_and_columns(grad)
            fp8.note(fp8.gradient_scales, {" gradient": rows})
            blocks = kernels.quantize_blocks(weight, dtype, transpose=True)
            part = kernels.multiply(rows, blocks, dtype if len(weights) == 1 else torch.float32)
            d_x = part if d_x is None else d_x.add_(part)
            d_weights.append(weight_gradient(leaf, _wgrad, kernels, None, dtype, weight.dtype, inputs, columns))
        assert d_x is not None
        return None, d_x.to(dtype), *d_weights


class _FeedForward(torch.autograd.Function):
    """Weights are gate, up and down; or, with `counts`, gate and up one below the other, and down, of every expert.

    Rows are weighed before the last product, as in `model.ops.experts`: what it gives out is not needed again.

    `learns`: whether there will be a backward pass, which a forward pass in here cannot ask for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fp8: Fp8,
        learns: bool,
        x: Tensor,
        counts: Tensor | None,
        row_weights: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        kernels, dtype = fp8.kernels, x.dtype
        gate_w, up_w, down_w = (kernels.quantize_blocks(w, dtype, transpose=False) for w in _three(weights))
        rows = kernels.quantize_rows(x, power_of_two=True)
        gate = _multiply(kernels, rows, gate_w, counts, dtype)
        up = _multiply(kernels, rows, up_w, counts, dtype)
        noted = {"gate_proj input": rows, "gate_proj weight": gate_w, "up_proj weight": up_w}
        if learns:
            product, kept_gate, kept_up = hidden(kernels, gate, up, row_weights)
            noted |= {"gate_proj output": kept_gate, "up_proj output": kept_up}
            ctx.fp8, ctx.dtype, ctx.leaves = fp8, dtype, [leaf_of(w) for w in weights]
            ctx.save_for_backward(*rows, *kept_gate, *kept_up, counts, row_weights, *weights)
        else:
            product = kernels.swiglu(gate, up, row_weights)
        noted |= {"down_proj input": product, "down_proj weight": down_w}
        fp8.note(fp8.scales, {f".{name}": tensor for name, tensor in noted.items()})
        return _multiply(kernels, product, down_w, counts, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        fp8, dtype, kernels = ctx.fp8, ctx.dtype, ctx.fp8.kernels
        saved = ctx.saved_tensors  # once: a block that recomputes hands them out only then
        rows, gate, up = (Quantized(*saved[i : i + 2]) for i in (0, 2, 4))
        counts, row_weights, *weights = saved[6:]
        gate_w, up_w, down_w = (kernels.quantize_blocks(w, dtype, transpose=True) for w in _three(weights))
        if counts is None:
            d_rows, d_columns = kernels.quantize_rows_and_columns(grad)
        else:
            d_rows = kernels.quantize_rows(grad, power_of_two=True)
            d_columns = kernels.requantize_columns(d_rows, counts)
        d_product = _multiply(kernels, d_rows, down_w, counts, dtype)
        d = kernels.swiglu_backward(d_product, gate, up, row_weights, counts)
        noted = {".down_proj gradient": d_rows, ".gate_proj gradient": d.gate, ".up_proj gradient": d.up}
        fp8.note(fp8.gradient_scales, noted)
        d_x = _multiply(kernels, d.gate, gate_w, counts, torch.float32)
        d_x += _multiply(kernels, d.up, up_w, counts, torch.float32)
        inputs = kernels.requantize_columns(rows, counts)
        of_gate_up = [(d.gate_columns,), (d.up_columns,)] if counts is None else [(d.gate_columns, d.up_columns)]
        factors = [*((inputs, columns) for columns in of_gate_up), (d.product, (d_columns,))]
        of_weights = (
            weight_gradient(leaf, _wgrad, kernels, counts, dtype, w.dtype, x, *columns)
            for (x, columns), w, leaf in zip(factors, weights, ctx.leaves, strict=True)
        )
        return None, None, d_x.to(dtype), None, None if row_weights is None else d.weights, *of_weights


def _three(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of a feed-forward network's two or three weights."""
    *gate_up, down = weights
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=1)
    return gate, up, down


def _multiply(kernels: Kernels, a: Quantized, b: Quantized, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Fprop and Dgrad."""
    return kernels.multiply(a, b, dtype) if counts is None else kernels.multiply_groups(a, b, counts, dtype)


def _wgrad(
    kernels: Kernels,
    counts: Tensor | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    inputs: Quantized,
    *columns: Quantized,
) -> Tensor:
    """The gradient of a weight, or of several that lie one below the other and read the same inputs.

    Rounded to the compute dtype, in which `fsdp` takes gradients; they are summed in fp32.
    """
    if counts is None:
        parts = [kernels.multiply(d, inputs, dtype) for d in columns]
    else:
        parts = [kernels.multiply_within_groups(d, inputs, counts, dtype) for d in columns]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)).to(weight_dtype)
