"""Layers lie where the work comes out most even: as good as the best of all cuts, and sensible for DeepSeek-V3."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest

from model.config import ModelConfig, load_preset
from model.flops import flops_by_part, flops_mfu
from parallel.placement import Placement, Schedule, describe, place
from tests.small_model import small_config

V3 = ModelConfig.from_hf(load_preset("v3"))
LENGTH = 64


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages_per_rank"),
    [
        ("1f1b", 1, 1),
        ("1f1b", 2, 1),
        ("1f1b", 5, 1),
        ("interleaved", 2, 3),
        ("zbv", 1, 2),
        ("zbv", 3, 2),
        ("dualpipev", 2, 2),
    ],
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 6, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
        {"num_hidden_layers": 9, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1},
        {"num_hidden_layers": 8, "first_k_dense_replace": 8, "num_nextn_predict_layers": 2},
        {"num_hidden_layers": 9, "first_k_dense_replace": 5, "intermediate_size": 400},  # a dense layer is many others
        {"num_hidden_layers": 7, "first_k_dense_replace": 2, "vocab_size": 2000},  # and so is the head
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_no_cut_is_better(sizes: dict[str, int], schedule: Schedule, ranks: int, stages_per_rank: int) -> None:
    config = small_config(**sizes)
    found = place(config, LENGTH, ranks, schedule, stages_per_rank)
    layers, tail = costs_of_layers(config)

    def sizes(cut: tuple[range, ...]) -> tuple[list[int], list[int]]:
        stages = [sum(layers[layer] for layer in part) for part in cut]
        stages[-1] += tail
        return [sum(stages[stage] for stage in found.stages_of(rank)) for rank in range(ranks)], stages

    def squares(cut: tuple[range, ...]) -> int:
        return sum(cost**2 for costs in sizes(cut) for cost in costs)

    cuts = list(every_cut(config.num_hidden_layers, ranks * stages_per_rank))
    for largest in (lambda cut: max(sizes(cut)[0]), lambda cut: max(sizes(cut)[1])):
        least = min(map(largest, cuts))
        cuts = [cut for cut in cuts if largest(cut) <= 1.01 * least]
    assert found.layers in cuts
    assert squares(found.layers) == min(map(squares, cuts))


def costs_of_layers(config: ModelConfig) -> tuple[list[int], int]:
    """FLOPs of each layer by what adding one to a model adds, and of what is no layer of the main model."""

    def layer(is_dense: bool) -> int:
        one, two = (
            flops_mfu(replace(config, num_hidden_layers=n, first_k_dense_replace=n * is_dense), LENGTH) for n in (1, 2)
        )
        return two - one

    layers = [layer(not config.is_moe(i)) for i in range(config.num_hidden_layers)]
    return layers, flops_mfu(config, LENGTH) - sum(layers)


def every_cut(layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for inner in combinations_with_replacement(range(layers + 1), stages - 1):
        cut = tuple(range(start, end) for start, end in pairwise((0, *inner, layers)))
        if all(cut[1:-1]):
            yield cut


def test_v3_on_sixteen_ranks_has_at_most_what_cannot_be_split() -> None:
    # Head, MTP module and its head are 3.92 MoE layers, 64.9 in all: 4.06 a rank. Fifteen ranks of four leave one layer over, which
    # is 4.92 beside the head and 5 elsewhere.
    for schedule, stages_per_rank in (("1f1b", 1), ("dualpipev", 2)):
        placement = place(V3, 4096, 16, schedule, stages_per_rank)
        loads = [placement.load_of(rank) for rank in range(16)]
        with_head = placement.rank_of(len(placement.layers) - 1)
        assert loads.index(max(loads)) == with_head
        assert [sum(len(placement.layers[s]) for s in placement.stages_of(r)) for r in range(16)] == [
            1 if rank == with_head else 4 for rank in range(16)
        ]
        assert max(loads) * 16 == pytest.approx(1.213, abs=1e-3)
    assert [len(part) for part in placement.layers] == [
        1,
        *[2] * 30,
        0,
    ]  # no stage is larger than the last, which has no layer


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_costs_are_shares_of_what_a_token_costs(depth: int) -> None:
    config = replace(V3, num_nextn_predict_layers=depth)
    placement = place(config, 4096, 8, "zbv", 2)
    assert sum(placement.costs) == pytest.approx(1)
    head = flops_by_part(config, 4096)["head"] / flops_mfu(config, 4096)
    modules = placement.costs[-1] - head - len(placement.layers[-1]) * placement.costs[8] / len(placement.layers[8])
    assert modules / (placement.costs[8] / len(placement.layers[8])) == pytest.approx(
        1.15 * depth, abs=0.01
    )  # eh_proj: 0.15


def test_dense_layers_do_not_drive_stages_apart() -> None:
    # The head and two MTP modules are 6.5 layers, so seven ranks share 59, three of them nine. With a dense layer, 0.3 % cheaper,
    # on each of these the largest rank would be as little smaller, and its stages of one layer and eight.
    placement = place(replace(V3, num_nextn_predict_layers=2), 4096, 8, "zbv", 2)
    assert all(3 <= len(part) <= 5 for part in placement.layers[1:-1])


def test_a_v_brings_first_and_last_stage_to_one_rank() -> None:
    straight, v = place(V3, 4096, 4, "interleaved", 2), place(V3, 4096, 4, "zbv", 2)
    assert [straight.stages_of(rank) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [v.stages_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    for placement in (straight, v):
        assert all(placement.rank_of(stage) == rank for rank in range(4) for stage in placement.stages_of(rank))


def test_too_few_layers_are_refused() -> None:
    assert [len(part) for part in place(small_config(num_hidden_layers=6), LENGTH, 4, "zbv", 2).layers] == [
        0,
        *[1] * 6,
        0,
    ]
    with pytest.raises(
        ValueError, match=r"^model.num_hidden_layers = 5: too few for the 8 stages of parallel.pipeline = 4"
    ):
        place(small_config(num_hidden_layers=5), LENGTH, 4, "zbv", 2)


def test_description_says_what_each_rank_has() -> None:
    placement = Placement(
        layers=(range(1), range(1, 3), range(3, 6), range(0)), ranks=2, v_shaped=True, costs=(0.1, 0.2, 0.3, 0.4), mtp=2
    )
    assert describe(placement) == [
        "rank 0: embedding, layer 0 | head, 2 MTP modules  50.00% of the work, 1.00 of an even share",
        "rank 1: layers 1-2 | layers 3-5                   50.00% of the work, 1.00 of an even share",
    ]
    assert describe(replace(placement, mtp=0))[0].startswith("rank 0: embedding, layer 0 | head  ")
