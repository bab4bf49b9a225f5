"""Recipes of laws and forecasts: what a law's own models are trained by, and what trains a forecast as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.config import Recipe, load_recipe, parse_recipe
from train.published import moved
from train.scaling.apply import whole_batch
from train.scaling.family import differences
from train.scaling.law import Law

if TYPE_CHECKING:
    from train.scaling.forecast import Forecast


def template_of(law: Law) -> Recipe:
    """The recipe that a law's family is trained by: `small`, with the law's own models where it names them.

    Raises:
        RecipeError: the law's family is no model.
    """
    small = load_recipe("small")
    if law.family is None:
        return small
    values = small.model_dump(mode="json", by_alias=True)
    length = law.family.sequence_length
    sections = {
        "model": law.family.model,
        "data": values["data"] | {"sequence_length": length},
        "schedule": values["schedule"] | {"batch_tokens": length},
    }
    return parse_recipe(values | sections)


def recipe_of(forecast: Forecast, base: Recipe | None = None, law: str | None = None) -> Recipe:
    """A recipe that trains the run.

    Positions of the balancing and MTP weights move in proportion to the tokens; the warm-up is at most a tenth of the steps. Stages
    of the base's data are left out: a forecast is of one context.

    Args:
        base: what the forecast does not decide; the forecast's template by default. Its models must be of the same family.
        law: what to name the law by; the law's name by default.

    Raises:
        RecipeError: the model does not go with the base.
    """
    base = base or forecast.template
    values, length = base.model_dump(mode="json", by_alias=True), base.data.sequence_length
    batch = whole_batch(forecast.batch_tokens.value, length * base.schedule.batch_multiple)
    steps = max(1, round(forecast.tokens / batch))
    tokens = steps * batch
    taken = {"lr": float(f"{forecast.lr.value:.4g}"), "batch_tokens": batch}
    schedule = values["schedule"] | {
        "tokens": tokens,
        **taken,
        "from_law": {**taken, "hash": forecast.hyperparameters.hash},
        "lr_batch_exponent": 0.0,
        "warmup_steps": min(base.schedule.warmup_steps, max(1, steps // 10)),
        "law": forecast.hyperparameters.name if forecast.hyperparameters != forecast.law else law or forecast.law.name,
    }
    for name in ("gamma", "alpha", "lambda"):
        if isinstance(points := schedule[name], list):
            schedule[name] = moved(points, tokens, base.schedule.tokens)
    micro_batch = min(base.parallel.micro_batch, batch // length)
    budget = f"{forecast.flops:.1e}".replace("+", "").replace(".0e", "e")
    return parse_recipe(
        values
        | {
            "model": values["model"] | differences(base.model_config_resolved(), forecast.model),
            "data": values["data"] | {"stages": []},
            "parallel": values["parallel"] | {"micro_batch": micro_batch},
            "schedule": schedule,
            "run": values["run"] | {"dir": f"{base.run.dir}-{budget}"},
        }
    )
