"""What the law of a recipe says for its run, beside what the recipe has; and what to be warned of.

It is computed from the recipe's numbers and its `schedule.law` alone, so that a recipe with `auto` and the one that was written
from it are told the same. A law file that is not there any more is no mistake then: the numbers stand in the recipe.
"""

from pathlib import Path

from data.errors import DataError
from data.manifest import Manifest
from train.config import Recipe
from train.fields import as_points
from train.scaling.apply import NAMES, Advice, Course, advise
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.law import Law, load_law

ANOTHER_HALF = 2.0  # ratio to the law's from which on a batch or a learning rate is another one


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
    doubts = (tokenizer_warning(advice.law, tokenizer), half_warning(recipe, advice))
    return advice.warnings() + [doubt for doubt in doubts if doubt]


def tokenizer_warning(law: Law, tokenizer: str | None) -> str | None:
    """Whether a law was fitted on text that another tokenizer cut, in a line; None where it was not or one of them is not known."""
    if law.tokenizer is None or tokenizer is None or law.tokenizer == tokenizer:
        return None
    return (
        f"law {law.name} was fitted on text that another tokenizer cut ({law.tokenizer[:12]}…, the store's is {tokenizer[:12]}…); "
        "its learning rate and batch may serve, its loss does not hold for this text"
    )


def half_warning(recipe: Recipe, advice: Advice) -> str | None:
    """Whether one of learning rate and batch is the law's and the other is not near it, in a line: the law gives both together."""
    schedule, taken = recipe.schedule, recipe.schedule.from_law
    if taken is None or taken.hash != advice.law.hash or advice.lr is None or advice.batch_tokens is None:
        return None
    name, batch, last = advice.law.name, advice.batch_tokens.value, as_points(schedule.batch_tokens)[-1][1]
    if taken.batch_tokens is None and _is_another(last, batch):
        return (
            f"law {name}: its learning rate belongs to a batch of {batch:,.0f} tokens, the recipe has {last:,}; take both from the "
            "law, or compare a few learning rates at this batch"
        )
    if taken.lr is None and _is_another(schedule.lr, advice.lr.value):
        return (
            f"law {name}: its batch belongs to a learning rate of {advice.lr.value:.3g}, the recipe has {schedule.lr:.3g}; take "
            "both from the law, or compare a few batches at this learning rate"
        )
    return None


def _is_another(value: float, wanted: float) -> bool:
    return not 1 / ANOTHER_HALF <= value / wanted <= ANOTHER_HALF


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
    outside = ", ".join(f"{NAMES[name]} {decades:.1f}" for name, decades in advice.distances.items())
    lines = [
        f"law {advice.law.name}, for {place}:",
        f"  decades outside of what it was measured on: {outside or 'unknown, it does not say on what'}",
        f"  learning rate {_amount(advice.lr, '.3g')}; the recipe has {schedule.lr:.4g}",
        f"  batch {_amount(advice.batch_tokens, ',.0f')}; the recipe has {has} tokens",
    ]
    if len(batches) > 1 and schedule.lr_batch_exponent:
        lines.append(f"  while the batch grows: learning rate · (batch / last batch)^{schedule.lr_batch_exponent:g}")
    if schedule.from_law and schedule.from_law.hash != advice.law.hash:
        lines.append(
            f"  it has changed since the recipe's {' and '.join(schedule.from_law.numbers)} were taken from it"
        )
    return lines + [f"warning: {line}" for line in law_warnings(recipe, store_tokenizer(recipe))]


def _amount(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
