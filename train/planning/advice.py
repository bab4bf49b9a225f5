"""What the law of a recipe says for its run, beside what the recipe has; and what to be warned of.

It is computed from the recipe's numbers and its `schedule.law` alone, so that a recipe with `auto` and the one that was written
from it are told the same. A law file that is not there any more is no mistake then: the numbers stand in the recipe.
"""

from pathlib import Path

from data.errors import DataError
from data.manifest import Manifest
from train.config import Recipe
from train.fields import as_points
from train.scaling.apply import Advice, Course, advise
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.law import Law, load_law


def law_advice(recipe: Recipe) -> Advice | None:
    """The answer of the recipe's law for its model and tokens; None where it names none, or one that is not there."""
    if recipe.schedule.law is None:
        return None
    try:
        law = load_law(recipe.schedule.law)
    except ScalingError:
        return None
    course = Course.of(law, recipe.model_config_resolved(), recipe.data.lengths)
    return advise(law, course, recipe.schedule.tokens)


def law_warnings(recipe: Recipe, tokenizer: str | None) -> list[str]:
    """A line for each thing that makes the law's answer doubtful.

    Args:
        tokenizer: fingerprint of that of the store; None where it is not known.
    """
    advice = law_advice(recipe)
    if advice is None:
        return []
    doubt = tokenizer_warning(advice.law, tokenizer)
    return advice.warnings() + ([doubt] if doubt else [])


def tokenizer_warning(law: Law, tokenizer: str | None) -> str | None:
    """Whether a law was fitted on text that another tokenizer cut, in a line; None where it was not or one of them is not known."""
    if law.tokenizer is None or tokenizer is None or law.tokenizer == tokenizer:
        return None
    return (
        f"law {law.name} was fitted on text that another tokenizer cut ({law.tokenizer[:12]}…, the store's is {tokenizer[:12]}…); "
        "its learning rate and batch may serve, its loss does not hold for this text"
    )


def store_tokenizer(recipe: Recipe) -> str | None:
    """The fingerprint that the first store has, where it is there already."""
    try:
        return Manifest.read(Path(recipe.data.train[0].path)).tokenizer_fingerprint
    except DataError:
        return None


def law_in_words(recipe: Recipe) -> list[str]:
    """What the law says, what the recipe has, and the warnings, a line each; nothing where there is no law."""
    if recipe.schedule.law is None:
        return []
    advice = law_advice(recipe)
    if advice is None:
        return [f"law {recipe.schedule.law}: is not here; the recipe keeps the numbers that were taken from it"]
    schedule, at = recipe.schedule, advice.variables
    batches = [batch for _, batch in as_points(schedule.batch_tokens)]
    has = f"{batches[0]:,}" if len(batches) == 1 else f"{batches[0]:,} to {batches[-1]:,} in {len(batches)} stages of"
    place = f"N = {at['params']:.4g} ({at['active']:.4g} active), D = {at['tokens']:.4g}, C = {at['flops']:.4g}"
    lines = [
        f"law {advice.law.name}, for {place}:",
        f"  learning rate {_amount(advice.lr, '.3g')}; the recipe has {schedule.lr:.4g}",
        f"  batch {_amount(advice.batch_tokens, ',.0f')}; the recipe has {has} tokens",
    ]
    if len(batches) > 1 and schedule.lr_batch_exponent:
        lines.append(f"  while the batch grows: learning rate · (batch / last batch)^{schedule.lr_batch_exponent:g}")
    return lines + [f"warning: {line}" for line in law_warnings(recipe, store_tokenizer(recipe))]


def _amount(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
