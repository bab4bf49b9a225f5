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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data.errors import DataError
from data.yaml_io import first_problem, read_yaml
from model.config import ConfigError
from train.config import Recipe, RecipeError, builtin_recipes, load_recipe, parse_recipe
from train.fields import Count, Name, PositiveCount, mistake, show
from train.scaling.basins import SAME_CELL, seed_noise
from train.scaling.errors import ScalingError
from train.scaling.family import at_width
from train.scaling.ladder_fields import Batches, Budgets, Rates, RecipeOrName, Row, Seeds, Spacing, Widths
from train.scaling.law import load_law
from train.scaling.runs import Runs
from train.scaling.size import size_of

NEAR = 0.0025  # of the minimum: DeepSeek LLM §3.1


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(Section):
    """Part 1: what each budget starts with."""

    widths: Widths  # of each budget, or one for all
    lr: Rates
    batch_tokens: Batches
    spacing: Spacing = 2.0  # ratio of two neighbours, with which the grid grows
    max_cells: PositiveCount = 20  # of a budget

    @model_validator(mode="after")
    def _holds_its_first_cells(self) -> Self:
        if self.max_cells < (first := len(self.lr) * len(self.batch_tokens)):
            raise mistake(
                f"is less than the {first} cells that lr and batch_tokens begin with",
                f"write at least {first}",
                field="max_cells",
                value=self.max_cells,
            )
        return self


class Rows(Section):
    """Part 2: the widths of an IsoFLOP row, from which every budget takes those around its own."""

    widths: Row
    sizes: PositiveCount = 5  # of a row to begin with


class Ladder(Section):
    """A ladder's YAML file. Width, tokens, rate, batch and seeds are the ladder's, whatever `recipe` says of them."""

    recipe: RecipeOrName  # a name, a path, or the sections
    budgets: Budgets  # C of each rung, FLOPs
    hyperparameters: Grid
    allocation: Rows | None = None
    warmup_tokens: Count = 0  # of every run, rounded to steps; fixed, so that runs of one rate and batch begin alike
    seeds: Seeds = 3  # runs of a budget's best cell
    dir: Name  # cells/, runs.sqlite
    keep_checkpoints: bool = False  # of finished cells

    @model_validator(mode="after")
    def _fits(self) -> Self:
        widths = self.hyperparameters.widths
        if len(widths) not in (1, len(self.budgets)):
            budgets = f"{len(self.budgets)} budget{'s' * (len(self.budgets) > 1)}"
            raise mistake(
                f"has {len(widths)} entries for {budgets}",
                "give one width for each, or one for all",
                field="hyperparameters.widths",
                value=widths,
            )
        if self.allocation and (missing := sorted(set(widths) - set(self.allocation.widths))):
            raise mistake(
                f"lacks {missing[0]}, a width of hyperparameters.widths",
                "add it",
                field="allocation.widths",
                value=self.allocation.widths,
            )
        return self

    def width(self, budget: float) -> int:
        """Of part 1."""
        widths = self.hyperparameters.widths
        return widths[self.budgets.index(budget)] if len(widths) > 1 else widths[0]

    def template(self) -> Recipe:
        """What the runs have in common, as a recipe; its own tokens, rate and batch stand for nothing.

        Raises:
            ScalingError: it is no recipe.
        """
        if isinstance(self.recipe, str):
            if not Path(self.recipe).is_file() and self.recipe not in builtin_recipes():
                raise ScalingError(f"recipe = {self.recipe!r}: is no recipe; give the path of one")
            try:
                return load_recipe(self.recipe)
            except RecipeError as error:
                raise ScalingError(f"recipe = {self.recipe!r}: {_as_key(str(error))}") from None
        data, schedule, run = (_section(self.recipe, name) for name in ("data", "schedule", "run"))
        schedule = {"tokens": 1e12, "lr": 1e-3, "batch_tokens": _whole_sequences(data), **schedule}
        try:
            return parse_recipe({**self.recipe, "schedule": schedule, "run": {"dir": self.dir, **run}})
        except RecipeError as error:
            raise ScalingError(in_ladder(str(error))) from None


def load_ladder(path: Path) -> Ladder:
    """Read a ladder's file.

    Raises:
        ScalingError: it cannot be read, or breaks a rule; the line names the file and the key.
    """
    try:
        content = read_yaml(path)
    except DataError as error:
        raise ScalingError(str(error)) from None
    try:
        ladder = Ladder.model_validate(content)
        template = ladder.template()
        _check_law(template)
        _check_runs(ladder, template)
    except ValidationError as error:
        raise ScalingError(f"{path}: {_first_mistake(error, content)}") from None
    except ScalingError as error:
        raise ScalingError(f"{path}: {error}") from None
    return ladder


def in_ladder(message: str) -> str:
    """What is wrong with a recipe, as the file says it that has the recipe as its section `recipe`."""
    text = _KEY.sub(r"recipe.\g<0>", _as_key(message))
    return text if text.startswith("recipe.") or not _FIELD.match(text) else f"recipe.{text}"


_SECTIONS = "|".join(Recipe.model_fields)
_KEY = re.compile(rf"""(?<![\w./'"-])(?:{_SECTIONS})\.(?=\w)""")
_OVERRIDE = re.compile(rf"\b((?:{_SECTIONS})\.[\w.]+)=(?=\S)")
_FIELD = re.compile(r"[\w.]+(?: =|:) ")


def _as_key(message: str) -> str:
    """A mistake of a recipe with the fixes that a file can take: `schedule.lr: 1e-3` in place of `schedule.lr=1e-3`."""
    return _OVERRIDE.sub(r"\1: ", re.sub(r" in the recipe or as \S+=…", "", message))


def _section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section as it is written; nothing below its key means the defaults, which `data` has not."""
    given = recipe.get(name)
    if given is None and name != "data":
        return {}
    if not isinstance(given, dict):
        examples = {"data": "{train: STORE, sequence_length: 128}", "schedule": "{shape: wsd}", "run": "{device: cpu}"}
        raise ScalingError(f"recipe.{name}: must be a map of keys; write for example {name}: {examples[name]}")
    return given


def _whole_sequences(data: Mapping[str, Any]) -> int | None:
    """The least batch that is whole sequences in every stage of the data; None where what is written is no length."""
    stages = data["stages"] if isinstance(data.get("stages"), list) else []
    sections = [data, *(stage for stage in stages if isinstance(stage, dict))]
    lengths = [section["sequence_length"] for section in sections if section.get("sequence_length") is not None]
    if not lengths or not all(isinstance(T, int | float) and 1 <= T < math.inf for T in lengths):
        return None
    return math.lcm(*map(int, lengths))


_RULES = {
    "model_type": "must be a map of keys; write key: value pairs below it",
    "string_type": "must be text; write it in quotes",
    "bool_parsing": "must be true or false; write one of them",
    "bool_type": "must be true or false; write one of them",
}


def _first_mistake(error: ValidationError, content: Any) -> str:
    """The first problem of a ladder's own keys, an unknown key before all else, as one line."""
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    context, field = first.get("ctx", {}), ".".join(map(str, first["loc"]))
    if rule := _RULES.get(first["type"]):
        return f"{field} = {show(first['input'])}: {rule}"
    if first["type"] != "recipe":
        return first_problem(error, Ladder, content)
    field = ".".join(filter(None, [field, context.get("field")]))
    return f"{field} = {show(context.get('value', first['input']))}: {context['rule']}; {context['fix']}"


def _check_law(template: Recipe) -> None:
    """A law that is named must be there, unless it has given its numbers already."""
    if template.schedule.law is not None and template.schedule.from_law is None:
        try:
            load_law(template.schedule.law)
        except ScalingError as error:
            raise ScalingError(f"recipe.schedule.{error}") from None


def _check_runs(ladder: Ladder, template: Recipe) -> None:
    """Batches are whole sequences; every first run has a step of its batch, and more tokens than its warm-up."""
    batches, base, length = (
        ladder.hyperparameters.batch_tokens,
        template.model_config_resolved(),
        template.data.sequence_length,
    )
    for i, batch in enumerate(batches):
        for tokens in sorted({tokens for _, tokens in template.data.lengths}):
            if batch % tokens:
                raise ScalingError(
                    f"hyperparameters.batch_tokens.{i} = {batch}: is not a multiple of the sequence length {tokens}; write for "
                    f"example {max(round(batch / tokens), 1) * tokens}"
                )
    for i, budget in enumerate(ladder.budgets):
        own = ladder.width(budget)
        low, high = _first_row(ladder, own)
        row = ladder.allocation.widths[low:high] if ladder.allocation else ()
        for width in dict.fromkeys((own, *row)):
            try:
                flops = size_of(at_width(base, width), length).flops_per_token
            except ConfigError as error:
                raise ScalingError(f"width {width}: {in_ladder(str(error))}") from None
            rung, tokens = f"budgets.{i} = {budget:g}", int(budget / flops)
            if budget < (least := flops * min(batches)):
                raise ScalingError(
                    f"{rung}: is less than one step of batch {min(batches)} at width {width} ({least:.3g} FLOPs); give at least "
                    f"{_rounded_up(least):.3g}"
                )
            if width == own and tokens < (most := max(batches)):
                raise ScalingError(
                    f"hyperparameters.batch_tokens.{batches.index(most)} = {most}: is more than the whole run of {rung} at width "
                    f"{width}, {tokens:,} tokens; lower it, or let the budgets begin at {_rounded_up(flops * most):.3g}"
                )
            if tokens <= ladder.warmup_tokens:
                raise ScalingError(
                    f"warmup_tokens = {ladder.warmup_tokens}: is not less than the whole run of {rung} at width {width}, "
                    f"{tokens:,} tokens; write for example {tokens // 10}"
                )


def _rounded_up(flops: float) -> float:
    """To three digits, never below."""
    unit = 10.0 ** (math.floor(math.log10(flops)) - 2)
    return math.ceil(flops / unit) * unit


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
    low, high = _first_row(ladder, best.width)
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


def _first_row(ladder: Ladder, own: int) -> tuple[int, int]:
    """Which of the ladder's widths the row around this one begins with: from the first to below the last."""
    if ladder.allocation is None:
        return 0, 0
    widths, sizes = ladder.allocation.widths, ladder.allocation.sizes
    low = max(0, min(widths.index(own) - (sizes - 1) // 2, len(widths) - sizes))
    return low, min(len(widths), low + sizes)


def _with(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**cell.__dict__, **changes})
