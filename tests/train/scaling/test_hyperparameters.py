"""Basins and the laws of learning rate and batch, on made ladders whose laws are known."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.coverage_hyper import LADDERS, Ladder
from train.scaling.errors import ScalingError
from train.scaling.fits.basins import basins, best_runs, same_size, seed_noise
from train.scaling.fits.hyperparameters import fit_hyperparameters
from train.scaling.fits.runs import Runs

EXACT = Ladder(("flops",), "surface", noise=0.0)


def grid(loss: list[list[float]], lr: list[float], batch: list[float], n: float = 1e6, d: float = 2e7) -> Runs:
    """One basin: a row of losses for each learning rate."""
    across = np.array(loss, float)
    rates, batches = np.meshgrid(lr, batch, indexing="ij")
    full = np.full(across.size, 1.0)
    return Runs.of(
        params=n * full, tokens=d * full, lr=rates.ravel(), batch=batches.ravel(), loss=across.ravel(), seed=0 * full
    )


def joined(*tables: Runs) -> Runs:
    columns = ("params", "tokens", "flops", "lr", "batch", "loss", "seed")
    return Runs.of(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in columns})


# 2.000 in the middle; 0.25 % of it is 0.005. Learning rate 2e-3 and batch 2048 are the middle.
BOWL = [[2.040, 2.020, 2.030], [2.020, 2.000, 2.006], [2.050, 2.030, 2.060]]
RATES, BATCHES = [1e-3, 2e-3, 4e-3], [1024.0, 2048.0, 4096.0]


def test_near_optimal_cells_are_within_a_quarter_per_cent_or_twice_the_noise() -> None:
    runs = grid(BOWL, RATES, BATCHES)
    assert basins(runs)[0].near.sum() == 1
    assert basins(runs, noise=0.002)[0].near.sum() == 2  # 0.4 %: 2.006 too
    assert basins(runs, noise=0.001)[0].near.sum() == 1  # 0.2 % is less than 0.25 %


def test_a_basin_whose_band_is_inside_has_no_edges() -> None:
    basin = basins(grid(BOWL, RATES, BATCHES))[0]
    assert basin.minimum == (2e-3, 2048.0, 2.0)
    assert basin.edges == () and basin.advice is None


def test_a_minimum_at_the_edge_names_the_cells_to_add() -> None:
    basin = basins(grid([row[:2] for row in BOWL[:2]], RATES[:2], BATCHES[:2]))[0]
    assert basin.edges == ("lr high", "batch high")
    assert basin.advice is not None and "add runs with lr above 0.002, batch above 2048" in basin.advice


def test_a_cell_that_diverged_covers_its_side() -> None:
    diverged = grid([*BOWL[:2], [np.nan, np.inf, np.nan]], RATES, BATCHES)
    basin = basins(diverged)[0]
    assert basin.edges == () and np.isinf(basin.loss).sum() == 3 and not basin.near[np.isinf(basin.loss)].any()


def test_seeds_of_a_cell_are_averaged_and_measure_the_noise() -> None:
    again = replace(
        grid(BOWL, RATES, BATCHES).take([4, 4, 0]), loss=np.array([2.02, 2.01, 2.04]), seed=np.array([1.0, 2.0, 1.0])
    )
    runs = joined(grid(BOWL, RATES, BATCHES), again)
    basin = basins(runs)[0]
    assert len(basin.loss) == 9 and np.isclose(basin.loss[basin.seeds == 3].item(), 2.01)
    assert basin.minimum == pytest.approx((2e-3, 2048.0, 2.01))  # 2.006 is a single run
    assert basin.excess.min() == pytest.approx(2.006 / 2.01 - 1)
    # 2.00, 2.02, 2.01 have variance 1e-4 with 2 degrees of freedom, the two of 2.04 add none with 1: sd 0.0082 of 2.01
    assert np.isclose(seed_noise(runs), np.sqrt(2e-4 / 3) / 2.01, rtol=1e-3)
    assert seed_noise(grid(BOWL, RATES, BATCHES)) is None


def test_a_bad_cell_that_was_repeated_is_not_the_best() -> None:
    again = replace(grid(BOWL, RATES, BATCHES).take([0, 0]), seed=np.array([1.0, 2.0]))
    assert basins(joined(grid(BOWL, RATES, BATCHES), again))[0].minimum == (2e-3, 2048.0, 2.0)


def test_models_of_one_size_that_use_different_parts_of_it_are_apart() -> None:
    tables = [replace(grid(BOWL, RATES, BATCHES), active=np.full(9, active)) for active in (1e5, 2e5)]
    tables[1] = replace(tables[1], loss=tables[1].loss - 0.1)
    columns = ("params", "active", "tokens", "lr", "batch", "loss")
    runs = Runs.of(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in columns})
    assert [basin.minimum[2] for basin in basins(runs)] == pytest.approx([2.0, 1.9])
    assert best_runs(runs).loss.tolist() == pytest.approx([2.0, 1.9])


def test_rounding_does_not_cut_a_size_in_two() -> None:
    runs = Runs.of(params=[1e6, 2e6, 2e6], tokens=[1e7, 1.015e7, 1.03e7], loss=[3.0, 2.0, 2.0])
    assert same_size(runs).tolist() == [0, 1, 1]


def test_runs_without_a_grid_are_no_basin() -> None:
    isoflop = grid([[2.1]], [2e-3], [2048.0], n=3e6)
    assert len(basins(joined(grid(BOWL, RATES, BATCHES), isoflop))) == 1
    with pytest.raises(ScalingError, match="1 sizes: none has a grid of 4; add runs that differ in lr and batch"):
        basins(isoflop)


def test_the_form_of_a_basin_has_the_minimum_that_was_put_there() -> None:
    for basin in basins(EXACT.runs(seed=0)):
        lr, batch = (float(law(flops=basin.flops)) for law in EXACT.laws())
        assert basin.surface is not None
        assert np.allclose([basin.surface.lr.value, basin.surface.batch.value], [lr, batch])
        assert np.allclose(basin.surface.curvature, [[0.02, -0.008], [-0.008, 0.02]])


@pytest.mark.parametrize("variables", [("flops",), ("params", "tokens")])
def test_the_surface_finds_the_laws_that_losses_without_noise_follow(variables: tuple[str, ...]) -> None:
    ladder = Ladder(variables, "surface", noise=0.0)
    fit = fit_hyperparameters(basins(ladder.runs(seed=0)), ladder.variables, method="surface")
    for law, truth in zip((fit.lr, fit.batch), ladder.laws()):
        assert np.isclose(law.coefficient, truth.coefficient) and np.allclose(
            list(law.exponents.values()), list(truth.exponents.values())
        )
    assert fit.residual is not None and fit.residual < 1e-9


def test_the_band_draws_a_line_through_near_optimal_cells() -> None:
    # At 6·1e6·2e7 FLOPs the band is the cell (2e-3, 2048); at 64 times as many (1e-3, 8192): lr ∝ C^-1/6, batch ∝ C^1/3.
    small = grid(BOWL, RATES, BATCHES)
    large = grid(BOWL, [r / 2 for r in RATES], [4 * b for b in BATCHES], n=8e6, d=1.6e8)
    fit = fit_hyperparameters(basins(joined(small, large)), ("flops",), method="band", draws=20)
    assert np.isclose(fit.lr.exponents["flops"], -1 / 6) and np.isclose(fit.batch.exponents["flops"], 1 / 3)
    assert np.isclose(fit.batch(flops=1.2e14), 2048) and fit.cells == 2


def test_fits_are_a_function_of_runs_and_seed() -> None:
    found = basins(Ladder(("flops",), "surface").runs(seed=1))
    one, again, other = (fit_hyperparameters(found, ("flops",), method="surface", seed=seed) for seed in (3, 3, 4))
    assert one == again and one.lr.draws != other.lr.draws and one.lr.coefficient == other.lr.coefficient


@pytest.mark.parametrize("ladder", [ladder for ladder in LADDERS if ladder.claimed], ids=lambda ladder: ladder.name)
def test_intervals_contain_the_truth(ladder: Ladder) -> None:
    inside = [ladder.inside(seed) for seed in range(20)]
    assert all(
        sum(row[name] for row in inside) >= 17 for name in inside[0]
    )  # 19 are expected; 16 or fewer come in 1.6 % of cases


def test_laws_of_too_few_variables_are_reported_and_have_wide_intervals() -> None:
    # Best values follow N and D; C alone, off the compute-optimal line, does not determine them.
    found = basins(Ladder(("params", "tokens"), "surface", noise=0.0005).runs(seed=0), noise=0.0005)
    right = fit_hyperparameters(found, ("params", "tokens"), method="surface")
    wrong = fit_hyperparameters(found, ("flops",), method="surface")
    assert not any("scatters" in warning for warning in right.warnings)
    assert any("best lr of 9 basins scatters by" in warning for warning in wrong.warnings)
    widths = [i.high - i.low for i in (wrong.lr.estimate(flops=6e14), right.lr.estimate(params=2e6, tokens=5e7))]
    assert widths[0] > 3 * widths[1]


def test_edges_are_among_the_warnings_of_a_fit() -> None:
    runs = EXACT.runs(seed=0)
    assert fit_hyperparameters(basins(runs), ("flops",), method="surface").warnings == ()
    small = basins(runs)[0]
    cut = runs.take((runs.flops > 1.1 * small.flops) | (runs.lr < 1.1 * small.minimum[0]))
    warnings = fit_hyperparameters(basins(cut), ("flops",), method="surface").warnings
    assert [f"{small.label}: " in w and f"add runs with lr above {small.minimum[0]:.4g}" in w for w in warnings] == [
        True
    ]


def test_one_budget_is_refused() -> None:
    one = basins(grid(BOWL, RATES, BATCHES))
    with pytest.raises(
        ScalingError, match="basins = 1: a law in flops needs at least 2; add a grid of lr × batch at another budget"
    ):
        fit_hyperparameters(one, ("flops",), method="surface")
    twins = basins(joined(grid(BOWL, RATES, BATCHES), grid(BOWL, RATES, BATCHES, n=2e6, d=1e7)))
    with pytest.raises(ScalingError, match="one budget cannot tell an exponent"):
        fit_hyperparameters(twins, ("flops",), method="band")


def test_variables_that_grow_together_are_refused() -> None:
    with pytest.raises(
        ScalingError, match=r"hardly any change of .*exponents cannot be told apart; add a grid .* or fit in flops"
    ):
        fit_hyperparameters(basins(EXACT.runs(seed=0)), ("params", "tokens"), method="surface")
    with pytest.raises(ScalingError, match="column active = missing"):
        fit_hyperparameters(basins(EXACT.runs(seed=0)), ("active", "tokens"), method="surface")


def test_runs_that_all_diverged_are_refused() -> None:
    with pytest.raises(ScalingError, match=r"all runs diverged; add runs with lr below 0.001"):
        basins(grid(np.full((3, 3), np.nan).tolist(), RATES, BATCHES))
    with pytest.raises(ScalingError, match="column batch = missing"):
        basins(Runs.of(params=[1e6], tokens=[1e7], lr=[1e-3], loss=[2.0]))


def test_grids_without_a_minimum_are_refused() -> None:
    falling = [[2.3, 2.2, 2.1], [2.2, 2.1, 2.0], [2.1, 2.0, 1.8]]
    runs = joined(grid(falling, RATES, BATCHES), grid(falling, RATES, BATCHES, d=8e7))
    with pytest.raises(
        ScalingError, match=r"the fitted loss falls in some direction; .*add runs with lr above 0.004, batch above 4096"
    ):
        fit_hyperparameters(basins(runs), ("flops",), method="surface")
    line = joined(*(grid([[2.1], [2.0], [2.1], [2.3]], [*RATES, 8e-3], BATCHES[:1], d=d) for d in (2e7, 4e7)))
    with pytest.raises(ScalingError, match="too few different lr and batch"):
        fit_hyperparameters(basins(line), ("flops",), method="surface")
