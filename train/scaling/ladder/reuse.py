"""Constant stages that two runs have in common (DeepSeek LLM §3.1 reuses the first stage of its multi-step schedule).

Two runs that differ in their number of tokens alone make the same steps as long as their schedules give the same settings: same
samples, same learning rate, same batch, same γ, α, λ. A longer run may then continue from a checkpoint of the shorter one, and ends
with the very numbers of a run of its own. How far that goes is not a matter of shapes and rules: both schedules are asked.
"""

import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from train.config import Recipe
from train.scaling.ladder.cells import Cells
from train.scaling.ladder.wanted import Cell
from train.schedule import Schedule

LEAST = 0.2  # of the shorter run; a smaller part is not worth a checkpoint


class Shared(NamedTuple):
    """What two runs have in common."""

    steps: int
    tokens: int
    why_not_more: str  # what differs in the step after these; empty where the shorter run ends first


def shared_steps(shorter: Recipe, longer: Recipe) -> Shared:
    """The steps that both runs begin with, and what ends them."""
    runs = [
        Schedule(recipe.schedule, recipe.data.lengths, recipe.data.passed_over).steps() for recipe in (shorter, longer)
    ]
    steps = tokens = 0
    for one, other in zip(*runs):
        if one != other:
            mine, theirs = asdict(one.settings), asdict(other.settings)
            differing = [name.rstrip("_") for name in mine if mine[name] != theirs[name]]
            return Shared(steps, tokens, " and ".join(differing) or "the samples")
        steps, tokens = steps + 1, tokens + one.tokens
    return Shared(steps, tokens, "")


class ConstantStages:
    """Which cells of a ladder can go on from which."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._shared: dict[tuple[Cell, Cell], Shared] = {}

    def shared(self, shorter: Cell, longer: Cell) -> Shared:
        """The steps that two cells begin with."""
        if (shorter, longer) not in self._shared:
            recipes = self._cells.recipe(shorter), self._cells.recipe(longer)
            self._shared[shorter, longer] = shared_steps(*recipes)
        return self._shared[shorter, longer]

    def step(self, shorter: Cell, longer: Cell) -> int:
        """Where the longer one goes on from the shorter one; 0 where that is not worth while."""
        shared = self.shared(shorter, longer)
        return shared.steps if shared.tokens >= LEAST * self._cells.tokens(shorter) else 0

    def kept(self, cell: Cell) -> int:
        """The step whose checkpoint a cell keeps for the next larger budget of its width; 0 where none will ask for it."""
        ladder = self._cells.ladder
        larger = [b for b in ladder.budgets if b > cell.budget and ladder.width(b) == cell.width]
        if not larger or ladder.width(cell.budget) != cell.width:
            return 0
        return self.step(cell, Cell(larger[0], cell.width, cell.lr, cell.batch_tokens, cell.seed))

    def donor(self, cell: Cell, wanted: Collection[Cell]) -> Cell | None:
        """The cell of the next smaller budget that this one can go on from."""
        for budget in sorted((b for b in self._cells.ladder.budgets if b < cell.budget), reverse=True):
            donor = Cell(budget, cell.width, cell.lr, cell.batch_tokens, cell.seed)
            if donor in wanted:
                step = self.step(donor, cell)
                return donor if step and step == self.kept(donor) else None
        return None


def inherit(donor: Path, own: Path, step: int) -> None:
    """Give a run that has not begun the checkpoint of another, as hard links: a checkpoint is never written again."""
    source = donor / f"step-{step:08d}"
    if (source / "COMPLETE").exists() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        temporary = own.with_name(".checkpoints.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary / source.name, copy_function=os.link)
        temporary.rename(own)
