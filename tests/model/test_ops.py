"""Each fast operation against its plain reference: values and gradients."""

import pytest
import torch

from model.config import ConfigError
from model.ops.grouped_mm import check_widths, fused_grouped_mm, reference_grouped_mm
from model.ops.swiglu import reference_swiglu, swiglu


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(output, inputs, seed=1):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


# grouped matrix product -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [[5, 3, 4, 2], [0, 14, 0, 0], [7, 0, 0, 7], [0, 0, 0, 14], [0, 0, 0, 0]],
    ids=["all busy", "one busy", "two empty", "last only", "no rows"],
)
def test_grouped_mm_equals_the_loop_in_values_and_gradients(counts):
    x, weight = leaves((sum(counts), 12), (4, 8, 12))
    n = torch.tensor(counts)
    fast, slow = fused_grouped_mm(x, weight, n), reference_grouped_mm(x, weight, n)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(gradients(fast, (x, weight)), gradients(slow, (x, weight))):
        torch.testing.assert_close(a, b)


def test_reference_grouped_mm_gives_each_row_its_own_expert():
    x, weight = torch.randn(5, 4), torch.randn(3, 8, 4)
    out = reference_grouped_mm(x, weight, torch.tensor([2, 0, 3]))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(out[row], weight[expert] @ x[row])


# cross-entropy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_width_that_the_grouped_product_cannot_read_is_refused(dtype, step):
    """Rows of 16 bytes: multiples of 4 numbers in fp32, of 8 in bf16."""
    check_widths(8 * step, 3 * step, dtype)
    with pytest.raises(ConfigError, match=rf"moe_intermediate_size: {3 * step + 2} .* write {4 * step}$"):
        check_widths(8 * step, 3 * step + 2, dtype)


def test_swiglu_equals_the_reference_in_values_and_gradients():
    gate, up = (4 * torch.randn(7, 2 * 12, requires_grad=True)).chunk(
        2, dim=-1
    )  # halves of one product, as in the experts
    _assert_equal_with_gradients(swiglu, reference_swiglu, (gate, up), torch.randn(7, 12))


def _assert_equal_with_gradients(op, reference, inputs, upstream, **options):
    values, gradients = [], []
    for function in (op, reference):
        values.append(function(*inputs, **options))
        gradients.append(torch.autograd.grad(values[-1], inputs, upstream, retain_graph=True))
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
