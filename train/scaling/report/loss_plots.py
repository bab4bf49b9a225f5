"""Pictures of the loss: over compute with the forecast of what was held out, and what L(N, D) leaves unexplained."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data.report.figures import GREY
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import best_runs
from train.scaling.fits.bootstrap import quantile
from train.scaling.fits.fit import Fit
from train.scaling.fits.loss_law import drop_highest
from train.scaling.fits.runs import Array, Runs
from train.scaling.law import LossLaw
from train.scaling.report.drawing import (
    AMBER,
    BLUE,
    C_LABEL,
    WIDTH,
    amount,
    bar,
    held_out,
    legend,
    line,
    logarithmic,
    once,
    panel,
    power,
    span,
)


@dataclass(frozen=True)
class Best:
    """The best allocation of a budget by L(N, D)."""

    flops: float
    flops_per_token: Estimate
    loss: Estimate


def sizes_of(runs: Runs, law: LossLaw) -> Array | None:
    """[R] the N that a law reads."""
    return runs.active if law.size == "active" else runs.params


def frontier(law: LossLaw, runs: Runs, flops: Array, points: int = 300) -> list[Best | None]:
    """The best M of each budget by L(N, D), among the sizes that were run; None where it lies outside of them.

    N goes with M as in the runs, straight between them in the logarithms: attention makes M/N greater in small models, so that
    the closed form with M = 6·N would answer another question.
    """
    n = sizes_of(runs, law)
    if n is None or runs.flops is None or runs.tokens is None:
        return [None] * len(flops)
    m, first = np.unique(runs.flops_per_token, return_index=True)
    grid = np.geomspace(m[0], m[-1], points)  # [M]
    size = np.exp(np.interp(np.log(grid), np.log(m), np.log(n[first])))
    rows = np.array([(law.E, law.A, law.B, law.alpha, law.beta), *law.draws])[:, :, None]  # [1 + draws, 5, 1]
    e, a, b, alpha, beta = rows.swapaxes(0, 1)
    found: list[Best | None] = []
    for budget in flops:
        loss = e + a * size**-alpha + b * (budget / grid) ** -beta  # [1 + draws, M]
        at = loss.argmin(axis=1)
        outside = (at == 0) | (at == points - 1)
        known = outside.mean() < 0.025  # else the interval would end where the runs do
        best = Best(float(budget), _estimate(grid[at], known), _estimate(loss.min(axis=1), known))
        found.append(None if outside[0] else best)
    return found


def loss_over_compute(fit: Fit) -> Figure | None:
    """The best loss over C: measured, by L(C) and by L(N, D), and the forecast of what was held out.

    Below the same over the first of these laws, where intervals of a few tenths of a per cent show.
    """
    if fit.runs.flops is None:
        return None
    finite = np.isfinite(fit.runs.loss)
    runs, flops = fit.runs.loss[finite], fit.runs.flops[finite]
    laws = _laws(fit, span(flops, 1.6))
    if not laws:
        return None
    measured = [(row.flops, row.best_loss) for row in fit.rows if row.edge is None]
    measured = measured or [(basin.flops, Estimate(basin.minimum[2])) for basin in fit.basins]
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    upper.plot(flops, runs, "o", color=GREY, alpha=0.35, markersize=3.5, markeredgewidth=0, label="runs")
    for axes, seen in ((upper, lambda one, c: one), (lower, laws[0].excess)):
        for law in laws:
            losses = [seen(one, c) for one, c in zip(law.loss, law.flops)]
            line(axes, law.flops, losses, law.colour, law.dashes, law.label)
        for budget, loss in measured:
            bar(axes, budget, seen(loss, budget), BLUE, "o", once(axes, "best of a budget"), size=5, zorder=5)
        for held in fit.held_out:
            if held.loss:
                there = seen(Estimate(held.measured_loss), held.flops).value
                held_out(axes, held.flops, seen(held.loss, held.flops), there)
    best = [one.value for _, one in measured] + [one.value for law in laws for one in law.loss]
    low, high = min([*best, runs.min()]), max([*best, float(np.percentile(runs, 90))])
    upper.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    upper.set_ylabel(f"loss, {fit.law.loss_unit}")
    logarithmic(lower, "x", flops, C_LABEL, power, 1.6)
    over = [laws[0].excess(loss, budget) for budget, loss in measured]
    over += [laws[0].excess(held.loss, held.flops) for held in fit.held_out if held.loss]
    over += [laws[0].excess(Estimate(held.measured_loss), held.flops) for held in fit.held_out if held.loss]
    _round_zero(lower, over)
    lower.set_ylabel(f"over {laws[0].name}, %")
    legend(upper)
    return figure


@dataclass(frozen=True)
class _Law:
    """A law of the best loss over C, as it is drawn."""

    name: str
    label: str
    colour: str
    dashes: str
    flops: Array
    loss: list[Estimate]

    def excess(self, loss: Estimate, flops: float) -> Estimate:
        """A loss at C over this law's, per cent."""
        own = float(np.interp(np.log(flops), np.log(self.flops), [one.value for one in self.loss]))
        ends = (None if end is None else 100 * (end / own - 1) for end in (loss.low, loss.high))
        return Estimate(100 * (loss.value / own - 1), *ends)


def _laws(fit: Fit, x: Array) -> list[_Law]:
    found = []
    if fit.allocation and (law := fit.allocation.best_loss):
        label = f"L(C) = {law.E:.3g} + {power(law.k)}/C^{law.gamma:.3g}"
        found.append(_Law("L(C)", label, BLUE, "-", x, [law.estimate(flops=c) for c in x]))
    points = [point for point in frontier(fit.law.loss, fit.runs, x) if point] if fit.law.loss else []
    if points:
        flops, losses = np.array([point.flops for point in points]), [point.loss for point in points]
        found.append(_Law("L(N, D)", "best allocation by L(N, D)", AMBER, "--", flops, losses))
    return found


def loss_fitted(fit: Fit) -> Figure | None:
    """Each size's best run: its loss against what L(N, D) says of it."""
    found = _against(fit)
    if not found:
        return None
    figure, axes = panel(3.8)
    ends = [min(found.fitted.min(), found.measured.min()), max(found.fitted.max(), found.measured.max())]
    axes.plot(ends, ends, color=GREY, linewidth=1.2)
    _dots(axes, found.fitted, found.measured, found.used)
    axes.set_xlabel(f"L(N, D), {fit.law.loss_unit}")
    axes.set_ylabel("measured loss")
    legend(axes)
    return figure


def loss_residuals(fit: Fit) -> Figure | None:
    """What L(N, D) leaves unexplained, over tokens per parameter: a good law leaves no pattern."""
    found = _against(fit)
    if not found:
        return None
    figure, axes = panel(3.8)
    axes.axhline(0, color=GREY, linewidth=1.2)
    if fit.noise:
        axes.axhspan(
            -196 * fit.noise, 196 * fit.noise, color=GREY, alpha=0.18, linewidth=0, label="noise between seeds, 95 %"
        )
    left = 100 * (found.measured / found.fitted - 1)
    low, high = left[found.used].min(), left[found.used].max()
    room = 0.12 * (high - low)
    shown = np.clip(left, low - room, high + room)  # what was left out can lie far away
    _dots(
        axes,
        found.ratio,
        shown,
        found.used,
        f" (up to {left[~found.used].max():+.0f} %)" if not found.used.all() else "",
    )
    logarithmic(axes, "x", found.ratio, "D/N, tokens per parameter", amount, 1.2)
    axes.set_ylabel("measured over fitted loss, %")
    legend(axes)
    return figure


@dataclass(frozen=True)
class _Compared:
    """[R] runs and L(N, D) of each.

    Attributes:
        ratio: D/N.
        used: those that the law was fitted to.
    """

    ratio: Array
    measured: Array
    fitted: Array
    used: NDArray[np.bool_]


def _against(fit: Fit) -> _Compared | None:
    """The runs among which L(N, D) was fitted, the highest losses left out (`fit_runs`)."""
    law = fit.law.loss
    runs = best_runs(fit.runs.take(np.isfinite(fit.runs.loss)))
    sizes = sizes_of(runs, law) if law else None
    if law is None or sizes is None or runs.tokens is None:
        return None
    count = next(len(found.residuals) for found in fit.losses.values() if found.law == law)
    used = drop_highest(runs.loss, len(runs) - count)
    return _Compared(runs.tokens / sizes, runs.loss, law(sizes, runs.tokens), used)


def _round_zero(axes: Axes, estimates: list[Estimate]) -> None:
    """Scale an axis so that values and, unless they are many times as large, their intervals are seen."""
    values = [abs(one.value) for one in estimates]
    ends = [abs(end) for one in estimates for end in (one.low, one.high) if end is not None]
    reach = max(values, default=0.1)
    reach = 1.2 * max([reach, *(end for end in ends if end < 10 * max(reach, 0.1))])
    axes.set_ylim(-reach, reach)
    axes.axhline(0, color=GREY, linewidth=0.8)


def _dots(axes: Axes, x: Array, y: Array, used: NDArray[np.bool_], how: str = "") -> None:
    axes.plot(x[used], y[used], "o", color=BLUE, alpha=0.6, markersize=4.5, markeredgewidth=0)
    if not used.all():
        axes.plot(
            x[~used], y[~used], "o", color=BLUE, markersize=5, markerfacecolor="none", label=f"left out of the fit{how}"
        )


def _estimate(values: Array, known: bool) -> Estimate:
    """The first value, with the interval of the others."""
    if len(values) == 1 or not known:
        return Estimate(float(values[0]))
    low, high = quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
