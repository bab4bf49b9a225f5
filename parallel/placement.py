"""Which layers lie on which rank of a pipeline: by what they cost, not by how many they are.

A stage is a run of layers; the output head and all MTP modules go with the last. A step takes as long as the rank with the most to
do, so that is what a placement makes small first, then the largest stage (chunks wait for the longest of them), then unevenness.
Costs are the FLOPs of `model.flops`; the embedding, a look-up, costs nothing. They do not tell times apart to a hundredth, so what
is that close to the least counts as good as it: a dense layer of V3 has 0.3 % fewer FLOPs than one with experts. The first stage
and the last may do without layers, each other has one at least.

    straight (1f1b, interleaved)           V (zbv, dualpipev)
    rank   0    1    2    3                rank   0    1    2    3
    stage  0    1    2    3                stage  0    1    2    3
           4    5    6    7                       7    6    5    4        embedding and head on one rank
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.flops import flops_by_part, flops_mfu

Schedule = Literal["1f1b", "interleaved", "zbv", "dualpipev"]
V_SHAPED: tuple[Schedule, ...] = ("zbv", "dualpipev")


@dataclass(frozen=True)
class Placement:
    """The stages of a pipeline and the ranks on which they lie."""

    layers: tuple[range, ...]  # of the main model, for each stage
    ranks: int
    v_shaped: bool
    costs: tuple[float, ...]  # each stage's share of the FLOPs of a token
    mtp: int = 0  # modules, with the last stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return _stages_of(rank, self.ranks, len(self.layers), self.v_shaped)

    def rank_of(self, stage: int) -> int:
        is_way_back = self.v_shaped and stage >= self.ranks
        return len(self.layers) - 1 - stage if is_way_back else stage % self.ranks

    def load_of(self, rank: int) -> float:
        """A rank's share of the FLOPs of a token."""
        return sum(self.costs[stage] for stage in self.stages_of(rank))


def place(config: ModelConfig, sequence_length: int, ranks: int, schedule: Schedule, stages_per_rank: int) -> Placement:
    """The best placement, found exactly; the same arguments give the same one.

    Raises:
        ValueError: the model has fewer layers than there are stages that need one.
    """
    v_shaped = schedule in V_SHAPED
    assert stages_per_rank == 2 or not v_shaped, "a V has two stages a rank"
    stages = ranks * stages_per_rank
    if config.num_hidden_layers < stages - 2:
        raise ValueError(
            f"model.num_hidden_layers = {config.num_hidden_layers}: too few for the {stages} stages of parallel.pipeline = {ranks} "
            f"and parallel.stages_per_rank = {stages_per_rank}, each of which but the first and the last needs a layer; lower one "
            f"of the two, or give the model {stages - 2} layers"
        )
    costs = _costs(config, sequence_length)
    counts = _best_counts(costs, [_stages_of(rank, ranks, stages, v_shaped) for rank in range(ranks)])
    ends = list(accumulate((count.dense + count.moe for count in counts), initial=0))
    total = flops_mfu(config, sequence_length)
    return Placement(
        layers=tuple(range(start, end) for start, end in pairwise(ends)),
        ranks=ranks,
        v_shaped=v_shaped,
        costs=tuple(costs.of(count, has_tail=stage == stages - 1) / total for stage, count in enumerate(counts)),
        mtp=config.num_nextn_predict_layers,
    )


def describe(placement: Placement) -> list[str]:
    """One line a rank: what its stages hold, and its share of the work, beside an even one."""
    held = [
        " | ".join(_contents(placement, stage) or "nothing" for stage in placement.stages_of(rank))
        for rank in range(placement.ranks)
    ]
    width, digits = max(map(len, held)), len(str(placement.ranks - 1))
    return [
        f"rank {rank:{digits}}: {held[rank]:{width}}  {placement.load_of(rank):6.2%} of the work, "
        f"{placement.load_of(rank) * placement.ranks:.2f} of an even share"
        for rank in range(placement.ranks)
    ]


def _contents(placement: Placement, stage: int) -> str:
    layers = placement.layers[stage]
    parts = ["embedding"] if stage == 0 else []
    if layers:
        parts.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}")
    if stage == len(placement.layers) - 1:
        parts.append("head")
        if placement.mtp:
            parts.append(f"{placement.mtp} MTP module{'s' if placement.mtp > 1 else ''}")
    return ", ".join(parts)


def _stages_of(rank: int, ranks: int, stages: int, v_shaped: bool) -> tuple[int, ...]:
    return (rank, stages - 1 - rank) if v_shaped else tuple(range(rank, stages, ranks))


# The search -----------------------------------------------------------------------------------------------------------


class _Count(NamedTuple):
    """Numbers of layers."""

    dense: int
    moe: int


@dataclass(frozen=True)
class _Costs:
    """Training FLOPs per token."""

    dense: int
    moe: int
    tail: int  # head and MTP, with the last stage
    layers: _Count  # of the model

    def of(self, count: _Count, has_tail: bool) -> int:
        return count.dense * self.dense + count.moe * self.moe + has_tail * self.tail


def _costs(config: ModelConfig, sequence_length: int) -> _Costs:
    def layer(is_dense: bool) -> int:
        alone = replace(config, num_hidden_layers=1, first_k_dense_replace=int(is_dense), num_nextn_predict_layers=0)
        parts = flops_by_part(alone, sequence_length)
        return sum(parts.values()) - parts["head"]

    layers = _Count(config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace)
    costs = _Costs(layer(is_dense=True), layer(is_dense=False), 0, layers)
    return replace(costs, tail=flops_mfu(config, sequence_length) - costs.of(layers, has_tail=False))


class _Goal(NamedTuple):
    """What is made small: a number of each stage's cost, joined over the stages of a rank and with its load, joined over ranks."""

    of_stage: Callable[[int], int]
    of_rank: Callable[[int, int], int]  # load of the rank, what its stages gave
    join: Callable[[int, int], int]


LARGEST_RANK = _Goal(lambda cost: 0, lambda load, stages: load, max)
LARGEST_STAGE = _Goal(lambda cost: cost, lambda load, stages: stages, max)
SQUARES = _Goal(lambda cost: cost**2, lambda load, stages: stages + load**2, operator.add)


class _Way(NamedTuple):
    """The best way found to give some stages so many layers."""

    value: int
    counts: tuple[_Count, ...]  # of each of these stages


def _best_counts(costs: _Costs, stages: Sequence[Sequence[int]]) -> list[_Count]:
    """How many layers of each kind each stage has; `stages` are those of each rank.

    Layers of a kind cost the same, and dense layers come first: at most one stage, the border, has both kinds; those before it have
    dense layers alone, those after it MoE layers alone. With the border chosen, all numbers that add up are a placement, whatever
    the order of stages on ranks: so ranks are joined one by one, and of all ways to give the first few so many layers the best is
    kept. One pass for each goal, among what is as good as the best for the goals before it.
    """
    order = [stage for held in stages for stage in held]
    last = len(order) - 1
    borders = [b for b in range(last + 1) if b - 1 <= costs.layers.dense and last - 1 - b <= costs.layers.moe]

    def best(goal: _Goal, rank_limit: int, stage_limit: int) -> _Way | None:
        ways = (_best_way(costs, stages, last, border, goal, rank_limit, stage_limit) for border in borders)
        return min((way for way in ways if way), key=lambda way: way.value, default=None)

    limit = max(costs.tail, costs.of(costs.layers, has_tail=True) // len(stages))
    while (way := best(LARGEST_RANK, limit, limit)) is None:  # near an even share there are few to look at, if any
        limit += max(costs.dense, costs.moe)
    rank_limit = _close_to(way.value)
    way = best(LARGEST_STAGE, rank_limit, rank_limit)
    assert way, "a goal before it found one"
    way = best(SQUARES, rank_limit, _close_to(way.value))
    assert way, "a goal before it found one"
    counts = dict(zip(order, way.counts))
    return [counts[stage] for stage in range(last + 1)]


def _close_to(cost: int) -> int:
    return cost + cost // 100


def _best_way(
    costs: _Costs,
    stages: Sequence[Sequence[int]],
    last: int,
    border: int,
    goal: _Goal,
    rank_limit: int,
    stage_limit: int,
) -> _Way | None:
    """The best way to place all layers with this border, no rank and no stage above its limit."""
    tables = []
    for held in stages:
        table = reduce(
            lambda one, other: _joined(one, other, goal.join, costs.layers),
            [_of_stage(costs, stage, last, border, goal, stage_limit) for stage in held],
        )
        loads = {count: costs.of(count, has_tail=last in held) for count in table}
        tables.append(
            {
                count: _Way(goal.of_rank(loads[count], way.value), way.counts)
                for count, way in table.items()
                if loads[count] <= rank_limit
            }
        )
    if not all(tables):
        return None
    # Only ways that the ranks to come can complete are worth keeping.
    most = [_Count(max(c.dense for c in table), max(c.moe for c in table)) for table in tables]
    total = tables[0]
    for rank, table in enumerate(tables[1:], start=1):
        to_come = _Count(sum(m.dense for m in most[rank:]), sum(m.moe for m in most[rank:]))
        enough = {
            c: way
            for c, way in total.items()
            if c.dense + to_come.dense >= costs.layers.dense and c.moe + to_come.moe >= costs.layers.moe
        }
        total = _joined(enough, table, goal.join, costs.layers)
    return total.get(costs.layers)


def _of_stage(costs: _Costs, stage: int, last: int, border: int, goal: _Goal, limit: int) -> dict[_Count, _Way]:
    """What one stage may have."""
    dense = costs.layers.dense if stage <= border else 0
    moe = costs.layers.moe if stage >= border else 0
    least = 1 if 0 < stage < last else 0
    table = {}
    for count in (_Count(d, m) for d in range(dense + 1) for m in range(moe + 1) if d + m >= least):
        cost = costs.of(count, has_tail=stage == last)
        if cost <= limit:
            table[count] = _Way(goal.of_stage(cost), (count,))
    return table


def _joined(
    one: dict[_Count, _Way], other: dict[_Count, _Way], join: Callable[[int, int], int], most: _Count
) -> dict[_Count, _Way]:
    """The best ways for the stages of both together; of equals the first."""
    table: dict[_Count, _Way] = {}
    for a, way in one.items():
        for b, way_b in other.items():
            count = _Count(a.dense + b.dense, a.moe + b.moe)
            if count.dense > most.dense or count.moe > most.moe:
                continue
            value = join(way.value, way_b.value)
            if count not in table or value < table[count].value:
                table[count] = _Way(value, way.counts + way_b.counts)
    return table
