"""SwiGLU and sums of rows in Triton, against the plain operations in fp64."""

import pytest
import torch
from torch import Tensor

from tests.triton import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from model.ops.rows import reference_spread_rows, reference_sum_rows
from model.ops.swiglu import reference_swiglu
from model.ops.triton import rows as triton_rows
from model.ops.triton import swiglu as triton_swiglu

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def agree(found: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        found.double().cpu(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()) / 10
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True], ids=["no weights", "weights"])
@pytest.mark.parametrize("width", [24, 1030], ids=["a block", "more than a block"])
def test_swiglu_equals_the_reference_in_values_and_gradients(device, width, weighted, dtype):
    halves, grad = (4 * torch.randn(3, 2 * width)).to(dtype), torch.randn(3, width).to(dtype)
    weights = torch.rand(3) if weighted else None
    there = weights.to(device) if weighted else None
    leaves = [halves.double().requires_grad_(), *([weights.double().requires_grad_()] if weighted else [])]
    exact = reference_swiglu(leaves[0], None, leaves[1] if weighted else None)
    d_exact = torch.autograd.grad(exact, leaves, grad.double())
    gate, up = halves.to(device).chunk(2, dim=-1)
    agree(triton_swiglu.swiglu(gate, up, there), exact.detach(), TOLERANCE[dtype])
    d_halves, product, d_weights = triton_swiglu.swiglu_backward(grad.to(device), gate, up, there)
    agree(product, exact.detach(), TOLERANCE[dtype])
    agree(d_halves, d_exact[0], TOLERANCE[dtype])
    if weighted:
        agree(d_weights, d_exact[1], 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("k", "width"), [(1, 24), (3, 1030)])
def test_sums_of_rows_equal_the_reference_in_values_and_gradients(device, k, width, dtype):
    place = torch.randperm(4 * k).view(4, k)
    rows, grad = torch.randn(4 * k, width).to(dtype), torch.randn(4, width).to(dtype)
    there = place.to(device)
    agree(triton_rows.sum_up(rows.to(device), there), reference_sum_rows(rows.double(), place), TOLERANCE[dtype])
    assert torch.equal(triton_rows.spread(grad.to(device), there).cpu(), reference_spread_rows(grad, place))
