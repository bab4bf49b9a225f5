"""The schedules of a pipeline beside each other: who does what when, how long ranks wait, and what formulas say they would.

    python benchmarks/bubbles.py --ranks 4 --micro-batches 12 [--costs 1 1 1] [--overlapped 3] [--json FILE] [--out FILE.png]

Nothing is measured: PyTorch's own orders are played through with these costs (`parallel.timeline`, which also says why a count is
not the formula's). The unit is the forward pass of one micro-batch through all layers of a rank, which 1f1b does as one stage and
the others as two of half the size.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from data.files import replace_file
from parallel.placement import Schedule
from parallel.timeline import Chunk, Costs, bubble, gaps, held, order_of, published_bubble, timeline

STAGES: dict[Schedule, int] = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}  # of a rank
COLORS = {"F": "#6baed6", "B": "#74c476", "W": "#fdae6b", "F&B": "#b39ddb"}
NAMES = {
    "F": "forward",
    "B": "backward, of inputs",
    "W": "backward, of weights",
    "F&B": "forward and backward, overlapped",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=12)
    parser.add_argument("--costs", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("F", "B", "W"))
    parser.add_argument("--overlapped", type=float, help="cost of F&B; F + B + W if not given")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--out", type=Path, help="draw the timelines here")
    arguments = parser.parse_args()
    ranks, micro_batches = arguments.ranks, arguments.micro_batches
    lines, found = {}, []
    for schedule, stages in STAGES.items():
        forward, of_inputs, of_weights = (cost / stages for cost in arguments.costs)
        costs = Costs(forward, of_inputs, of_weights, arguments.overlapped and arguments.overlapped / stages)
        try:
            lines[schedule] = timeline(order_of(schedule, ranks, stages, micro_batches), costs)
        except ValueError as problem:  # too few micro-batches
            parser.error(f"{schedule}: {problem}")
        found.append(summary(schedule, lines[schedule], published_bubble(schedule, ranks, costs)))
    print(as_table(found))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.out:
        draw(lines, found, arguments.out)


def summary(schedule: Schedule, chunks: list[list[Chunk]], formula: float) -> dict[str, Any]:
    """Of the rank that has the most of each."""
    span = max(chunk.end for line in chunks for chunk in line)
    return {
        "schedule": schedule,
        "bubble": max(bubble(chunks)),
        "formula": formula,
        "of_the_step": max(bubble(chunks)) / span,
        "gaps": max(gaps(chunks)),
        "held": max(held(chunks)) / STAGES[schedule],
    }


def as_table(found: list[dict[str, Any]]) -> str:
    lines = [f"{'schedule':12}{'bubble':>8}{'formula':>9}{'of the step':>13}{'gaps':>7}{'micro-batches held':>20}"]
    lines += [
        f"{row['schedule']:12}{row['bubble']:8.2f}{row['formula']:9.2f}{row['of_the_step']:13.1%}{row['gaps']:7.2f}{row['held']:20.1f}"
        for row in found
    ]
    return "\n".join(lines)


def draw(lines: dict[Schedule, list[list[Chunk]]], found: list[dict[str, Any]], path: Path) -> None:
    """One picture a schedule, one line a rank; a number is a micro-batch, the later stage of a rank is darker."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(lines["1f1b"])
    figure = Figure(figsize=(15, len(lines) * (0.28 * ranks + 0.55) + 0.6), layout="constrained")
    for axis, row in zip(figure.subplots(len(lines), sharex=True), found):
        chunks = lines[row["schedule"]]
        boxes = [box for rank, line in enumerate(chunks) for chunk in line for box in boxes_of(chunk, rank)]
        axis.barh(
            [box.rank for box in boxes], [box.end - box.start for box in boxes], 0.92, [box.start for box in boxes],
            color=[COLORS[box.kind] for box in boxes], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        later = [box for box in boxes if box.stage >= ranks]
        axis.barh(
            [box.rank for box in later], [box.end - box.start for box in later], 0.92, [box.start for box in later],
            color="black", alpha=0.18, linewidth=0,
        )  # fmt: skip
        for box in boxes:
            axis.text((box.start + box.end) / 2, box.rank, box.label, ha="center", va="center", fontsize=5)
        axis.set_title(
            f"{row['schedule']}: bubble {row['bubble']:g}, by the formula {row['formula']:g}; {row['of_the_step']:.1%} of the "
            f"step, activations of {row['held']:g} micro-batches",
            loc="left",
            fontsize=10,
        )
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axis.invert_yaxis()
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
        axis.margins(x=0.005)
    handles = [Patch(color=color, label=NAMES[kind]) for kind, color in COLORS.items()]
    handles.append(Patch(color="black", alpha=0.18, label="in the later stage of the rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix[1:] or "png")


class Box(NamedTuple):
    """What is drawn in one colour."""

    rank: int
    start: float
    end: float
    kind: str
    label: str
    stage: int


def boxes_of(chunk: Chunk, rank: int) -> list[Box]:
    """One box, or two equal ones for a full backward pass; where two passes overlap it has the number of both."""
    start, end, (first, *rest) = chunk
    label = str(first.micro_batch)
    if len(rest) == 2:
        return [Box(rank, start, end, "F&B", f"{label} & {rest[0].micro_batch}", first.stage)]
    width = (end - start) / len(chunk.action)
    return [
        Box(rank, start + i * width, start + (i + 1) * width, work.kind, label, first.stage)
        for i, work in enumerate(chunk.action)
    ]


if __name__ == "__main__":
    main()
