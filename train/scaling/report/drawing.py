"""Logarithmic axes with plain numbers, and what every picture of a fit is drawn with.

Colour-blind readers tell blue, amber and red apart, and shape or dashes say the same again; all stand out on white and on black.
"""

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, log10
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.scaling.estimate import Estimate
from train.scaling.fits.runs import Array

BLUE, AMBER, RED, GREEN, VIOLET = "#4269d0", "#e0a10a", "#f2604d", "#3ca951", "#a463f2"
WIDTH = 5.0  # inches: text is as large as the page's where the page is wide, and readable on a narrow one
SMALL = 8.5  # points, of legends
C_LABEL = "C, training FLOPs without embedding and head"


def panel(height: float = 3.4, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def legend(axes: Axes, columns: int = 2) -> None:
    """Below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=SMALL, handlelength=2.4
        )


def logarithmic(
    axes: Axes,
    which: Literal["x", "y"],
    values: Iterable[float],
    label: str,
    write: Callable[[float], str],
    room: float,
) -> None:
    """Scale an axis to positive values with some room (a ratio) at both ends, and write round numbers on it."""
    found = [value for value in values if value > 0]
    low, high = min(found) / room, max(found) * room
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high), f"{which}label": label})
    axis = axes.xaxis if which == "x" else axes.yaxis
    places = ticks(low, high)
    axis.set_ticks(places, [write(place) for place in places])
    axis.set_ticks([], minor=True)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between two positive ones: as many of each decade as fit, or as many decades."""
    first, last = floor(log10(low)), ceil(log10(high))
    for steps in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        places = [m * 10.0**k for k in range(first, last + 1) for m in steps if low <= m * 10.0**k <= high]
        if len(places) <= most:
            return places
    return places[:: ceil(len(places) / most)]


def power(value: float, digits: int = 3) -> str:
    """0.00022 as 2.2e-4, 3.2e14 as 3.2e14, 0.25 as 0.25."""
    if 1e-2 <= abs(value) < 999.5:
        return f"{value:.{digits}g}"
    if abs(value) < 1e-12:  # what is left of a difference
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):.{digits}g}e{int(exponent)}"


def amount(value: float) -> str:
    """20480 as 20.5k, 2.1e9 as 2.1B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def span(values: Iterable[float], room: float, points: int = 60) -> Array:
    """[points] evenly in the logarithm over some values, with room (a ratio) at both ends."""
    found = [value for value in values if value > 0]
    return np.geomspace(min(found) / room, max(found) * room, points)


def line(axes: Axes, x: Array, y: Sequence[Estimate], colour: str, dashes: str, label: str) -> None:
    """A law with its 95 % interval, where it has one."""
    axes.plot(x, [one.value for one in y], color=colour, linestyle=dashes, linewidth=1.9, label=label, zorder=3)
    low, high = (np.array([getattr(one, end) for one in y], float) for end in ("low", "high"))  # None is nan: a gap
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1)


def bar(
    axes: Axes, x: float, y: Estimate, colour: str, marker: str, label: str | None, size: float = 6, **style: Any
) -> None:
    """An estimate with its interval as a vertical bar."""
    reach = None if y.low is None or y.high is None else [[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]]
    drawn: dict[str, Any] = {"color": colour, "markersize": size} | style
    axes.errorbar([x], [y.value], yerr=reach, fmt=marker, elinewidth=1.4, capsize=2, **drawn)
    if label:  # of the mark alone, in its place among the lines of the legend
        axes.plot([], [], marker, label=label, **drawn)


def held_out(axes: Axes, flops: float, forecast: Estimate, measured: float) -> None:
    """What a fit without a budget says of it, and what was measured there."""
    bar(axes, flops, forecast, RED, "s", once(axes, "forecast without this budget"), size=5, zorder=6)
    ring: dict[str, Any] = {"color": RED, "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
    axes.plot(flops, measured, "D", label=once(axes, "measured there"), zorder=7, **ring)


def once(axes: Axes, label: str) -> str | None:
    """A label for the first of many marks; None for the others, which the legend leaves out."""
    return None if label in axes.get_legend_handles_labels()[1] else label
