"""What a ladder amounts to, said before it starts: cells, FLOPs, hours, and which constant stages are used again."""

from collections.abc import Collection
from itertools import pairwise

from train.scaling.cells import Cells
from train.scaling.ladder import Cell
from train.scaling.pace import Pace
from train.scaling.reuse import ConstantStages


def describe(
    cells: Cells, stages: ConstantStages, pace: Pace, jobs: int, wanted: list[Cell], finished: Collection[Cell]
) -> list[str]:
    """Lines for people. How far grids and rows must grow is not known before they have been run: the hours have two ends."""
    grid, rows, rungs = cells.ladder.hyperparameters, cells.ladder.allocation, len(cells.ladder.budgets)
    first = len(grid.lr) * len(grid.batch_tokens)
    left = [cell for cell in wanted if cell not in finished]
    later = max(0, rungs * (first + (rows.sizes - 1 if rows else 0) + cells.ladder.seeds - 1) - len(wanted))
    refined = rungs * max(0, grid.max_cells - first)
    seconds, each = pace.seconds(left) / jobs, pace.seconds(wanted) / jobs / max(1, len(wanted))
    flops, all_flops = sum(map(cells.flops, wanted)), sum(map(cells.all_flops, wanted))
    return [
        f"{len(wanted)} cells of {rungs} budgets are known to be wanted, {len(finished)} of them finished: "
        f"C = {flops:.3g} FLOPs, {all_flops:.3g} with the output head and MTP",
        f"{later} more follow from their results (IsoFLOP rows, seeds), and up to {refined} where a grid must grow",
        f"{jobs} at once: about {duration(seconds + later * each)}, or up to {duration(seconds + (later + refined) * each)}",
        *_reused(cells, stages, wanted),
    ]


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def _reused(cells: Cells, stages: ConstantStages, wanted: list[Cell]) -> list[str]:
    alike: dict[tuple[int, float, int, int], list[Cell]] = {}
    for cell in wanted:
        alike.setdefault((cell.width, cell.lr, cell.batch_tokens, cell.seed), []).append(cell)
    pairs = [pair for group in alike.values() for pair in pairwise(group)]
    if not pairs:
        return ["no constant stage is used again: no two cells differ in their budget alone"]
    used = [stages.shared(*pair).tokens for pair in pairs if stages.step(*pair)]
    unused = next((pair for pair in pairs if not stages.step(*pair)), None)
    lines = []
    if used:
        share = sum(used) / sum(map(cells.tokens, wanted))
        lines.append(f"{len(used)} cells go on from the constant stage of a shorter one: {share:.0%} of the tokens")
    if unused:
        shorter, longer = unused
        shared = stages.shared(shorter, longer)
        lines.append(
            f"{longer.name} cannot go on from {shorter.name}: they have {shared.steps} steps in common, then "
            f"{shared.why_not_more} differs"
        )
    return lines
