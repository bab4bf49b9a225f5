"""A step of a run on a layout: what one process has to do in it. Memory and time are counted for this."""

from dataclasses import dataclass
from functools import cached_property

import torch

from model.config import ModelConfig
from parallel.layout import Layout
from parallel.timeline import Costs, order_of, timeline
from train.config import Recipe
from train.schedule import Span

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PlannedStep:
    """A step of one kind: its batch, its length, its micro-batches.

    Attributes:
        imbalance: rows that arrive at the fullest expert rank over the mean of all of them; 1: evenly.
    """

    recipe: Recipe
    layout: Layout
    span: Span
    imbalance: float = 1.0

    @cached_property
    def config(self) -> ModelConfig:
        return self.recipe.model_config_resolved()

    @property
    def compute(self) -> torch.dtype:
        """Of activations and products."""
        return DTYPES[self.recipe.compute]

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch, as many as there are at most."""
        return min(self.recipe.micro_batch(self.span.first_token), self._share)

    @property
    def micro_batches(self) -> int:
        """Of a process."""
        return -(-self._share // self.micro_batch)

    @property
    def tokens(self) -> int:
        """Predicted tokens that one process computes in the step."""
        return self.micro_batch * self.micro_batches * self.span.sequence_length // self.layout.config.context

    @property
    def _share(self) -> int:
        return self.span.sequences // self.layout.data_ranks


def bubble_share(step: PlannedStep) -> float:
    """Share of the time of all pipeline ranks in which they wait. From two numbers of micro-batches that fill the pipeline on, each
    further one takes as long as the one before.

    Forward pass, gradients of inputs and gradients of weights cost the same, as do a forward and a backward pass at the same time
    and one after the other. Where the engine casts weights first (`model.ops.weight_gradient`), both gradients are made at once.
    """
    c, placement, micro_batches = step.layout.config, step.layout.placement, step.micro_batches
    puts_aside = c.engine == "fsdp" or c.fp8 or step.compute is torch.float32
    costs = Costs() if puts_aside else Costs(1, 2, 0)
    sizes = [cost * c.stages for cost in placement.costs]

    def span(number: int) -> float:
        chunks = timeline(order_of(c.schedule, c.pipeline, c.stages // c.pipeline, number), costs, sizes)
        return max(chunk.end for rank in chunks for chunk in rank)

    few, more = 2 * c.stages, 2 * c.stages + c.pipeline
    if micro_batches <= more:
        whole = span(micro_batches)
    else:
        first = span(few)
        whole = first + (span(more) - first) * (micro_batches - few) / c.pipeline
    work = costs.all * sum(sizes) * micro_batches / c.pipeline  # of a rank, in the mean
    return 1 - work / whole
