"""Recipes of laws and forecasts: what a law's own runs were trained by, and what trains a forecast as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Recipe, RecipeError, load_recipe, parse_recipe
from train.published import moved
from train.scaling.apply import whole_batch
from train.scaling.errors import ScalingError
from train.scaling.family import differences
from train.scaling.law import Law

if TYPE_CHECKING:
    from train.scaling.forecast import Forecast

WARMUP_SHARE = 10  # of the steps at most are warm-up: one in so many


def template_of(law: Law) -> Recipe:
    """The recipe that a law's runs had in common; `small` for a law that does not know. Its tokens, rate and batch mean nothing.

    Raises:
        ScalingError: what the law has is no recipe.
    """
    if law.family is None:
        return load_recipe("small")
    given = law.family.recipe
    varied = {"tokens": 1e12, "lr": 1e-3, "batch_tokens": given.get("data", {}).get("sequence_length")}
    schedule = varied | given.get("schedule", {})
    try:
        return parse_recipe({**given, "schedule": schedule, "run": {"dir": "runs/law", **given.get("run", {})}})
    except RecipeError as error:
        raise ScalingError(f"law = {law.name!r}: family.recipe: {error}; or give the forecast a recipe") from None


def recipe_of(forecast: Forecast, base: Recipe | None = None, law: str | None = None) -> Recipe:
    """A recipe that trains the run.

    Positions of the balancing and MTP weights move in proportion to the tokens, and so does the warm-up of a law's own recipe,
    from the middle of the tokens that it was measured over; it is at most a tenth of the steps. Stages of the base's data are left
    out: a forecast is of one context. The run's folder lies beside the base's and is named by law and C.

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
    named, numbers = _named(forecast, taken)
    schedule = values["schedule"] | {
        "tokens": tokens,
        **taken,
        "from_law": {**numbers, "hash": named.hash},
        "lr_batch_exponent": 0.0,
        "warmup_steps": _warmup_steps(forecast.law, base, steps),
        "law": law if law and named == forecast.law else named.name,
    }
    for name in ("gamma", "alpha", "lambda"):
        if isinstance(points := schedule[name], list):
            schedule[name] = moved(points, tokens, base.schedule.tokens)
    micro_batch = min(base.parallel.micro_batch, batch // length)
    return parse_recipe(
        values
        | {
            "model": values["model"] | differences(base.model_config_resolved(), forecast.model),
            "data": values["data"] | {"stages": []},
            "parallel": values["parallel"] | {"micro_batch": micro_batch},
            "schedule": schedule,
            "run": values["run"] | {"dir": str(Path(base.run.dir).parent / _run_name(forecast))},
        }
    )


def run_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe of `recipe_of` trains with, by the names of its schedule."""
    schedule = recipe.schedule
    assert isinstance(schedule.batch_tokens, int)
    return {
        "tokens": schedule.tokens,
        "steps": schedule.tokens // schedule.batch_tokens,
        "warmup_steps": schedule.warmup_steps,
        "lr": schedule.lr,
        "batch_tokens": schedule.batch_tokens,
        "sequences": schedule.batch_tokens // recipe.data.sequence_length,
        "sequence_length": recipe.data.sequence_length,
        "data": [source.path for source in recipe.data.train],
        "dir": recipe.run.dir,
    }


def _named(forecast: Forecast, taken: dict[str, Any]) -> tuple[Law, dict[str, Any]]:
    """The law that the recipe names, and the numbers that are its own: the forecast's, unless all of them are another's."""
    sources = {"lr": forecast.lr_law, "batch_tokens": forecast.batch_law}
    named = forecast.law if forecast.law in sources.values() else forecast.lr_law
    return named, {name: taken[name] for name, source in sources.items() if source == named}


def _warmup_steps(law: Law, base: Recipe, steps: int) -> int:
    most = max(1, steps // WARMUP_SHARE)
    unknown = law.family is None or law.family.warmup_tokens is None or "tokens" not in law.measured
    if unknown or base != template_of(law):
        return min(base.schedule.warmup_steps, most)
    assert law.family and law.family.warmup_tokens
    share = law.family.warmup_tokens / math.sqrt(math.prod(law.measured["tokens"]))
    return min(max(1, round(share * steps)), most)


def _run_name(forecast: Forecast) -> str:
    budget = f"{forecast.flops:.1e}".replace("+", "").replace(".0e", "e")
    return re.sub(r"[^\w.-]+", "-", f"{forecast.law.name}-{budget}")
