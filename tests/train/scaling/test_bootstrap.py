"""Intervals of the bootstrap against statistics that are known in closed form."""

import numpy as np
from scipy.stats import t

from train.scaling.estimate import Estimate
from train.scaling.fits.bootstrap import of_a_run, percentile_interval, resample, residual_samples, scatter


def test_samples_are_a_function_of_their_seed() -> None:
    assert np.array_equal(resample(7, 5, seed=3), resample(7, 5, seed=3))
    assert not np.array_equal(resample(7, 5, seed=3), resample(7, 5, seed=4))
    assert resample(7, 5, seed=3).shape == (5, 7) and resample(7, 500, seed=3).max() == 6


def test_residual_samples_give_a_line_its_student_interval() -> None:
    # 8 points, 2 parameters: the slope's error is Student's with 6 degrees of freedom, 2.45 standard errors instead of 1.96
    x = np.linspace(-1, 1, 8)
    noise = np.array([1, -1, -1, 1, 1, -1, -1, 1]) * 0.1  # orthogonal to the constant and to x
    y = 2 + 3 * x + noise
    slope = x @ y / (x @ x)
    samples = residual_samples(2 + slope * x, noise, parameters=2, repetitions=40_000, seed=0)
    interval = percentile_interval(slope, samples @ x / (x @ x))
    error = np.sqrt(np.sum(noise**2) / 6 / np.sum(x**2))
    assert np.isclose(slope, 3)
    assert np.allclose([interval.low, interval.high], 3 + error * t.ppf([0.025, 0.975], 6), rtol=0.01)


def test_smoothed_residuals_are_as_wide_as_they_were() -> None:
    residuals = np.array([-0.3, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.0])  # of a robust fit that passes through five runs
    samples = residual_samples(np.zeros(8), residuals, parameters=2, repetitions=40_000, seed=0)
    # the variance of n/(n − p) · r, times the mean of Student's scale (n − p)/χ²: 6/4
    assert np.isclose(samples.var(), residuals.var() * 8 / 6 * 6 / 4, rtol=0.05)


def test_the_ends_of_an_interval_allow_for_few_draws() -> None:
    # 39 draws cut the line into 40 parts that a further draw falls into with equal chance: 2.5 % lie below the first draw
    interval = percentile_interval(20.0, np.arange(1.0, 40.0))
    assert np.allclose([interval.low, interval.high], [1, 39])


def test_a_run_lies_around_a_law_that_is_uncertain_itself() -> None:
    # Residuals of ±1 % with 100 degrees of freedom scatter by 1.98 %; beside a law known to 3 %: √(3² + 1.98²) = 3.6 %.
    around = scatter([0.01, -0.01] * 50 + [0.0] * 5, parameters=5)
    run = of_a_run(Estimate(2.0, 1.94, 2.06), around)
    assert around is not None and np.isclose(around, 0.0198, atol=1e-4)
    assert run.low is not None and run.high is not None and np.allclose([run.low, run.high], [1.928, 2.072], atol=1e-3)
    assert of_a_run(Estimate(2.0), around) == of_a_run(Estimate(2.0, 1.9, 2.1), None) == Estimate(2.0)
