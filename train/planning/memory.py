"""Bytes that the fullest process of a pipeline rank holds, and what they are for."""

from dataclasses import dataclass

from parallel.footprint import footprint, peak_bytes, shapes_on, under_way
from train.planning.step import PlannedStep

MOMENTS = {"fp32": 4, "bf16": 2}  # bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a process that are alive at once, in a step of one kind.

    On its device lie the parts of parameters, gradients and moments that the layout gives it, what it gathers of others, buffers of
    messages (`parallel.footprint`), what a micro-batch, or those under way in a pipeline, keep for their backward pass, and what a
    block needs at work (`model.activations`); not counted is the allocator's slack. On the host lie what is offloaded and the
    average of the weights.
    """

    pipeline_rank: int
    parameters: int
    gradients: int
    moments: int
    gathered: int
    communication: int
    activations: int
    working: int
    peak: int  # not always the sum: gradients may take the place of activations
    host: int


def memory_of(step: PlannedStep, pipeline_rank: int = 0) -> RankMemory:
    """What the fullest of its processes holds."""
    recipe, layout, config = step.recipe, step.layout, step.config
    element = step.compute.itemsize
    held = footprint(layout, config, element, MOMENTS[recipe.precision.moments], step.micro_batches, pipeline_rank)
    activations = under_way(
        layout,
        config,
        pipeline_rank,
        sequence_length=step.span.sequence_length,
        micro_batch=step.micro_batch,
        micro_batches=step.micro_batches,
        element_size=element,
        device="cuda" if recipe.on_gpu else "cpu",
    )
    holders = layout.stage_ranks if layout.config.engine == "ddp" else layout.shard  # of one average of the weights
    here = sum(shape.numel() for shape in shapes_on(layout, config, pipeline_rank).values())
    average = 4 * -(-here // holders) if recipe.optimizer.ema else 0
    return RankMemory(
        pipeline_rank,
        held.parameters,
        held.gradients,
        held.moments,
        held.gathered,
        0,
        activations.kept,
        activations.working,
        peak_bytes(layout, config, held, activations.kept, activations.working, step.micro_batches),
        held.host + average * (2 if recipe.on_gpu else 1),
    )
