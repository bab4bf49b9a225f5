"""What FP8 costs in loss: a small MoE in fp32 and in emulated FP8, the same weights at the start, the same data in the same order.

    python benchmarks/fp8.py --store STORE --work FOLDER [--seeds 2] [--json FILE] [--plot FILE.png] [key=value …]

DeepSeek-V3 (§3.3, B.1) reports a relative difference of the smoothed loss below 0.25 % when training 16 B and 230 B parameters.
Here the loss is averaged over the last 100 steps at each step, and the difference taken of the averages, from step 200 on, when the
first steep descent is over. A run that was interrupted goes on from its checkpoint when the command is started again.

Two runs that round differently part, and may then differ as two seeds do. So every seed is trained in both ways: fp32 with one seed
against fp32 with the other is the difference that means nothing. What the products themselves cost shows without that noise in the
last weights of each run, evaluated in fp32 and in FP8.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.files import replace_file
from data.store import Store
from data.validation import validation_batches
from model.ops.fp8.kernels import Reference
from model.transformer import Transformer, compute_in_fp8
from train.generate import load_model

RECIPE = Path(__file__).parent / "recipes" / "fp8.yaml"
ARMS = {"fp32": "false", "fp8": "true"}
SMOOTHED, FROM = 100, 200  # steps
CLAIM = 0.0025
LENGTH, TOKENS = 256, 65536  # of an evaluation

Record = list[dict[str, Any]]
Losses = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2, help="of the first weights")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    losses, products = {}, {}
    for name in [f"{arm}-{seed}" for seed in range(arguments.seeds) for arm in ARMS]:
        run, (arm, seed) = arguments.work / name, name.split("-")
        changes = [f"data.train={arguments.store}", f"run.dir={run}", f"run.seed={seed}", f"precision.fp8={ARMS[arm]}"]
        subprocess.run([sys.executable, "-m", "train", str(RECIPE), *changes, *arguments.overrides], check=True)
        losses[name] = losses_of([json.loads(line) for line in (run / "metrics.jsonl").open()])
        products[name] = cost_of_products(load_model(run)[0], arguments.store)
    differences = compare(losses)
    result = {"differences": {name: summary(d) for name, d in differences.items()}, "products_alone": products}
    print(as_table(result))
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        draw(losses, differences, arguments.plot)


def losses_of(record: Record) -> Losses:
    """The loss of every step."""
    return np.array([step["loss"] for step in record])


def compare(losses: dict[str, Losses]) -> dict[str, Losses]:
    """Relative differences of smoothed losses, from step 200 on: FP8's from fp32's for each seed, and those of fp32's seeds."""
    seeds = range(len(losses) // len(ARMS))
    pairs = {f"fp8 against fp32, seed {seed}": (f"fp32-{seed}", f"fp8-{seed}") for seed in seeds}
    pairs |= {f"fp32, seed {seed} against seed 0": ("fp32-0", f"fp32-{seed}") for seed in seeds if seed}
    return {name: (smooth(losses[b]) / smooth(losses[a]) - 1)[FROM - 1 :] for name, (a, b) in pairs.items()}


def summary(difference: Losses) -> dict[str, float]:
    """Its mean, the mean of its size, the largest, the last."""
    size = np.abs(difference)
    found = {"mean": difference.mean(), "mean_size": size.mean(), "largest": size.max(), "last": difference[-1]}
    return {name: float(value) for name, value in found.items()}


def smooth(values: Losses) -> Losses:
    """At each place the mean of the last hundred values, or of as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - SMOOTHED, 0)
    return (sums[end] - sums[begin]) / (end - begin)


def cost_of_products(model: Transformer, store: Path) -> float:
    """How far the loss of a model's weights in FP8 lies from that in fp32, relative to it, over the same validation text."""
    plain = nats(model, store)
    compute_in_fp8(model.model.layers, Reference())
    return nats(model, store) / plain - 1


def nats(model: Transformer, store: Path) -> float:
    """Cross-entropy summed over validation text."""
    depths = model.config.num_nextn_predict_layers
    batches = validation_batches(Store.open(store), LENGTH, depths, batch=8, max_tokens=TOKENS)
    return sum(float(model.score(batch.tokens, batch.documents).nats) for _, batch in batches)


def as_table(result: dict[str, Any]) -> str:
    """Differences of losses in per cent."""
    lines = [f"{'smoothed loss':32}{'mean':>9}{'mean |·|':>9}{'largest':>9}{'last':>9}"]
    for name, row in result["differences"].items():
        lines.append(f"{name:32}" + "".join(f"{row[key]:9.3%}" for key in ("mean", "mean_size", "largest", "last")))
    lines += ["", "the same weights in FP8 against fp32"]
    return "\n".join(lines + [f"{name:32}{value:9.3%}" for name, value in result["products_alone"].items()])


def draw(losses: dict[str, Losses], differences: dict[str, Losses], path: Path) -> None:
    """The smoothed losses, and their differences beside the band of the report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        arm, seed = name.split("-")
        left.plot(smooth(values), "-" if arm == "fp32" else "--", color=f"C{seed}", linewidth=1, label=name)
    left.set_title("loss, nats per token, mean of 100 steps", loc="left")
    right.axhspan(-100 * CLAIM, 100 * CLAIM, alpha=0.12, label="0.25 %, DeepSeek-V3")
    for number, (name, values) in enumerate(differences.items()):
        color = f"C{number}" if name.startswith("fp8") else "0.6"
        right.plot(np.arange(FROM, FROM + len(values)), 100 * values, color=color, linewidth=1.2, label=name)
    right.set_title("relative difference, %", loc="left")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize="small")
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")


if __name__ == "__main__":
    main()
