"""The keys of a schedule that a law decides: `lr: auto`, `batch_tokens: auto`, and `batch_tokens: ramp` beside a `law`.

They need the model and the data, so that they are decided where a recipe is read and not in their section. `train.planning.advice`
tells what they came to; `train.continued` keeps it in a run that is under way.
"""

import math
from typing import Any

from model.config import ConfigError
from train.fields import mistake, whole_number
from train.scaling.apply import LR_EXPONENT, Course, growing_batch, required, whole_batch
from train.scaling.errors import ScalingError
from train.scaling.law import load_law
from train.sections import DataSection, ModelSection, ScheduleSection

DEFAULT = "step-law"  # the lowest regret of the published laws, also for MoE models off the compute-optimal allocation


def decided(given: Any, model: ModelSection | None, data: DataSection | None) -> Any:
    """A schedule section as it was given, with numbers for what a law decides.

    Args:
        model, data: the other sections; None where one is wrong, whose mistake then stands for the whole recipe.

    Returns:
        The numbers, and in `from_law` that they are the law's.
    """
    if not isinstance(given, dict):
        return given
    section = ScheduleSection.filled(given)
    lr, batch = section.get("lr"), section.get("batch_tokens")
    if lr != "auto" and batch not in ("auto", "ramp"):
        return section
    numbers: dict[str, Any] = {"lr": 1.0} if lr == "auto" else {}
    numbers |= {"batch_tokens": 1} if batch in ("auto", "ramp") else {}
    try:
        tokens = whole_number(section.get("tokens"), 1)
        multiple = whole_number(section.get("batch_multiple", 1), 1)
        config = model.resolve() if model else None
    except (ConfigError, OSError, ValueError):
        config = None  # told where it is validated
    if config is None or data is None:
        return section | numbers
    name = section.get("law") or DEFAULT
    unit = multiple * math.lcm(*(length for _, length in data.lengths))  # whole sequences of every stage
    try:
        law = load_law(name)
        course = Course.of(law, config, data.lengths)
        if lr == "auto":
            numbers["lr"] = float(f"{required(law, 'lr')(**course.at(tokens)):.4g}")
        if batch == "auto":
            numbers["batch_tokens"] = whole_batch(float(required(law, "batch_tokens")(**course.at(tokens))), unit)
        elif batch == "ramp":
            numbers["batch_tokens"] = growing_batch(law, course, tokens, unit)
            numbers |= {} if "lr_batch_exponent" in section else {"lr_batch_exponent": LR_EXPONENT}
    except ScalingError as error:
        raise mistake("", "", line=f"schedule.{error}") from None
    before = section.get("from_law")
    same = before if isinstance(before, dict) and before.get("hash") == law.hash else {}
    return section | numbers | {"law": name, "from_law": {**same, **numbers, "hash": law.hash}}
