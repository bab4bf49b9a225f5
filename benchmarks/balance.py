"""Three ways to balance experts, the same data and seed: the bias, the auxiliary loss alone, neither.

    python benchmarks/balance.py --store STORE --work FOLDER [--plot FILE.png] [key=value …]

The claim to see is that of the auxiliary-loss-free paper (arXiv 2408.15664, Table 2; 1B model): the bias balances better than
the loss (MaxVio 0.04 against 0.72) and costs nothing (perplexity 9.50 against 9.56). MaxVio is taken over the whole
validation split.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent / "recipes" / "balance.yaml"
ARMS = {
    "bias": ["schedule.gamma=0.001", "schedule.alpha=0"],
    "auxiliary loss": ["schedule.gamma=0", "schedule.alpha=0.001"],  # the paper's strength
    "neither": ["schedule.gamma=0", "schedule.alpha=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    records = {}
    for arm, settings in ARMS.items():
        run = arguments.work / arm.replace(" ", "-")
        places = [f"data.train={arguments.store}", f"run.dir={run}"]
        command = [sys.executable, "-m", "train", str(RECIPE), *places, *settings, *arguments.overrides]
        subprocess.run(command, check=True)
        records[arm] = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    print(f"{'arm':16}{'MaxVio mean':>12}{'worst layer':>12}{'perplexity':>12}{'bits/byte':>12}")
    for arm, record in records.items():
        print(f"{arm:16}" + "".join(f"{value:12.3f}" for value in results(record[-1])))
    if arguments.plot:
        draw(records, arguments.plot)


def results(last: dict[str, Any]) -> tuple[float, float, float, float]:
    """MaxVio over validation (mean and worst layer), perplexity, bits per byte, of a run's last step."""
    sources = last["validation"].values()
    tokens = sum(source["tokens"] for source in sources)
    nats = sum(source["nats_per_token"] * source["tokens"] for source in sources)
    size = sum(source["nats_per_token"] * source["tokens"] / source["bits_per_byte"] for source in sources) / math.log(
        2
    )
    violation = last["validation_max_vio"]
    return sum(violation) / len(violation), max(violation), math.exp(nats / tokens), nats / math.log(2) / size


def draw(records: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """MaxVio of each training batch, mean over the layers, smoothed over 20 steps, and the training loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, key, title in zip(
        figure.subplots(1, 2), ("max_vio_mean", "loss"), ("MaxVio of a batch", "loss, nats per token")
    ):
        for arm, record in records.items():
            values = [step[key] for step in record]
            smooth = [
                sum(values[max(0, i - 19) : i + 1]) / len(values[max(0, i - 19) : i + 1]) for i in range(len(values))
            ]
            axis.plot([step["step"] for step in record], smooth, label=arm, linewidth=1.2)
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
