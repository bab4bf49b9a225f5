"""What FP8 costs in loss: a small MoE in fp32 and in emulated FP8, the same weights at the start, the same data in the same order.

    python benchmarks/fp8.py --store STORE --work FOLDER [--json FILE] [--plot FILE.png] [key=value …]

DeepSeek-V3 (§3.3, B.1) reports a relative difference of the smoothed loss below 0.25 % when training 16 B and 230 B parameters.
Here the loss is averaged over the last 100 steps at each step, and the difference taken of the averages, from step 200 on, when the
first steep descent is over. An arm that was interrupted goes on from its checkpoint when the command is started again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.files import replace_file

RECIPE = Path(__file__).parent / "recipes" / "fp8.yaml"
ARMS = {"fp32": ["precision.fp8=false"], "fp8": ["precision.fp8=true"]}
SMOOTHED, FROM = 100, 200  # steps
CLAIM = 0.0025

Record = list[dict[str, Any]]


class Difference(NamedTuple):
    """Of FP8's loss from fp32's, relative to it."""

    steps: NDArray[np.int64]
    relative: NDArray[np.float64]  # of the smoothed losses at these steps
    summary: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    records = {}
    for arm, settings in ARMS.items():
        run = arguments.work / arm
        places = [f"data.train={arguments.store}", f"run.dir={run}"]
        command = [sys.executable, "-m", "train", str(RECIPE), *places, *settings, *arguments.overrides]
        subprocess.run(command, check=True)
        records[arm] = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    found = difference(records["fp32"], records["fp8"])
    for name, value in found.summary.items():
        print(f"{name:28} {value:+.4%}" if "difference" in name else f"{name:28} {value:,.4f}")
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(found.summary, indent=2) + "\n")
    if arguments.plot:
        draw(records, found, arguments.plot)


def difference(plain: Record, fp8: Record) -> Difference:
    """How far FP8's losses lie from those of the plain run."""
    steps = np.array([step["step"] for step in plain])
    a, b = (smooth(np.array([step["loss"] for step in record])) for record in (plain, fp8))
    late = steps >= min(FROM, steps[-1])
    relative = (b / a - 1)[late]
    single = np.array([y["loss"] / x["loss"] - 1 for x, y in zip(plain, fp8)])[late]
    summary = {
        "steps": float(steps[-1]),
        "last smoothed loss, fp32": a[-1],
        "last smoothed loss, fp8": b[-1],
        "difference at the end": relative[-1],
        "mean difference": relative.mean(),
        "largest difference": relative[np.abs(relative).argmax()],
        "largest difference of a step": single[np.abs(single).argmax()],
        "validation, fp32": nats(plain[-1]),
        "validation, fp8": nats(fp8[-1]),
        "difference of validation": nats(fp8[-1]) / nats(plain[-1]) - 1,
    }
    return Difference(steps[late], relative, {name: float(value) for name, value in summary.items()})


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At each place the mean of the last hundred values, or of as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - SMOOTHED, 0)
    return (sums[end] - sums[begin]) / (end - begin)


def nats(last: dict[str, Any]) -> float:
    """Nats per token over all sources of a run's last validation."""
    sources = last["validation"].values()
    tokens = sum(source["tokens"] for source in sources)
    return sum(source["nats_per_token"] * source["tokens"] for source in sources) / tokens


def draw(records: dict[str, Record], found: Difference, path: Path) -> None:
    """Both losses, smoothed, and the relative difference within the band of the report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, relative = figure.subplots(1, 2)
    for (arm, record), style in zip(records.items(), ("-", "--")):
        losses.plot([s["step"] for s in record], smooth(np.array([s["loss"] for s in record])), style, label=arm)
    losses.set_title("loss, nats per token, mean of 100 steps", loc="left")
    losses.legend(frameon=False)
    relative.axhspan(-100 * CLAIM, 100 * CLAIM, alpha=0.12, label="0.25 %, DeepSeek-V3")
    relative.axhline(0, color="black", linewidth=0.6)
    relative.plot(found.steps, 100 * found.relative, linewidth=1.2)
    relative.set_title("FP8 against fp32, %", loc="left")
    relative.legend(frameon=False)
    for axis in (losses, relative):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")


if __name__ == "__main__":
    main()
