"""Which process does what: a parallel configuration, checked against the number of processes and the model, becomes a `Layout`.

This is the one place that knows how ranks are arranged. All of them read data; a rank's place is

    rank = replica · shard + place                      dense parameters are sharded over `place`, replicated over `replica`
    place = expert_shard · expert + expert_rank         an expert's matrices lie on one `expert_rank`, sharded over `expert_shard`

so that the ranks among which tokens travel to their experts are neighbours, on one node where they fit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, product
from typing import Any, Literal

from model.config import ModelConfig
from model.flops import Recompute
from parallel.proven import PROVEN, Cell

EngineName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "all"]


class LayoutError(ValueError):
    """A layout that cannot run. The message names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes."""

    engine: EngineName = "ddp"
    replicate: int = 1  # copies of the sharded model (HSDP); ddp replicates over all ranks by itself
    expert: int = 1  # ranks that share the experts of a layer
    pipeline: int = 1
    context: int = 1
    micro_batch: int = 1  # sequences in one forward pass of one process
    reshard_after_forward: bool = True  # fsdp: free gathered parameters between forward and backward pass
    offload: Offload = "none"  # what lives in host memory
    recompute: Recompute = "none"
    unproven: bool = False  # allow a layout without a row in PARITY.md
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # a user's own ds_config, merged into the derived one


@dataclass(frozen=True)
class Layout:
    """A configuration that fits a number of processes and, where one is given, a model.

    Raises:
        LayoutError: it does not; the message names the nearest that do.
    """

    config: ParallelConfig
    world_size: int
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        problem = _problem(self.config, self.world_size, self.model)
        if problem:
            near = nearest(self.config, self.world_size, self.model)
            raise LayoutError(f"{problem}; use {' or '.join(near)}" if near else problem)

    @property
    def shard(self) -> int:
        """Ranks over which one copy of the model is spread; meaningless for ddp."""
        return self.world_size // self.config.replicate

    @property
    def expert_shard(self) -> int:
        """Ranks over which the experts of one expert rank are spread."""
        return self.shard // self.config.expert

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences: all of them, since expert parallelism borrows its ranks from data parallelism."""
        return self.world_size

    def check_batch(self, sequences: int) -> None:
        """Refuse a global batch that the data ranks cannot share evenly."""
        if sequences % self.data_ranks:
            raise LayoutError(
                f"schedule.batch_tokens: a global batch of {sequences} sequences does not divide over {self.data_ranks} "
                f"processes; choose a multiple of {self.data_ranks} sequences or another number of processes"
            )


def cell(config: ParallelConfig) -> Cell:
    """The row of PARITY.md that a configuration needs."""
    axes = {"replicate": config.replicate > 1, "expert": config.expert > 1}
    axes |= {"recompute": config.recompute != "none", "offload": config.offload != "none"}
    return Cell(config.engine, frozenset(name for name, used in axes.items() if used))


def nearest(config: ParallelConfig, world_size: int, model: ModelConfig | None = None) -> list[str]:
    """Up to three changes of one or two fields that make a configuration work, as they would be written in a recipe.

    The fewest fields change, and a number changes by the smallest factor.
    """
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    choices: dict[str, Sequence[Any]] = {
        "expert": divisors,
        "replicate": divisors,
        "pipeline": [1],
        "context": [1],
        "offload": ["none", "optimizer", "all"],
        "reshard_after_forward": [True],
        "deepspeed": [{}],
        "engine": ["fsdp", "ddp", "zero1", "zero2", "zero3"],
    }
    for fields in (1, 2):
        found: list[tuple[float, str]] = []
        for names in combinations(choices, fields):
            for values in product(*(choices[name] for name in names)):
                changes = dict(zip(names, values))
                if any(getattr(config, name) == value for name, value in changes.items()):
                    continue
                if _problem(replace(config, **changes), world_size, model) is None:
                    distance = sum(_distance(getattr(config, name), value) for name, value in changes.items())
                    found.append(
                        (distance, " ".join(f"parallel.{name}={_show(value)}" for name, value in changes.items()))
                    )
        if found:
            return [text for _, text in sorted(found, key=lambda item: item[0])[:3]]
    return []


def _distance(old: Any, new: Any) -> float:
    both_numbers = isinstance(old, int) and isinstance(new, int) and not isinstance(new, bool)
    return abs(math.log(max(old, 1) / new)) if both_numbers else 2.0


def _show(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value or "null")


def _problem(config: ParallelConfig, world_size: int, model: ModelConfig | None) -> str | None:
    """The first rule that a configuration breaks, as `field = value: rule`."""
    problems = chain(
        _problems_of_engine(config),
        _problems_of_ranks(config, world_size),
        _problems_of_model(config, world_size, model) if model else [],
        _problems_of_proof(config),
    )
    return next(iter(problems), None)


def _problems_of_engine(c: ParallelConfig) -> Iterator[str]:
    for axis in ("pipeline", "context"):
        if getattr(c, axis) != 1:
            yield f"parallel.{axis} = {getattr(c, axis)}: not built yet"
    if c.engine != "fsdp":
        if c.replicate != 1:
            yield f"parallel.replicate = {c.replicate}: belongs to fsdp; {c.engine} has no copies beside its own"
        if c.expert != 1:
            yield f"parallel.expert = {c.expert}: only fsdp spreads experts over ranks, {c.engine} does not"
        if not c.reshard_after_forward:
            yield f"parallel.reshard_after_forward = false: belongs to fsdp, not to {c.engine}"
    if not c.engine.startswith("zero") and c.deepspeed:
        yield f"parallel.deepspeed: belongs to zero1, zero2 and zero3, not to {c.engine}"
    if c.engine == "ddp" and c.offload != "none":
        yield f"parallel.offload = {c.offload}: ddp keeps everything on its device"
    if c.engine == "fsdp" and c.offload == "optimizer":
        yield "parallel.offload = optimizer: fsdp offloads parameters and optimizer together"
    if c.engine in ("zero1", "zero2") and c.offload == "all":
        yield f"parallel.offload = all: {c.engine} keeps whole parameters on every device; only its optimizer can go"


def _problems_of_ranks(c: ParallelConfig, world_size: int) -> Iterator[str]:
    if world_size % c.replicate:
        yield f"parallel.replicate = {c.replicate}: does not divide the {world_size} processes"
    elif world_size // c.replicate % c.expert:
        each = f"each of {c.replicate} copies" if c.replicate > 1 else "the run"
        yield f"parallel.expert = {c.expert}: does not divide the {world_size // c.replicate} processes of {each}"


def _problems_of_model(c: ParallelConfig, world_size: int, model: ModelConfig) -> Iterator[str]:
    if c.expert == 1:
        return
    if model.n_moe_layers == 0:
        yield f"parallel.expert = {c.expert}: the model has no layer with experts"
    elif model.n_routed_experts % c.expert:
        yield f"parallel.expert = {c.expert}: does not divide model.n_routed_experts = {model.n_routed_experts}"
    parts = world_size // c.replicate // c.expert
    for name, width in {
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": 2 * model.moe_intermediate_size,
    }.items():
        if width % parts:
            yield (
                f"parallel.expert = {c.expert}: each expert is sharded over {parts} processes, which do not divide "
                f"{'twice ' if width != getattr(model, name) else ''}model.{name} = {getattr(model, name)}"
            )


def _problems_of_proof(c: ParallelConfig) -> Iterator[str]:
    if not c.unproven and cell(c) not in PROVEN:
        yield (
            f"parallel: {cell(c)} has no row in parallel/PARITY.md, so nothing shows that its answer is right; "
            "parallel.unproven=true runs it all the same"
        )
