"""Figures of the report as SVG that lies in the page: their text takes font and colour from the page, so dark pages work.

Equal input gives equal bytes.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Observable's categorical palette; tells ten sources apart on white and on black.
PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
GREY = "#8a8f98"  # of axes; readable on both
WIDTH = 5.6  # inches: 403 of the page's pixels, what a narrow window has
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "rorqual",  # ids of markers and clips: the same in every run
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}


def lengths(counts: Mapping[str, Mapping[int, int]], colours: Mapping[str, str], unit: str) -> str:
    """Documents by length, stacked by source.

    Args:
        counts: source → k → documents of 2^(k−1) … 2^k − 1 units.
        unit: what is counted: "bytes" or "tokens".
    """
    exponents = sorted({k for of_source in counts.values() for k in of_source})
    if not exponents:
        return ""
    places = range(exponents[0], exponents[-1] + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6)
        _stack(
            axes,
            {source: [of_source.get(k, 0) for k in places] for source, of_source in counts.items()},
            places,
            colours,
        )
        every = max(1, len(places) // 7)
        axes.set_xticks([k - 0.5 for k in places][::every], [power(k - 1) for k in places][::every])
        axes.set_xlabel(f"{unit} in a document")
        axes.set_ylabel("documents")
        axes.grid(axis="x", visible=False)
        return _svg(figure)


def clusters(sizes: Mapping[int, int], colour: str) -> str:
    """Groups of documents that resemble each other, by how many there are in one; from 8 on in powers of two."""
    if not sizes:
        return ""
    binned: dict[int, int] = {}
    for size, groups in sizes.items():
        low = size if size < 8 else 1 << size.bit_length() - 1
        binned[low] = binned.get(low, 0) + groups
    lows = sorted(binned)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6)
        axes.bar(range(len(lows)), [binned[low] for low in lows], 0.8, color=colour)
        axes.set_xticks(range(len(lows)), [str(low) if low < 8 else f"{low}–{2 * low - 1}" for low in lows])
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.set_xlabel("documents in a group")
        axes.set_ylabel("groups")
        axes.grid(axis="x", visible=False)
        return _svg(figure)


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
        axes.set_yticks(range(len(sources)), sources, parse_math=False)  # a name may hold a dollar sign
        axes.set_ylim(-0.6, len(sources) - 0.4)
        axes.set_xlim(0, max([*own.values(), *reference.values()]) * 1.08)
        axes.set_xlabel("bytes per token")
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def power(exponent: int) -> str:
    """2^exponent in short: "512", "4k", "1M"."""
    prefix, rest = divmod(max(exponent, 0), 10)
    return f"{1 << rest}{['', 'k', 'M', 'G', 'T'][prefix]}" if exponent >= 0 else "0"


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _stack(axes: Axes, values: Mapping[str, Sequence[int]], places: Sequence[int], colours: Mapping[str, str]) -> None:
    bottom = [0] * len(places)
    for source, heights in values.items():
        axes.bar(places, heights, 0.9, bottom=bottom, color=colours[source])
        bottom = [low + height for low, height in zip(bottom, heights)]


def _svg(figure: Figure) -> str:
    """The element alone, without a background, sizes in points, and ids that other figures of the page would repeat."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with StringIO() as file:
        figure.savefig(file, format="svg", metadata=nothing)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return re.sub(r'<g id="[a-zA-Z0-9_.]+_\d+">', "<g>", text)
