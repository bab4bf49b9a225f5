"""IsoFLOP rows against a surface whose minima are known in closed form, and on the Chinchilla points."""

import re

import numpy as np
import pytest

from tests.train.scaling.chinchilla import chinchilla
from train.scaling.errors import ScalingError
from train.scaling.fits.isoflop import fit_allocation, isoflop_rows
from train.scaling.fits.loss_law import fit_loss, optimum
from train.scaling.fits.runs import Array, Runs
from train.scaling.law import LossLaw

# With α = β and rows around the optimum, loss is a hyperbolic cosine of ln M: the parabola turns exactly where the surface does.
# a = β/(α + β) = 1/2, γ = αβ/(α + β) = 0.175, M_opt = 6·√(A/B)^(1/α)·√(C/6) = √(6·C).
EVEN = LossLaw(E=1.8, A=400.0, B=400.0, alpha=0.35, beta=0.35)
BUDGETS = 1e18 * 4.0 ** np.arange(5)


def rows_of(law: LossLaw, budgets: Array = BUDGETS, shift: float = 1.0, noise: float = 0.0, seed: int = 0) -> Runs:
    """Five sizes a factor of 1.5 apart at each budget, the middle one `shift` times the optimum."""
    flops = np.repeat(budgets, 5)
    params = (
        np.array([optimum(law, c).params for c in flops]) * shift * np.tile(1.5 ** np.arange(-2.0, 3.0), len(budgets))
    )
    loss = law(params, flops / (6 * params))
    return Runs.of(
        params=params, flops=flops, loss=loss * np.exp(noise * np.random.default_rng(seed).normal(size=len(loss)))
    )


def test_a_known_surface_gives_its_allocation_and_its_best_loss() -> None:
    rows = isoflop_rows(rows_of(EVEN))
    assert [row.flops for row in rows] == BUDGETS.tolist() and all(row.edge is None for row in rows)
    for row in rows:
        assert row.optimum.value == pytest.approx(np.sqrt(6 * row.flops), rel=1e-9)
        assert row.best_loss.value == pytest.approx(optimum(EVEN, row.flops).loss, rel=1e-4)
    allocation = fit_allocation(rows)
    assert allocation.M.exponents["flops"] == pytest.approx(0.5) and allocation.M.coefficient == pytest.approx(6**0.5)
    assert allocation.D.exponents["flops"] == pytest.approx(0.5) and allocation.D.coefficient == pytest.approx(6**-0.5)
    best = allocation.best_loss
    assert best is not None and best.gamma == pytest.approx(0.175, rel=1e-3) and np.isclose(best.E, 1.8, rtol=1e-3)


def test_noise_is_in_the_intervals_of_rows_and_laws() -> None:
    # 95 % of 40 repetitions are 38, with a standard deviation of 1.4
    hits = np.zeros(4)
    for seed in range(40):
        rows = isoflop_rows(rows_of(EVEN, noise=0.002, seed=seed))
        allocation = fit_allocation(rows, draws=100)
        hits += [
            optimum(EVEN, BUDGETS[2]).params * 6 in rows[2].optimum,
            optimum(EVEN, BUDGETS[2]).loss in rows[2].best_loss,
            np.sqrt(6e22) in allocation.M.estimate(flops=1e22),
            allocation.best_loss is not None and optimum(EVEN, 1e22).loss in allocation.best_loss.estimate(1e22),
        ]
    assert np.all(hits >= 35), hits


def test_models_of_one_compute_a_token_that_differ_in_size_are_not_averaged() -> None:
    runs = rows_of(EVEN)
    twice = Runs.of(
        params=np.concatenate([runs.params, 3 * runs.params]),  # type: ignore[operator, list-item]
        flops=np.concatenate([runs.flops, runs.flops]),  # type: ignore[arg-type]
        tokens=np.concatenate([runs.tokens, runs.tokens]),  # type: ignore[arg-type]
        loss=np.concatenate([runs.loss, runs.loss + 0.5]),
        seed=np.zeros(2 * len(runs)),
    )
    for found, alone in zip(isoflop_rows(twice), isoflop_rows(runs), strict=True):
        assert found.loss.tolist() == alone.loss.tolist()


def test_a_minimum_outside_of_the_measured_sizes_is_an_edge_and_no_answer() -> None:
    small, large = (isoflop_rows(rows_of(EVEN, shift=shift)) for shift in (0.2, 5.0))
    assert {row.edge for row in small} == {"high"} and {row.edge for row in large} == {"low"}
    assert all(row.optimum.low is None for row in small + large)
    assert re.search("C = 1e.18: .* add runs with M above", str(small[0].advice))
    with pytest.raises(ScalingError, match=r"budgets = 0 with a minimum .* add runs with M below"):
        fit_allocation(large)


def test_a_row_that_bends_the_wrong_way_has_an_edge_on_its_lower_side() -> None:
    flops, params = np.full(5, 1e18), 1e8 * 2.0 ** np.arange(5)
    row = isoflop_rows(Runs.of(params=params, flops=flops, loss=3 - np.array([0.2, 0.05, 0, 0.1, 0.3])))[0]
    assert row.curvature < 0 and row.edge == "high"


def test_seeds_count_by_their_mean_and_learning_rates_by_their_best() -> None:
    loss = [3.1, 3.3, 3.0, 2.9, 3.1, 3.2, 3.4]  # sizes 1 1 2 2 2 4 4
    runs = Runs.of(
        params=np.array([1, 1, 2, 2, 2, 4, 4]) * 1e8,
        flops=np.full(7, 1e18),
        loss=loss,
        lr=[1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 1e-3, 2e-3],
        seed=[0, 1, 0, 0, 1, 0, 0],
    )
    assert isoflop_rows(runs)[0].loss == pytest.approx(
        [3.2, 3.0, 3.2]
    )  # (3.1 + 3.3)/2; min(3.0, (2.9 + 3.1)/2); min(3.2, 3.4)


def test_three_sizes_have_intervals_only_where_the_seeds_tell_the_noise() -> None:
    runs = rows_of(EVEN)
    three = runs.take(np.arange(len(runs)) % 5 < 3)
    assert isoflop_rows(three)[0].optimum.low is None and not fit_allocation(isoflop_rows(three)).M.draws
    known = isoflop_rows(three, noise=0.0005)
    assert known[0].optimum.low is not None and len(fit_allocation(known, draws=10).M.draws) == 10


def test_rows_of_the_chinchilla_points_and_their_loss_law_allocate_alike() -> None:
    # The points are digitised, and their budgets scatter by 10 %: each moves along the fitted law to the budget it was meant for.
    runs = chinchilla()
    assert runs.params is not None and runs.flops is not None and runs.tokens is not None
    law = fit_loss(runs.params, runs.tokens, runs.loss).law
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    nearest = np.argmin(np.abs(np.log(runs.flops[:, None] / budgets)), axis=1)
    meant = budgets[nearest]
    near = np.abs(np.log(runs.flops / meant)) < 0.12
    moved = runs.loss * law(runs.params, meant / (6 * runs.params)) / law(runs.params, runs.tokens)
    rows = isoflop_rows(Runs.of(params=runs.params[near], flops=meant[near], loss=moved[near]))
    allocation = fit_allocation(rows)
    assert allocation.M.exponents["flops"] == pytest.approx(law.beta / (law.alpha + law.beta), abs=0.05)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (Runs.of(loss=[3.0, 2.9, 3.1]), "column flops = missing: IsoFLOP needs"),
        (Runs.of(params=[1e8, 2e8, 4e8], flops=[1e18] * 3, loss=[np.nan] * 3), "loss = no number in all 3 runs: they diverged"),
        (Runs.of(params=[1e8, 2e8, 1e8, 2e8], flops=[1e18, 1e18, 2e18, 2e18], loss=[3, 2.9, 2.8, 2.7]),
         "sizes = 2 at most in one budget: .* add 1 or more"),
        (Runs.of(params=[1e8, 1e8, 1e8, 2e8], flops=[1e18] * 4, loss=[3, 2.9, 2.8, 2.7]), "sizes = 2 at most in one budget"),
    ],
)  # fmt: skip
def test_runs_without_a_row_are_refused_in_one_line(runs: Runs, says: str) -> None:
    with pytest.raises(ScalingError) as refusal:
        isoflop_rows(runs)
    assert re.search(says, str(refusal.value)) and "\n" not in str(refusal.value)


def test_one_budget_is_no_allocation() -> None:
    rows = isoflop_rows(rows_of(EVEN, budgets=np.array([1e18])))
    with pytest.raises(ScalingError, match=r"budgets = 1 .* add runs of 3 sizes at another C"):
        fit_allocation(rows)
