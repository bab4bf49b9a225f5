"""Figures of the report of a preparation."""

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from data.report.figures import GREY, STYLE, WIDTH, svg


def lengths(counts: Mapping[str, Mapping[int, int]], colours: Mapping[str, str], unit: str) -> str:
    """Documents by length, a line for each source.

    Args:
        counts: source → k → documents of 2^(k−1) … 2^k − 1 units.
        unit: what is counted: "bytes" or "tokens".
    """
    exponents = {k for of_source in counts.values() for k in of_source}
    if not exponents:
        return ""
    places = range(min(exponents), max(exponents) + 1)
    edges = [k - 1 for k in places] + [places[-1]]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6)
        for source, of_source in counts.items():
            axes.stairs(
                [of_source.get(k, 0) for k in places], edges, color=colours[source], linewidth=1.8, baseline=None
            )
        _logarithmic(axes, "documents")
        ticks = edges[:: max(1, len(edges) // 7)]
        axes.set_xticks(ticks, [_short(1 << k, 1024) if k >= 0 else "0" for k in ticks])
        axes.set_xlabel(f"{unit} in a document")
        return svg(figure)


def clusters(sizes: Mapping[int, int], colour: str) -> str:
    """Groups of documents that resemble each other, by how many there are in one: 2, 3, then in powers of two."""
    if not sizes:
        return ""
    binned: dict[int, int] = {}
    for size, groups in sizes.items():
        place = size.bit_length() - 1 if size > 3 else size - 2
        binned[place] = binned.get(place, 0) + groups
    places = range(max(*binned, 5) + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6)
        axes.bar(places, [binned.get(place, 0) for place in places], 0.85, color=colour)
        _logarithmic(axes, "groups")
        axes.set_xticks(places, [_short(1 << place, 1024) if place > 1 else str(place + 2) for place in places])
        axes.set_xlabel("documents in a group (from 4 on: up to the next number)")
        axes.grid(axis="x", visible=False)
        return svg(figure)


def bytes_per_token(own: Mapping[str, float], reference: Mapping[str, float], colours: Mapping[str, str]) -> str:
    """Bytes per token of each source, with the reference tokenizer's as a ring."""
    if not own:
        return ""
    sources = list(own)[::-1]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.3 * len(sources))
        for place, source in enumerate(sources):
            if source in reference:
                axes.plot([own[source], reference[source]], [place, place], color=GREY, linewidth=1.2, zorder=1)
                axes.plot([reference[source]], [place], "o", markersize=7, markerfacecolor="none", markeredgecolor=GREY)
            axes.plot([own[source]], [place], "o", markersize=8, color=colours[source])
        labels = [name if len(name) <= 24 else f"{name[:23]}…" for name in sources]
        axes.set_yticks(range(len(sources)), labels, parse_math=False)  # a name may hold a dollar sign
        axes.set_ylim(-0.6, len(sources) - 0.4)
        axes.set_xlim(0, max([*own.values(), *reference.values()]) * 1.08)
        axes.set_xlabel("bytes per token")
        axes.tick_params(axis="y", length=0)
        return svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _logarithmic(axes: Axes, counted: str) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # so that a single one shows
    axes.yaxis.set_major_formatter(lambda value, _: _short(round(value), 1000))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(counted)


def _short(value: int, thousand: int) -> str:
    """20000 → "20k"; a thousand is 1000 or 1024."""
    unit = ""
    for larger in "kMGT":
        if value < thousand:
            break
        value, unit = value // thousand, larger
    return f"{value}{unit}"
