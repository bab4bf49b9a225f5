"""The layouts of a run on so many devices: which are fastest by their predicted time, and why the others fall out.

Tried is every combination of

    engine                  ddp, fsdp; on one node zero1, zero2 and zero3 too
    pipeline                divisors of the devices, as far as there are layers for the stages, under each schedule
    expert                  divisors of the routed experts
    replicate               fsdp: divisors of what is left, two processes at least to a copy
    reshard_after_forward   fsdp without a pipeline: both
    context                 1; powers of two up to 16 where a sequence is longer than 8,192 tokens
    micro_batch             powers of two up to the sequences of a process, and the recipe's own
    recompute               none, selective, full

All else stays as the recipe has it; where FP8 meets experts on several processes, rows travel in FP8. Rules of layouts and of the
run's batches are asked first, then memory, rank by rank until one is too full, and time only of what fits. Two things are concluded
and not computed: a micro-batch of m sequences that does not fit with everything recomputed does not fit with more of them; and what
fits is not made faster by recomputing more.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeGuard, get_args

from model.flops import Recompute, parameter_counts
from parallel.layout import NUMBERS, Layout, LayoutError, cell, problem_of
from parallel.proven import PROVEN
from train.config import Recipe, RecipeError
from train.planning.devices import Device
from train.planning.plan import Plan
from train.planning.step import MOMENTS
from train.planning.written import amount, duration, size
from train.schedule import Schedule
from train.sections import ParallelSection

BEST = 20  # that are kept, of the proven and of the unproven each
LONG = 8192  # tokens of a sequence beyond which several processes may share it
MOST_CONTEXT = 16
STAGES_PER_RANK = {"1f1b": (1,), "interleaved": (2, 4), "zbv": (2,), "dualpipev": (2,)}
RECOMPUTE = get_args(Recompute)  # from the fastest to the smallest
MOST_DEVICES = 2**17  # to look for a number of devices on which a run fits

TRIED = (
    "engine",
    "pipeline",
    "schedule",
    "stages_per_rank",
    "expert",
    "replicate",
    "context",
    "reshard_after_forward",
    "micro_batch",
    "recompute",
    "unproven",
)
ALWAYS_SAID = ("engine", "micro_batch", "recompute")

# Why a rule refuses, by the field that it names.
RULES = {
    "schedule.batch_tokens": "a batch of the run does not divide over the processes that read it",
    "parallel.micro_batch": "a batch of the run makes too few micro-batches, or uneven rounds of them, for the pipeline",
    "parallel.expert": "the processes do not share the experts evenly",
    "parallel.context": "the processes do not share the sequences evenly",
}

Progress = Callable[[int, int], None]  # candidates done, and all


class Fallen(NamedTuple):
    """Candidates that are not among the best."""

    what: str
    how_many: int
    why: str
    example: str  # the nearest, or the first


class Own(NamedTuple):
    """The recipe's own layout beside what was found."""

    plan: Plan | None  # None: it cannot run
    place: int  # by time, from 1; 0: it does not fit, or cannot run
    times: float  # the time of the best
    why_not: str


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        recipe: to which `overrides` are.
        candidates: how many were tried: those in `found`, in `unproven` and in `fallen`.
        found: the best that fit and run as they are, by predicted time.
        unproven: the best of those that run with parallel.unproven=true only, since no row of PARITY.md is theirs.
        fallen: the others by reason, the most first.
        fit: of all that fit and run as they are, how many.
    """

    recipe: Recipe
    world_size: int
    device: Device
    candidates: int
    found: list[Plan]
    unproven: list[Plan]
    fallen: list[Fallen]
    own: Own
    fit: int

    def overrides(self, plan: Plan) -> list[str]:
        """What a user writes behind the recipe to have this layout."""
        return overrides(self.recipe, plan.recipe)


def search(
    recipe: Recipe,
    schedule: Schedule,
    world_size: int,
    device: Device,
    imbalance: float = 1.0,
    progress: Progress | None = None,
) -> Search:
    """The best layouts of a run on so many devices.

    Args:
        imbalance: of the rows of experts, where these lie on several processes.

    Raises:
        DeviceError: the device lacks what the recipe asks of it.
    """
    space = _Space(recipe, schedule, world_size, device, imbalance)
    groups = list(space.groups())
    total, done = sum(group.candidates for group in groups), 0
    fallen = _Reasons()
    fit: list[Plan] = []
    for group in groups:
        fit += _of_group(space, group, fallen)
        done += group.candidates
        if progress:
            progress(done, total)
    fit.sort(key=_seconds)
    proven = [plan for plan in fit if plan.layout.config.unproven is recipe.parallel.unproven]
    others = [plan for plan in fit if plan.layout.config.unproven is not recipe.parallel.unproven]
    for slower in (proven[BEST:], others[BEST:]):
        for plan in slower:
            example = f"{duration(_seconds(plan))}: {_line(recipe, plan)}"
            distance = _changed(recipe, _varied(plan))
            fallen.add("time", "fit, and take longer than the best", example, distance=distance)
    own = _own(space, proven)
    return Search(recipe, world_size, device, total, proven[:BEST], others[:BEST], fallen.by_number(), own, len(proven))


def nearest_that_fits(
    recipe: Recipe, schedule: Schedule, world_size: int, device: Device, imbalance: float = 1.0
) -> Plan | None:
    """Of the layouts that fit on so many devices, one that changes few keys of the recipe's; else of those on the next powers of
    two, the first at which there is one. None: on none that anybody has."""
    powers = [2**power for power in range(MOST_DEVICES.bit_length())]
    for number in [world_size, *(power for power in powers if power > world_size)]:
        found = _nearest(_Space(recipe, schedule, number, device, imbalance))
        if found:
            return found
    return None


def overrides(base: Recipe, recipe: Recipe) -> list[str]:
    """The keys in which a layout differs from the defaults or from another recipe, as they are written behind that one."""
    said = []
    for name in TRIED:
        value, default = getattr(recipe.parallel, name), ParallelSection.model_fields[name].default
        if name in ALWAYS_SAID or value != default or value != getattr(base.parallel, name):
            said.append(f"parallel.{name}={value if isinstance(value, str) else json.dumps(value)}")
    dispatch = recipe.precision.fp8_dispatch
    if dispatch or dispatch != base.precision.fp8_dispatch:
        said.append(f"precision.fp8_dispatch={json.dumps(dispatch)}")
    return said


# The candidates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Candidates that differ in micro-batch and recomputation."""

    parallel: dict[str, Any]
    sizes: list[int]  # of micro-batches, ascending

    @property
    def candidates(self) -> int:
        return len(self.sizes) * len(RECOMPUTE)


@dataclass(frozen=True)
class _Space:
    """All that are tried."""

    recipe: Recipe
    schedule: Schedule
    world_size: int
    device: Device
    imbalance: float

    def groups(self) -> Iterator[_Group]:
        most = max(span.sequences for span in self.schedule.spans)
        for parallel in self._layouts():
            share = max(1, most * parallel["pipeline"] * parallel["context"] // self.world_size)
            sizes = {2**power for power in range(share.bit_length())}
            sizes |= {size for size in [self.recipe.parallel.micro_batch] if size <= share}
            yield _Group(parallel, sorted(sizes))

    def _layouts(self) -> Iterator[dict[str, Any]]:
        world, model = self.world_size, self.recipe.model_config_resolved()
        experts = _divisors(model.n_routed_experts) if model.n_moe_layers else [1]
        plain = {
            **dict.fromkeys(NUMBERS, 1),
            "schedule": "1f1b",
            "stages_per_rank": None,
            "reshard_after_forward": None,
        }
        for context in self._contexts():
            if world == 1:
                yield {**plain, "engine": "ddp", "context": context}
                continue
            if world <= self.device.node:
                for engine in ("zero1", "zero2", "zero3"):
                    for expert in experts if engine != "zero3" else [1]:
                        if expert <= world:
                            yield {**plain, "engine": engine, "expert": expert, "context": context}
            for way in self._pipelines(model.num_hidden_layers):
                yield {**plain, **way, "engine": "ddp", "context": context}
                ranks = world // way["pipeline"]
                for expert, copies in product(experts, _divisors(ranks)):
                    if max(2, expert) * copies > ranks:
                        continue
                    for reshards in (None, False) if way["pipeline"] == 1 else (None,):
                        numbers = {"expert": expert, "replicate": copies, "context": context}
                        yield {**plain, **way, **numbers, "engine": "fsdp", "reshard_after_forward": reshards}

    def _contexts(self) -> list[int]:
        longest = max(length for _, length in self.recipe.data.lengths)
        powers = [2**power for power in range(MOST_CONTEXT.bit_length())] if longest > LONG else [1]
        return [power for power in powers if self.world_size % power == 0]

    def _pipelines(self, layers: int) -> Iterator[dict[str, Any]]:
        yield {"pipeline": 1}
        for ranks, (schedule, numbers) in product(_divisors(self.world_size)[1:], STAGES_PER_RANK.items()):
            for stages in numbers:
                if ranks * stages <= layers + 2:  # the first stage and the last may have none
                    said = stages if schedule == "interleaved" else None
                    yield {"pipeline": ranks, "schedule": schedule, "stages_per_rank": said}

    def plan(self, parallel: Mapping[str, Any]) -> Plan | str:
        """Of one candidate; or the rule that it breaks."""
        dispatches = self.recipe.precision.fp8 and parallel["expert"] > 1
        try:
            recipe = self.recipe.spread(parallel, dispatches)
            if cell(recipe.parallel_config) not in PROVEN:
                recipe = recipe.spread({"unproven": True}, dispatches)
        except RecipeError as error:
            return str(error)
        return self.plan_of(recipe)

    def plan_of(self, recipe: Recipe) -> Plan | str:
        config = recipe.parallel_config
        lengths = [length for _, length in recipe.data.lengths]
        problem = problem_of(config, self.world_size, recipe.model_config_resolved(), lengths)
        if problem:
            return problem
        try:
            return Plan.of(recipe, self.schedule, self.world_size, self.device, self.imbalance)
        except LayoutError as error:
            batch = self._excludes(recipe.layout(self.world_size), recipe)
            problem, semicolon, fix = str(error).partition("; ")
            return f"{problem} ({batch}){semicolon}{fix}" if batch else str(error)

    def _excludes(self, layout: Layout, recipe: Recipe) -> str:
        """The batch of the run that a layout cannot have, where the run has several."""
        spans = sorted(self.schedule.spans, key=lambda span: (span.sequences, recipe.micro_batch(span.first_token)))
        for span in spans if len(self.schedule.batches()) > 1 else []:
            try:
                layout.check_batch(span.sequences, recipe.micro_batch(span.first_token))
            except LayoutError:
                when = f"from {amount(span.first_token)} tokens on" if span.first_token else "at the run's beginning"
                return f"the batch {when}"
        return ""


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _of_group(space: _Space, group: _Group, fallen: "_Reasons") -> Iterator[Plan]:
    """Those that fit."""
    does_not_fit = f"do not fit in {size(space.device.usable)}"
    is_too_much = False
    for micro_batch in group.sizes:
        # The largest may be the only one of its step, whose gradients need not lie beside those of others.
        if is_too_much and micro_batch != group.sizes[-1]:
            fallen.add("memory", does_not_fit, how_many=len(RECOMPUTE))
            continue
        tried = [space.plan({**group.parallel, "micro_batch": micro_batch, "recompute": mode}) for mode in RECOMPUTE]
        for problem, mode in zip(tried, RECOMPUTE):
            if isinstance(problem, str):
                candidate = {**group.parallel, "micro_batch": micro_batch, "recompute": mode}
                fallen.refuse(problem, _changed(space.recipe, candidate))
        plans = [plan for plan in tried if not isinstance(plan, str)]
        is_too_much = bool(plans) and not plans[-1].fits
        fitting = next((number for number, plan in enumerate(plans) if not is_too_much and plan.fits), len(plans))
        for plan in plans[:fitting]:
            distance = _changed(space.recipe, _varied(plan))
            example = ""
            if distance < fallen.distance("memory"):
                example = f"{size(plan.fullest.peak)}: {_line(space.recipe, plan)}"
            fallen.add("memory", does_not_fit, example, distance=distance)
        if plans[fitting:]:
            yield plans[fitting]
            example, distance = (
                f"{_line(space.recipe, plans[fitting])} fits",
                _changed(space.recipe, _varied(plans[fitting])),
            )
            number = len(plans) - fitting - 1
            fallen.add("recompute", "need not recompute so much to fit", example, number, distance)


class _Reasons:
    """Why candidates fall out."""

    def __init__(self) -> None:
        self._found: dict[str, Fallen] = {}
        self._distance: dict[str, float] = {}

    def add(self, what: str, why: str, example: str = "", how_many: int = 1, distance: float = math.inf) -> None:
        """Of the examples the one of the smallest distance stays, of equals the first."""
        if how_many == 0:
            return
        before = self._found.get(what, Fallen(what, 0, why, ""))
        is_nearer = example and (not before.example or distance < self.distance(what))
        self._found[what] = Fallen(what, before.how_many + how_many, why, example if is_nearer else before.example)
        if is_nearer:
            self._distance[what] = distance

    def refuse(self, problem: str, distance: float) -> None:
        """A rule that a candidate breaks, `field = value: rule; fix`."""
        field, _, rule = problem.partition(": ")
        field = field.partition(" = ")[0]
        self.add(field, RULES.get(field, rule.partition("; ")[0]), problem.partition("; ")[0], distance=distance)

    def distance(self, what: str) -> float:
        return self._distance.get(what, math.inf)

    def by_number(self) -> list[Fallen]:
        return sorted(self._found.values(), key=lambda fallen: -fallen.how_many)


def _own(space: _Space, found: list[Plan]) -> Own:
    plan = space.plan_of(space.recipe)
    if isinstance(plan, str):
        return Own(None, 0, math.inf, plan)
    if not plan.fits:
        return Own(plan, 0, math.inf, f"needs {size(plan.fullest.peak)} of {size(space.device.usable)}")
    seconds = _seconds(plan)
    place = 1 + sum(_seconds(other) < seconds for other in found)
    return Own(plan, place, seconds / min([seconds, *map(_seconds, found[:1])]), "")


def _nearest(space: _Space) -> Plan | None:
    """A layout that fits and changes few keys: first of all micro-batch and recomputation."""
    recipe = space.recipe
    if recipe.parallel.offload == "none" and not recipe.parallel.deepspeed:
        state = parameter_counts(recipe.model_config_resolved()).trainable * (8 + 2 * MOMENTS[recipe.precision.moments])
        if state / space.world_size > space.device.usable:
            return None
    for group in sorted(space.groups(), key=lambda group: _changed(recipe, group.parallel)):
        smallest = {**group.parallel, "micro_batch": group.sizes[0], "recompute": RECOMPUTE[-1]}
        if not _runs(space.plan(smallest), recipe):
            continue
        variants = [{"micro_batch": m, "recompute": r} for m, r in product(group.sizes, RECOMPUTE)]
        for variant in sorted(variants, key=lambda variant: _changed(recipe, variant)):
            plan = space.plan({**group.parallel, **variant})
            if _runs(plan, recipe):
                return plan
    return None


def _runs(plan: Plan | str, recipe: Recipe) -> TypeGuard[Plan]:
    """Whether there is such a layout that fits and runs as it is."""
    if isinstance(plan, str) or plan.layout.config.unproven is not recipe.parallel.unproven:
        return False
    return bool(plan.fits)


def _changed(recipe: Recipe, parallel: Mapping[str, Any]) -> float:
    """How far values are from a recipe's: how many differ, and a little for numbers that are far from its."""
    own = {**dict(recipe.parallel), "recompute": recipe.recompute}
    changes = 0.0
    for name, value in parallel.items():
        if value != own[name]:
            is_number = all(type(number) is int for number in (value, own[name]))
            changes += 1 + (abs(math.log2(value / own[name])) / 10 if is_number else 0)
    return changes


def _varied(plan: Plan) -> dict[str, Any]:
    """What a search has tried of it."""
    return {name: getattr(plan.recipe.parallel, name) for name in TRIED if name != "unproven"}


def _seconds(plan: Plan) -> float:
    assert plan.time, "a search knows its device"
    return plan.time.seconds


def _line(recipe: Recipe, plan: Plan) -> str:
    return " ".join(overrides(recipe, plan.recipe))
