"""A limit for losses is a function of the losses two steps and more ago, and of nothing else."""

import math

from train.guard.spikes import SpikeDetector, center
from train.sections import SpikesSection

SECTION = SpikesSection(window=4, threshold=10)


def seen(losses: list[float], stage: int = 0) -> SpikeDetector:
    detector = SpikeDetector(SECTION)
    for number, loss in enumerate(losses, start=1):
        detector.see(number, stage, 8 * (number - 1), loss)
    return detector


def test_the_limit_is_the_median_and_so_many_robust_deviations() -> None:
    # Steps 2 … 5: median 3.0, distances 0.1, 0.1, 0.3, 0.1 with the median 0.1. Step 6 is too near.
    detector = seen([9.0, 3.1, 2.9, 3.3, 2.9, 7.0])
    assert math.isclose(detector.limit(7, 0), 3.0 + 10 * 1.4826 * 0.1)


def test_a_curve_that_stands_still_is_not_its_own_limit() -> None:
    assert center([3.0] * 4) == (3.0, 3e-3)
    assert seen([3.0] * 6).limit(7, 0) == 3.0 + 10 * 3e-3


def test_the_limit_does_not_depend_on_whether_the_last_step_has_been_read() -> None:
    losses = [5.0, 4.0, 4.5, 3.5, 4.2, 3.0, 2.0]
    for number in range(3, len(losses) + 1):
        assert seen(losses[: number - 1]).limit(number, 0) == seen(losses[: number - 2]).limit(number, 0)


def test_a_spike_of_some_steps_does_not_hide_the_next_and_a_lasting_rise_is_none_in_the_end() -> None:
    assert seen([3.1, 2.9, 30.0, 3.0, 3.0, 3.0]).limit(7, 0) < 5
    assert seen([3.1, 2.9, 3.0, 6.0, 6.1, 6.2, 6.0]).limit(8, 0) > 6


def test_there_is_no_limit_before_half_a_window_nor_from_another_stage_nor_from_what_is_not_finite() -> None:
    assert seen([3.0, 3.1]).limit(3, 0) == math.inf and seen([3.0, 3.1]).limit(4, 0) < math.inf
    assert seen([3.0] * 6, stage=1).limit(7, 2) == math.inf
    assert seen([math.nan] * 6).limit(7, 0) == math.inf


def test_what_a_checkpoint_holds_gives_the_same_limits() -> None:
    detector = seen([5.0, 4.0, math.nan, 3.5, 4.2, 3.0, 2.0])
    again = SpikeDetector(SECTION, detector.record())
    assert again.limit(8, 0) == detector.limit(8, 0)
    assert again.first_sample(7, 3) == detector.first_sample(7, 3) == 4 * 8
    assert again.first_sample(7, 100) == 2 * 8, "as far back as is known"
