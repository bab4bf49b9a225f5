"""How often the rule for loss spikes is wrong on the loss curves of real runs, and how small a rise it still finds.

    python benchmarks/spikes.py RUN … [--window N] [--plot FILE.png] [--json FILE]

A step's score is its loss less the median of those before it, in robust standard deviations (`train.guard.spikes`); it stands out
where the score is above the threshold. Of healthy runs every such step is a false alarm. A rise is planted in every step in turn:
found is the share of steps that would stand out with so many nats more. The gradient norm is scored in the same way, beside it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.guard.spikes import SpikeDetector
from train.sections import SpikesSection

THRESHOLDS = (3, 4, 5, 6, 8, 10, 12)
RISES = (0.1, 0.2, 0.5, 1.0)  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--window", type=int, default=SpikesSection().window)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    curves = {run.name: [json.loads(line) for line in (run / "metrics.jsonl").open()] for run in arguments.runs}
    losses = {name: scores(curve, "loss", arguments.window) for name, curve in curves.items()}
    norms = {name: scores(curve, "grad_norm", arguments.window) for name, curve in curves.items()}
    print(f"{'run':24}{'steps':>8}{'largest score':>15}{'at step':>9}{'of the norm':>13}")
    for name, scored in losses.items():
        worst = max(scored, key=lambda one: one[1])
        print(f"{name:24}{len(scored):8}{worst[1]:15.1f}{worst[0]:9}{max(one[1] for one in norms[name]):13.1f}")
    table = [row(threshold, losses.values(), norms.values()) for threshold in THRESHOLDS]
    print(
        f"\n{'threshold':>9}{'false alarms':>14}{'by the norm':>13}"
        + "".join(f"{f'+{rise:g} nats':>11}" for rise in RISES)
    )
    for each in table:
        shares = "".join(f"{share:11.1%}" for share in each["found"])
        print(f"{each['threshold']:9}{each['false_alarms']:14}{each['false_alarms_of_the_norm']:13}{shares}")
    print(f"of {sum(map(len, losses.values())):,} steps")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1), encoding="utf-8")
    if arguments.plot:
        draw(curves, losses, arguments.plot)


Score = tuple[int, float, float]  # step, deviations above the median, the deviation in the value's own unit


def scores(curve: Sequence[dict[str, Any]], key: str, window: int) -> list[Score]:
    """Of every step for which there is a limit. A limit is linear in the threshold: two of them give median and deviation."""
    zero, one = (SpikeDetector(SpikesSection.model_construct(window=window, threshold=t)) for t in (0.0, 1.0))
    found = []
    for line in curve:
        step, stage, value = line["step"], line["sequence_length"], line[key]
        median = zero.limit(step, stage)
        if median < math.inf and value is not None:
            deviation = max(one.limit(step, stage) - median, 1e-9)
            found.append((step, (value - median) / deviation, deviation))
        for detector in (zero, one):
            detector.see(step, stage, 0, math.nan if value is None else value)
    return found


def row(threshold: float, losses: Any, norms: Any) -> dict[str, Any]:
    """A line of the table."""
    every = [one for scored in losses for one in scored]
    return {
        "threshold": threshold,
        "false_alarms": sum(score > threshold for _, score, _ in every),
        "false_alarms_of_the_norm": sum(score > threshold for scored in norms for _, score, _ in scored),
        "steps": len(every),
        "found": [
            sum(score + rise / deviation > threshold for _, score, deviation in every) / len(every) for rise in RISES
        ],
    }


def draw(curves: dict[str, list[dict[str, Any]]], losses: dict[str, list[Score]], path: Path) -> None:
    """Above the losses, below their scores with the default threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    for name, curve in curves.items():
        above.plot([line["step"] for line in curve], [line["loss"] for line in curve], linewidth=0.7, label=name)
        below.plot([step for step, *_ in losses[name]], [score for _, score, _ in losses[name]], ".", markersize=2)
    below.axhline(SpikesSection().threshold, color="black", linewidth=0.8)
    above.set_ylabel("loss, nats")
    below.set_ylabel("robust deviations above the median")
    below.set_xlabel("step")
    above.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
