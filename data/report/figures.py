"""What the figures of pages have in common: they are SVG that lies in the page, and their text takes font and colour from it.

Equal input gives equal bytes.
"""

import re
from io import StringIO
from typing import Any

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


def svg(figure: Figure) -> str:
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
