"""RMSNorm and its gradients in C++ and in Triton against PyTorch's, and what it keeps."""

import pytest
import torch

from model.layers import RMSNorm
from model.ops import cpu
from model.ops.rms_norm import _rms_norm_backward, reference_rms_norm, rms_norm

EPS = 1e-6
WIDTHS = [3, 24, 96, 137]  # less than a vector, a part of one beside whole ones


def exact(x, weight, upstream, eps=EPS):
    """The norm and the gradients of x and weight, in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    normed = inputs[0] * (inputs[0].square().mean(-1, keepdim=True) + eps).rsqrt() * inputs[1]
    return [normed, *torch.autograd.grad(normed, inputs, upstream.double())]


def close(found, expected, rtol=2e-6):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=rtol * float(b.detach().abs().max()))


@pytest.fixture(params=["C++", "PyTorch"])
def path(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu, "library", lambda name: None)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # at 1e-3 eps is as large as the mean square
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients_are_those_of_the_equation(path, width, scale):
    x, weight = (scale * torch.randn(3, 45, width)).requires_grad_(), torch.randn(width, requires_grad=True)
    upstream = torch.randn(3, 45, width)
    for norm in (rms_norm, reference_rms_norm):
        normed = norm(x, weight, EPS)
        found = [normed, *torch.autograd.grad(normed, (x, weight), upstream)]
        close(found, exact(x, weight, upstream))


def test_a_part_of_wider_rows_is_read_where_it_lies():
    wide, weight = torch.randn(2, 7, 30, requires_grad=True), torch.randn(20, requires_grad=True)
    part, upstream = wide[..., :20], torch.randn(2, 7, 20)
    normed = rms_norm(part, weight, EPS)
    assert normed.is_contiguous()
    assert normed.grad_fn.saved_tensors[0].data_ptr() == wide.data_ptr()
    close([normed, *torch.autograd.grad(normed, (part, weight), upstream)], exact(part, weight, upstream))
    # and of columns, which no kernel reads so
    across = torch.randn(20, 7).T
    close([rms_norm(across, weight, EPS)], exact(across, weight, torch.ones(7, 20))[:1])


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_rows_are_no_error(path, shape):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(24, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == shape and not weight.grad.any()


def test_the_number_of_threads_changes_no_bit():
    x, weight, upstream = torch.randn(300, 50), torch.randn(50), torch.randn(300, 50)
    inverse, found = torch.rand(300), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([rms_norm(x, weight, EPS), *_rms_norm_backward(upstream, x, weight, inverse)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_a_row_with_nan_stays_alone():
    x = torch.randn(4, 24)
    x[1, 3] = torch.nan
    normed = rms_norm(x, torch.ones(24), EPS)
    assert normed[1].isnan().all() and normed[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_computes_in_fp32_and_keeps_its_input_as_it_is(dtype):
    x, layer = torch.randn(5, 48).to(dtype).requires_grad_(), RMSNorm(48)
    normed = layer(x)
    assert normed.dtype is dtype and torch.equal(normed, reference_rms_norm(x, layer.weight, EPS))
    kept, _, inverse = normed.grad_fn.saved_tensors
    assert kept.data_ptr() == x.data_ptr() and inverse.shape == (5,) and inverse.dtype is torch.float32
    upstream = torch.randn(5, 48).to(dtype)
    found = torch.autograd.grad(normed, (x, layer.weight), upstream)
    assert [d.dtype for d in found] == [dtype, torch.float32]
    _, dx, d_weight = exact(x, layer.weight, upstream)
    close(found[:1], [dx], rtol=torch.finfo(dtype).eps)
    close(found[1:], [d_weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, width, stride", [(5, 24, 24), (3, 137, 150), (300, 512, 576), (0, 8, 8)])
def test_triton_norms_as_the_equation_says(device, n, width, stride, dtype):
    from model.ops.triton import rms_norm as kernels

    x = torch.randn(n, stride, device=device).to(dtype)[:, :width]
    weight, upstream = torch.randn(width, device=device), torch.randn(n, width, device=device).to(dtype)
    normed, inverse = kernels.rms_norm(x, weight, EPS)
    found = [normed, *kernels.rms_norm_backward(upstream, x, weight, inverse)]
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    expected = exact(x, weight, upstream)
    if n:
        close(found[:2], expected[:2], rtol=max(torch.finfo(dtype).eps, 2e-6))
        close(found[2:], expected[2:], rtol=5e-6)
    else:
        assert not found[2].any()


def test_triton_sums_the_gradient_of_weight_over_more_rows_than_it_has_programs(device, monkeypatch):
    from model.ops.triton import rms_norm as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "NUMBERS", 64)
    x, weight, upstream = (torch.randn(*shape, device=device) for shape in ((50, 20), (20,), (50, 20)))
    _, inverse = kernels.rms_norm(x, weight, EPS)
    close(kernels.rms_norm_backward(upstream, x, weight, inverse), exact(x, weight, upstream)[1:])
