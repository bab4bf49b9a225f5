"""Each fast operation against its plain reference: values and gradients."""

import pytest
import torch

from model.config import ConfigError
from model.ops.grouped_mm import check_widths, examine
from tests.small_model import small_config


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


@pytest.mark.parametrize(
    ("dtype", "capability", "waits"),
    [
        (torch.bfloat16, (9, 0), False),
        (torch.bfloat16, (10, 0), False),
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (12, 0), True),
        (torch.float32, (9, 0), True),
    ],
)
def test_a_grouped_product_that_waits_for_the_host_is_told_of(dtype, capability, waits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    told = examine(small_config(hidden_size=32, moe_intermediate_size=16), dtype, torch.device("cuda"))
    assert len(told) == waits and all(f"{dtype} on sm_{capability[0]}0" in line for line in told)
    assert examine(small_config(moe_intermediate_size=15), dtype, torch.device("cpu")) == []
    with pytest.raises(ConfigError, match=r"model\.moe_intermediate_size: 15 is no multiple of"):
        examine(small_config(hidden_size=32, moe_intermediate_size=15), dtype, torch.device("cuda"))


def _assert_equal_with_gradients(op, reference, inputs, upstream, **options):
    values, gradients = [], []
    for function in (op, reference):
        values.append(function(*inputs, **options))
        gradients.append(torch.autograd.grad(values[-1], inputs, upstream, retain_graph=True))
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
