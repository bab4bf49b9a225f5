"""A law's learning rate and batch against a grid made by hand, at a budget that no run of the law has seen.

    python benchmarks/auto.py --ladder LADDER.yaml --law law.json --budget 3.2e12 --width 40 --work FOLDER --json FILE

The grid is nine cells, three rates by three batches, each a real run; the law's run takes `schedule.lr: auto` and
`schedule.batch_tokens: auto` from the law and is otherwise the same. Interrupted, the same command continues.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.config import Recipe, parse_recipe
from train.scaling.cells import mixture_loss
from train.scaling.execute import Execution
from train.scaling.ladder import Cell, Ladder, load_ladder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, required=True, help="what its runs have in common, these have too")
    parser.add_argument("--law", required=True)
    parser.add_argument("--budget", type=float, required=True, help="C, FLOPs")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ladder = by_hand(arguments)
    execution = Execution(ladder, arguments.jobs, 1, print)
    execution.run()
    execution.look()
    grid = {cell: result.loss for cell, result in execution.results.items()}
    best = min(grid, key=grid.__getitem__)
    recipe = by_law(execution.cells.recipe(best), arguments.law, arguments.work / "auto")
    loss, bits = train(recipe, arguments.work)
    report = {
        "budget": arguments.budget,
        "width": arguments.width,
        "law": arguments.law,
        "auto": {"lr": recipe.schedule.lr, "batch_tokens": recipe.schedule.batch_tokens, "loss": loss, "bits": bits},
        "best_by_hand": {"lr": best.lr, "batch_tokens": best.batch_tokens, "loss": grid[best]},
        "auto_over_best": loss / grid[best] - 1,
        "rank_of_auto": sum(value < loss for value in grid.values()) + 1,
        "grid": [{"lr": c.lr, "batch_tokens": c.batch_tokens, "loss": value} for c, value in sorted_cells(grid)],
    }
    text = json.dumps(report, indent=1)
    if arguments.json:
        with replace_file(arguments.json) as path:
            path.write_text(text + "\n", encoding="utf-8")
    print(text)


def by_hand(arguments: argparse.Namespace) -> Ladder:
    """The grid as a ladder of one budget that does not grow."""
    ladder = load_ladder(arguments.ladder)
    grid = ladder.hyperparameters.model_copy(
        update={
            "widths": (arguments.width,),
            "lr": tuple(arguments.lr),
            "batch_tokens": tuple(arguments.batch),
            "max_cells": 1,
        }
    )
    changes = {"budgets": (arguments.budget,), "hyperparameters": grid, "allocation": None, "seeds": 1}
    return ladder.model_copy(update={**changes, "dir": str(arguments.work / "by_hand")})


def by_law(recipe: Recipe, law: str, folder: Path) -> Recipe:
    """The same run with the law's learning rate and batch."""
    values = recipe.model_dump(mode="json", by_alias=True)
    values["schedule"] |= {"lr": "auto", "batch_tokens": "auto", "law": law}
    values["run"] |= {"dir": str(folder)}
    found = parse_recipe(values)
    batch, warmup = found.schedule.batch_tokens, recipe.schedule.batch_tokens
    assert isinstance(batch, int) and isinstance(warmup, int)
    steps = max(1, round(recipe.schedule.warmup_steps * warmup / batch))  # as many tokens as the grid's
    values = found.model_dump(mode="json", by_alias=True)
    values["schedule"] |= {"warmup_steps": steps}
    values["parallel"] |= {"micro_batch": min(values["parallel"]["micro_batch"], batch // recipe.data.sequence_length)}
    return parse_recipe(values)


def train(recipe: Recipe, work: Path) -> tuple[float, float]:
    """Nats per token and bits per byte at the end of a run."""
    path = work / "auto.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "train", str(path)], check=True, stdout=sys.stderr)
    last: dict[str, Any] = json.loads(Path(recipe.run.dir, "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    return mixture_loss(last["validation"], last["tokens_by_source"])


def sorted_cells(grid: dict[Cell, float]) -> list[tuple[Cell, float]]:
    return sorted(grid.items(), key=lambda item: (item[0].batch_tokens, item[0].lr))


if __name__ == "__main__":
    main()
