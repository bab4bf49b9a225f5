"""Samples that are passed over: no step reads one, and all that follows is where it would be without them."""

import random

import pytest

from train.config import RecipeError, load_recipe
from train.guard.passed_over import consumed, to_pass_over, union
from train.schedule import Schedule

# 8 sequences of 32 tokens a step, from 2,560 tokens on 16.
GIVEN = [
    "data.train=s",
    "data.sequence_length=32",
    "schedule.tokens=10240",
    "schedule.batch_tokens=[[0, 256], [2560, 512]]",
]


def schedule(*ranges: tuple[int, int]) -> Schedule:
    recipe = load_recipe("tiny", [*GIVEN, f"data.passed_over={[list(each) for each in ranges]}"])
    return Schedule(recipe.schedule, recipe.data.lengths, recipe.data.passed_over)


def test_a_step_that_would_read_a_passed_over_sample_begins_behind_it() -> None:
    plain, other = list(schedule().steps()), list(schedule((16, 23), (41, 42)).steps())
    assert [step.first_sample for step in plain[:5]] == [0, 8, 16, 24, 32]
    assert [step.first_sample for step in other[:5]] == [0, 8, 24, 32, 43]
    for one, same in zip(plain, other, strict=True):
        assert (one.settings, one.first_token, one.tokens) == (same.settings, same.first_token, same.tokens)


def test_samples_of_many_steps_are_counted_as_they_are_walked() -> None:
    chance = random.Random(0)
    for _ in range(200):
        edges = sorted(chance.sample(range(400), 6))
        ranges = tuple(zip(edges[::2], edges[1::2]))
        steps = list(schedule(*ranges).steps())
        samples = 0
        for sequences in (8, 16):
            span = [step for step in steps if step.settings.batch == sequences]
            samples = consumed(samples, len(span), sequences, ranges)
            assert samples == span[-1].end_sample, ranges
        assert not any(
            step.first_sample <= last and first < step.end_sample for step in steps for first, last in ranges
        )


def test_ranges_come_together_without_losing_a_sample() -> None:
    assert union([(8, 15)], [(0, 3), (8, 15)], [(12, 20), (21, 22)]) == ((0, 3), (8, 20), (21, 22))


def test_a_run_rolls_back_no_further_than_its_oldest_checkpoint_and_only_so_often_to_one() -> None:
    assert to_pass_over((40, 71), [0, 32, 64], [], 1) == (40, 71)
    assert to_pass_over((8, 71), [32, 64], [], 1) == (32, 71)
    assert to_pass_over((40, 71), [0, 32, 64], [(8, 15), (16, 23)], 1) == (40, 71), (
        "these were to the checkpoint before"
    )
    assert to_pass_over((48, 55), [0, 32], [(40, 47)], 1) is None
    assert to_pass_over((32, 55), [0, 32], [(40, 47)], 2) == (32, 55)


@pytest.mark.parametrize("given", ["[[3, 2]]", "[[8, 15], [15, 20]]", "[[8, 15], [0, 3]]", "[[1]]", "[[-1, 3]]", "7"])
def test_ranges_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.passed_over"):
        load_recipe("tiny", [f"data.passed_over={given}"])
