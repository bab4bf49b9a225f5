"""How a run lies on its processes, in the words of its log."""

from parallel.layout import Layout
from parallel.placement import describe
from train.config import Recipe
from train.planning.step import PlannedStep, bubble_share
from train.schedule import Span


def layout_in_words(recipe: Recipe, layout: Layout, processes: int, next_steps: list[Span]) -> list[str]:
    """Lines: the layout; of a pipeline with steps before it also what its processes wait, and which layers lie where."""
    config = layout.config
    keys = {"engine": config.engine} | recipe.parallel.model_dump(exclude_defaults=True)
    if config.recompute != "none":  # a GPU's default too
        keys["recompute"] = config.recompute
    settings = ", ".join(f"{key} {value}" for key, value in keys.items())
    line = f"layout: {settings} on {processes} process{'es' * (processes > 1)}"
    if config.pipeline == 1 or not next_steps:
        return [line]
    step = PlannedStep(recipe, layout, next_steps[0])
    said = (
        f"pipeline: {config.schedule}, {step.micro_batches} micro-batches a step, of which processes wait "
        f"{bubble_share(step):.1%}, as counted"
    )
    return [line, said, *describe(layout.placement)]
