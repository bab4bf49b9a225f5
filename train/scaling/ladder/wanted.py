"""A ladder: small runs that measure how the best learning rate, batch and size go with compute. This file says which runs.

DeepSeek LLM §3 measures in two parts, and so does a ladder, budget by budget:

1. hyper-parameters: at one width and C = M·D, a grid of learning rates × batches. It grows by its own spacing until every
   near-optimal cell (within max(0.25 %, twice the noise) of the minimum) has been tried at its four neighbours, so that the band
   is covered on both sides;
2. allocation: with the best of these, the same compute at other widths (an IsoFLOP row). It grows until its minimum lies inside.

The best run of each budget is repeated with other seeds, which tells the noise: of all seeds so far, so that grids may grow
again. Which cells are wanted is a pure function of the ladder and of the results so far; `execute.py` runs them, and any number
of processes may ask at any time.

All widths of a row have the learning rate and the batch that were best at the budget's own width. Widths far from it are not tuned,
so that their losses are a little too high: a known bias of the row's minimum towards the tuned width.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.scaling.fits.basins import SAME_CELL, seed_noise
from train.scaling.fits.runs import Runs
from train.scaling.ladder.ladder import Grid, Ladder

NEAR = 0.0025  # of the minimum: DeepSeek LLM §3.1


@dataclass(frozen=True)
class Cell:
    """One run of a ladder."""

    budget: float
    width: int
    lr: float
    batch_tokens: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"c{self.budget:.4g}-d{self.width}-lr{self.lr:.3g}-b{self.batch_tokens}-s{self.seed}"


Losses = Mapping[Cell, float]  # of the finished cells; a run that diverged has infinity


def wanted(ladder: Ladder, losses: Losses, sequence_length: int) -> list[Cell]:
    """The cells that the results so far ask for, finished ones among them, in the order in which to run them.

    Args:
        losses: of all cells that are finished, whether they are still wanted or not: together they tell the noise.
        sequence_length: of the ladder's recipe; batches are whole sequences.
    """
    cells: list[Cell] = []
    for part in _parts(ladder, losses, sequence_length):
        cells += [*part.grid, *part.row, *part.seeds]
    return list(dict.fromkeys(cells))


def open_ends(ladder: Ladder, losses: Losses, sequence_length: int) -> list[str]:
    """A line for each grid or row that ended before its minimum was surrounded, and which key of the ladder to change."""
    lines = []
    for part in _parts(ladder, losses, sequence_length):
        if part.uncovered:
            limit = ladder.hyperparameters.max_cells
            lines.append(
                f"C = {part.budget:.4g}: max_cells ended its grid with {part.uncovered} neighbour{'s' * (part.uncovered > 1)} of "
                f"near-optimal cells not run; raise hyperparameters.max_cells = {limit}"
            )
        if part.edge:
            end = part.row[0 if part.edge == "smaller" else -1]
            lines.append(
                f"C = {part.budget:.4g}: its row has its minimum at its edge, width {end.width}; add a {part.edge} one to "
                "allocation.widths"
            )
    return lines


@dataclass
class _Part:
    """What one budget asks for.

    Attributes:
        uncovered: neighbours of near-optimal cells that `max_cells` left out.
        edge: where widths are missing: the row's minimum is at its last one on that side.
    """

    budget: float
    grid: list[Cell]
    uncovered: int
    row: list[Cell]
    seeds: list[Cell]
    edge: str = ""


def _parts(ladder: Ladder, losses: Losses, sequence_length: int) -> list[_Part]:
    """Every budget's, the smallest first."""
    band, parts = max(NEAR, 2 * _noise(losses)), []
    for budget in ladder.budgets:
        grid, uncovered = _grid(ladder, budget, losses, band, sequence_length)
        part = _Part(budget, grid, uncovered, [], [])
        if all(cell in losses for cell in grid):
            best = min(grid, key=lambda cell: losses[cell])
            if losses[best] < math.inf:
                part.row, part.edge = _row(ladder, best, losses)
                part.seeds = [_with(best, seed=seed) for seed in range(1, ladder.seeds)]
        parts.append(part)
    return parts


def _grid(ladder: Ladder, budget: float, losses: Losses, band: float, length: int) -> tuple[list[Cell], int]:
    """Part 1 of a budget: the grid that it starts with, and the neighbours of what is near-optimal in it.

    Also how many neighbours `max_cells` left out.
    """
    grid, width = ladder.hyperparameters, ladder.width(budget)
    start = (Cell(budget, width, lr, batch) for batch in grid.batch_tokens for lr in grid.lr)
    cells = _distinct([], start, losses)
    while all(cell in losses for cell in cells):
        least = min(losses[cell] for cell in cells)
        near = [cell for cell in cells if losses[cell] <= least * (1 + band)] if least < math.inf else []
        more = _distinct(cells, _neighbours(near, grid, length), losses)
        room = max(grid.max_cells - len(cells), 0)
        if not more[:room]:
            return cells, len(more)
        cells += more[:room]
    return cells, 0


def _distinct(cells: list[Cell], new: Iterable[Cell], losses: Losses) -> list[Cell]:
    """The new cells that are none of these: cells within 1 % of each other are one, and a finished one stands for it."""
    found: list[Cell] = []
    for cell in new:
        if not any(_alike(cell, other) for other in (*cells, *found)):
            done = [other for other in losses if _alike(cell, other)]
            found.append(min(done, key=lambda other: (other != cell, other.lr, other.batch_tokens), default=cell))
    return found


def _alike(a: Cell, b: Cell) -> bool:
    return (a.budget, a.width, a.seed) == (b.budget, b.width, b.seed) and all(
        max(x, y) <= SAME_CELL * min(x, y) for x, y in ((a.lr, b.lr), (a.batch_tokens, b.batch_tokens))
    )


def _neighbours(near: Iterable[Cell], grid: Grid, length: int) -> Iterator[Cell]:
    """Each cell's neighbours in the learning rate and in the batch."""
    for cell in near:
        for sign in (-1, 1):
            lr, step = _on_lattice(cell.lr, grid.lr, grid.spacing)
            yield _with(cell, lr=float(f"{lr * grid.spacing ** (step + sign):.6g}"))
        for sign in (-1, 1):
            start, step = _on_lattice(cell.batch_tokens, grid.batch_tokens, grid.spacing)
            whole = cell.batch_tokens // length
            while whole == cell.batch_tokens // length:  # a few sequences may be the same number a step further
                step += sign
                whole = round(start * grid.spacing**step / length)
            if whole:
                yield _with(cell, batch_tokens=whole * length)


def _on_lattice(value: float, starts: Sequence[float], spacing: float) -> tuple[float, int]:
    """The start and the k for which start · spacing^k is nearest to the value."""
    steps = [(start, round(math.log(value / start, spacing))) for start in starts]
    return min(steps, key=lambda at: abs(math.log(value / at[0] / spacing ** at[1])))


def _noise(losses: Losses) -> float:
    """Relative sd over seeds; 0 where nothing has been repeated."""
    if not losses:
        return 0.0
    rows = [(loss, c.width, c.budget, c.lr, c.batch_tokens) for c, loss in losses.items()]
    columns = dict(zip(("loss", "params", "flops", "lr", "batch"), zip(*rows)))
    return seed_noise(Runs.of(**columns)) or 0.0


def _row(ladder: Ladder, best: Cell, losses: Losses) -> tuple[list[Cell], str]:
    """Part 2 of a budget: widths around its own, and one more beyond the best as long as that is the last on its side.

    An even number of widths has one more above than below, where a run is shorter. Also on which side the ladder's widths
    ended first: smaller, larger, or neither.
    """
    if ladder.allocation is None:
        return [], ""
    widths = ladder.allocation.widths
    low, high = ladder.first_row(best.width)
    while True:
        cells = [_with(best, width=width) for width in widths[low:high]]
        if any(cell not in losses for cell in cells):
            return cells, ""
        at = min(range(len(cells)), key=lambda i: losses[cells[i]])
        if at == 0 and low > 0:
            low -= 1
        elif at == len(cells) - 1 and high < len(widths):
            high += 1
        else:
            return cells, "smaller" if at == 0 else "larger" if at == len(cells) - 1 else ""


def _with(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**cell.__dict__, **changes})
