"""The bubbles of PyTorch's schedules, counted, against published formulas; where they differ, by how much."""

import pytest

from parallel.placement import Schedule
from parallel.timeline import Costs, Work, bubble, gaps, held, order_of, published_bubble, timeline

RANKS = (2, 4, 8)
SHAPES = [(ranks, n) for ranks in RANKS for n in (2 * ranks, 2 * ranks + 2, 3 * ranks)]
EVEN, UNEVEN = Costs(), Costs(1.0, 1.5, 0.75)


@pytest.mark.parametrize(
    "schedule, stages_per_rank", [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2), ("dualpipev", 2)]
)
def test_every_micro_batch_passes_every_stage_once(schedule: Schedule, stages_per_rank: int) -> None:
    order = order_of(schedule, 4, stages_per_rank, 8)
    works = [work for actions in order for action in actions for work in action]
    expected = {
        Work(kind, stage, n) for kind in ("F", "B", "W") for stage in range(4 * stages_per_rank) for n in range(8)
    }
    assert len(works) == len(expected) and set(works) == expected


@pytest.mark.parametrize("costs", [EVEN, UNEVEN])
@pytest.mark.parametrize("ranks, micro_batches", [*SHAPES, (4, 4), (8, 8)])
def test_1f1b_and_interleaved_have_the_bubble_of_the_formula(ranks: int, micro_batches: int, costs: Costs) -> None:
    for schedule, stages_per_rank in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3)):
        chunks = timeline(order_of(schedule, ranks, stages_per_rank, micro_batches), costs)
        assert bubble(chunks) == pytest.approx([published_bubble(schedule, ranks, costs)] * ranks)


@pytest.mark.parametrize("ranks, micro_batches", SHAPES)
def test_zbv_has_no_gaps_and_ends_as_staggered_as_it_begins(ranks: int, micro_batches: int) -> None:
    chunks = timeline(order_of("zbv", ranks, 2, micro_batches))
    assert gaps(chunks) == [published_bubble("zbv", ranks)] * ranks == [0] * ranks
    assert [line[0].start for line in chunks] == list(range(ranks))
    assert bubble(chunks) == [ranks - 1] * ranks


def test_zbv_has_gaps_where_chunks_differ_or_are_few() -> None:
    assert gaps(timeline(order_of("zbv", 4, 2, 12), UNEVEN)) == [4.5, 3.5, 2.5, 1.5]
    assert gaps(timeline(order_of("zbv", 4, 2, 7))) == [0, 0, 0, 0]
    assert gaps(timeline(order_of("zbv", 4, 2, 4))) == [6, 4, 2, 0]


@pytest.mark.parametrize("ranks, micro_batches", SHAPES)
def test_dualpipev_has_the_bubble_of_the_formula(ranks: int, micro_batches: int) -> None:
    order = order_of("dualpipev", ranks, 2, micro_batches)
    assert bubble(timeline(order)) == [published_bubble("dualpipev", ranks)] * ranks == [2 * (ranks - 1)] * ranks
    for costs, gained in ((Costs(1, 1, 1, overlapped=2.5), 0.5), (Costs(1, 1, 0.5, overlapped=1.75), 0.75)):
        fewer_overlapped = [max(0, ranks - 2 - rank) for rank in range(ranks)]
        expected = [published_bubble("dualpipev", ranks, costs) - gained * n for n in fewer_overlapped]
        assert bubble(timeline(order, costs)) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipev_has_another_bubble_where_chunks_differ(ranks: int) -> None:
    order = order_of("dualpipev", ranks, 2, 3 * ranks)
    for f, b, w, gained in ((1, 1.5, 0.75, 0.5), (1, 1.5, 2, 0), (2, 1.5, 1, 1), (2, 1, 1.5, 0.25), (1, 1.25, 1.25, 1)):
        costs = Costs(f, b, w, overlapped=f + b + w - gained)
        slope = f + b + w - gained - w + max(b - w, 0) + max(f - b, 0)
        expected = (ranks - 1) * slope - min(f, (ranks - 1) * max(b - f, 0))
        assert max(bubble(timeline(order, costs))) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", RANKS)
def test_dualpipev_gains_what_its_last_rank_does_not_overlap(ranks: int) -> None:
    order = order_of("dualpipev", ranks, 2, 3 * ranks)
    formula = published_bubble("dualpipev", ranks, UNEVEN)
    assert bubble(timeline(order, UNEVEN))[-1] == pytest.approx(formula - min(1.0, (ranks - 1) * (1.5 - 1.0)))
    last = order[-1]
    at = next(i for i, action in enumerate(last) if len(action) == 2)
    assert [work.kind for work in last[at - 1]] == ["F"]
    last[at - 1 : at + 1] = [last[at - 1] + last[at]]
    assert bubble(timeline(order, UNEVEN))[-1] == pytest.approx(formula)


@pytest.mark.parametrize("ranks", RANKS)
def test_activations_are_held_as_published(ranks: int) -> None:
    most = {
        (schedule, v): held(timeline(order_of(schedule, ranks, v, 3 * ranks)))
        for schedule, v in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2), ("dualpipev", 2))
    }
    assert most["1f1b", 1] == [ranks - rank for rank in range(ranks)]
    for v in (2, 3):  # in layers 1 + (R-1)/(Rv) times 1F1B's (arXiv 2205.05198, §4.2.3)
        assert most["interleaved", v] == [ranks * (v - 1) + 2 * (ranks - rank) - 1 for rank in range(ranks)]
        assert most["interleaved", v][0] == pytest.approx(ranks * v * (1 + (ranks - 1) / (ranks * v)))
    assert most["zbv", 2] == [2 * ranks] * ranks
    assert most["dualpipev", 2] == [2 * ranks + 1] * ranks


def test_a_larger_stage_is_what_the_others_wait_for() -> None:
    # 1F1B of 3 micro-batches: F on rank 0, then three times F, B and W of size 2 on rank 1, then B and W on rank 0.
    chunks = timeline(order_of("1f1b", 2, 1, 3), sizes=[1.0, 2.0])
    assert [line[-1].end for line in chunks] == [1 + 3 * 6 + 2, 1 + 3 * 6]
    assert bubble(chunks) == [21 - 9, 21 - 18]
