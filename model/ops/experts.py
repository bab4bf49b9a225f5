"""The routed experts' feed-forward networks: y[n] = Σ_k w · down(silu(gate) · up) of x[n], over the K experts of row n.

`reference_experts` is the equation. `experts` is the same with as little kept as can be: of every (row, expert) pair the outputs of
gate and up, an index there and one back. Three things make the rest unnecessary.

- **Weights before the last product.** w (p Wᵀ) = (w p) Wᵀ, so that the gradient of w is that of w p times p, which is computed
  anyway. What experts hand out, D numbers a pair, is summed and forgotten.
- **Rows by an index.** x[index] is never kept: the products take rows by their index, of x forward and of dy backward.
- **The product again.** silu(gate) · up is made a second time in the pass that makes the gradients of gate and up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops import rows, swiglu
from model.ops.grouped_mm import GroupedMM, multiply_groups, multiply_within_groups, reference_grouped_mm
from model.ops.weight_gradient import leaf_of, weight_gradient

ExpertsBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]


def experts(
    x: Tensor, index: Tensor, place: Tensor, counts: Tensor, weights: Tensor | None, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Each row through its experts.

    Args:
        x: [N, D].
        index: [M] the row of x that each pair has, pairs sorted by expert.
        place: [N, K] the pairs of each row; M = N·K.
        counts: [E] pairs of each expert.
        weights: [M] fp32, how much each pair counts; 1 where there are none.
        gate_up: [E, 2F, D], gate first.
        down: [E, D, F].

    Returns:
        [N, D].
    """
    return _Experts.apply(x, index, place, counts, weights, gate_up, down)


def reference_experts(
    x: Tensor,
    index: Tensor,
    place: Tensor,
    counts: Tensor,
    weights: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    grouped_mm: GroupedMM = reference_grouped_mm,
) -> Tensor:
    """`experts`, term by term."""
    inner = swiglu.reference_swiglu(grouped_mm(x[index], gate_up, counts))  # [M, F]
    outputs = grouped_mm(inner, down, counts)  # [M, D]
    weighed = outputs if weights is None else (outputs * weights.unsqueeze(-1)).to(outputs.dtype)
    return rows.reference_sum_rows(weighed, place)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        place: Tensor,
        counts: Tensor,
        weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        halves = multiply_groups(x, index, gate_up, counts)  # [M, 2F]
        ctx.save_for_backward(x, index, place, counts, weights, halves, gate_up, down)
        ctx.leaves = leaf_of(gate_up), leaf_of(down)
        inner = swiglu.multiply(*halves.chunk(2, dim=-1), weights)  # [M, F]
        return rows.sum_up(multiply_groups(inner, None, down, counts), place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, index, place, counts, weights, halves, gate_up, down = ctx.saved_tensors
        d_inner = multiply_groups(dy, index, down.mT, counts)  # [M, F]
        d_halves, inner, d_weights = swiglu.multiply_backward(d_inner, *halves.chunk(2, dim=-1), weights)
        of_gate_up, of_down = ctx.leaves
        d_down = weight_gradient(of_down, multiply_within_groups, dy, index, inner, None, counts)
        d_gate_up = weight_gradient(of_gate_up, multiply_within_groups, d_halves, None, x, index, counts)
        d_x = rows.sum_up(multiply_groups(d_halves, None, gate_up.mT, counts), place)
        return d_x, None, None, None, d_weights if weights is not None else None, d_gate_up, d_down


BACKENDS: dict[str, ExpertsBackend] = {"grouped_mm": experts, "reference": reference_experts}
