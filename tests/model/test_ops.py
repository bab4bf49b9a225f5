"""Each fast operation against its plain reference: values and gradients."""

import pytest
import torch

from model.config import ConfigError
from model.ops.grouped_mm import check_widths


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(output, inputs, seed=1):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


# cross-entropy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_width_that_the_grouped_product_cannot_read_is_refused(dtype, step):
    """Rows of 16 bytes: multiples of 4 numbers in fp32, of 8 in bf16."""
    check_widths(8 * step, 3 * step, dtype)
    with pytest.raises(ConfigError, match=rf"moe_intermediate_size: {3 * step + 2} .* write {4 * step}$"):
        check_widths(8 * step, 3 * step + 2, dtype)


def _assert_equal_with_gradients(op, reference, inputs, upstream, **options):
    values, gradients = [], []
    for function in (op, reference):
        values.append(function(*inputs, **options))
        gradients.append(torch.autograd.grad(values[-1], inputs, upstream, retain_graph=True))
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
