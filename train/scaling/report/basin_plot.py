"""The learning rate × batch basin of one budget: how much worse than the best cell each other one is.

What matters is the band of near-optimal losses (`train.scaling.fits.basins`): a law is right where its choice lies in it.
"""

from itertools import pairwise
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.tri import LinearTriInterpolator, Triangulation, UniformTriRefiner

from data.report.figures import GREY
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import Basin
from train.scaling.fits.runs import Array
from train.scaling.law import PowerLaw, Variable
from train.scaling.report.drawing import RED, SMALL, amount, logarithmic, panel, power

VARIABLES: tuple[Variable, ...] = ("flops", "params", "active", "tokens")
# viridis from its bright end: the best cells are the brightest, which holds on white, on black and for colour-blind readers
COLOURS = ListedColormap(["#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154"])
BLACK = "#15181d"  # over the colours, on any page
HALO = withStroke(linewidth=3.2, foreground="white")  # so that black shows on dark colours


def choice(law: PowerLaw | None, basin: Basin) -> Estimate | None:
    """What a law gives at a basin's budget; None where the basin does not have the law's variables."""
    known = {name: getattr(basin, name) for name in VARIABLES if getattr(basin, name) is not None}
    return law.estimate(**known) if law and set(law.exponents) <= set(known) else None


def on_a_line(lr: Array, batch: Array) -> bool:
    """Whether nothing lies between some cells."""
    logs = np.log(np.stack([lr, batch]))
    return bool(np.linalg.matrix_rank(logs - logs.mean(axis=1, keepdims=True), tol=1e-6) < 2)


def levels(band: float) -> list[float]:
    """Where the colours change, per cent: the band, and twice as much each time."""
    return [0.0, *(band * 2**k for k in range(len(COLOURS.colors) - 1))]  # type: ignore[arg-type]


def draw_basin(basin: Basin, lr: PowerLaw | None, batch: PowerLaw | None, key: bool = False) -> Figure:
    """One budget's basin.

    Args:
        lr, batch: the law whose choice is marked.
        key: with the explanation of colours and marks.
    """
    figure, axes = panel(4.1 if key else 3.0, 4.8 if key else 3.9)
    band, worse, finite = 100 * basin.band, 100 * np.maximum(basin.excess, 0), np.isfinite(basin.loss)
    shades = BoundaryNorm([*levels(band), np.inf], COLOURS.N)
    _contours(axes, basin, worse, finite, band, shades)
    for rows, width in ((finite & ~basin.near, 0.6), (basin.near, 1.5)):
        axes.scatter(
            basin.lr[rows],
            basin.batch[rows],
            s=26,
            c=worse[rows],
            cmap=COLOURS,
            norm=shades,
            edgecolors=BLACK,
            linewidths=width,
            zorder=4,
        )
    axes.scatter(basin.lr[~finite], basin.batch[~finite], s=30, c=RED, marker="x", zorder=4)
    if basin.surface:
        _cross(axes, basin.surface.lr, basin.surface.batch, BLACK, "+", 9)
    axes.plot(
        *basin.minimum[:2], "*", color="white", markeredgecolor=BLACK, markeredgewidth=0.9, markersize=13, zorder=6
    )
    chosen = choice(lr, basin), choice(batch, basin)
    if chosen[0] and chosen[1]:
        _cross(axes, chosen[0], chosen[1], RED, "D", 7)
    logarithmic(axes, "x", [*basin.lr, *([chosen[0].value] if chosen[0] else [])], "peak learning rate", power, 1.3)
    logarithmic(axes, "y", [*basin.batch, *([chosen[1].value] if chosen[1] else [])], "batch, tokens", amount, 1.3)
    axes.grid(False)
    if key:
        axes.set_title("\n".join(wrap(basin.label, 44)), loc="left", fontsize=9)
        figure.legend(handles=_key(band), loc="outside lower left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def draw_key(band: float) -> Figure:
    """The explanation of colours and marks that all basins of a page share."""
    figure = Figure(figsize=(5.6, 1.2))
    figure.legend(
        handles=_key(band), loc="center left", ncols=2, frameon=False, fontsize=9, borderpad=0, borderaxespad=0
    )
    return figure


def _contours(axes: Axes, basin: Basin, worse: Array, finite: Array, band: float, shades: BoundaryNorm) -> None:
    """Between the cells, where there are enough of them; straight in the logarithms of both."""
    x, y = basin.lr[finite], basin.batch[finite]
    if len(x) < 9 or len(np.unique(x)) < 3 or len(np.unique(y)) < 3 or on_a_line(x, y):
        return
    coarse, mean = Triangulation(np.log(x), np.log(y)), worse[finite]
    fine, values = UniformTriRefiner(coarse).refine_field(mean, LinearTriInterpolator(coarse, mean), subdiv=2)
    mesh = Triangulation(np.exp(fine.x), np.exp(fine.y), fine.triangles)
    edges = [*levels(band), max(float(values.max()), levels(band)[-1]) + 1]
    axes.tricontourf(mesh, values, levels=edges, cmap=COLOURS, norm=shades, zorder=1)
    axes.tricontour(mesh, values, levels=[band], colors=BLACK, linewidths=1.5, zorder=3)


def _cross(axes: Axes, x: Estimate, y: Estimate, colour: str, marker: str, size: float) -> None:
    """A point with the intervals of both coordinates."""
    for along, across, draw in ((x, y, axes.hlines), (y, x, axes.vlines)):
        if along.low is not None and along.high is not None:
            draw(across.value, along.low, along.high, colors=colour, linewidth=1.8, path_effects=[HALO], zorder=5)
    axes.plot(
        x.value, y.value, marker, color=colour, markeredgecolor=BLACK, markersize=size, path_effects=[HALO], zorder=7
    )


def _key(band: float) -> list[Line2D | Patch]:
    edges = [f"{edge:.2g}" for edge in levels(band)]
    names = [f"within {edges[1]} % of the minimum"] + [f"{a} to {b} % above it" for a, b in pairwise(edges[1:])]
    names.append(f"more than {edges[-1]} % above it")
    shades = [Patch(facecolor=COLOURS(n), edgecolor=GREY, linewidth=0.6, label=name) for n, name in enumerate(names)]

    def mark(marker: str, label: str, **style: Any) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="", label=label, **style)

    return [
        *shades,
        mark("o", "run; thick: near-optimal", markerfacecolor="none", markeredgecolor=GREY),
        mark("*", "best run", color="white", markeredgecolor=GREY, markersize=11),
        mark("+", "minimum of the fitted surface", color=GREY, markersize=9),
        mark("D", "the law's choice, 95 % interval", color=RED, markersize=6),
        mark("x", "diverged", color=RED),
    ]
