"""The largest budget, left away and forecast: the only error of a law that can be measured before it is used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from train.scaling.estimate import Estimate
from train.scaling.fits.attempt import Attempt
from train.scaling.fits.basins import Basin, best_runs, clusters, seed_noise
from train.scaling.fits.bootstrap import of_a_run, scatter
from train.scaling.fits.regret import regret
from train.scaling.fits.runs import Array, Runs
from train.scaling.law import Law

LEAST = 4  # budgets: a law of fewer than three says little
LOSS_PARAMETERS = 5  # of L(N, D)
SIZES = ("flops", "params", "active", "tokens")
ONE = 1.2  # runs whose C differ by less are of one budget


@dataclass(frozen=True)
class HoldOut:
    """The largest budget, forecast by a fit that has not seen it.

    What was measured is one run: the best cell of the budget's grid, as `basins.best_cell` finds it, where there is a grid; else
    the best of the budget's runs. Its loss is the mean over its seeds.

    Attributes:
        flops: C.
        params, tokens: N and D of the measured run.
        loss: forecast for this N and D, with the noise of a run; None where the rest gives no law of the loss.
        lr, batch: forecast for it; None where the rest gives no law of them.
        measured_loss, measured_lr, measured_batch: of the measured run.
        measured_seeds: how many runs its loss is the mean of.
        inside: whether the forecast lr and batch lie inside the measured grid; None where there is no grid, or no forecast.
        regret: what the forecast lr and batch cost there, relative; None where it is unknown, as outside of the grid.
        noise: relative sd of the loss over seeds: a regret below it is none.
    """

    flops: float
    params: float
    tokens: float
    loss: Estimate | None
    measured_loss: float
    measured_seeds: int = 1
    lr: Estimate | None = None
    batch: Estimate | None = None
    measured_lr: float | None = None
    measured_batch: float | None = None
    inside: bool | None = None
    regret: float | None = None
    noise: float | None = None


Refit = Callable[
    [Runs], tuple[Law, Array | None]
]  # the law of some runs, and the residuals of its loss, ln measured − ln fit


def forecast_largest(runs: Runs, found: Sequence[Basin], refit: Refit, attempt: Attempt) -> list[HoldOut]:
    """The largest of the budgets, if there are three others: of the basins, else of groups of three runs of nearly equal C.

    Runs of a larger C than any budget are left away too.
    """
    if runs.flops is None or runs.params is None or runs.tokens is None:
        return []
    groups = clusters(np.array([basin.flops for basin in found]) if found else runs.flops, ONE)
    values, least = (np.array([b.flops for b in found]), 1) if found else (runs.flops, 3)
    budgets = [values[groups == g].mean() for g in range(groups.max() + 1) if (groups == g).sum() >= least]
    if len(budgets) < LEAST:
        return []
    flops = float(max(budgets))
    rest = attempt("the forecast of the largest budget", refit, runs.take(runs.flops < flops / ONE))
    if rest is None:
        return []
    there = (runs.flops >= flops / ONE) & (runs.flops <= flops * ONE) & np.isfinite(runs.loss)
    law, residuals = rest
    around = None if residuals is None else scatter(residuals, LOSS_PARAMETERS)
    grids = [basin for basin in found if flops / ONE < basin.flops < flops * ONE and basin.tokens]
    if grids:
        grid = min(grids, key=lambda basin: basin.minimum[2])
        return [replace(_of_grid(grid, law, around, attempt), noise=seed_noise(runs))]
    best = best_runs(runs.take(there))
    return [replace(_of_run(best.take([int(np.argmin(best.loss))]), law, around), noise=seed_noise(runs))]


def _of_run(run: Runs, law: Law, around: float | None) -> HoldOut:
    """Without a grid: the loss alone."""
    size = {name: float(c[0]) for name in SIZES if (c := getattr(run, name)) is not None}
    return HoldOut(size["flops"], size["params"], size["tokens"], _loss(law, size, around), float(run.loss[0]))


def _of_grid(basin: Basin, law: Law, around: float | None, attempt: Attempt) -> HoldOut:
    """Loss, learning rate and batch, and what the forecast of the two costs on the measured grid."""
    size = {name: value for name in SIZES if (value := getattr(basin, name)) is not None}
    lr, batch, loss = basin.minimum
    held = HoldOut(
        basin.flops,
        size["params"],
        size["tokens"],
        _loss(law, size, around),
        loss,
        measured_seeds=int(basin.seeds[basin.best]),
        measured_lr=lr,
        measured_batch=batch,
    )
    if law.lr is None or law.batch_tokens is None:
        return held
    held = replace(held, lr=law.lr.estimate(**size), batch=law.batch_tokens.estimate(**size))
    assert held.lr is not None and held.batch is not None
    cost = attempt("regret of the forecast", regret, basin, held.lr.value, held.batch.value)
    if cost is None:
        return held
    if not cost.inside:
        attempt.problems.append(
            f"held out: C = {held.flops:.3g}: the forecast lr {held.lr.value:.3g} and batch {held.batch.value:.4g} lie outside of "
            "the grid, so that what they cost is unknown; add runs there"
        )
    return replace(held, inside=cost.inside, regret=cost.value if cost.inside else None)


def _loss(law: Law, size: dict[str, float], around: float | None) -> Estimate | None:
    """The forecast of a single run's loss."""
    if law.loss is None or law.loss.size not in size:
        return None
    return of_a_run(law.loss.estimate(size[law.loss.size], size["tokens"]), around)
