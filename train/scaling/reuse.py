"""Constant stages that two runs have in common (DeepSeek LLM §3.1 reuses the first stage of its multi-step schedule).

Two runs that differ in their number of tokens alone make the same steps as long as their schedules give the same settings: same
samples, same learning rate, same batch, same γ, α, λ. A longer run may then continue from a checkpoint of the shorter one, and ends
with the very numbers of a run of its own. How far that goes is not a matter of shapes and rules: both schedules are asked.
"""

from dataclasses import asdict
from typing import NamedTuple

from train.config import Recipe
from train.schedule import Schedule

LEAST = 0.2  # of the shorter run; a smaller part is not worth a checkpoint


class Shared(NamedTuple):
    """What two runs have in common."""

    steps: int
    tokens: int
    why_not_more: str  # what differs in the step after these; empty where the shorter run ends first


def shared_steps(shorter: Recipe, longer: Recipe) -> Shared:
    """The steps that both runs begin with, and what ends them."""
    runs = [Schedule(recipe.schedule, recipe.data.lengths).steps() for recipe in (shorter, longer)]
    steps = tokens = 0
    for one, other in zip(*runs):
        if one != other:
            mine, theirs = asdict(one.settings), asdict(other.settings)
            differing = [name.rstrip("_") for name in mine if mine[name] != theirs[name]]
            return Shared(steps, tokens, " and ".join(differing) or "the samples")
        steps, tokens = steps + 1, tokens + one.tokens
    return Shared(steps, tokens, "")
