"""Which process does what: a parallel configuration, checked against the number of processes and the model, becomes a `Layout`.

This is the one place that knows how ranks are arranged. A rank's place is

    rank = pipeline_rank · stage_ranks + in_stage       layers lie on one `pipeline_rank`, stage_ranks = processes / pipeline
    in_stage = replica · shard + place                  dense parameters are sharded over `place`, replicated over `replica`
    place = expert_shard · expert + expert_rank         an expert's matrices lie on one `expert_rank`, sharded over `expert_shard`
    in_stage = data_rank · context + context_rank       a sequence is shared by the ranks of one `data_rank`

so that the ranks among which tokens travel to their experts, and those that share a sequence, are neighbours, on one node where
they fit. Ranks of one `pipeline_rank` are to each other what all are without a pipeline. All ranks read data: those that differ in
`pipeline_rank` or `context_rank` alone read the same.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain, combinations, product
from typing import Any, Literal, get_args

from model.config import ModelConfig
from model.flops import Recompute
from parallel.placement import Placement, Schedule, place
from parallel.proven import PROVEN, Cell

EngineName = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]  # by how much of the model is spread
Offload = Literal["none", "optimizer", "all"]


_place = cache(place)  # which many layouts share

NUMBERS = ("expert", "replicate", "pipeline", "context")  # fields that divide processes


class LayoutError(ValueError):
    """A layout that cannot run. The message names the field, the value, the rule and the fix."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes."""

    engine: EngineName = "ddp"
    replicate: int = 1  # copies of the sharded model (HSDP); ddp has one on every rank by itself
    expert: int = 1  # ranks that share the experts of a layer
    pipeline: int = 1  # ranks over which the layers are spread
    schedule: Schedule = "1f1b"  # of the pipeline
    stages_per_rank: int | None = None  # of the pipeline; None: 1 under 1f1b, else 2
    context: int = 1  # ranks that share a sequence
    micro_batch: int = 1  # sequences in one forward pass of one process
    reshard_after_forward: bool | None = (
        None  # fsdp: free gathered parameters after the forward pass; None: not in a pipeline
    )
    offload: Offload = "none"  # what lives in host memory
    recompute: Recompute = "none"
    fp8: bool = False  # the products of blocks in FP8 (`precision.fp8`)
    fp8_dispatch: bool = False  # rows travel to experts in FP8; with fp8 and expert > 1 only
    unproven: bool = False  # allow a layout without a row in PARITY.md
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # a user's own ds_config, merged into the derived one

    @property
    def reshards(self) -> bool:
        """Whether fsdp frees gathered parameters between forward and backward pass."""
        return self.pipeline == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    @property
    def stages(self) -> int:
        """Of the pipeline, on all its ranks."""
        return self.pipeline * (self.stages_per_rank or default_stages(self))


@dataclass(frozen=True)
class Layout:
    """A configuration that fits a number of processes and, where one is given, a model.

    Args:
        lengths: T, or those of the run's stages. The layers of a pipeline are placed by what they cost at the first one; none:
            at the model's own context.

    Raises:
        LayoutError: it does not; the message names the nearest that do.
    """

    config: ParallelConfig
    world_size: int
    model: ModelConfig | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problem = problem_of(self.config, self.world_size, self.model, self.lengths)
        if problem:
            fixes = nearest(self.config, self.world_size, self.model, self.lengths)
            raise LayoutError(f"{problem}; use {' or '.join(fixes)}" if fixes else problem)

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same layers, or parts of them."""
        return self.world_size // self.config.pipeline

    @property
    def shard(self) -> int:
        """Ranks over which one copy of the model, or of its stages on one pipeline rank, is spread; 1 under ddp."""
        return 1 if self.config.engine == "ddp" else self.stage_ranks // self.config.replicate

    @property
    def expert_shard(self) -> int:
        """Ranks over which the experts of one expert rank are spread."""
        return self.shard // self.config.expert

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that read different sequences."""
        return self.stage_ranks // self.config.context

    def data_rank(self, rank: int) -> int:
        """Which of them a rank belongs to."""
        return rank % self.stage_ranks // self.config.context

    @cached_property
    def placement(self) -> Placement:
        """Which layers lie on which pipeline rank."""
        assert self.model is not None
        length = self.lengths[0] if self.lengths else self.model.max_position_embeddings
        c = self.config
        return _place(self.model, length, c.pipeline, c.schedule, c.stages // c.pipeline)

    def check_batch(self, sequences: int, micro_batch: int | None = None, fix: str | None = None) -> None:
        """Refuse a global batch that the ranks cannot share evenly, or that does not fill a pipeline.

        Args:
            micro_batch: where it differs from the configuration's.
            fix: what gives other batches, where the caller knows it.
        """
        ranks = self.data_ranks
        if sequences % ranks:
            groups = (
                _processes(ranks)
                if ranks == self.world_size
                else f"{ranks} groups of {self.world_size // ranks} processes"
            )
            raise LayoutError(
                f"schedule.batch_tokens: a global batch of {sequences} sequences does not divide over {groups}; "
                f"{fix or f'choose a multiple of {ranks} sequences'} or another number of processes"
            )
        share, size = sequences // ranks, micro_batch or self.config.micro_batch
        if rule := _problem_of_micro_batches(self.config, -(-share // size)):
            name = "parallel.micro_batch" if size == self.config.micro_batch else "data.stages: micro_batch"
            sizes = sorted(range(1, share + 1), key=lambda other: (other > size, share % other > 0, abs(other - size)))
            fits = next((s for s in sizes if not _problem_of_micro_batches(self.config, -(-share // s))), None)
            others = f"give the batch at least {ranks * self.config.stages} sequences (schedule.batch_tokens)"
            raise LayoutError(
                f"{name} = {size}: of a batch of {sequences} sequences that is {-(-share // size)} a rank, and {rule}; "
                f"{f'write micro_batch={fits}' if fits else others}, or parallel.schedule=zbv, which takes any number"
            )


def cell(config: ParallelConfig) -> Cell:
    """The row of PARITY.md that a configuration needs."""
    axes = {"replicate": config.replicate > 1, "expert": config.expert > 1, "context": config.context > 1}
    axes[config.schedule] = config.pipeline > 1
    axes |= {"recompute": config.recompute != "none", "offload": config.offload != "none"}
    axes["fp8"] = config.fp8
    return Cell(config.engine, frozenset(name for name, used in axes.items() if used))


def default_stages(config: ParallelConfig) -> int:
    """Stages of a rank where the configuration does not say."""
    return 1 if config.pipeline == 1 or config.schedule == "1f1b" else 2


def nearest(
    config: ParallelConfig, world_size: int, model: ModelConfig | None = None, lengths: Sequence[int] = ()
) -> list[str]:
    """Up to three sets of changes that make a configuration work, as they would be written in a recipe, and a number of processes
    on which it works as it is.

    Preferred are few changes that keep what was asked for: a number moves by a small factor, another engine takes over, first one
    of the same library (DeepSpeed, or PyTorch alone); what gives something up or adds something comes last. Of those that change
    the same fields the best two are named, and none that changes more fields than the best.
    """
    changes = list(_changes_that_work(config, world_size, lambda new: problem_of(new, world_size, model, lengths)))
    changes.sort(key=lambda new: sum(_cost(name, getattr(config, name), value) for name, value in new.items()))
    changes = [new for new in changes if len(new) <= len(changes[0])]
    best = [new for i, new in enumerate(changes) if sum(new.keys() == better.keys() for better in changes[:i]) < 2]
    texts = [" ".join(f"parallel.{name}={_show(value)}" for name, value in new.items()) for new in best[:3]]

    unit = config.pipeline * math.lcm(config.context, config.replicate * config.expert)
    sizes = [size for size in (world_size // unit * unit, (world_size // unit + 1) * unit) if size > 0]
    return texts + [_processes(size) for size in sizes if problem_of(config, size, model, lengths) is None][:1]


def _changes_that_work(
    config: ParallelConfig, world_size: int, problem: Callable[[ParallelConfig], str | None]
) -> Iterator[dict[str, Any]]:
    """All changes of one and two fields, and of more where these do not help; none that changes a field needlessly.

    Of three fields and more only near numbers are tried, or the search would take minutes.
    """
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    choices: dict[str, Sequence[Any]] = {
        "engine": get_args(EngineName),
        **dict.fromkeys(NUMBERS, divisors),
        "offload": get_args(Offload),
        "recompute": ["none"],
        "schedule": get_args(Schedule),
        "stages_per_rank": [None],
        "reshard_after_forward": [None],
        "deepspeed": [{}],
    }
    found: list[dict[str, Any]] = []
    for fields in range(1, len(choices) + 1):
        if found and fields > 2:
            return
        if fields == 3:
            choices |= {name: _near(getattr(config, name), divisors) for name in NUMBERS}
        others = {name: [v for v in values if v != getattr(config, name)] for name, values in choices.items()}
        for names in combinations(others, fields):
            for values in product(*(others[name] for name in names)):
                new = dict(zip(names, values))
                works = problem(replace(config, **new)) is None
                if works and not any(fewer.items() < new.items() for fewer in found):
                    found.append(new)
                    yield new


def _near(number: int, among: Sequence[int]) -> list[int]:
    """1, and the nearest numbers on both sides."""
    smaller, larger = [n for n in among if n < number], [n for n in among if n > number]
    return sorted({1, *smaller[-2:], *larger[:1]})


def _cost(name: str, old: Any, new: Any) -> float:
    """How far a change takes a configuration from what was asked for."""
    if name == "engine":
        order = get_args(EngineName)
        changes_library = old.startswith("zero") != new.startswith("zero")
        return 3 + 6 * changes_library + 0.1 * abs(order.index(old) - order.index(new))
    moved = 1 + abs(math.log2(new / old)) if name in NUMBERS else 2
    default = getattr(ParallelConfig(), name)
    return 10 if new == default else 10 + moved if old == default else moved


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value or None if isinstance(value, dict) else value)


def _processes(number: int) -> str:
    return f"{number} process" + ("es" if number > 1 else "")


def problem_of(
    config: ParallelConfig, world_size: int, model: ModelConfig | None, lengths: Sequence[int] = ()
) -> str | None:
    """The first rule that a configuration breaks, as `field = value: rule`; None: `Layout` takes it."""
    problems = chain(
        _problems_of_engine(config),
        _problems_of_pipeline(config),
        _problems_of_ranks(config, world_size),
        _problems_of_lengths(config, lengths),
        _problems_of_model(config, world_size, model) if model else [],
        _problems_of_proof(config),
    )
    return next(iter(problems), None)


def _problems_of_engine(c: ParallelConfig) -> Iterator[str]:
    if c.engine != "fsdp":
        if c.replicate != 1:
            has = "has a copy on every process" if c.engine == "ddp" else "has one copy, spread over all processes"
            yield f"parallel.replicate = {c.replicate}: belongs to fsdp; {c.engine} {has}"
        if c.reshard_after_forward is False:
            yield f"parallel.reshard_after_forward = false: belongs to fsdp, not to {c.engine}"
    if c.engine in ("ddp", "zero3") and c.expert != 1:
        yield f"parallel.expert = {c.expert}: fsdp, zero1 and zero2 spread experts, {c.engine} does not"
    if not c.engine.startswith("zero") and c.deepspeed:
        yield f"parallel.deepspeed = {{{', '.join(c.deepspeed)}}}: belongs to zero1, zero2 and zero3, not to {c.engine}"
    if c.engine == "ddp" and c.offload != "none":
        yield f"parallel.offload = {c.offload}: ddp keeps everything on its device"
    if c.engine == "fsdp" and c.offload == "optimizer":
        yield "parallel.offload = optimizer: fsdp offloads parameters and optimizer together"
    if c.engine in ("zero1", "zero2") and c.offload == "all":
        yield f"parallel.offload = all: {c.engine} keeps whole parameters on every device; only its optimizer can go"


def _problems_of_pipeline(c: ParallelConfig) -> Iterator[str]:
    if c.pipeline == 1:
        if c.schedule != "1f1b":
            yield f"parallel.schedule = {c.schedule}: is for a parallel.pipeline above 1"
        if c.stages_per_rank is not None:
            yield f"parallel.stages_per_rank = {c.stages_per_rank}: is for a parallel.pipeline above 1"
        return
    if c.engine.startswith("zero"):
        yield f"parallel.pipeline = {c.pipeline}: ddp and fsdp spread layers, {c.engine} does not"
    if c.reshard_after_forward:
        yield (
            "parallel.reshard_after_forward = true: under a pipeline several micro-batches are under way, and parameters stay "
            "gathered for all of them"
        )
    if c.offload != "none":
        yield f"parallel.offload = {c.offload}: under a pipeline parameters and optimizer stay on the device"
    given = c.stages_per_rank
    if given is not None and (given < 2 if c.schedule == "interleaved" else given != default_stages(c)):
        has = {"1f1b": "has one stage a rank", "interleaved": "has at least two stages a rank"}.get(
            c.schedule, "has two stages a rank"
        )
        yield f"parallel.stages_per_rank = {given}: {c.schedule} {has}"


def _problems_of_ranks(c: ParallelConfig, world_size: int) -> Iterator[str]:
    if world_size % c.pipeline:
        yield f"parallel.pipeline = {c.pipeline}: does not divide {_processes(world_size)}"
        return
    in_stage, of_each = world_size // c.pipeline, f" of each of {c.pipeline} pipeline ranks" * (c.pipeline > 1)
    if in_stage % c.replicate:
        yield f"parallel.replicate = {c.replicate}: does not divide {_processes(in_stage)}{of_each}"
    elif in_stage // c.replicate % c.expert:
        shard = _processes(in_stage // c.replicate)
        ranks = f"{shard}{of_each}" if c.replicate == 1 else f"the {shard} of each of {c.replicate} copies"
        yield f"parallel.expert = {c.expert}: does not divide {ranks}"
    if in_stage % c.context:
        yield f"parallel.context = {c.context}: does not divide {_processes(in_stage)}{of_each}"


def _problems_of_lengths(c: ParallelConfig, lengths: Sequence[int]) -> Iterator[str]:
    pieces = 2 * c.context
    for length in lengths if c.context > 1 else ():
        if length % pieces:
            yield (
                f"parallel.context = {c.context}: cuts sequences into {pieces} equal pieces, which a sequence_length of {length} "
                "does not give"
            )


def _problem_of_micro_batches(c: ParallelConfig, number: int) -> str | None:
    """The rule of its schedule that a number of micro-batches breaks, as PyTorch has it."""
    if c.pipeline == 1:
        return None
    if c.schedule in ("1f1b", "dualpipev") and number < c.stages:
        return f"{c.schedule} needs as many micro-batches as stages, {c.stages}, at least"
    rounds = max(1, number // c.pipeline)
    if c.schedule == "interleaved" and number % rounds:
        return f"interleaved needs them in {rounds} equal rounds"
    return None


def _problems_of_model(c: ParallelConfig, world_size: int, model: ModelConfig) -> Iterator[str]:
    if c.pipeline > 1:
        interior = c.stages - 2
        if model.num_hidden_layers < max(interior, 1):
            yield (
                f"parallel.pipeline = {c.pipeline}: {c.stages} stages need a layer each but the first and the last, and "
                f"model.num_hidden_layers = {model.num_hidden_layers}"
            )
    if c.expert == 1:
        return
    if model.n_moe_layers == 0:
        yield f"parallel.expert = {c.expert}: the model has no layer with experts"
    elif model.n_routed_experts % c.expert:
        yield f"parallel.expert = {c.expert}: does not divide model.n_routed_experts = {model.n_routed_experts}"
    if c.engine != "fsdp":
        return
    parts = world_size // c.pipeline // c.replicate // c.expert
    for name, rows in (("hidden_size", model.hidden_size), ("moe_intermediate_size", 2 * model.moe_intermediate_size)):
        if rows % parts:
            value = getattr(model, name)
            yield (
                f"parallel.expert = {c.expert}: each expert is spread over {parts} processes, which do not divide "
                f"{'twice ' if rows != value else ''}model.{name} = {value}"
            )


def _problems_of_proof(c: ParallelConfig) -> Iterator[str]:
    if not c.unproven and cell(c) not in PROVEN:
        yield (
            f"parallel: {cell(c)} has no row in parallel/PARITY.md: nothing shows that its answer is right, "
            "and parallel.unproven=true runs it all the same"
        )


def cut_of(shape: Sequence[int], ranks: int) -> int:
    """The dimension along which FSDP cuts a parameter: rows, or an expert's rows where ranks divide these but not the experts.

    Rows that ranks do not divide are padded: for 256 experts on 1,024 ranks three quarters of what is stored and sent.
    """
    return 1 if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0 else 0
