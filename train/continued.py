"""What a law gave a run stays as long as the run does.

`auto` and `ramp` are decided where a recipe is read, every time. By then the law's file may hold another law, fitted to more runs
perhaps, and a run that took its answer would have another batch, other steps and another learning rate from the middle on. So a
run that is under way keeps its own numbers, which stand in its checkpoint, and says so in a line where the law's are others.
Numbers that are given by hand count, as in every recipe.
"""

from collections.abc import Mapping
from typing import Any

from train.config import Recipe, parse_recipe
from train.fields import show
from train.sections import ScheduleSection


def continued(recipe: Recipe, record: Mapping[str, Any]) -> tuple[Recipe, str | None]:
    """A recipe with the run's own numbers in the place of those that a law gave just now.

    Args:
        record: `run.json` of the checkpoint that the run continues from.

    Returns:
        The recipe, and a line where a number of the law is not the run's.

    Raises:
        RecipeError: the run's numbers do not go with what else has been changed.
    """
    given = recipe.schedule.from_law
    if given is None:
        return recipe, None
    old = ScheduleSection.model_validate(record["recipe"]["schedule"])
    own = {name: getattr(old, name) for name in given.numbers}
    values = recipe.model_dump(mode="json", by_alias=True)
    values["schedule"] |= old.model_dump(mode="json", include={*own, "law", "from_law"})
    differing = [name for name in own if own[name] != given.numbers[name]]
    if not differing:
        return parse_recipe(values), None
    told, kept = (
        ", ".join(f"schedule.{name} = {show(numbers[name])}" for name in differing) for numbers in (given.numbers, own)
    )
    return parse_recipe(values), (
        f"law {recipe.schedule.law} gives {told} now; the run in {recipe.run.dir} keeps its {kept}; give numbers to change them"
    )
