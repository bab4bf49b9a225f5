"""A law's learning rate and batch against a grid made by hand, at a budget that no run of the law has seen.

    python benchmarks/auto.py --ladder LADDER.yaml --law law.json --budget 3.2e12 --width 40 --work FOLDER --json FILE

The grid is nine cells, three rates by three batches, each a real run; what `schedule.lr: auto` and `schedule.batch_tokens: auto`
take from the law is a tenth. The best of nine single runs is partly luck, so it is repeated with other seeds, as the law's run is,
and the seed that chose it is left out of the comparison. Interrupted, the same command continues.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from data.files import replace_file
from train.config import Recipe, parse_recipe
from train.scaling.fits.basins import seed_noise
from train.scaling.fits.runs import Runs
from train.scaling.ladder.cells import Cells
from train.scaling.ladder.execute import Execution
from train.scaling.ladder.ladder import Ladder, load_ladder
from train.scaling.ladder.wanted import Cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, required=True, help="what its runs have in common, these have too")
    parser.add_argument("--law", required=True)
    parser.add_argument("--budget", type=float, required=True, help="C, FLOPs")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--lr", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    by_hand = one_budget(arguments, tuple(arguments.lr), tuple(arguments.batch))
    cell = Cell(arguments.budget, arguments.width, arguments.lr[0], arguments.batch[0])
    lr, batch = advised(Cells(by_hand).recipe(cell), arguments.law)
    report = compare(measure(by_hand, arguments.jobs), measure(one_budget(arguments, (lr,), (batch,)), arguments.jobs))
    text = json.dumps({"budget": arguments.budget, "width": arguments.width, "law": arguments.law, **report}, indent=1)
    if arguments.json:
        with replace_file(arguments.json) as path:
            path.write_text(text + "\n", encoding="utf-8")
    print(text)


def one_budget(arguments: argparse.Namespace, lr: tuple[float, ...], batch: tuple[int, ...]) -> Ladder:
    """A ladder of one budget whose grid does not grow, and whose best cell is repeated."""
    ladder = load_ladder(arguments.ladder)
    changes = {"widths": (arguments.width,), "lr": lr, "batch_tokens": batch, "max_cells": len(lr) * len(batch)}
    return ladder.model_copy(
        update={
            "budgets": (arguments.budget,),
            "hyperparameters": ladder.hyperparameters.model_copy(update=changes),
            "allocation": None,
            "seeds": arguments.seeds,
            "dir": str(arguments.work),
        }
    )


def advised(recipe: Recipe, law: str) -> tuple[float, int]:
    """What a run like this one takes from a law."""
    values = recipe.model_dump(mode="json", by_alias=True)
    values["schedule"] |= {"lr": "auto", "batch_tokens": "auto", "law": law}
    schedule = parse_recipe(values).schedule
    assert isinstance(schedule.batch_tokens, int)
    return schedule.lr, schedule.batch_tokens


def measure(ladder: Ladder, jobs: int) -> dict[Cell, float]:
    """Nats per token of every cell, after running those that are left."""
    execution = Execution(ladder, jobs, 1, lambda line: print(line, flush=True))
    execution.run()
    return {cell: execution.results[cell].loss for cell in execution.wanted}


def compare(by_hand: dict[Cell, float], by_law: dict[Cell, float]) -> dict[str, Any]:
    """The law's run beside the best of the grid, each with the seeds that did not choose it."""
    grid = {cell: loss for cell, loss in by_hand.items() if cell.seed == 0}
    best = min(grid, key=grid.__getitem__)
    repeated = [loss for cell, loss in by_hand.items() if cell.seed and cell.batch_tokens == best.batch_tokens]
    hand, law = mean(repeated or [grid[best]]), mean(by_law.values())
    cells = {**by_hand, **by_law}
    rows = [(loss, c.width, c.budget, c.lr, c.batch_tokens) for c, loss in cells.items()]
    runs = Runs.of(**dict(zip(("loss", "params", "flops", "lr", "batch"), zip(*rows))))
    one = next(iter(by_law))
    return {
        "noise": seed_noise(runs),
        "auto": {"lr": one.lr, "batch_tokens": one.batch_tokens, "loss": law, "seeds": list(by_law.values())},
        "best_by_hand": {"lr": best.lr, "batch_tokens": best.batch_tokens, "loss": hand, "seeds": repeated},
        "auto_over_best": law / hand - 1,
        "grid": [{"lr": c.lr, "batch_tokens": c.batch_tokens, "loss": loss} for c, loss in grid.items()],
    }


if __name__ == "__main__":
    main()
