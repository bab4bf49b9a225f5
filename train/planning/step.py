"""A step of a run on a layout: what one process has to do in it. Memory and time are counted for this."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch

from model.config import ModelConfig
from parallel.layout import Layout
from parallel.placement import Schedule
from parallel.timeline import Action, Costs, Work, needs_of, order_of, timeline
from train.config import Recipe
from train.schedule import Span

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENTS = {"fp32": 4, "bf16": 2}  # bytes of one of Adam's


@dataclass(frozen=True)
class PlannedStep:
    """A step of one kind: its batch, its length, its micro-batches.

    Attributes:
        imbalance: rows that arrive at the fullest expert rank over the mean of all of them, where experts are shared and as far as
            there are so many ranks (`skew`); 1: evenly.
    """

    recipe: Recipe
    layout: Layout
    span: Span
    imbalance: float = 1.0

    @cached_property
    def config(self) -> ModelConfig:
        return self.recipe.model_config_resolved()

    @property
    def skew(self) -> float:
        """`imbalance` as it can be: all rows of E expert ranks arrive at one of them at most, E times the mean."""
        return min(self.imbalance, self.layout.config.expert)

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


def bubble_share(step: PlannedStep, pace: "Pace | None" = None) -> float:
    """Share of the time of all pipeline ranks in which they wait.

    Args:
        pace: None: by FLOPs. Forward pass, gradients of inputs and gradients of weights cost the same, as do a forward and a
            backward pass at the same time and one after the other.
    """
    played = play(step, *(pace or pace_by_flops(step)))
    return 1 - sum(played.works) / step.layout.config.pipeline / played.seconds


class Pace(NamedTuple):
    """What the chunks of a pipeline take."""

    costs: Costs  # of a stage of size 1
    sizes: Sequence[float]  # of the stages


def pace_by_flops(step: PlannedStep) -> Pace:
    """In forward passes of a stage that has an even share."""
    return Pace(Costs(), [cost * step.layout.config.stages for cost in step.layout.placement.costs])


def costs_of_engine(step: PlannedStep, costs: Costs) -> Costs:
    """Where the engine casts weights first (`model.ops.weight_gradient`), both gradients are made at once."""
    c = step.layout.config
    if c.engine == "fsdp" or c.fp8 or step.compute is torch.float32:
        return costs
    return replace(costs, input_gradient=costs.input_gradient + costs.weight_gradient, weight_gradient=0)


class Played(NamedTuple):
    """A step in a pipeline."""

    seconds: float  # from the first chunk to the end of the last
    works: list[float]  # of each rank's chunks


def play(step: PlannedStep, costs: Costs, sizes: Sequence[float]) -> Played:
    """A step through its pipeline, as `parallel.timeline` has it. From two numbers of micro-batches that fill the pipeline on, each
    further one takes as long as the one before.

    Args:
        costs, sizes: as of `Pace`.
    """
    c, number = step.layout.config, step.micro_batches
    costs = costs_of_engine(step, costs)
    few, more = 2 * c.stages, 2 * c.stages + c.pipeline

    def played(micro_batches: int) -> Played:
        return _chunks(c.schedule, c.pipeline, c.stages // c.pipeline, micro_batches).play(costs, sizes)

    if number <= more:
        return played(number)
    first, second, times = played(few), played(more), (number - few) / c.pipeline
    return Played(
        first.seconds + (second.seconds - first.seconds) * times,
        [one + (other - one) * times for one, other in zip(first.works, second.works)],
    )


class _Chunks(NamedTuple):
    """A schedule's chunks, each behind those that it needs, so that they can be played with other costs in one pass: what
    `parallel.timeline.timeline` does, without looking for the order again."""

    kinds: list[Action]  # of chunks, without their micro-batches: what decides their costs
    chunks: list[tuple[int, int, tuple[int, ...]]]  # (rank, number of the kind, chunks that it needs)
    ranks: int

    def play(self, costs: Costs, sizes: Sequence[float]) -> Played:
        seconds = [costs.of(kind, sizes) for kind in self.kinds]
        free, works = [0.0] * self.ranks, [0.0] * self.ranks
        ends: list[float] = []
        for rank, kind, needs in self.chunks:
            start = free[rank]
            for need in needs:
                if ends[need] > start:
                    start = ends[need]
            works[rank] += seconds[kind]
            free[rank] = start + seconds[kind]
            ends.append(free[rank])
        return Played(max(free), works)


@cache
def _chunks(schedule: Schedule, ranks: int, stages_per_rank: int, micro_batches: int) -> _Chunks:
    order = order_of(schedule, ranks, stages_per_rank, micro_batches)
    lines = timeline(order)  # with any costs: what starts later needs nothing that starts after it
    placed = sorted((chunk.start, rank, chunk.action) for rank, line in enumerate(lines) for chunk in line)
    numbers: dict[Action, int] = {}
    done: dict[Work, int] = {}
    chunks = []
    for number, (_, rank, action) in enumerate(placed):
        kind = tuple(work._replace(micro_batch=0) for work in action)
        needs = {
            done[need] for work in action for need in needs_of(work, ranks * stages_per_rank - 1) if need not in action
        }
        chunks.append((rank, numbers.setdefault(kind, len(numbers)), tuple(needs)))
        done |= dict.fromkeys(action, number)
    return _Chunks(list(numbers), chunks, ranks)
