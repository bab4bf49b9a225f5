"""A picture of a run's schedules, one panel for each value over the tokens consumed."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.config import RecipeError
from train.schedule import Schedule, as_points

INK, QUIET, GRID = "#1c2733", "#6b7785", "#e6eaee"
PANELS = {  # label, colour, height
    "lr": ("learning rate", "#0b6bb0", 3.2),
    "batch": ("global batch\n(tokens)", "#0f8a6d", 1.9),
    "gamma": ("γ  step of the\nbalancing bias", "#b0560b", 1.0),
    "alpha": ("α  weight of the\nbalance loss", "#7d3fa0", 1.0),
    "lambda": ("λ  weight of the\nMTP losses", "#b02a4c", 1.0),
}


def plot_schedule(schedule: Schedule, path: str | Path) -> None:
    """Draw learning rate, batch, γ, α and λ of a run over its tokens into a .png, .svg or .pdf file.

    Raises:
        RecipeError: the file name has another ending.
        OSError: the folder is missing, or the disk is full.
    """
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise RecipeError(f"plot = {str(path)!r}: must end in .png, .svg or .pdf; write for example schedule.png")
    with replace_file(path) as temporary:
        draw(schedule).savefig(temporary, format=kind, dpi=160)


def draw(schedule: Schedule) -> Any:
    """The matplotlib Figure; nothing is drawn on a screen and no global state is touched."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    unit, letter = _unit(schedule.tokens)
    end = schedule.tokens / unit
    config = schedule.config
    figure = Figure(figsize=(9.5, 9.0), facecolor="white", layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.02))
    panels = figure.subplots(len(PANELS), sharex=True, height_ratios=[height for _, _, height in PANELS.values()])
    axes = dict(zip(PANELS, panels, strict=True))

    tokens = _sample_points(schedule)
    rates = [schedule.learning_rate(t) for t in tokens]
    _curve(axes["lr"], [t / unit for t in tokens], rates, PANELS["lr"][1])
    for name, value in (
        ("batch", config.batch_tokens),
        ("gamma", config.gamma),
        ("alpha", config.alpha),
        ("lambda", config.lambda_),
    ):
        _steps(axes[name], [(start / unit, held) for start, held in as_points(value)], end, name)
    _label_rates(axes["lr"], tokens, rates, unit)
    for name, axis in axes.items():
        _dress(axis, PANELS[name][0], end)
    axes["batch"].yaxis.set_major_formatter(lambda value, _: _amount(value) if value else "0")
    axes["lr"].yaxis.set_major_formatter(lambda value, _: _exponent(value))
    for name in ("gamma", "alpha", "lambda"):
        axes[name].set_yticks([])
        axes[name].spines["left"].set_visible(False)
    panels[-1].set_xlabel(f"tokens consumed ({letter})" if letter else "tokens consumed", color=INK, labelpad=8)
    _title(figure, schedule)
    return figure


def _title(figure: Any, schedule: Schedule) -> None:
    config = schedule.config
    name = config.preset or f"shape {config.shape}"
    sizes = schedule.batches()
    batch = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    facts = [
        f"{_amount(config.tokens)} tokens",
        f"{schedule.total_steps:,} steps",
        f"{batch} sequences of {schedule.sequence_length:,}",
        f"warm-up over {config.warmup_steps:,} steps",
    ]
    figure.suptitle(f"Schedules of the run  ·  {name}", x=0.02, ha="left", color=INK, fontsize=15, fontweight="bold")
    figure.get_axes()[0].set_title("   ·   ".join(facts), loc="left", color=QUIET, fontsize=10.5, pad=12)


def _sample_points(schedule: Schedule) -> list[int]:
    """Where the learning rate is drawn: evenly over the run, and at every step of the first part of the warm-up."""
    even = [schedule.tokens * i // 2000 for i in range(2000)] + [schedule.tokens - 1]
    first_batch = as_points(schedule.config.batch_tokens)[0][1]
    early = [i * first_batch for i in range(min(schedule.config.warmup_steps, 300) + 1)]
    return sorted({token for token in even + early if token < schedule.tokens})


def _curve(axis: Any, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    axis.plot(x, y, color=colour, linewidth=2.2, solid_capstyle="round", clip_on=False, zorder=3)
    axis.fill_between(x, y, color=colour, alpha=0.10, linewidth=0)
    axis.set_ylim(0, max(max(y), 1e-12) * 1.18)


def _steps(axis: Any, points: list[tuple[float, float]], end: float, name: str) -> None:
    """A value that is constant between its points, its levels written above them where they fit."""
    colour = PANELS[name][1]
    edges = [start for start, _ in points] + [end]
    levels = [held for _, held in points]
    x = [edge for pair in pairwise(edges) for edge in pair]
    y = [level for level in levels for _ in range(2)]
    _curve(axis, x, y, colour)
    top = max(*levels, 1e-12)
    axis.set_ylim(0, top * (1.22 if name == "batch" else 1.75))
    written = {0, len(levels) - 1} if name == "batch" else range(len(levels))
    for i in written:
        narrow = edges[i + 1] - edges[i] < 0.12 * end
        last = i == len(levels) - 1
        axis.annotate(
            _amount(levels[i]) if name == "batch" else f"{levels[i]:g}",
            (end if last and narrow else edges[i], levels[i]),
            xytext=(0 if last and narrow else 6, 5),
            textcoords="offset points",
            ha="right" if last and narrow else "left",
            color=colour,
            fontsize=10,
            fontweight="bold",
        )


def _label_rates(axis: Any, tokens: list[int], rates: list[float], unit: int) -> None:
    """Write the peak where it is reached and the last value at the end."""
    colour = PANELS["lr"][1]
    top = max(range(len(rates)), key=rates.__getitem__)
    for i, side, offset in ((top, "left", 6), (len(rates) - 1, "right", 0)):
        axis.annotate(
            f"{rates[i]:.3g}",
            (tokens[i] / unit, rates[i]),
            xytext=(offset, 6),
            textcoords="offset points",
            ha=side,
            color=colour,
            fontsize=10,
            fontweight="bold",
        )


def _dress(axis: Any, label: str, end: float) -> None:
    axis.set_xlim(0, end)
    axis.set_ylabel(label, rotation=0, ha="left", va="center", color=INK, fontsize=10.5, labelpad=118)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=QUIET, length=0, labelsize=9.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b9c2cb")


def _unit(tokens: int) -> tuple[int, str]:
    """The unit of the token axis and its name."""
    for unit, letter in ((10**12, "trillions"), (10**9, "billions"), (10**6, "millions"), (10**3, "thousands")):
        if tokens >= unit:
            return unit, letter
    return 1, ""


def _amount(value: float) -> str:
    """1500000 as 1.5M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def _exponent(value: float) -> str:
    """0.0002 as 2e-4."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
