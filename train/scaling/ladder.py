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
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data.errors import DataError
from data.yaml_io import first_problem, read_yaml
from train.config import Recipe, RecipeError, builtin_recipes, load_recipe, parse_recipe
from train.fields import Count, Name, Positive, PositiveCount, mistake
from train.scaling.basins import SAME_CELL, seed_noise
from train.scaling.errors import ScalingError
from train.scaling.family import STEP
from train.scaling.runs import Runs

NEAR = 0.0025  # of the minimum: DeepSeek LLM §3.1


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(Section):
    """Part 1: what each budget starts with."""

    widths: tuple[PositiveCount, ...]  # of each budget, or one for all
    lr: tuple[Positive, ...]
    batch_tokens: tuple[PositiveCount, ...]
    spacing: Positive = 2.0  # ratio of two neighbours, with which the grid grows
    max_cells: PositiveCount = 20  # of a budget

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        if self.spacing <= 1:
            raise mistake(f"spacing = {self.spacing} is the ratio of two neighbours and more than 1", "write 2")
        for name in ("widths", "lr", "batch_tokens"):
            if not getattr(self, name):
                raise mistake(f"{name} must have an entry", "write for example [1e-3, 2e-3]")
        return self


class Rows(Section):
    """Part 2: the widths of an IsoFLOP row, from which every budget takes those around its own."""

    widths: tuple[PositiveCount, ...]
    sizes: PositiveCount = 5  # of a row to begin with

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if list(self.widths) != sorted(set(self.widths)) or not self.widths:
            raise mistake(f"widths = {list(self.widths)} must have an entry, and grow", "sort them")
        return self


class Ladder(Section):
    """A ladder's YAML file. Width, tokens, rate, batch and seeds are the ladder's, whatever `recipe` says of them."""

    recipe: Name | dict[str, Any]  # a recipe's name or path, or the sections themselves
    budgets: tuple[Positive, ...]  # C of each rung, FLOPs
    hyperparameters: Grid
    allocation: Rows | None = None
    warmup_tokens: Count = 0  # of every run, rounded to steps; fixed, so that runs of one rate and batch begin alike
    seeds: PositiveCount = 3  # runs of a budget's best cell
    dir: Name  # cells/, runs.sqlite
    keep_checkpoints: bool = False  # of finished cells

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.budgets) != sorted(set(self.budgets)) or not self.budgets:
            raise mistake(f"budgets = {list(self.budgets)} must have an entry, and grow", "sort them")
        widths, others = self.hyperparameters.widths, self.allocation.widths if self.allocation else ()
        if len(widths) not in (1, len(self.budgets)):
            raise mistake(
                f"hyperparameters.widths has {len(widths)} entries for {len(self.budgets)} budgets",
                "give one width for each, or one for all",
            )
        for width in (*widths, *others):
            if width % STEP:
                raise mistake(f"width {width}: widths must be multiples of {STEP}", "give for example 64")
        if missing := sorted(set(widths) - set(others)) if self.allocation else ():
            raise mistake(f"allocation.widths lacks {missing[0]}, a width of hyperparameters.widths", "add it")
        return self

    def width(self, budget: float) -> int:
        """Of part 1."""
        widths = self.hyperparameters.widths
        return widths[self.budgets.index(budget)] if len(widths) > 1 else widths[0]

    def template(self) -> Recipe:
        """What the runs have in common, as a recipe; its own tokens, rate and batch stand for nothing.

        Raises:
            RecipeError, ScalingError: it is no recipe.
        """
        if isinstance(self.recipe, str):
            if not Path(self.recipe).is_file() and self.recipe not in builtin_recipes():
                raise ScalingError(f"recipe = {self.recipe!r}: is no recipe; give the path of one")
            return load_recipe(self.recipe)
        schedule = {"tokens": 1e12, "lr": 1e-3, **self.recipe.get("schedule", {})}
        schedule.setdefault("batch_tokens", self.recipe.get("data", {}).get("sequence_length"))
        return parse_recipe(
            {**self.recipe, "schedule": schedule, "run": {"dir": self.dir, **self.recipe.get("run", {})}}
        )


def load_ladder(path: Path) -> Ladder:
    """Read a ladder's file.

    Raises:
        ScalingError: it cannot be read, or breaks a rule; the line names the key.
    """
    try:
        content = read_yaml(path)
        ladder = Ladder.model_validate(content)
        ladder.template()
    except (DataError, RecipeError) as error:
        raise ScalingError(str(error)) from None
    except ValidationError as error:
        raise ScalingError(f"{path}: {first_problem(error, Ladder, content)}") from None
    return ladder


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
                f"C = {part.budget:.4g}: max_cells ended its grid with {part.uncovered} neighbours of near-optimal cells not "
                f"run; raise hyperparameters.max_cells = {limit}"
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
    widths, sizes = ladder.allocation.widths, ladder.allocation.sizes
    middle = widths.index(best.width)
    low = max(0, min(middle - (sizes - 1) // 2, len(widths) - sizes))
    high = min(len(widths), low + sizes)
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
