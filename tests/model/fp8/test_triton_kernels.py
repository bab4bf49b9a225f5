"""Linear maps and networks in FP8 by the Triton kernels, against the same by the reference: forward, and every gradient."""

import pytest
import torch
from torch import Tensor

from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Kernels, Reference
from tests.triton import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

from model.ops.fp8.triton import TritonKernels

D, F, M = 144, 200, 150


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """‖error‖ / ‖expected‖ of what two roundings of a sum to bf16 make, and of the few numbers in E4M3 that they move by a step."""
    for one, other in zip(found, expected):
        error = (one.cpu().float() - other.float()).norm() / other.float().norm()
        assert one.shape == other.shape and error < 3e-3, float(error)


def run(kernels: Kernels, device: torch.device, form: str) -> list[Tensor]:
    """An output and all gradients."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "linear": [(2, 75, D), (F, D), (M, D)],
        "feed_forward": [(2, 75, D), (F, D), (F, D), (D, F)],
        "experts": [(M, D), (M,), (3, 2 * F, D), (3, D, F)],
    }[form]
    x, *weights = (torch.randn(shape, generator=random) for shape in shapes)
    x = x.bfloat16().to(device).requires_grad_()
    weights = [(w * 0.1).to(device).requires_grad_() for w in weights]
    fp8 = Fp8(kernels)
    if form == "linear":
        outputs = fp8.linear(x, *weights)
    elif form == "feed_forward":
        outputs = (fp8.feed_forward(x, *weights),)
    else:
        outputs = (fp8.experts(x, torch.tensor([22, 0, 128], device=device), *weights),)
    grads = [torch.randn(y.shape, generator=random).to(device, y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *weights], grads)]


@pytest.mark.parametrize("form", ["linear", "feed_forward", "experts"])
def test_it_makes_no_difference_whether_triton_or_the_reference_computes(device: torch.device, form: str) -> None:
    assert_alike(run(TritonKernels(), device, form), run(Reference(), torch.device("cpu"), form))
