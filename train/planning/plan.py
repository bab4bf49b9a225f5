"""What a run amounts to, from its recipe, a number of processes and what each computes on: parameters, FLOPs, tokens, steps; memory
and time of a process."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch

from model.config import ModelConfig
from model.flops import flops_mfu, flops_scaling, parameter_counts
from parallel.ds_config import ds_config
from parallel.layout import Layout
from parallel.placement import Placement, describe
from parallel.traffic import step_traffic
from train.config import Recipe
from train.planning.advice import law_advice
from train.planning.devices import Device
from train.planning.memory import RankMemory, memory_of
from train.planning.speed.step_time import StepTime, step_time
from train.planning.step import DTYPES, PlannedStep, bubble_share
from train.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """A run on a number of processes.

    Attributes:
        device: what each has; None: nothing is said of time and whether it fits.
        imbalance: as of `PlannedStep`.
        step: the largest of the run.
        kinds: steps that may take most memory, one of each length and micro-batch.
    """

    recipe: Recipe
    schedule: Schedule
    layout: Layout
    device: Device | None
    imbalance: float
    step: PlannedStep
    kinds: tuple[PlannedStep, ...]
    _held: dict[int, RankMemory] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, recipe: Recipe, schedule: Schedule, world_size: int, device: Device | None = None, imbalance: float = 1.0
    ) -> Self:
        """The plan of a run.

        Raises:
            LayoutError: the layout does not fit the number of processes, the model, or a batch of the schedule, or the user's
                ds_config contradicts the recipe.
        """
        layout = recipe.layout(world_size)
        schedule.check_layout(layout, recipe.micro_batch)
        if layout.config.deepspeed:
            where = torch.device("cuda" if recipe.on_gpu else "cpu")
            ds_config(layout.config, DTYPES[recipe.compute], recipe.optimizer.clip, where)
        by_size = sorted(schedule.spans, key=lambda span: span.batch_tokens)
        kinds = {(span.sequence_length, recipe.micro_batch(span.first_token)): span for span in by_size}
        steps = tuple(PlannedStep(recipe, layout, span, imbalance) for span in kinds.values())
        largest = PlannedStep(recipe, layout, by_size[-1], imbalance)
        return cls(recipe, schedule, layout, device, imbalance, largest, steps)

    def memory_on(self, pipeline_rank: int) -> RankMemory:
        """In the steps that take most of it."""
        if pipeline_rank not in self._held:
            held = (memory_of(step, pipeline_rank) for step in self.kinds)
            self._held[pipeline_rank] = max(held, key=lambda held: held.peak)
        return self._held[pipeline_rank]

    @property
    def memory(self) -> tuple[RankMemory, ...]:
        """Of each pipeline rank."""
        return tuple(self.memory_on(rank) for rank in range(self.layout.config.pipeline))

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda held: held.peak)

    @property
    def fits(self) -> bool | None:
        """Whether every process has the memory; None: nobody said on what device."""
        if self.device is None:
            return None
        usable, ranks = self.device.usable, self.layout.config.pipeline
        # The ends of a pipeline are where it is mostly fullest, so that what does not fit is told soon.
        return all(self.memory_on(rank).peak <= usable for rank in dict.fromkeys([0, ranks - 1, *range(ranks)]))

    @cached_property
    def time(self) -> StepTime | None:
        """Of its largest step."""
        return step_time(self.step, self.device) if self.device else None

    @cached_property
    def bubble(self) -> float:
        """Share of the time of all pipeline ranks in which they wait, in its largest step; where no device is known by FLOPs."""
        return bubble_share(self.step, self.time.pace if self.time else None)

    @property
    def tokens_per_second(self) -> float:
        """Of a process, in its largest step."""
        assert self.time, "asked for the time on an unknown device"
        return self.step.span.batch_tokens / self.time.seconds / self.layout.world_size

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """Of all devices together, in its largest steps."""
        return 1e12 / self.tokens_per_second / 3600

    @cached_property
    def days(self) -> float:
        """Of all steps of the run, each with its own batch."""
        assert self.device, "asked for the time on an unknown device"
        seconds: dict[tuple[int, int, int], float] = {}
        total = 0.0
        for span in self.schedule.spans:
            kind = (span.sequence_length, span.batch_tokens, self.recipe.micro_batch(span.first_token))
            if kind not in seconds:
                step = PlannedStep(self.recipe, self.layout, span, self.imbalance)
                seconds[kind] = step_time(step, self.device).seconds
            total += span.steps * seconds[kind]
        return total / 86400

    def numbers(self) -> dict[str, Any]:
        """All of it by name, for a program to read."""
        recipe, config, schedule, layout = self.recipe, self.step.config, self.schedule, self.layout
        counts = parameter_counts(config)
        length = self.step.span.sequence_length
        flops = sum(flops_mfu(config, span.sequence_length) * (span.end - span.first_token) for span in schedule.spans)
        return {
            "total_parameters": counts.total,
            "mtp_parameters": counts.mtp,
            "active_parameters": counts.active,
            "tokens": schedule.final_tokens,
            "steps": schedule.total_steps,
            "tokens_per_parameter": schedule.final_tokens / counts.total,
            "flops_per_token": flops_mfu(config, length),
            "flops_per_token_for_scaling_laws": flops_scaling(config, length),
            "total_flops": flops,
            **_law(recipe),
            **_memory(self.fullest, layout),
            "world_size": layout.world_size,
            **_step(self),
            **_on_device(self),
        }


def _on_device(plan: Plan) -> dict[str, Any]:
    """Whether it fits, and how long it takes."""
    if plan.device is None or plan.time is None:
        return {}
    return {
        "device": plan.device.name,
        "usable_bytes_per_device": round(plan.device.usable),
        "fits": plan.fits,
        "imbalance": plan.step.skew,
        "step_seconds": plan.time.seconds,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "mfu": plan.time.mfu,
        "days": plan.days,
        "gpu_hours_per_trillion_tokens": plan.gpu_hours_per_trillion_tokens,
        "bytes_sent_in_node_per_step": plan.time.sent["node"],
        "bytes_sent_between_nodes_per_step": plan.time.sent["network"],
    }


def _law(recipe: Recipe) -> dict[str, float]:
    """What the recipe's law says, in numbers."""
    advice = law_advice(recipe)
    if advice is None:
        return {}
    said = {"learning_rate_of_the_law": advice.lr, "batch_tokens_of_the_law": advice.batch_tokens}
    numbers = {name: estimate.value for name, estimate in said.items() if estimate is not None}
    return numbers | {"decades_outside_of_the_law": max(advice.distances.values(), default=0.0)}


def _memory(held: RankMemory, layout: Layout) -> dict[str, int]:
    return {
        "bytes_of_parameters": held.parameters,
        "bytes_of_gradients": held.gradients,
        "bytes_of_moments": held.moments,
        "bytes_of_gathered_modules": held.gathered,
        "bytes_of_messages": held.communication,
        "bytes_of_activations": held.activations,
        "bytes_of_a_block_at_work": held.working,
        "peak_bytes_per_rank": held.peak,
        "host_bytes_per_rank": held.host,
        **({"fullest_pipeline_rank": held.pipeline_rank} if layout.config.pipeline > 1 else {}),
    }


def _step(plan: Plan) -> dict[str, Any]:
    """What its largest step costs: FLOPs of the process that has the most to do; where links are not known, bytes that one sends
    at most; and, in a pipeline, the share of the step in which a process waits, in the mean."""
    step, layout, span, config = plan.step, plan.layout, plan.step.span, plan.step.config
    ranks = range(layout.config.pipeline)
    flops = flops_mfu(config, span.sequence_length) * span.batch_tokens / layout.stage_ranks
    of_others = _flops_of_others(config, layout) * span.batch_tokens / layout.stage_ranks
    numbers: dict[str, Any] = {"micro_batches_per_step": step.micro_batches}
    if plan.device is None:
        numbers["bytes_sent_per_step"] = round(max(_sent(step, rank) for rank in ranks))
    if len(ranks) == 1:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        return {"flops_per_step_and_rank": flops + of_others * layers, **numbers}
    placement = layout.placement
    return {
        "flops_per_step_and_rank": max(
            flops * placement.load_of(rank) + of_others * _layers_on(placement, rank) for rank in ranks
        ),
        **numbers,
        "bubble": plan.bubble,
        "placement": describe(placement),
    }


def _sent(step: PlannedStep, pipeline_rank: int) -> float:
    """Bytes that a process sends, over whatever link."""
    flows = step_traffic(
        step.layout,
        step.config,
        tokens=step.tokens,
        micro_batches=step.micro_batches,
        element_size=step.compute.itemsize,
        pipeline_rank=pipeline_rank,
    )
    return sum(flow.sent for flow in flows)


def _flops_of_others(c: ModelConfig, layout: Layout) -> int:
    """FLOPs of a layer, for each token of a rank's own, for tokens of the ranks that share its sequences: it makes the keys and
    values of these too. No convention of `model.flops` counts them."""
    once = 2 * c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return (layout.config.context - 1) * once * 3  # forward, gradients of inputs and of weights


def _layers_on(placement: Placement, rank: int) -> int:
    """With MTP modules."""
    stages = placement.stages_of(rank)
    has_last = len(placement.layers) - 1 in stages
    return sum(len(placement.layers[stage]) for stage in stages) + (placement.mtp if has_last else 0)
