"""Seconds of a micro-batch in each stage of a pipeline, or in the whole model, and of a step through all of them.

What is done is `train.planning.speed.work`, how fast it goes `train.planning.speed.rates`. A message hides behind what the device
computes meanwhile, which it slows a little: of s seconds that travel beside c that compute max(0, s − c) + share · min(s, c) are
added. Tokens on their way to experts hide behind the shared experts, in both directions, and in a chunk of dualpipev that goes
forward and backward at once behind the whole other pass; latents hide behind nothing.
"""

from dataclasses import dataclass

from model.transformer import Part
from parallel.parts import parts_of
from parallel.timeline import Costs
from parallel.traffic import Flow, bytes_of_trips
from train.planning.devices import Device
from train.planning.speed.rates import Rates, rates_of
from train.planning.speed.work import How, Pass, Work, work_of_head, work_of_layer
from train.planning.step import Pace, PlannedStep, play


@dataclass(frozen=True)
class Stage:
    """A stage, or the whole model: what a micro-batch does there, and seconds of it."""

    work: Work
    forward: float
    inputs: float  # with what is computed again
    weights: float
    there: float  # seconds that tokens travel to experts forward, and back
    back: float
    again: float  # the same where the backward pass sends again
    waits_forward: float  # what of it is not hidden in a pass by itself
    waits_backward: float
    latents_forward: float
    latents_backward: float

    @property
    def computes(self) -> float:
        return self.forward + self.inputs + self.weights

    @property
    def alone(self) -> float:
        """Of a micro-batch whose passes overlap with no other."""
        waits = self.waits_forward + self.waits_backward
        return self.computes + waits + self.latents_forward + self.latents_backward


class Stages:
    """Those of a step on so many of these devices.

    Attributes:
        rank: the pipeline rank that works longest.
        here: its stages.
        bubble: seconds that it waits for the others.
        saves: seconds that it works less than its stages take alone, since passes overlap.
        pace: of a pipeline's chunks; None without one.
        rows: of an expert, in a micro-batch.
    """

    def __init__(self, step: PlannedStep, device: Device):
        self.step, self.device = step, device
        self.layout, self.config = step.layout, step.config
        c = self.parallel = step.layout.config
        self.count = step.micro_batches
        self.tokens = step.tokens // step.micro_batches
        element = step.compute.itemsize
        self.how = How(
            tokens=self.tokens,
            length=step.span.sequence_length,
            element=element,
            gathered=element if c.engine == "fsdp" else 4,
            recompute=c.recompute,
            fp8=c.fp8,
            expert=c.expert,
            context=c.context,
            skew=step.skew,
            accumulates=self.count > 1,
            puts_together=device.name != "cpu" or element != 4,
        )
        self.rows = step.skew * self.tokens * self.config.num_experts_per_tok * c.expert / self.config.n_routed_experts
        self.rates: Rates = rates_of(device, self.config, self.how)
        parts = parts_of(self.layout) if c.pipeline > 1 else [Part(range(self.config.num_hidden_layers))]
        self.all = [self._stage(part) for part in parts]
        self.rank, self.bubble, self.saves = 0, 0.0, 0.0
        self.pace: Pace | None = None
        if c.pipeline > 1:
            self._play()
        self.here = [self.all[n] for n in self._stages_of(self.rank)]

    @property
    def takes_turns(self) -> bool:
        """Whether forward and backward chunks run at once."""
        return self.parallel.schedule == "dualpipev" and self.parallel.expert > 1

    def by_kind(self, of: Pass, backward: bool = False) -> dict[str, float]:
        """Seconds of what is done, by what does it."""
        rates = self.rates
        return {
            "linear": of.linear / rates.linear,
            "experts": of.experts / rates.of_experts(self.rows),
            "attention": of.attention / (rates.attention_backward if backward else rates.attention),
            "head": of.head / rates.head,
            "moved": of.moved / rates.memory,
        }

    def travel(self, flow: Flow) -> float:
        """Seconds that messages travel, over both links at once."""
        node, network = flow.by_link(self.device.node)
        return max(node / self.rates.node, network / self.rates.network)

    def not_hidden(self, travels: float, computes: float) -> float:
        """Seconds that messages add to what a device computes meanwhile."""
        return travels - min(travels, computes) * (1 - self.rates.sending)

    def _stage(self, part: Part) -> Stage:
        work = sum((work_of_layer(self.config, layer, self.how) for layer in part.layers), Work())
        if part.last:
            for _ in range(self.config.num_nextn_predict_layers):
                work += work_of_layer(self.config, self.config.num_hidden_layers, self.how)
            work += work_of_head(self.config, self.how)
        there, back = self._trips()
        shared = self._seconds(work.shared_experts) / max(work.moe_layers, 1)
        again = there + back if self.parallel.recompute == "full" else 0.0
        forward = self.not_hidden(there, shared) + back
        backward = there + self.not_hidden(back, 2 * shared)
        again_waits = forward if again else 0.0
        latents = self._latents()
        return Stage(
            work,
            self._seconds(work.forward),
            self._seconds(work.inputs, backward=True) + self._seconds(work.again),
            self._seconds(work.weights),
            work.moe_layers * there,
            work.moe_layers * back,
            work.moe_layers * again,
            work.moe_layers * forward,
            work.moe_layers * (backward + again_waits),
            work.layers * latents,
            work.layers * latents * (2 if again else 1),
        )

    def _seconds(self, of: Pass, backward: bool = False) -> float:
        return sum(self.by_kind(of, backward).values())

    def _trips(self) -> tuple[float, float]:
        """Seconds that the rows of a layer travel to the fullest expert rank, and from it."""
        if self.parallel.expert == 1:
            return 0.0, 0.0
        rows = self.tokens * self.config.num_experts_per_tok
        there, back = (
            self.travel(Flow("tokens", "all_to_all", self.parallel.expert, rows * size)) * self.step.skew
            for size in bytes_of_trips(self.layout, self.config.hidden_size, self.how.element)
        )
        return there, back

    def _latents(self) -> float:
        """Seconds that those of a layer travel, or their gradients."""
        whole = self.tokens * self.parallel.context * (self.config.kv_lora_rank + self.config.qk_rope_head_dim)
        return self.travel(Flow("latents", "all_gather", self.parallel.context, whole * self.how.element))

    def _stages_of(self, rank: int) -> tuple[int, ...]:
        return self.layout.placement.stages_of(rank) if self.parallel.pipeline > 1 else (0,)

    def _play(self) -> None:
        """Find the rank that works longest, and what it waits for."""
        stages = self.all
        forward = sum(s.forward + s.waits_forward + s.latents_forward for s in stages)
        inputs = sum(s.inputs + s.waits_backward + s.latents_backward for s in stages)
        weights = sum(s.weights for s in stages)
        overlapped = None
        if self.takes_turns:
            of_forward, of_backward = sum(s.forward for s in stages), sum(s.inputs + s.weights for s in stages)
            travels, again = sum(s.there + s.back for s in stages), sum(s.again for s in stages)
            overlapped = sum(s.computes + s.latents_forward + s.latents_backward for s in stages)
            overlapped += self.not_hidden(travels, of_backward) + self.not_hidden(travels + again, of_forward)
        total = forward + inputs + weights
        costs = Costs(forward / total, inputs / total, weights / total, overlapped and overlapped / total)
        sizes = [stage.alone for stage in stages]
        self.pace = Pace(costs, sizes)
        played = play(self.step, *self.pace)
        self.rank = max(range(self.parallel.pipeline), key=lambda rank: played.works[rank])
        self.bubble = played.seconds - played.works[self.rank]
        self.saves = self.count * sum(sizes[n] for n in self._stages_of(self.rank)) - played.works[self.rank]
