"""Intervals for fitted coefficients by the bootstrap, corrected for few runs.

Two ways to draw another table of runs that might as well have been measured:

    residuals   y* = ŷ + t · √(n/(n−p)) · r*     r* drawn from the smoothed, centred residuals, p fitted parameters, t as below
    runs        rows drawn with replacement, each with all of its columns

A fit makes its residuals smaller than the noise; the root undoes that. What is left is that the noise itself is known from only
n−p degrees of freedom: t = √((n−p)/χ²) with one χ² of n−p degrees for each sample turns the spread of a linear model's refitted
coefficients into the Student distribution that their errors have. Samples of runs have neither correction, so that their
intervals take it as an argument. Residuals are smoothed, because a robust fit passes exactly through some runs, and their zeros
drawn again make its coefficients look better known than they are: without it the intervals of a Huber fit hold the truth in 90
of 100 cases, with it in 95 (`benchmarks/coverage.py`).

Refitted coefficients of a bent model are biased and skewed. `bca_interval` measures both and moves the ends (Efron 1987, bias
corrected and accelerated); `percentile_interval` takes the draws as they are. Everything is a function of its seed.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from train.scaling.estimate import Estimate
from train.scaling.runs import Array


def resample(n: int, repetitions: int, seed: int) -> NDArray[np.int64]:
    """[R, n] indices of runs, drawn with replacement."""
    return np.random.default_rng(seed).integers(n, size=(repetitions, n))


def residual_samples(fitted: Array, residuals: Array, parameters: int, repetitions: int, seed: int) -> Array:
    """[R, n] tables of values that might as well have been measured, if errors are alike in every run.

    Args:
        fitted: [n] values of the fit.
        residuals: [n] measured minus fitted.
        parameters: how many the fit has taken from the n runs, p < n.
    """
    n = len(fitted)
    freedom = n - parameters
    assert freedom > 0, f"{n} runs cannot tell the error of {parameters} parameters"
    generator = np.random.default_rng(seed)
    centred = (residuals - residuals.mean()) * np.sqrt(n / freedom)
    width = _bandwidth(centred)
    drawn = centred[generator.integers(n, size=(repetitions, n))] + width * generator.normal(size=(repetitions, n))
    spread = np.sqrt(centred.var() / max(centred.var() + width**2, 1e-300))  # as wide as before it was smoothed
    scale = np.sqrt(freedom / generator.chisquare(freedom, size=(repetitions, 1)))
    return np.asarray(fitted + scale * spread * drawn)


def _bandwidth(sample: Array) -> float:
    """Standard deviation of the normal kernel: a little above the rule for normal samples, small beside far outliers."""
    quartiles = np.subtract(*np.quantile(sample, [0.75, 0.25])) / 1.34
    return float(1.5 * min(sample.std(), quartiles) * len(sample) ** -0.2)


def jackknife(n: int, fit: Callable[[NDArray[np.int64]], Array]) -> Array:
    """[n, …] what `fit` makes of all runs but one, for each of them in turn; `fit` is given the indices of the others."""
    everyone = np.arange(n)
    return np.array([fit(np.delete(everyone, left_out)) for left_out in range(n)])


def percentile_interval(value: float, draws: ArrayLike, level: float = 0.95, freedom: int | None = None) -> Estimate:
    """The value with the part of the draws that is left when the same share is cut off at both ends.

    Args:
        freedom: degrees of freedom n − p of draws that lack the small-sample correction: samples of runs.
    """
    z = _normal_or_student(0.5 + level / 2, freedom)
    low, high = quantile(draws, norm.cdf([-z, z]))
    return Estimate(value, float(low), float(high))


def bca_interval(
    value: float, draws: ArrayLike, jackknife: ArrayLike, level: float = 0.95, freedom: int | None = None
) -> Estimate:
    """The value with its bias-corrected and accelerated interval (Efron 1987, eq. 6.8).

    Args:
        draws: [R] the value of refitted samples.
        jackknife: [n] the value without each of the runs; its skew says how the spread changes with the value.
        freedom: as in `percentile_interval`.
    """
    sample = np.asarray(draws, float)
    share = (np.mean(sample < value) + np.mean(sample <= value)) / 2  # draws that equal it count by half
    edge = 0.5 / len(sample)
    bias = norm.ppf(np.clip(share, edge, 1 - edge))
    pulls = np.mean(np.asarray(jackknife, float)) - np.asarray(jackknife, float)
    spread = np.sum(pulls**2) ** 1.5
    acceleration = np.sum(pulls**3) / (6 * spread) if spread > 0 else 0.0
    z = bias + _normal_or_student(0.5 + level / 2, freedom) * np.array([-1.0, 1.0])
    low, high = quantile(sample, norm.cdf(bias + z / (1 - acceleration * z)))
    return Estimate(value, float(low), float(high))


def quantile(draws: ArrayLike, shares: ArrayLike) -> Array:
    """Where so many shares of the draws lie below, if one more draw is as likely to fall between any two of them."""
    return np.asarray(np.quantile(np.asarray(draws, float), np.asarray(shares, float), method="weibull"))


def _normal_or_student(probability: float, freedom: int | None) -> float:
    return float(norm.ppf(probability) if freedom is None else t.ppf(probability, freedom))
