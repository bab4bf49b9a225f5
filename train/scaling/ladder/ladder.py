"""A ladder's YAML file: what its runs have in common, its budgets, and what each of them begins with.

A mistake is one line that names the key as the file has it, also where the recipe inside it is at fault.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data.errors import DataError
from data.yaml_io import first_problem, read_yaml
from model.config import ConfigError
from train.config import Recipe, RecipeError, builtin_recipes, load_recipe, parse_recipe
from train.fields import Count, Name, PositiveCount, mistake, show
from train.scaling.errors import ScalingError
from train.scaling.family import at_width
from train.scaling.ladder.fields import Batches, Budgets, Rates, RecipeOrName, Row, Seeds, Spacing, Widths
from train.scaling.law import load_law
from train.scaling.size import size_of


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

    def first_row(self, own: int) -> tuple[int, int]:
        """Which of its widths the row around this one begins with: from the first to below the last."""
        if self.allocation is None:
            return 0, 0
        widths, sizes = self.allocation.widths, self.allocation.sizes
        low = max(0, min(widths.index(own) - (sizes - 1) // 2, len(widths) - sizes))
        return low, min(len(widths), low + sizes)

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
        low, high = ladder.first_row(own)
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
