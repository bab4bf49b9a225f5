"""What a ladder amounts to, said before it starts: cells, FLOPs, hours, and which constant stages are used again."""

from collections.abc import Collection
from itertools import pairwise

from train.scaling.ladder.cells import Cells
from train.scaling.ladder.pace import Pace
from train.scaling.ladder.reuse import ConstantStages
from train.scaling.ladder.wanted import Cell


def describe(
    cells: Cells, stages: ConstantStages, pace: Pace, jobs: int, wanted: list[Cell], finished: Collection[Cell]
) -> list[str]:
    """Lines for people. How far grids and rows must grow is not known before they have been run: the hours have two ends."""
    grid, rows, rungs = cells.ladder.hyperparameters, cells.ladder.allocation, len(cells.ladder.budgets)
    first = len(grid.lr) * len(grid.batch_tokens)
    left = [cell for cell in wanted if cell not in finished]
    repeated = (rows.sizes - 1 if rows else 0) + cells.ladder.seeds - 1
    later = max(0, rungs * (first + repeated) - len(wanted))
    refined = max(0, rungs * (grid.max_cells + repeated) - len(wanted) - later)
    seconds, each = pace.seconds(left) / jobs, pace.seconds(wanted) / jobs / max(1, len(wanted))
    flops, all_flops = sum(map(cells.flops, wanted)), sum(map(cells.all_flops, wanted))
    return [
        f"{counted(len(wanted), 'cell')} of {counted(rungs, 'budget')} {'is' if len(wanted) == 1 else 'are'} known to be wanted, "
        f"{len(finished)} of them finished: C = {flops:.3g} FLOPs, {all_flops:.3g} with the output head and MTP",
        f"{later} more {'follows' if later == 1 else 'follow'} from their results (IsoFLOP rows, seeds), and up to {refined} "
        "where a grid must grow",
        f"{jobs} at once: about {duration(seconds + later * each)}, or up to {duration(seconds + (later + refined) * each)}; more "
        "where the noise, once seeds tell it, moves a best cell: its row and its seeds are then run again",
        *_reused(cells, stages, wanted),
    ]


def counted(number: int, what: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {what}{'s' * (number != 1)}"


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
        go = "goes" if len(used) == 1 else "go"
        lines.append(
            f"{counted(len(used), 'cell')} {go} on from the constant stage of a shorter one: {share:.0%} of the tokens"
        )
    if unused:
        shorter, longer = unused
        shared = stages.shared(shorter, longer)
        lines.append(
            f"{longer.name} cannot go on from {shorter.name}: they have {counted(shared.steps, 'step')} in common, then "
            f"{shared.why_not_more} differs"
        )
    return lines
