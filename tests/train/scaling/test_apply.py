"""A law's answer for one run: batches that any number of processes can share, and a batch that grows with what was spent."""

import math
from itertools import pairwise

import pytest

from model.config import ModelConfig, load_preset
from model.flops import flops_scaling
from train.scaling.apply import Course, advise, growing_batch, whole_batch
from train.scaling.errors import ScalingError
from train.scaling.law import Law, PowerLaw, load_law


def model() -> ModelConfig:
    return ModelConfig.from_hf(load_preset("tiny"))


def law_of(batch: PowerLaw) -> Law:
    return Law(name="made-up", source="this test", batch_tokens=batch)


@pytest.mark.parametrize(
    ("wanted", "sequences"),
    [(0.01, 1), (1.4, 1), (1.45, 2), (2.4, 2), (2.5, 3), (3.4, 3), (3.5, 4), (73.04, 64), (79, 96), (100, 96), (111, 128)],
)  # fmt: skip
def test_a_batch_is_the_nearest_power_of_two_or_its_three_halves_in_ratio(wanted: float, sequences: int) -> None:
    assert whole_batch(wanted * 256, 256) == sequences * 256
    assert whole_batch(wanted * 256 * 7, 256 * 7) == sequences * 256 * 7  # multiples of 7 sequences


def test_compute_counts_each_stage_at_its_own_sequence_length() -> None:
    course = Course.of(load_law("deepseek-llm"), model(), ((0, 256), (1000, 512)))
    short, long = flops_scaling(model(), 256), flops_scaling(model(), 512)
    assert course.at(400)["flops"] == 400 * short
    assert course.at(1500)["flops"] == 1000 * short + 500 * long


def test_a_law_of_six_n_d_counts_the_active_parameters() -> None:
    course = Course.of(load_law("chinchilla"), model(), ((0, 256),))
    assert course.at(10)["flops"] == 60 * course.active < 60 * course.params


def test_step_laws_learning_rate_takes_all_experts() -> None:
    # 1.79 · N^-0.713 · D^0.307, 0.58 · D^0.571 tokens
    course = Course.of(load_law("step-law"), model(), ((0, 256),))
    advice = advise(load_law("step-law"), course, 10**7)
    assert advice.lr and advice.batch_tokens
    assert advice.lr.value == pytest.approx(1.79 * course.params**-0.713 * 1e7**0.307)
    assert advice.batch_tokens.value == pytest.approx(0.58 * 1e7**0.571)
    assert advice.distances["tokens"] == pytest.approx(math.log10(4e9 / 1e7))
    assert "D by 2.6 decades" in advice.warnings()[0]


def test_a_growing_batch_is_within_a_root_of_two_of_the_laws_and_ends_where_auto_would_be() -> None:
    law, unit, tokens = load_law("deepseek-llm"), 256, 10**9
    course = Course.of(law, model(), ((0, unit),))
    assert law.batch_tokens
    points = growing_batch(law, course, tokens, unit)
    assert points[-1][1] == whole_batch(float(law.batch_tokens(**course.at(tokens))), unit)
    assert len(points) == 5 and all(later == 2 * batch for (_, batch), (_, later) in pairwise(points))
    for (start, batch), end in zip(points[1:], [start for start, _ in points[2:]] + [tokens]):
        for at in (start, (start + end) // 2, end - 1):
            assert 1 / math.sqrt(2) < batch / law.batch_tokens(**course.at(at)) <= math.sqrt(2) * (1 + 1e-9)


def test_what_divides_the_first_batch_of_a_ramp_divides_all() -> None:
    law = law_of(PowerLaw(coefficient=100.0, exponents={"tokens": 0.4}))
    course = Course.of(law, model(), ((0, 8),))
    points = growing_batch(law, course, 10**6, 8 * 6)  # multiples of 6 sequences of 8
    assert len(points) > 2 and all(batch % points[0][1] == 0 and batch % 48 == 0 for _, batch in points)


def test_a_ramp_of_one_unit_is_a_constant_batch() -> None:
    law = law_of(PowerLaw(coefficient=1e-3, exponents={"tokens": 0.5}))
    assert growing_batch(law, Course.of(law, model(), ((0, 256),)), 10**6, 256) == ((0, 256),)


def test_a_law_whose_batch_does_not_grow_gives_no_ramp() -> None:
    law = law_of(PowerLaw(coefficient=100.0, exponents={"params": 0.5}))
    with pytest.raises(
        ScalingError, match="its best batch does not grow with the tokens, so there is no ramp; use auto"
    ):
        growing_batch(law, Course.of(law, model(), ((0, 256),)), 10**6, 256)
