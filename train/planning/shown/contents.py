"""What a terminal and a page alike show of a plan, before it is drawn: the answer, the kinds of memory, the pipeline's timeline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from parallel.timeline import Action, Chunk, order_of, timeline
from train.planning.memory import RankMemory
from train.planning.plan import Plan
from train.planning.speed.step_time import StepTime
from train.planning.step import PlannedStep, bubble_share, costs_of_engine, pace_by_flops, play
from train.planning.written import amount, counted, duration, long_time, share, size

if TYPE_CHECKING:
    from train.planning.simulation.simulate import Simulation

# Of `RankMemory`, in the order in which they are stacked.
KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "moments",
    "gathered": "gathered modules",
    "communication": "messages",
    "activations": "activations",
    "working": "a block at work",
}
ENOUGH = 64  # micro-batches whose timeline is longer than there is room for
PER_TRILLION = "gpu_hours_per_trillion_tokens"
ANSWER = {
    "fits": "Fits",
    "step_seconds": "Step",
    "tokens_per_second_per_device": "Tokens per second",
    "mfu": "MFU",
    PER_TRILLION: "GPU-hours",
    "days": "Run",
    "peak_bytes_per_rank": "Memory of a process",
    "micro_batches_per_step": "Largest step",
    "tokens": "Run",
    "bubble": "Bubble",
}
LINKS = {"node": "between the devices of a node", "network": "between nodes"}


class Fact(NamedTuple):
    """A figure of the answer."""

    key: str  # of `Plan.numbers()`
    name: str
    value: str
    note: str


def title(plan: Plan) -> str:
    """V3 on 2,048 × H800."""
    model = plan.recipe.model.preset or "a model"
    processes = plan.layout.world_size
    return f"{model} on " + (f"{processes:,} × {plan.device.name}" if plan.device else counted(processes, "process"))


def answer(plan: Plan, numbers: Mapping[str, Any]) -> list[Fact]:
    """What one wants to know first.

    Args:
        numbers: the plan's.
    """
    on_cpu = plan.device is not None and plan.device.name == "cpu"
    names = {**ANSWER, PER_TRILLION: "Hours of processes"} if on_cpu else ANSWER
    return [Fact(key, names[key], value, note) for key, value, note in _answer(plan, numbers)]


def _answer(plan: Plan, numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    held, c, span, processes = plan.fullest, plan.layout.config, plan.step.span, plan.layout.world_size
    where = f" on pipeline rank {held.pipeline_rank}" if c.pipeline > 1 else ""
    micro_batches = counted(plan.step.micro_batches, "micro-batch")
    steps = f"{span.sequences:,} sequences of {span.sequence_length:,}, {micro_batches} a process"
    if plan.device and plan.time:
        speed, days, hours = (numbers[key] for key in ("tokens_per_second_per_device", "days", PER_TRILLION))
        yield "fits", "yes" if plan.fits else "no", f"{size(held.peak)} of {size(plan.device.usable)} usable{where}"
        yield "step_seconds", duration(plan.time.seconds), steps
        yield (
            "tokens_per_second_per_device",
            amount(speed),
            "on each device" + f"; {amount(speed * processes)} on all" * (processes > 1),
        )
        yield "mfu", share(numbers["mfu"]), f"of the device's peak in {'FP8' if c.fp8 else plan.recipe.compute}"
        yield PER_TRILLION, amount(hours), f"per trillion tokens; {amount(days * 24 * processes)} in all"
        yield "days", long_time(days), f"for {amount(numbers['tokens'])} tokens in {numbers['steps']:,} steps"
    else:
        yield "peak_bytes_per_rank", size(held.peak), f"at its peak{where}"
        yield "micro_batches_per_step", amount(span.batch_tokens), f"tokens: {steps}"
        yield "tokens", amount(numbers["tokens"]), f"tokens in {numbers['steps']:,} steps"
    if c.pipeline > 1:
        note = "of the ranks' time in the mean, by FLOPs"
        if plan.time:
            waits = sum(term.seconds for term in plan.time.terms if term.name == "bubble")
            note = f"of the ranks' time in the mean; the busiest waits {share(waits, plan.time.seconds)}"
        yield "bubble", share(numbers["bubble"]), f"{note}: {c.schedule}"


def layout_in_words(plan: Plan) -> str:
    """What a recipe would say of it, without what is at its default."""
    c = plan.layout.config
    parts: list[str] = [c.engine]
    if c.pipeline > 1:
        parts.append(f"pipeline={c.pipeline} {c.schedule}")
        if c.schedule == "interleaved":
            parts.append(f"stages_per_rank={c.stages // c.pipeline}")
    parts += [f"{name}={getattr(c, name)}" for name in ("expert", "context", "replicate") if getattr(c, name) > 1]
    if c.engine == "fsdp" and c.pipeline == 1 and not c.reshards:
        parts.append("reshard_after_forward=false")
    if c.offload != "none":
        parts.append(f"offload={c.offload}")
    return " · ".join([*parts, f"micro_batch={plan.step.micro_batch}", f"recompute={c.recompute}"])


class Room(NamedTuple):
    """What bars of memory are drawn in."""

    bytes: float
    usable: float | None  # where the line stands; None: not in the picture


def room_of(plan: Plan) -> Room:
    """As much as the fullest rank needs, or the device has, unless it has so much more that nothing would be seen of the bars."""
    usable, most = plan.device.usable if plan.device else None, plan.fullest.peak
    if usable is None or 8 * most < usable:
        return Room(most, None)
    return Room(max(usable, most), usable)


def parts_of(held: RankMemory) -> dict[str, int]:
    """Bytes by kind, in the order of the stack."""
    return {kind: getattr(held, kind) for kind in KINDS}


class Link(NamedTuple):
    """What a process sends over it in a step."""

    name: str
    bytes: int
    speed: float  # bytes/s that are reached
    seconds: float


def links_of(plan: Plan) -> list[Link]:
    """Those that something travels over."""
    if plan.time is None:
        return []
    speeds = plan.time.reached
    return [
        Link(LINKS[link], count, speeds[link], count / speeds[link]) for link, count in plan.time.sent.items() if count
    ]


def beside(plan: Plan, simulation: "Simulation") -> list[tuple[str, int, int]]:
    """What the formula counts of each kind, and what the simulation found: a block at work is among its activations."""
    held = plan.fullest
    counted = parts_of(held)
    counted["activations"] += counted.pop("working")
    rows = [(KINDS[kind], counted[kind], simulation.at_peak[kind]) for kind in counted]
    return [*rows, ("peak", held.peak, simulation.peak)]


@dataclass(frozen=True)
class Timeline:
    """What the ranks of a pipeline do when. Of many micro-batches so many are played as fill the pipeline twice, and the room that
    there is: each further one takes as long as the one before. The others are skipped where the steady part is cut.

    Attributes:
        chunks: of each rank.
        unit: what a forward chunk takes, in the mean.
        in_seconds: whether times are in seconds; else only their ratios are known.
        skipped: micro-batches that are not played.
        pause: what they take.
        waits: share of the time in which a rank waits, in the mean over the whole step.
    """

    chunks: Sequence[Sequence[Chunk]]
    stages: int
    unit: float
    in_seconds: bool
    skipped: int
    pause: float
    waits: float

    @property
    def span(self) -> float:
        """Of what is played."""
        return max(chunk.end for rank in self.chunks for chunk in rank)

    def length(self, of: float) -> str:
        """A span of time in words: in seconds, or in forward chunks."""
        return duration(of) if self.in_seconds else f"{of / self.unit:,.3g} F"

    def windows(self, room: float) -> list[tuple[float, float]]:
        """The whole, or its beginning and its end, as (start, end): together `room` forward chunks wide, or as wide as
        shows how the pipeline fills."""
        half = max(room / 2, 1.5 * self.stages) * self.unit
        if not self.skipped and self.span <= 2 * half:
            return [(0.0, self.span)]
        half = min(half, self.span / 2)
        return [(0.0, half), (self.span - half, self.span)]


def timeline_of(step: PlannedStep, time: StepTime | None = None) -> Timeline:
    """Of a step in a pipeline.

    Args:
        time: what the step takes; None: chunks take as long as they have FLOPs.
    """
    c, pace = step.layout.config, time.pace if time else None
    costs, sizes = pace or pace_by_flops(step)
    costs = costs_of_engine(step, costs)
    filled = 2 * c.stages
    played = min(step.micro_batches, filled * ceil(ENOUGH / filled))
    chunks = timeline(order_of(c.schedule, c.pipeline, c.stages // c.pipeline, played), costs, sizes)
    shown = max(chunk.end for rank in chunks for chunk in rank)
    unit = costs.forward * sum(sizes) / len(sizes)
    whole = play(step, costs, sizes)
    waits = bubble_share(step, pace)
    return Timeline(chunks, c.stages, unit, pace is not None, step.micro_batches - played, whole.seconds - shown, waits)


def kind_of(action: Action) -> str:
    """F, B, W, or & where a forward pass overlaps a backward pass; a full backward pass is a B."""
    kinds = [work.kind for work in action]
    return "&" if "F" in kinds and len(kinds) > 1 else kinds[0]
