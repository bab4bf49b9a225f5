"""Seconds of a step, term by term: products by kind, what is bound by memory, what messages are not hidden, bubble, optimizer.

What is counted is `train.planning.speed.work` and `parallel.traffic`, how fast it goes `train.planning.speed.rates`. The terms
are those of the process that has the most to do, and add up to the step: where others have less, they wait for it.

    of a micro-batch   products, memory, recomputation, tokens to experts, latents: of the stages of the busiest pipeline rank
    of a pipeline      what this rank waits for others: the step played through with these costs (`train.planning.step.play`)
    of a step          weights and gradients that travel, as far as nothing hides them, the optimizer

Messages hide behind what the device computes meanwhile (`train.planning.speed.stages`):

    weights of blocks    the block before; at the step's beginning, where they stay gathered, the first micro-batch's forward pass
    gradients            the backward pass of the block before, or of the last micro-batch; in a pipeline nothing
    nothing              weights of embedding and head, what DeepSpeed's stages 1 and 2 send, states that fill a pipeline

Not counted: the host, which runs ahead of a GPU, and what it costs to start a message.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model.flops import flops_mfu
from parallel.footprint import shapes_on
from parallel.traffic import Flow, Links, bytes_of_trips, step_traffic
from train.planning.devices import Device
from train.planning.speed.stages import Stage, Stages
from train.planning.step import MOMENTS, Pace, PlannedStep

HOST_LINK = 50e9  # bytes/s between device and host in one direction: PCIe 5.0 with 16 lanes has 63; assumed
HOST_MEMORY = 40e9  # bytes/s of host memory for each device of a node: 8 of 12 channels share about 300; assumed


@dataclass(frozen=True)
class Term:
    """A part of the time of a step."""

    name: str
    seconds: float
    formula: str  # with its numbers


@dataclass(frozen=True)
class StepTime:
    """The time of a step, as its slowest process spends it.

    Attributes:
        terms: they add up.
        sent: bytes that a process sends or receives at most, by link: "node", "network".
        reached: bytes/s in one direction that these links are counted with.
        mfu: FLOPs of `model.flops.flops_mfu` over those of all devices' peaks, in FP8 over that of FP8 as
            `train.planning.devices.peak_flops` has it. Papers divide by the peak of bf16 there too, which is half as much.
        peak: FLOP/s of a device that `mfu` divides by.
        peak_name: in what it has this peak: "FP8", "bf16", "fp16" or "fp32".
        pace: of a pipeline's chunks, in seconds.
    """

    terms: tuple[Term, ...]
    sent: dict[str, int]
    reached: dict[str, float]
    mfu: float
    peak: float
    peak_name: str
    pace: Pace | None = None

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)


def step_time(step: PlannedStep, device: Device) -> StepTime:
    """What a step takes on so many of these devices.

    Raises:
        DeviceError: FP8 on a device without it, or on a CPU, which emulates it.
    """
    planned = _Terms(step, device)
    terms = tuple(term for term in planned if term.seconds > 0)
    seconds = sum(term.seconds for term in terms)
    layout, span = step.layout, step.span
    fp8 = layout.config.fp8
    peak = device.peak(torch.float8_e4m3fn if fp8 else step.compute)
    flops = flops_mfu(step.config, span.sequence_length) * span.batch_tokens
    return StepTime(
        terms,
        planned.sent(),
        {"node": planned.rates.node, "network": planned.rates.network},
        flops / (seconds * layout.world_size * peak),
        peak,
        "FP8" if fp8 else step.recipe.compute,
        planned.stages.pace,
    )


class _Terms:
    """Of one step."""

    def __init__(self, step: PlannedStep, device: Device):
        self.step, self.device = step, device
        self.layout, self.config, self.parallel = step.layout, step.config, step.layout.config
        self.stages = Stages(step, device)
        self.count, self.rates = step.micro_batches, self.stages.rates

    def __iter__(self) -> Iterator[Term]:
        yield from self._products()
        yield self._memory()
        yield self._again()
        yield self._tokens()
        yield self._of_latents()
        yield from self._weights_and_gradients()
        yield from self._pipeline()
        yield from self._optimizer()

    def _sum(self, of: Callable[[Stage], float]) -> float:
        """Over the stages here and the micro-batches of a step."""
        return self.count * sum(of(stage) for stage in self.stages.here)

    def _done(self, kind: str) -> tuple[float, float]:
        """What of a kind is done in the step but again, and its seconds."""
        amount = self._sum(
            lambda s: getattr(s.work.forward, kind) + getattr(s.work.inputs, kind) + getattr(s.work.weights, kind)
        )
        seconds = self._sum(
            lambda s: (
                self.stages.by_kind(s.work.forward)[kind]
                + self.stages.by_kind(s.work.inputs, backward=True)[kind]
                + self.stages.by_kind(s.work.weights)[kind]
            )
        )
        return amount, seconds

    def _products(self) -> Iterator[Term]:
        micro = f"{self.stages.tokens:,} tokens · {self.count:,} micro-batches"
        per_token = self.stages.tokens * self.count
        of = "FP8" if self.parallel.fp8 else "compute dtype"
        for name, kind, rate, why in [
            ("linear maps", "linear", self.rates.linear, of),
            (
                "experts",
                "experts",
                self.rates.of_experts(self.stages.rows),
                f"{of}, {self.stages.rows:,.0f} rows an expert",
            ),
            ("attention", "attention", 0.0, "forward and backward"),
            ("head", "head", self.rates.head, "compute dtype"),
        ]:
            amount, seconds = self._done(kind)
            if not amount:
                continue
            rate = rate or amount / seconds
            if kind == "experts" and self.parallel.expert > 1:
                why += f", {self.step.skew:g} of the mean"
            yield Term(name, seconds, f"{micro} · {_flops(amount / per_token)} / {_flops(rate)}/s ({why})")

    def _memory(self) -> Term:
        amount, seconds = self._done("moved")
        each = f"{self.stages.tokens:,} tokens · {self.count:,} micro-batches · {_bytes(amount / self.stages.tokens / self.count)}"
        what = "norms, SwiGLU, routing, residuals, rotary keys, casts, sums of gradients" + (
            ", quantisation" if self.parallel.fp8 else ""
        )
        return Term("memory", seconds, f"{each} / {_bytes(self.rates.memory)}/s ({what})")

    def _again(self) -> Term:
        kinds: dict[str, float] = defaultdict(float)
        for stage in self.stages.here:
            for kind, seconds in self.stages.by_kind(stage.work.again).items():
                kinds[kind] += self.count * seconds
        parts = " + ".join(f"{seconds:.4g} s {kind}" for kind, seconds in kinds.items() if seconds)
        return Term("recomputation", sum(kinds.values()), f"{self.parallel.recompute}: {parts}, as in the forward pass")

    def _tokens(self) -> Term:
        alone = self._sum(lambda s: s.waits_forward + s.waits_backward)
        whole = self._sum(lambda s: 2 * (s.there + s.back) + s.again)
        there, back = bytes_of_trips(self.layout, self.config.hidden_size, self.stages.how.element)
        layers = sum(s.work.moe_layers for s in self.stages.here)
        links = Flow("", "all_to_all", self.parallel.expert, 1).by_link(self.device.node)
        trips = 2 + (self.parallel.recompute == "full")
        rows = self.stages.tokens * self.config.num_experts_per_tok
        text = (
            f"{self.count:,} micro-batches · {layers} layers · {rows:,} rows · {trips} · ({there:,} B there + {back:,} B back) · "
            f"{self.step.skew:g} of the mean; of it {links.node:.3f} at {_bytes(self.rates.node)}/s beside "
            f"{links.network:.3f} at {_bytes(self.rates.network)}/s: {whole:.4g} s, of which "
            f"{whole - alone + self.stages.saves:.4g} s hidden behind "
            f"{'the other pass and ' if self.stages.takes_turns else ''}shared experts"
        )
        return Term("tokens to experts", max(0.0, alone - self.stages.saves), text)

    def _of_latents(self) -> Term:
        """Gathered forward, again where all is recomputed, and their gradients scattered."""
        ranks, layers = self.parallel.context, sum(s.work.layers for s in self.stages.here)
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        whole = self.stages.tokens * ranks * width * self.stages.how.element
        trips = 2 + (self.parallel.recompute == "full")
        flow = Flow("latents", "all_gather", ranks, whole)
        text = f"{self.count:,} micro-batches · {layers} layers · {trips} · {self._shown([flow])}"
        return Term("latents", self._sum(lambda s: s.latents_forward + s.latents_backward), text)

    def _weights_and_gradients(self) -> Iterator[Term]:
        flows = self._flows(self.stages.rank)
        weights = [f for f in flows if f.collective == "all_gather" and f.what != "latents"]
        gradients = [f for f in flows if f.what == "gradients"]
        forward = sum(s.forward for s in self.stages.here)
        backward = sum(s.inputs + s.weights for s in self.stages.here)
        engine, reshards = self.parallel.engine, self.parallel.reshards
        of_weights, of_gradients = sum(map(self.stages.travel, weights)), sum(map(self.stages.travel, gradients))
        root = sum(self.stages.travel(f) for f in weights if f.what in ("embedding", "head"))
        blocks = of_weights - root
        if engine == "fsdp" and reshards:
            first = blocks / 2 / max(self.config.num_hidden_layers, 1)
            ahead = self.stages.not_hidden(blocks / 2 - first, self.count * forward)
            behind = self.stages.not_hidden(blocks / 2 + of_gradients, self.count * backward)
            share = of_gradients / (blocks / 2 + of_gradients) if of_gradients else 0.0
            weights_wait, gradients_wait = root + first + ahead + behind * (1 - share), behind * share
            behind_what = "behind the block before, in each pass of each micro-batch, but the first, embedding and head"
        elif engine == "fsdp":
            weights_wait = root + self.stages.not_hidden(blocks, forward)
            gradients_wait = (
                of_gradients if self.parallel.pipeline > 1 else self.stages.not_hidden(of_gradients, backward)
            )
            behind_what = "once, behind the first micro-batch"
        elif engine == "zero3":
            waits = self.stages.not_hidden(of_weights + of_gradients, self.count * (forward + backward))
            share = of_gradients / (of_weights + of_gradients) if of_gradients else 0.0
            weights_wait, gradients_wait = waits * (1 - share), waits * share
            behind_what = "behind what computes"
        else:
            weights_wait = of_weights
            hidden = engine == "ddp" and self.parallel.pipeline == 1
            gradients_wait = self.stages.not_hidden(of_gradients, backward) if hidden else of_gradients
            behind_what = "after the optimizer"
        yield Term("weights", weights_wait, f"{self._shown(weights)} = {of_weights:.4g} s, {behind_what}")
        passes = "both passes, as weights" if engine == "zero3" else "the backward pass"
        hides = "not hidden" if gradients_wait == of_gradients else f"behind {passes}"
        yield Term("gradients", gradients_wait, f"{self._shown(gradients)} = {of_gradients:.4g} s, {hides}")

    def _pipeline(self) -> Iterator[Term]:
        c = self.parallel
        if c.pipeline == 1:
            return
        size = self.stages.tokens * self.config.hidden_size * self.stages.how.element
        one = self.stages.travel(Flow("states", "send", 2, size, self.layout.stage_ranks, self._edge()))
        hops = 2 * (c.stages - 1 if c.schedule in ("zbv", "dualpipev") else c.pipeline - 1)
        yield Term(
            "states",
            hops * one,
            f"{hops} hops to fill and to drain · {_bytes(size)} / link = {one:.4g} s each; hidden between",
        )
        works = self._sum(lambda s: s.computes)
        yield Term(
            "bubble",
            self.stages.bubble,
            f"{c.schedule} of {c.pipeline} ranks, {self.count:,} micro-batches, played through with the costs of each stage: "
            f"rank {self.stages.rank} computes {works:.4g} s and waits for others",
        )

    def _edge(self) -> int:
        """A rank whose neighbour in the pipeline is on another node, if one is."""
        apart, node = self.layout.stage_ranks, self.device.node
        firsts = range(0, self.layout.world_size - apart, apart)
        return next((first for first in firsts if first // node != (first + apart) // node), 0)

    def _optimizer(self) -> Iterator[Term]:
        moment = MOMENTS[self.step.recipe.precision.moments]
        engine, offload = self.parallel.engine, self.parallel.offload
        here = sum(shape.numel() for shape in shapes_on(self.layout, self.config, self.stages.rank).values())
        elements = here / (self.layout.world_size if engine.startswith("zero") else self.layout.shard)
        size = 8 + 8 + 4 * moment  # weights read and written, gradients read twice (the norm), moments read and written
        rate = self.rates.optimizer if offload == "none" else HOST_MEMORY
        what = "weights and moments read and written, gradients read, for the norm too"
        text = f"{elements:,.0f} weights · (8 + 8 + 4 · {moment}) B / {_bytes(rate)}/s: {what}"
        yield Term("optimizer", elements * size / rate, text)
        if offload != "none":
            trips = 2 * 4 + (4 * self.count if offload == "all" else 0)
            yield Term(
                "offload",
                elements * trips / HOST_LINK,
                f"{elements:,.0f} weights · {trips} B / {_bytes(HOST_LINK)}/s to and from the host",
            )

    # Bytes

    def sent(self) -> dict[str, int]:
        """Of the process that sends or receives most, by link."""
        most = Links(0, 0)
        for rank in range(self.parallel.pipeline):
            links = [
                (flow.by_link(self.device.node), self.step.skew if flow.collective == "all_to_all" else 1.0)
                for flow in self._flows(rank)
            ]
            node, network = (sum(getattr(link, name) * times for link, times in links) for name in Links._fields)
            most = Links(max(most.node, node), max(most.network, network))
        return {"node": round(most.node), "network": round(most.network)}

    def _flows(self, rank: int) -> list[Flow]:
        return step_traffic(
            self.layout,
            self.config,
            tokens=self.step.tokens,
            micro_batches=self.count,
            element_size=self.stages.how.element,
            pipeline_rank=rank,
        )

    def _shown(self, flows: list[Flow]) -> str:
        """Each by the link that takes longer."""
        parts = []
        for flow in flows:
            node, network = flow.by_link(self.device.node)
            slow = network / self.rates.network > node / self.rates.node
            size, rate = (network, self.rates.network) if slow else (node, self.rates.node)
            parts.append(f"{_bytes(size)} of {flow.what} / {_bytes(rate)}/s {'between' if slow else 'in'} nodes")
        return " + ".join(parts)


def _flops(number: float) -> str:
    return _unit(number, "FLOP")


def _bytes(number: float) -> str:
    return _unit(number, "B")


def _unit(number: float, of: str) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {prefix}{of}"
    return f"{number:.4g} {of}"
