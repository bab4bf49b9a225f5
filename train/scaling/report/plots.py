"""Pictures of a fit: what was measured, the laws through it with their intervals, and published laws beside them.

Every picture is a matplotlib Figure, which the page takes as SVG and the folder of pictures as PNG. One for which the runs have
nothing is not drawn. Blue, amber, green and violet are this fit's methods, grey is what others published, red what was held out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.report.figures import GREY
from train.scaling.estimate import Estimate
from train.scaling.fits.fit import Fit
from train.scaling.fits.isoflop import IsoFlop
from train.scaling.fits.runs import Array
from train.scaling.law import Law, PowerLaw, load_law, shipped_laws
from train.scaling.report.basin_plot import choice, draw_basin
from train.scaling.report.drawing import (
    AMBER,
    BLUE,
    C_LABEL,
    GREEN,
    RED,
    SMALL,
    VIOLET,
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
from train.scaling.report.loss_plots import frontier, loss_fitted, loss_over_compute, loss_residuals

METHODS = ((BLUE, "-"), (AMBER, "--"), (GREEN, "-."), (VIOLET, ":"))
PUBLISHED: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))  # dashes
Part = Literal["lr", "batch_tokens", "flops_per_token"]  # of a law
SYMBOLS = {"flops": "C", "params": "N", "active": "N_active", "tokens": "D"}


def figures(fit: Fit) -> Iterator[tuple[str, Figure]]:
    """Every picture that the fit has something for, with its name, one after the other."""
    for number, basin in enumerate(fit.basins, start=1):
        figure = draw_basin(basin, fit.law.lr, fit.law.batch_tokens, key=True)
        yield f"basin-{number:02}-{power(basin.flops)}", figure
    for name, drawn in over_compute(fit).items():
        if drawn:
            yield name, drawn


def over_compute(fit: Fit) -> dict[str, Figure | None]:
    """The pictures of the whole fit; None where the runs have nothing for one."""
    return {
        "lr": hyperparameter(fit, LR),
        "batch": hyperparameter(fit, BATCH),
        "lr-chosen": chosen(fit, LR),
        "batch-chosen": chosen(fit, BATCH),
        "isoflop": isoflop(fit),
        "allocation": allocation(fit),
        "loss": loss_over_compute(fit),
        "loss-fitted": loss_fitted(fit),
        "loss-residuals": loss_residuals(fit),
    }


def formula(law: PowerLaw) -> str:
    """0.312 · C^−0.125."""
    factors = [f"{SYMBOLS[name]}^{exponent:.3g}".replace("-", "−") for name, exponent in law.exponents.items()]
    return " · ".join([power(law.coefficient).replace("-", "−"), *factors])


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter: its name in basins, its part of a law, its axis, and how its values are written."""

    name: Literal["lr", "batch"]
    part: Literal["lr", "batch_tokens"]
    title: str
    unit: str
    write: Callable[[float], str]


LR = Hyper("lr", "lr", "peak learning rate", "", power)
BATCH = Hyper("batch", "batch_tokens", "batch", ", tokens", amount)


def hyperparameter(fit: Fit, of: Hyper) -> Figure | None:
    """The best learning rate or batch over C: near-optimal runs, minima of the basins, laws of C fitted and published."""
    if not fit.basins:
        return None
    figure, axes = panel(4.8)
    flops = [basin.flops for basin in fit.basins]
    x = span(flops, 1.6)
    near = [(basin.flops, value) for basin in fit.basins for value in getattr(basin, of.name)[basin.near]]
    logarithmic(axes, "x", flops, C_LABEL, power, 1.6)
    logarithmic(axes, "y", [value for _, value in near], of.title + of.unit, of.write, 2)
    axes.plot(*zip(*near), "o", color=GREY, alpha=0.4, markersize=4, markeredgewidth=0, label="near-optimal runs")
    for basin in fit.basins:
        if basin.surface:
            minimum = getattr(basin.surface, of.name)
            bar(axes, basin.flops, minimum, GREY, "o", once(axes, "minimum of a grid's surface"), size=5, zorder=4)
    laws = {key: law for key, law in _fitted(fit, of).items() if of_compute(law)}
    for (key, law), (colour, dashes) in zip(laws.items(), METHODS, strict=False):
        line(axes, x, [law.estimate(flops=c) for c in x], colour, dashes, f"{key}: {formula(law)}")
    for held in fit.held_out:
        forecast, measured = (held.lr, held.measured_lr) if of is LR else (held.batch, held.measured_batch)
        if forecast and measured:
            held_out(axes, held.flops, forecast, measured)
    _published(axes, fit, x, of.part)
    legend(axes)
    return figure


def chosen(fit: Fit, of: Hyper) -> Figure | None:
    """What laws of (N, D) give at each grid, against the near-optimal runs there."""
    fitted = {key: law for key, law in _fitted(fit, of).items() if not of_compute(law)}
    if not fit.basins or not fitted:
        return None
    figure, axes = panel(4.8)
    near = [value for basin in fit.basins for value in getattr(basin, of.name)[basin.near]]
    ends = [min(near) / 1.5, max(near) * 1.5]
    logarithmic(axes, "x", ends, f"{of.title} that the law gives{of.unit}", of.write, 1.1)
    logarithmic(axes, "y", ends, f"near-optimal {of.title}{of.unit}", of.write, 1.1)
    axes.plot(ends, ends, color=GREY, linewidth=1.2)
    for (key, law), (colour, _), mark in zip(fitted.items(), METHODS, "osD^", strict=False):
        _against(axes, fit, of, law, colour, mark, f"{key}: {formula(law)}")
    for published, theirs in _laws(of.part):
        if not of_compute(theirs):
            _against(axes, fit, of, theirs, GREY, "x", f"{published.name}: {formula(theirs)}")
    legend(axes, columns=1)
    return figure


def of_compute(law: PowerLaw) -> bool:
    """Whether it can be drawn over C."""
    return set(law.exponents) == {"flops"}


def isoflop(fit: Fit) -> Figure | None:
    """Loss over M of each budget, the parabola in ln M through it, and its minimum."""
    if not fit.rows:
        return None
    figure, axes = panel(4.0)
    shades = colormaps["viridis"](np.linspace(0.2, 0.85, len(fit.rows)))
    named = range(0, len(fit.rows), ceil(len(fit.rows) / 8))
    for number, (row, shade) in enumerate(zip(fit.rows, shades, strict=True)):
        colour = (float(shade[0]), float(shade[1]), float(shade[2]))
        axes.plot(row.flops_per_token, row.loss, "o", color=colour, markersize=5)
        x = span(row.flops_per_token, 1.0)
        axes.plot(x, parabola(row, x), "-" if row.edge is None else ":", color=colour, linewidth=1.6)
        if number in named:
            end = (row.flops_per_token[-1], row.loss[-1])
            axes.annotate(
                power(row.flops), end, (7, 0), textcoords="offset points", va="center", fontsize=SMALL, clip_on=True
            )
        if row.edge is None:
            axes.plot(row.optimum.value, row.best_loss.value, "v", color=RED, markersize=7, zorder=5)
            if row.optimum.low is not None and row.optimum.high is not None:
                axes.hlines(row.best_loss.value, row.optimum.low, row.optimum.high, colors=RED, linewidth=1.6, zorder=4)
    lowest, highest = (pick([pick(row.loss) for row in fit.rows]) for pick in (min, max))
    top = min(
        highest, 1.2 * max(min(row.loss) for row in fit.rows)
    )  # a model far off its budget is not what the row is about
    axes.set_ylim(lowest - 0.05 * (top - lowest), top + 0.05 * (top - lowest))
    measured = np.concatenate([row.flops_per_token for row in fit.rows])
    logarithmic(axes, "x", [*measured, measured.max() * 1.5], "M, training FLOPs per token", power, 1.2)
    axes.set_ylabel(f"loss, {fit.law.loss_unit}")
    return figure


def parabola(row: IsoFlop, flops_per_token: Array) -> Array:
    """The loss that a row's parabola has at some M."""
    return np.asarray(row.best_loss.value + row.curvature * np.log(flops_per_token / row.optimum.value) ** 2)


def allocation(fit: Fit) -> Figure | None:
    """The best M over C: minima of the rows, the law through them, what L(N, D) says, and published laws."""
    inner = [row for row in fit.rows if row.edge is None]
    loss_law = fit.law.loss
    if not (inner or fit.allocation or loss_law):
        return None
    figure, axes = panel(4.4)
    flops = [row.flops for row in inner] or ([] if fit.runs.flops is None else [*fit.runs.flops])
    x = span(flops, 1.6)
    values = [row.optimum.value for row in inner]
    if fit.allocation:
        law = fit.allocation.M
        line(axes, x, [law.estimate(flops=c) for c in x], BLUE, "-", f"IsoFLOP: {formula(law)}")
        values += [float(law(flops=c)) for c in x]
    if loss_law:
        best = [point for point in frontier(loss_law, fit.runs, x) if point]
        if best:
            line(
                axes, np.array([p.flops for p in best]), [p.flops_per_token for p in best], AMBER, "--", "from L(N, D)"
            )
            values += [point.flops_per_token.value for point in best]
    logarithmic(axes, "x", flops, C_LABEL, power, 1.6)
    logarithmic(axes, "y", values, "M of the best loss, FLOPs per token", power, 1.5)
    for row in inner:
        bar(axes, row.flops, row.optimum, BLUE, "o", once(axes, "minimum of a row"), zorder=5)
    _published(axes, fit, x, "flops_per_token")
    legend(axes)
    return figure


def _fitted(fit: Fit, of: Hyper) -> dict[str, PowerLaw]:
    return {key: getattr(hyper, of.name) for key, hyper in fit.hyper.items()}


def _against(axes: Axes, fit: Fit, of: Hyper, law: PowerLaw, colour: str, mark: str, label: str) -> None:
    """Near-optimal runs from the lowest to the highest, with the middle in their logarithms, over what a law gives there."""
    for basin in fit.basins:
        if given := choice(law, basin):
            near = getattr(basin, of.name)[basin.near]
            middle = Estimate(float(np.exp(np.log(near).mean())), float(near.min()), float(near.max()))
            bar(axes, given.value, middle, colour, mark, once(axes, label), size=5, alpha=0.8)


def _laws(name: Part) -> list[tuple[Law, PowerLaw]]:
    """Published laws that have a part; the law of a ladder has a family."""
    published = [law for law in map(load_law, shipped_laws()) if law.family is None]
    return [(law, theirs) for law in published if (theirs := getattr(law, name)) is not None]


def _published(axes: Axes, fit: Fit, x: Array, name: Part) -> None:
    """Published laws over C, inside the limits that the runs gave the axes."""
    low, high = axes.get_ylim()
    for (law, theirs), dashes in zip(_laws(name), PUBLISHED, strict=False):
        if of_compute(theirs):
            places, values = x, theirs(flops=x)
            style: Any = {"linestyle": dashes, "linewidth": 1.5}
        else:
            there = [(basin.flops, one.value) for basin in fit.basins if (one := choice(theirs, basin))]
            places, values = np.array(there).reshape(-1, 2).T
            style = {"linestyle": "", "marker": "x", "markersize": 5}
        if len(values):
            off = " (below)" if values.max() < low else " (above)" if values.min() > high else ""
            axes.plot(places, values, color=GREY, label=law.name + off, **style)
