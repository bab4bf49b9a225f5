"""What the ranks of a pipeline do when: PyTorch's own order of a schedule, played through with given costs.

A chunk starts when its rank is free and what it needs from other stages is there; what travels takes no time. F is the cost of a
stage's forward chunk, B of the gradient of its input, W of those of its weights, F&B of a forward and a full backward chunk that
overlap. A rank's bubble is what it leaves of the span of the step, since no rank begins the next step before all have ended this
one (the gradient's norm is that of all parameters). `published_bubble` says what papers do, for R ranks of v stages:

    1f1b         (R−1)(F+B+W)            DeepSeek-V3 Table 2, whose B is B+W here
    interleaved  (R−1)(F+B+W)            arXiv 2104.04473 §2.2: a v-th of 1f1b's, as a stage is a v-th of a rank
    zbv          0 for F = B = W         arXiv 2401.10241 §6
    dualpipev    (R−1)(F&B + B − 2W)     github.com/deepseek-ai/DualPipe: (PP/2−1)(F&B+B−3W) for PP = 2R stages, its B is B+W here

What is counted of PyTorch's orders (2.13), from as many micro-batches as fill the pipeline (R, R, 2R−1 and 2R) to any number:

1f1b and interleaved have the bubble of the formula, whatever chunks cost. Rank r holds activations of R−r micro-batches under 1f1b,
and of (v−1)R + 2(R−r) − 1 chunks, each a v-th, under interleaved, where R divides the micro-batches.

zbv has (R−1)F where F = B = W. No rank has a gap between its first chunk and its last, but rank r begins and ends rF after the
first. The paper's ranks go on into the next step without waiting (§4: what the optimizer did is validated afterwards). With other
costs there are gaps. Every rank holds 2R chunks of half a rank's layers: as much as the first under 1f1b.

dualpipev has the bubble of the formula where F = B ≥ W, on the two last ranks; each before them has one overlapped chunk fewer than
the next, so works F+B+W−F&B longer and waits less. In general, where F&B ≥ B+W, the largest bubble is

    (R−1)(F&B − W + max(B−W, 0) + max(F−B, 0)) − min(F, (R−1)·max(B−F, 0)).

A gap that W fills is the formula's while W fits; a rank that goes forward beside one that goes backward takes the longer of both.
And the last rank's first forward and first backward chunk do not overlap ("to further reduce bubble size", as DeepSeek's code says,
whose order is the same): the former runs while the rank would wait. Overlapped too, they give the formula for all F ≤ B, W ≤ B.
Every rank holds 2R+1 chunks, the PP+1 of DeepSeek's table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch.distributed.pipelining import Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from parallel.placement import Schedule

SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "1f1b": lambda stages, *args, **options: Schedule1F1B(stages[0], *args, **options),
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
Kind = Literal["F", "B", "W"]
KINDS: dict[str, tuple[Kind, ...]] = {"F": ("F",), "I": ("B",), "W": ("W",), "B": ("B", "W")}  # by PyTorch's names


class Work(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int


Action = tuple[
    Work, ...
]  # done as one: F, B, W, a full backward pass (B, W), or one that overlaps a forward pass (F, B, W)


@dataclass(frozen=True)
class Costs:
    """Of a stage of size 1."""

    forward: float = 1.0  # F
    input_gradient: float = 1.0  # B
    weight_gradient: float = 1.0  # W
    overlapped: float | None = None  # F&B; None: F + B + W, nothing gained

    @property
    def all(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient

    def of(self, action: Action, sizes: Sequence[float] | None) -> float:
        each = {"F": self.forward, "B": self.input_gradient, "W": self.weight_gradient}
        cost = sum(each[work.kind] * (sizes[work.stage] if sizes else 1) for work in action)
        if self.overlapped is None or len(action) < 3:
            return cost
        return cost * self.overlapped / self.all


class Chunk(NamedTuple):
    """An action in its place."""

    start: float
    end: float
    action: Action


def order_of(schedule: Schedule, ranks: int, stages_per_rank: int, micro_batches: int) -> list[list[Action]]:
    """What each rank does, in order.

    Raises:
        ValueError: PyTorch has no such schedule for so many micro-batches.
    """
    stand_in = SimpleNamespace(
        stage_index=0, num_stages=ranks * stages_per_rank, group_size=ranks, group_rank=0, submod=None
    )
    planned = SCHEDULES[schedule]([stand_in] * stages_per_rank, micro_batches).pipeline_order
    order = [
        [action for planned_action in planned[rank] for action in _actions(planned_action)] for rank in range(ranks)
    ]
    return [_numbered(actions) for actions in order] if schedule == "1f1b" else order


def timeline(
    order: Sequence[Sequence[Action]], costs: Costs = Costs(), sizes: Sequence[float] | None = None
) -> list[list[Chunk]]:
    """When each rank does it.

    Args:
        sizes: of the stages, where they are not all alike; a chunk costs so many times as much.
    """
    last = max(work.stage for actions in order for action in actions for work in action)
    done: dict[Work, float] = {}
    chunks: list[list[Chunk]] = [[] for _ in order]
    waiting = set(range(len(order)))
    while waiting:
        before = len(done)
        for rank in sorted(waiting):
            for action in order[rank][len(chunks[rank]) :]:
                needs = [need for work in action for need in needs_of(work, last) if need not in action]
                if not all(need in done for need in needs):
                    break
                free = chunks[rank][-1].end if chunks[rank] else 0.0
                start = max([free, *(done[need] for need in needs)])
                chunks[rank].append(Chunk(start, start + costs.of(action, sizes), action))
                done |= dict.fromkeys(action, chunks[rank][-1].end)
            else:
                waiting.remove(rank)
        assert not waiting or len(done) > before, f"ranks {sorted(waiting)} wait for each other"
    return chunks


def needs_of(work: Work, last: int) -> list[Work]:
    """What must be done before it, on whatever rank; `last` of the stages."""
    if work.kind == "F":
        return [work._replace(stage=work.stage - 1)] if work.stage > 0 else []
    if work.kind == "B":
        behind = [work._replace(stage=work.stage + 1)] if work.stage < last else []
        return [work._replace(kind="F"), *behind]
    return [work._replace(kind="B")]


def bubble(chunks: Sequence[Sequence[Chunk]]) -> list[float]:
    """Of each rank: the span of the step without what it works."""
    span = max(c.end for rank in chunks for c in rank) - min(c.start for rank in chunks for c in rank)
    return [span - sum(c.end - c.start for c in rank) for rank in chunks]


def gaps(chunks: Sequence[Sequence[Chunk]]) -> list[float]:
    """Of each rank: its bubble between its first chunk and its last."""
    return [bubble([rank])[0] for rank in chunks]


def held(chunks: Sequence[Sequence[Chunk]]) -> list[int]:
    """Of each rank: the most chunks whose activations it holds at once, from the forward pass until W has read them."""
    most = []
    for rank in chunks:
        now, largest = 0, 0
        for kinds in ([work.kind for work in chunk.action] for chunk in rank):
            now += kinds.count("F")
            largest = max(largest, now)
            now -= kinds.count("W")
        most.append(largest)
    return most


def published_bubble(schedule: Schedule, ranks: int, costs: Costs = Costs()) -> float:
    """The formulas above, for stages of size 1."""
    if schedule == "zbv":
        return 0.0
    if schedule == "dualpipev":
        overlapped = costs.all if costs.overlapped is None else costs.overlapped
        return (ranks - 1) * (overlapped + costs.input_gradient - 2 * costs.weight_gradient)
    return (ranks - 1) * costs.all


def _actions(planned: Any) -> list[Action]:
    """An action of PyTorch's, where it is one that computes."""
    if planned is None:
        return []
    if planned.sub_actions:
        return [tuple(work for part in planned.sub_actions for action in _actions(part) for work in action)]
    kinds = KINDS.get(planned.computation_type.value)
    return [tuple(Work(kind, planned.stage_index, planned.microbatch_index) for kind in kinds)] if kinds else []


def _numbered(actions: list[Action]) -> list[Action]:
    """1f1b's forward chunks, numbered in order as its loop runs them; its table calls the last rank's first one 1 (torch 2.13)."""
    numbers = iter(range(len(actions)))
    return [(a[0]._replace(micro_batch=next(numbers)),) if a[0].kind == "F" else a for a in actions]
