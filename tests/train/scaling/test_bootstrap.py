"""Intervals of the bootstrap against statistics that are known in closed form."""

import numpy as np
from scipy.stats import t

from train.scaling.bootstrap import bca_interval, jackknife, percentile_interval, resample, residual_samples


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


def test_degrees_of_freedom_widen_the_interval_of_samples_of_runs() -> None:
    draws = np.random.default_rng(0).normal(size=200_000)
    interval = percentile_interval(0.0, draws, freedom=6)
    assert np.allclose([interval.low, interval.high], t.ppf([0.025, 0.975], 6), rtol=0.03)


def test_bca_moves_the_interval_of_a_skewed_statistic() -> None:
    # The variance of 20 normal numbers: 95 % of the chi-squared interval is (0.58, 2.13) times it, far from symmetric.
    sample = np.random.default_rng(5).normal(size=20)
    value = float(np.var(sample))
    draws = np.var(sample[resample(20, 20_000, seed=1)], axis=1)
    without_one = jackknife(20, lambda rows: np.var(sample[rows]))
    plain, corrected = percentile_interval(value, draws), bca_interval(value, draws, without_one)
    assert plain.low < corrected.low < value < plain.high < corrected.high


def test_bca_of_draws_without_bias_or_skew_is_the_percentile_interval() -> None:
    draws = np.linspace(-1, 1, 2001)
    plain, corrected = percentile_interval(0.0, draws), bca_interval(0.0, draws, [-1.0, 1.0])
    assert np.allclose([plain.low, plain.high], [corrected.low, corrected.high])
