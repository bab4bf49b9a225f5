"""A picture of a run's schedules, one panel for each value over the tokens consumed."""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.config import RecipeError
from train.fields import as_points
from train.planning.written import amount
from train.schedule import Schedule

INK, QUIET, GRID = "#1c2733", "#6b7785", "#e6eaee"
PANELS = {  # title, colour, height
    "lr": ("Learning rate", "#0b6bb0", 3.0),
    "batch": ("Global batch, tokens", "#0f8a6d", 2.0),
    "gamma": ("γ, step of the balancing bias", "#b0560b", 1.0),
    "alpha": ("α, weight of the sequence-wise balance loss", "#7d3fa0", 1.0),
    "lambda": ("λ, weight of the MTP losses", "#b02a4c", 1.0),
}


def plot_schedule(schedule: Schedule, path: str | Path, notes: Sequence[str] = ()) -> None:
    """Draw learning rate, batch, γ, α and λ of a run over its tokens into a .png, .svg or .pdf file.

    Args:
        notes: lines to stand below the picture, as those of `law_in_words`.

    Raises:
        RecipeError: the file name has another ending.
        OSError: the folder is missing, or the disk is full.
    """
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise RecipeError(
            f"plot = {str(path)!r}: must end in .png, .svg or .pdf for the schedules, or .html for the plan's page; write for "
            "example schedule.png"
        )
    with replace_file(path) as temporary:
        draw(schedule, notes).savefig(temporary, format=kind, dpi=160)


def draw(schedule: Schedule, notes: Sequence[str] = ()) -> Any:
    """The matplotlib Figure; nothing is drawn on a screen and no global state is touched."""
    from matplotlib.figure import Figure

    unit, unit_name = _unit(schedule.tokens)
    end = schedule.tokens / unit
    config = schedule.config
    lines = [part for note in notes for part in textwrap.wrap(note, 125, subsequent_indent="    ")]
    below = 0.2 * len(lines) + (0.15 if lines else 0)  # inches for the notes
    height = 9.5 + below
    figure = Figure(figsize=(9.5, height), facecolor="white")
    bottom, top = (0.62 + below) / height, 1 - 1.19 / height
    figure.subplots_adjust(left=0.085, right=0.905, top=top, bottom=bottom, hspace=0.42)
    figure.text(0.085, 0.12 / height, "\n".join(lines), color=QUIET, fontsize=9, linespacing=1.5, va="bottom")
    panels = figure.subplots(len(PANELS), sharex=True, height_ratios=[height for _, _, height in PANELS.values()])
    axes = dict(zip(PANELS, panels, strict=True))

    _rates(axes["lr"], schedule, unit)
    values = {"batch": config.batch_tokens, "gamma": config.gamma, "alpha": config.alpha, "lambda": config.lambda_}
    for name, value in values.items():
        _levels(axes[name], [(start / unit, held) for start, held in as_points(value)], end, name)
    for name, axis in axes.items():
        _dress(axis, PANELS[name][0], end)
    axes["lr"].yaxis.set_major_formatter(lambda value, _: _short(value))
    axes["batch"].yaxis.set_major_formatter(lambda value, _: amount(value))
    for name in ("gamma", "alpha", "lambda"):
        axes[name].set_yticks([])
        axes[name].spines["left"].set_visible(False)
    panels[-1].set_xlabel(f"tokens consumed{unit_name}", color=INK, labelpad=8)
    _title(figure, schedule)
    return figure


def _title(figure: Any, schedule: Schedule) -> None:
    config = schedule.config
    sizes = schedule.batches()
    lengths = list(dict.fromkeys(span.sequence_length for span in schedule.spans))
    facts = [
        f"{amount(config.tokens)} tokens",
        f"{schedule.total_steps:,} steps",
        (f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}")
        + f" sequences of {', then '.join(f'{length:,}' for length in lengths)}",
        f"warm-up over {config.warmup_steps:,} steps",
    ]
    title = f"Schedules of the run: {f'preset {config.preset}' if config.preset else f'shape {config.shape}'}"
    title += f", law {Path(config.law).stem}" if config.law else ""
    height = figure.get_figheight()
    figure.text(0.085, 1 - 0.41 / height, title, color=INK, fontsize=15, fontweight="bold")
    figure.text(0.085, 1 - 0.67 / height, "   ·   ".join(facts), color=QUIET, fontsize=10.5)


def _sample_points(schedule: Schedule) -> list[int]:
    """Where the learning rate is drawn: evenly over the run, at the first steps of the warm-up, and at the last step of all."""
    last_step = schedule.final_tokens - schedule.spans[-1].batch_tokens
    even = [schedule.tokens * i // 2000 for i in range(2000)] + [last_step]
    first_batch = as_points(schedule.config.batch_tokens)[0][1]
    early = [i * first_batch for i in range(min(schedule.config.warmup_steps, 300) + 1)]
    return sorted({token for token in even + early if token <= last_step})


def _rates(axis: Any, schedule: Schedule, unit: int) -> None:
    """The learning rate, with its peak and its last value written beside it."""
    colour = PANELS["lr"][1]
    tokens = _sample_points(schedule)
    rates = [schedule.learning_rate(t) for t in tokens]
    _line(axis, [t / unit for t in [*tokens, schedule.tokens]], [*rates, rates[-1]], colour)
    axis.set_ylim(0, max(rates) * 1.18)
    peak = rates.index(max(rates))
    _write(axis, _short(rates[peak]), (tokens[peak] / unit, rates[peak]), colour)
    _write(axis, _short(rates[-1]), (schedule.tokens / unit, rates[-1]), colour, outside=True)


def _levels(axis: Any, points: list[tuple[float, float]], end: float, name: str) -> None:
    """A value that is constant between its points; of a batch's many levels only the first and the last are written."""
    colour = PANELS[name][1]
    write = amount if name == "batch" else _short
    edges = [start for start, _ in points] + [end]
    levels = [held for _, held in points]
    _line(
        axis,
        [edge for pair in pairwise(edges) for edge in pair],
        [level for level in levels for _ in range(2)],
        colour,
    )
    axis.set_ylim(0, (max(levels) or 1.0) * (1.18 if name == "batch" else 1.8))
    inner = list(zip(edges, levels, strict=False))[:-1]
    for position in inner[:1] if name == "batch" else inner:
        _write(axis, write(position[1]), position, colour)
    _write(axis, write(levels[-1]), (end, levels[-1]), colour, outside=True)


def _line(axis: Any, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    axis.plot(x, y, color=colour, linewidth=2.2, solid_capstyle="round", clip_on=False, zorder=3)
    axis.fill_between(x, y, color=colour, alpha=0.10, linewidth=0)


def _write(axis: Any, text: str, position: tuple[float, float], colour: str, outside: bool = False) -> None:
    """A value above the line, or `outside`, to the right of the panel."""
    axis.annotate(
        text,
        position,
        xytext=(8, 0) if outside else (10, 5),
        textcoords="offset points",
        va="center" if outside else "bottom",
        color=colour,
        fontsize=10,
        fontweight="bold",
        annotation_clip=False,
    )


def _dress(axis: Any, title: str, end: float) -> None:
    axis.set_xlim(0, end)
    axis.set_title(title, loc="left", color=INK, fontsize=11, pad=5)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=QUIET, length=0, labelsize=9.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b9c2cb")


def _unit(tokens: int) -> tuple[int, str]:
    """The unit of the token axis, and its name for the axis label."""
    for unit, name in ((10**12, "trillions"), (10**9, "billions"), (10**6, "millions"), (10**3, "thousands")):
        if tokens >= unit:
            return unit, f", {name}"
    return 1, ""


def _short(value: float) -> str:
    """0.00022 as 2.2e-4, 0.3 as 0.3."""
    if value == 0 or value >= 1e-2:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
