"""Intervals hold the truth about as often as they say, in 20 repetitions; `benchmarks/coverage.py` makes 200."""

import numpy as np
import pytest

from benchmarks.coverage import DESIGNS, AllocationExperiment, Experiment, LossExperiment, coverage, misses
from benchmarks.coverage_hyper import LADDERS
from benchmarks.coverage_ladder import GROWN

REPETITIONS = 20
EXPERIMENTS: list[Experiment] = [
    LossExperiment(DESIGNS[0], "vpnls"),
    LossExperiment(DESIGNS[0], "huber"),
    AllocationExperiment(DESIGNS[-1]),
    LADDERS[0],
    GROWN[1],
]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_intervals_hold_the_truth_about_as_often_as_they_say(experiment: Experiment) -> None:
    # 19 of 20 are 95 %; 15 or fewer have a chance of 1 in 400
    shares = coverage(experiment, REPETITIONS)
    assert min(shares.values()) >= 16 / REPETITIONS, shares
    assert np.mean([*shares.values()]) >= 0.9, shares


def test_a_share_outside_of_95_plus_minus_4_percent_is_a_miss() -> None:
    assert misses({"low": 0.905, "at the edge": 0.91, "right": 0.95, "all": 1.0}) == ["low", "all"]
