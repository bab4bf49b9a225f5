"""The kernel of AdamW with moments in bf16, against the PyTorch operations that it stands for."""

import pytest
import torch

from tests.devices import NEEDS_GPU
from train.optimizer import AdamWBf16Moments


@pytest.mark.parametrize("skips", [False, True])
def test_the_kernel_makes_the_step_of_its_twin(device, skips):
    from model.ops.triton.adamw import BLOCK, adamw_

    size, step, lr = BLOCK + 37, 3, 1e-2  # a block and a part
    weight, gradient = torch.randn(size, device=device), torch.randn(size, device=device)
    m, v = (0.1 * torch.randn(size, device=device)).bfloat16(), (0.01 * torch.rand(size, device=device)).bfloat16()
    twin = torch.nn.Parameter(weight.cpu().clone())
    optimizer = AdamWBf16Moments([twin], lr=lr, weight_decay=0.1)
    twin.grad = gradient.cpu().clone()
    state = {"step": torch.tensor(step - 1.0), "exp_avg": m.cpu().clone(), "exp_avg_sq": v.cpu().clone()}
    optimizer.state[twin] = state
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.7), torch.tensor(float(skips))
    optimizer.step()
    factors = torch.tensor([-lr / (1 - 0.9**step), (1 - 0.95**step) ** 0.5], device=device)
    divisor, skip = torch.tensor(1.7, device=device), torch.tensor(float(skips), device=device)
    before = weight.clone()
    adamw_(weight, gradient, m, v, factors, divisor, skip, (0.9, 0.95), 1e-8, 1 - lr * 0.1)
    assert torch.equal(weight, before) == skips
    torch.testing.assert_close(weight.cpu(), twin.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        m.cpu(), state["exp_avg"], rtol=2**-8, atol=0
    )  # a rounding of bf16, should fp32 fall on a tie
    torch.testing.assert_close(v.cpu(), state["exp_avg_sq"], rtol=2**-8, atol=0)


@NEEDS_GPU
@pytest.mark.parametrize("skipped", [None, 0, 1], ids=["never asked", "none skipped", "second step skipped"])
def test_steps_on_a_gpu_are_those_on_a_cpu(skipped):
    start, gradients = (
        [torch.randn(37, 21), torch.randn(21)],
        [[torch.randn(37, 21), torch.randn(21)] for _ in range(3)],
    )
    found = []
    for place in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(t.to(place, copy=True)) for t in start]
        optimizer = AdamWBf16Moments(parameters, lr=1e-2, weight_decay=0.1)
        for number, step in enumerate(gradients):
            if skipped is not None:
                optimizer.grad_scale = torch.tensor(1.7, device=place)
                optimizer.found_inf = torch.tensor(float(skipped and number == 1), device=place)
            for parameter, gradient in zip(parameters, step):
                parameter.grad = gradient.to(place, copy=True)
            optimizer.step()
        found.append(
            [[p.detach(), *map(optimizer.state[p].get, ("step", "exp_avg", "exp_avg_sq"))] for p in parameters]
        )
    for (weight, steps, m, v), (weight_there, steps_there, m_there, v_there) in zip(*found):
        assert steps == steps_there.cpu() == 3 - bool(skipped)
        torch.testing.assert_close(weight_there.cpu(), weight, rtol=1e-4, atol=1e-4)  # a moment may fall on a tie
        for there, here in ((m_there, m), (v_there, v)):
            torch.testing.assert_close(there.cpu(), here, rtol=2**-7, atol=1e-6)
