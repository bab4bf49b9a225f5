"""Bytes that the fullest process of a pipeline rank holds, and what they are for."""

from dataclasses import dataclass

from parallel.footprint import footprint, shapes_on
from parallel.peak import forward_pass, fullest, moments_of
from train.planning.step import MOMENTS, PlannedStep


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a process at the moment of a step when most are alive: `peak` is their sum.

    On its device lie the parts of parameters and moments that the layout gives it (`parallel.footprint`), and what a moment needs
    beside them (`parallel.peak`): gradients as far as they are there, what it gathers of others, buffers of messages, what a
    micro-batch, or those under way in a pipeline, keep for their backward pass, and what a block needs at work; not counted is the
    allocator's slack. On the host lie what is offloaded and the average of the weights.
    """

    pipeline_rank: int
    when: str  # what it does then
    parameters: int
    gradients: int
    moments: int
    gathered: int
    communication: int
    activations: int
    working: int
    peak: int
    host: int


def memory_of(step: PlannedStep, pipeline_rank: int = 0) -> RankMemory:
    """What the fullest of its processes holds."""
    recipe, layout, config = step.recipe, step.layout, step.config
    moment = MOMENTS[recipe.precision.moments]
    held = footprint(layout, config, moment, step.micro_batches, pipeline_rank)
    forward = forward_pass(
        layout,
        sequence_length=step.span.sequence_length,
        micro_batch=step.micro_batch,
        element_size=step.compute.itemsize,
        device="cuda" if recipe.on_gpu else "cpu",
        imbalance=step.skew,
    )
    most = fullest(moments_of(layout, config, forward, moment, step.micro_batches, pipeline_rank))
    holders = layout.stage_ranks if layout.config.engine == "ddp" else layout.shard  # of one average of the weights
    here = sum(shape.numel() for shape in shapes_on(layout, config, pipeline_rank).values())
    average = 4 * -(-here // holders) if recipe.optimizer.ema else 0
    return RankMemory(
        pipeline_rank,
        most.when,
        held.parameters,
        most.gradients,
        held.moments,
        most.gathered,
        most.communication,
        most.activations,
        most.working,
        held.parameters + held.moments + most.all,
        held.host + average * (2 if recipe.on_gpu else 1),
    )
