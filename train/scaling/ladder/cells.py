"""A cell of a ladder as a run: its recipe, its folder, and what it came to.

`result.json` is written last; it is all that a table of runs is made from. It has the whole identity of its run, by which a ladder
that was edited, or whose code has changed, finds the results that still hold. The hash in a folder's name is for people, and keeps
runs of two recipes apart.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from data.files import replace_file
from data.store import Store
from model.config import ModelConfig
from train.config import Recipe, RecipeError, parse_recipe
from train.published import moved
from train.scaling.errors import ScalingError
from train.scaling.family import at_width, differences
from train.scaling.ladder.common import Common
from train.scaling.ladder.identity import Identity
from train.scaling.ladder.ladder import Ladder
from train.scaling.ladder.wanted import Cell
from train.scaling.size import Size, size_of

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """A finished run. Losses are means over the training mixture, a source counting by its weight; infinite where it diverged."""

    cell: Cell
    identity: Identity
    code_version: str  # of the source that the run began with; all of them, where it went on with another
    params: int  # N, without embedding and head; all experts counted
    active: int
    flops_per_token: int  # M
    all_flops_per_token: int  # with the output head and MTP
    tokens: int
    steps: int
    loss: float  # nats per token
    bits_per_byte: float
    by_source: dict[str, float] = field(default_factory=dict)  # nats per token
    seconds: float = 0.0  # of all its sessions
    reused_tokens: int = 0  # of another cell's constant stage

    @property
    def flops(self) -> int:
        """C = M·D."""
        return self.flops_per_token * self.tokens

    @classmethod
    def read(cls, path: Path) -> Self:
        """From `result.json`.

        Raises:
            ScalingError: the file is damaged.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            values |= {"cell": Cell(**values["cell"]), "identity": Identity.model_validate(values["identity"])}
            values |= {k: math.inf for k in ("loss", "bits_per_byte") if values[k] is None}
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScalingError(
                f"{path}: is not a cell's result ({error}); remove it and run the ladder again"
            ) from None

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"identity": self.identity.model_dump()}
        for name in ("loss", "bits_per_byte"):
            values[name] = values[name] if math.isfinite(values[name]) else None  # JSON has no infinity
        with replace_file(folder / RESULT) as path:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


class Cells:
    """The cells of one ladder: recipes and folders."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.folder = Path(ladder.dir) / "cells"
        self._template = ladder.template()
        self._base = self._template.model_config_resolved()
        self._common = self._template.model_dump(mode="json", by_alias=True)
        text = self._template.data
        sources = [*text.train, *(text.validation or ()), *(s for stage in text.stages for s in stage.train or ())]
        self._stores = {source.path: Store.open(Path(source.path)) for source in sources}
        self._text = {path: store.content for path, store in self._stores.items()}
        self._recipes: dict[Cell, Recipe] = {}
        self._identities: dict[Cell, Identity] = {}
        self._read: dict[Path, Result] = {}
        self._found: dict[Cell, Path] = {}  # folders of finished cells
        self.others: dict[Path, str] = {}  # finished cells of another recipe, and by what they differ

    @property
    def sequence_length(self) -> int:
        return self._template.data.sequence_length

    def model(self, cell: Cell) -> ModelConfig:
        return at_width(self._base, cell.width)

    def tokens(self, cell: Cell) -> int:
        """D = C / M, in whole batches."""
        tokens = cell.budget / self._size(cell).flops_per_token
        return max(1, round(tokens / cell.batch_tokens)) * cell.batch_tokens

    def common(self) -> Common:
        """What all cells have in common."""
        varied = {"schedule": ("lr", "batch_tokens", "warmup_steps"), "run": ("dir", "seed")}
        recipe = {
            section: {name: value for name, value in values.items() if name not in varied.get(section, ())}
            for section, values in self._common.items()
        }
        stores = list(self._stores.values())
        data = [f"{store.path.name}: {', '.join(store.shares('train'))}" for store in stores]
        return Common(
            recipe=recipe,
            data=data,
            tokenizer=stores[0].manifest.tokenizer_fingerprint,
            warmup_tokens=self.ladder.warmup_tokens or None,
        )

    def flops(self, cell: Cell) -> int:
        """C = M·D."""
        return self._size(cell).flops_per_token * self.tokens(cell)

    def all_flops(self, cell: Cell) -> int:
        """With the output head and MTP."""
        return self._size(cell).all_flops_per_token * self.tokens(cell)

    def recipe(self, cell: Cell) -> Recipe:
        """What `rorqual train` runs.

        Raises:
            RecipeError: the cell breaks a rule of recipes.
        """
        if cell not in self._recipes:
            self._recipes[cell] = self._make(cell)
        return self._recipes[cell]

    def place(self, cell: Cell) -> Path:
        """The cell's folder: `recipe.yaml`, `result.json`, `log.txt`, and `run/`."""
        return self._found.get(cell) or self.folder / f"{cell.name}-{self.identity(cell).hash()[:8]}"

    def identity(self, cell: Cell) -> Identity:
        """Of the cell's run."""
        if cell not in self._identities:
            self._identities[cell] = Identity.of(self.recipe(cell), self.model(cell), self._text)
        return self._identities[cell]

    def results(self) -> dict[Cell, Result]:
        """What all finished cells of the ladder's recipe came to, wanted or not, whoever ran them; the others are in `others`."""
        found: dict[Cell, Result] = {}
        for path in sorted(self.folder.glob(f"*/{RESULT}")):
            if path not in self._read:
                self._read[path] = result = Result.read(path)
                if difference := self._difference(result):
                    self.others[path.parent] = difference
            result = self._read[path]
            if path.parent not in self.others:
                found.setdefault(result.cell, result)
                self._found.setdefault(result.cell, path.parent)
        return dict(sorted(found.items(), key=lambda item: astuple(item[0])))

    def _difference(self, result: Result) -> str | None:
        try:
            return result.identity.difference(self.identity(result.cell))
        except (RecipeError, ScalingError) as error:  # the ladder's recipe has no such cell
            return str(error)

    def _size(self, cell: Cell) -> Size:
        return size_of(self.model(cell), self._template.data.sequence_length)

    def _make(self, cell: Cell) -> Recipe:
        common, tokens, batch = self._common, self.tokens(cell), cell.batch_tokens
        schedule = {**common["schedule"], "tokens": tokens, "lr": cell.lr, "batch_tokens": batch}
        for name in ("gamma", "alpha", "lambda"):  # positions of a curve move in proportion to the run
            if isinstance(points := schedule[name], list):
                schedule[name] = moved(points, tokens, self._template.schedule.tokens)
        if self.ladder.warmup_tokens:
            schedule["warmup_steps"] = max(1, round(self.ladder.warmup_tokens / batch))
        sequences = max(1, batch // self._template.data.sequence_length)
        changes: dict[str, dict[str, Any]] = {
            "model": differences(self._base, self.model(cell)),
            "data": {"seed": cell.seed},
            "parallel": {"micro_batch": min(common["parallel"]["micro_batch"], sequences)},
            "schedule": schedule,
            "evaluate": {"every_steps": None},
            "checkpoint": {"every_steps": None, "keep_every_steps": None, "keep": 1},
            "run": {"seed": cell.seed},
        }
        return parse_recipe(common | {section: common[section] | values for section, values in changes.items()})


def result_of(cells: Cells, cell: Cell, run: Path, code_version: str, seconds: float) -> Result | None:
    """Read what a run wrote; None where it was stopped before its end.

    Raises:
        ScalingError: it has no validation at its end.
    """
    steps = steps_of(run)
    first, last = steps[0], steps[-1]
    if last["tokens"] < cells.recipe(cell).schedule.tokens:
        return None
    if not last.get("validation"):
        raise ScalingError(f"{run}: its last step has no validation; give the store a validation split")
    loss, bits = mixture_loss(last["validation"], last["tokens_by_source"])
    return replace(
        diverged(cells, cell, code_version, seconds),
        tokens=last["tokens"],
        steps=last["step"],
        loss=loss,
        bits_per_byte=bits,
        by_source={source: values["nats_per_token"] for source, values in last["validation"].items()},
        reused_tokens=first["tokens"] - cell.batch_tokens,
    )


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps; the last line may be half-written."""
    path, steps = run / "metrics.jsonl", []
    for line in path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n"):
            steps.append(json.loads(line))
    return steps


def seconds_of_steps(run: Path) -> float:
    """How long a run's steps took, without its start, its validation and its checkpoints."""
    return float(sum(step["batch_tokens"] / step["tokens_per_second"] for step in steps_of(run)))


def diverged(cells: Cells, cell: Cell, code_version: str, seconds: float) -> Result:
    """Of a run that gave up after too many steps without a finite gradient."""
    recipe, config = cells.recipe(cell), cells.model(cell)
    size = size_of(config, recipe.data.sequence_length)
    return Result(
        cell=cell,
        identity=cells.identity(cell),
        code_version=code_version,
        **size._asdict(),
        tokens=recipe.schedule.tokens,
        steps=recipe.schedule.tokens // cell.batch_tokens,
        loss=math.inf,
        bits_per_byte=math.inf,
        seconds=seconds,
    )


def mixture_loss(validation: Mapping[str, Mapping[str, float]], trained: Mapping[str, float]) -> tuple[float, float]:
    """Nats per token and bits per byte of the training mixture.

        nats = Σ w·n,   bits/byte = Σ w·n / (ln 2 · Σ w·bytes per token)        w a source's share of the training tokens

    Args:
        validation: nats_per_token, bits_per_byte and tokens of each source.
        trained: training tokens of each source. Validation text that is none of them counts by its own tokens.
    """
    known = {source: trained[source] for source in validation if source in trained}
    weights = known if len(known) == len(validation) else {s: v["tokens"] for s, v in validation.items()}
    total = sum(weights.values())
    nats = sum(w / total * validation[s]["nats_per_token"] for s, w in weights.items())
    size = sum(
        w / total * validation[s]["nats_per_token"] / (math.log(2) * validation[s]["bits_per_byte"])
        for s, w in weights.items()
    )
    return (nats, nats / math.log(2) / size) if math.isfinite(nats) else (math.inf, math.inf)
