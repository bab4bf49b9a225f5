from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.moments import moments, restore
from tests.devices import DEVICES
from tests.small_model import small_model
from train.config import RecipeError
from train.optimizer import AdamWBf16Moments, HostEMA, build_optimizer, decays

SETTINGS = SimpleNamespace(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


class Toy(nn.Module):
    """One of each kind of parameter: embedding, linear weight, stacked experts, norm."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(11, 8, generator=draw))
        self.proj = nn.Parameter(torch.randn(8, 8, generator=draw))
        self.experts = nn.Parameter(torch.randn(3, 6, 8, generator=draw))
        self.norm = nn.Parameter(torch.ones(8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first … last−1 with gradients that are a function of the step alone."""
    for step in range(first, last):
        draw = torch.Generator().manual_seed(100 + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw) * 10.0 ** torch.randint(
                -4, 1, (), generator=draw
            )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def build(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    return build_optimizer(model.named_parameters(), SETTINGS, kind)  # type: ignore[arg-type]


def test_weight_decay_acts_on_matrices_only() -> None:
    model = Toy()
    assert {name for name, p in model.named_parameters() if decays(name)} == {"embed", "proj", "experts"}
    decayed, kept = build(model, "fp32").param_groups
    assert decayed["weight_decay"] == 0.1 and len(decayed["params"]) == 3
    assert kept["weight_decay"] == 0.0 and kept["params"][0] is model.norm


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_zero_gradients_leave_a_norm_alone_and_shrink_a_matrix(kind: str) -> None:
    model = Toy()
    before = model.proj.detach().clone()
    optimizer = build(model, kind)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.norm, torch.ones(8), rtol=0, atol=0)
    torch.testing.assert_close(model.proj, before * (1 - 0.5 * 0.1))


def test_the_names_that_decay_are_those_of_the_matrices() -> None:
    for name, parameter in small_model().named_parameters():
        assert decays(name) == (parameter.ndim >= 2), name


def test_fp32_moments_are_torchs_fused_adamw() -> None:
    optimizer = build(Toy(), "fp32")
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]


def test_bf16_moments_equal_adamw_that_rounds_its_moments_after_each_step() -> None:
    model, reference = Toy(), Toy()
    optimizer = build(model, "bf16")
    plain = torch.optim.AdamW(
        [
            {"params": [p for name, p in reference.named_parameters() if decays(name)], "weight_decay": 0.1},
            {"params": [reference.norm], "weight_decay": 0.0},
        ],
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        foreach=False,
    )
    for step in range(20):
        train(model, optimizer, step, step + 1)
        train(reference, plain, step, step + 1)
        for state in plain.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(state[key].bfloat16())
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        assert torch.equal(ours, theirs), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[ours][key].float(), plain.state[theirs][key]), (name, key)


def test_bf16_moments_stay_within_their_rounding_of_fp32_moments() -> None:
    """Each rounding moves a stored moment by at most 2⁻⁸ of itself, and what is left of that decays by β.

    So v is off by at most 2⁻⁸ · Σ 0.95ᵏ = 2⁻⁸ · 20 = 8 %, √v by 4 %, m by 2⁻⁸ · 10 = 4 % of the largest |m| seen. The 50
    learning rates 0.01/(1+t) sum to 0.045, and an update is about one of them: weights differ by 8 % of 0.045 at most.
    """
    model, reference = Toy(), Toy()
    optimizer, plain = build(model, "bf16"), build(reference, "fp32")
    train(model, optimizer, 0, 50)
    train(reference, plain, 0, 50)
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        v, v_fp32 = optimizer.state[ours]["exp_avg_sq"], plain.state[theirs]["exp_avg_sq"]
        assert v.dtype == torch.bfloat16 and v_fp32.dtype == torch.float32
        torch.testing.assert_close(v.float(), v_fp32, rtol=0.08, atol=0)
        assert (ours - theirs).abs().max() < 0.08 * 0.045
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_optimizer_divides_gradients_and_skips_a_step(kind: str) -> None:
    """As `parallel.step` asks it to: nothing is touched, nothing counted, in a step that is skipped."""
    ours, expected = Toy(), Toy()
    optimizer, plain = build(ours, kind), build(expected, kind)
    train(ours, optimizer, 0, 2)
    train(expected, plain, 0, 2)
    before = {name: t.clone() for name, t in flat(moments(optimizer, ours.named_parameters()))}
    weights = [p.detach().clone() for p in ours.parameters()]
    for group in [*optimizer.param_groups, *plain.param_groups]:
        group["lr"] = 0.01
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in flat(moments(optimizer, ours.named_parameters())))
    assert all(torch.equal(p, w) for p, w in zip(ours.parameters(), weights))
    for p, q in zip(ours.parameters(), expected.parameters()):
        p.grad, q.grad = 4 * torch.ones_like(p), torch.ones_like(q)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), expected.parameters()))


def flat(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    pairs = [(f"{kind} {name}", t) for kind in ("exp_avg", "exp_avg_sq") for name, t in state[kind].items()]
    return [*pairs, ("steps", state["steps"])]


def test_bf16_moments_refuse_a_decay_that_bf16_rounds_away() -> None:
    stuck = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (stuck.float() * 0.999).bfloat16() == stuck
    settings = SimpleNamespace(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    with pytest.raises(RecipeError, match=r"^optimizer.betas: β₂ = 0.999 .*set β₂ to at most 0.9961"):
        build_optimizer(Toy().named_parameters(), settings, "bf16")


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_ten_steps_saved_and_restored_and_ten_more_are_twenty_steps(kind: str) -> None:
    whole = Toy()
    optimizer = build(whole, kind)
    train(whole, optimizer, 0, 20)

    first = Toy()
    before = build(first, kind)
    train(first, before, 0, 10)
    saved = moments(before, first.named_parameters())
    weights = {name: p.detach().clone() for name, p in first.named_parameters()}

    second = Toy()
    after = build(second, kind)
    in_place = moments(after, second.named_parameters())  # zeros, to be read into as a checkpoint is
    for key in ("exp_avg", "exp_avg_sq"):
        for name, tensor in in_place[key].items():
            assert not tensor.any()
            tensor.copy_(saved[key][name])
    in_place["steps"].copy_(saved["steps"])
    restore(after, second.named_parameters(), in_place)
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            parameter.copy_(weights[name])
    train(second, after, 10, 20)

    expected, found = moments(optimizer, whole.named_parameters()), moments(after, second.named_parameters())
    assert int(found["steps"]) == 20
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name])
        assert torch.equal(found["exp_avg"][name], expected["exp_avg"][name])
        assert torch.equal(found["exp_avg_sq"][name], expected["exp_avg_sq"][name])


def test_restoring_copies_a_state_that_lies_elsewhere() -> None:
    model, other = Toy(), Toy()
    optimizer, fresh = build(model, "fp32"), build(other, "fp32")
    train(model, optimizer, 0, 3)
    saved = moments(optimizer, model.named_parameters())
    restore(fresh, other.named_parameters(), saved)
    restored = moments(fresh, other.named_parameters())
    assert int(restored["steps"]) == 3
    assert restored["exp_avg"]["proj"] is not saved["exp_avg"]["proj"]
    assert torch.equal(restored["exp_avg"]["proj"], saved["exp_avg"]["proj"])


def test_buckets_do_not_change_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = Toy(), Toy()
    train(one, build(one, "bf16"), 0, 3)
    monkeypatch.setattr("train.optimizer.BUCKET_ELEMENTS", 64)
    optimizer = build(many, "bf16")
    assert isinstance(optimizer, AdamWBf16Moments)
    train(many, optimizer, 0, 3)
    for ours, theirs in zip(one.parameters(), many.parameters()):
        assert torch.equal(ours, theirs)


def closed_form(weights: list[Tensor], decay: float) -> Tensor:
    """emaₙ = dⁿ·θ₀ + (1−d)·Σₖ dⁿ⁻ᵏ·θₖ, in float64."""
    n = len(weights) - 1
    total = decay**n * weights[0].double()
    for k in range(1, n + 1):
        total += (1 - decay) * decay ** (n - k) * weights[k].double()
    return total


@pytest.mark.parametrize("device", DEVICES)
def test_the_average_on_the_host_is_the_closed_form(device: str) -> None:
    model = Toy().to(device)
    optimizer = build(model, "fp32")
    ema = HostEMA(dict(model.named_parameters()), decay=0.9)
    seen = [model.proj.detach().cpu().clone()]
    for step in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, (-1.0) ** step)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        ema.update()
        seen.append(model.proj.detach().cpu().clone())
    average = ema.parts()["proj"]
    assert average.dtype == torch.float32 and average.device.type == "cpu"
    torch.testing.assert_close(average.double(), closed_form(seen, 0.9), rtol=1e-6, atol=1e-6)


def test_the_average_continues_from_what_was_saved() -> None:
    model = Toy()
    optimizer, weights = build(model, "fp32"), dict(model.named_parameters())
    whole, first = HostEMA(weights, 0.99), HostEMA(weights, 0.99)
    for step in range(6):
        if step == 3:
            second = HostEMA(weights, 0.99)
            for name, average in second.parts().items():
                average.copy_(first.parts()[name])  # as a checkpoint is read
        train(model, optimizer, step, step + 1)
        whole.update()
        (first if step < 3 else second).update()
    for name, average in whole.parts().items():
        assert torch.equal(average, second.parts()[name])
