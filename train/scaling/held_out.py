"""The largest budget, left away and forecast: the only error of a law that can be measured before it is used."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from train.scaling.attempt import Attempt
from train.scaling.basins import Basin, best_runs, clusters
from train.scaling.estimate import Estimate
from train.scaling.law import Law
from train.scaling.regret import regret
from train.scaling.runs import Array, Runs

LEAST = 4  # budgets: a law of fewer than three says little
ONE = 1.2  # runs whose C differ by less are of one budget


@dataclass(frozen=True)
class HoldOut:
    """The largest budget, forecast by a fit that has not seen it.

    Attributes:
        flops: its C.
        loss: forecast for its best run's N and D, with the noise of a run; None where the rest gives no law of the loss.
        lr, batch: forecast for it; None where the rest gives no law of them.
        measured_loss, measured_lr, measured_batch: of its best cell.
        regret: what the forecast lr and batch cost there, relative; None where there is no grid.
    """

    flops: float
    loss: Estimate | None
    measured_loss: float
    lr: Estimate | None = None
    batch: Estimate | None = None
    measured_lr: float | None = None
    measured_batch: float | None = None
    regret: float | None = None


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
    best = best_runs(runs.take(there))
    held = HoldOut(flops, None, float(best.loss.min()))
    held = _with_loss(held, best, *rest)
    basin = next((basin for basin in found if basin.flops > flops / ONE), None)
    return [held if basin is None else _with_choice(held, basin, rest[0], attempt)]


def _with_loss(held: HoldOut, best: Runs, law: Law, residuals: Array | None) -> HoldOut:
    """The loss of the best run, with the interval of a single run: the law's and the scatter around it in quadrature."""
    assert best.params is not None and best.tokens is not None
    if law.loss is None or residuals is None:
        return held
    at = int(np.argmin(best.loss))
    estimate = law.loss.estimate(float(best.params[at]), float(best.tokens[at]))
    if estimate.low is None or estimate.high is None:
        return replace(held, loss=estimate)
    scatter = 1.96 * math.sqrt(float(np.sum(residuals**2)) / max(1, len(residuals) - 5)) * estimate.value
    low = estimate.value - math.hypot(estimate.value - estimate.low, scatter)
    high = estimate.value + math.hypot(estimate.high - estimate.value, scatter)
    return replace(held, loss=Estimate(estimate.value, low, high))


def _with_choice(held: HoldOut, basin: Basin, law: Law, attempt: Attempt) -> HoldOut:
    """Learning rate and batch, and what the forecast of them costs on the measured grid."""
    if law.lr is None or law.batch_tokens is None:
        return held
    size = {name: getattr(basin, name) for name in ("flops", "params", "active", "tokens")}
    lr, batch = law.lr.estimate(**size), law.batch_tokens.estimate(**size)
    cost = attempt("regret of the forecast", regret, basin, lr.value, batch.value)
    return replace(
        held,
        lr=lr,
        batch=batch,
        measured_lr=basin.minimum[0],
        measured_batch=basin.minimum[1],
        regret=None if cost is None else cost.value,
    )
