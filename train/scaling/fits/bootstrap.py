"""Intervals for fitted coefficients by the bootstrap, corrected for few runs.

Two ways to draw another table of runs that might as well have been measured:

    residuals   y* = ŷ + t · √(n/(n−p)) · r*     r* drawn from the smoothed, centred residuals, p fitted parameters, t as below
    runs        rows drawn with replacement, each with all of its columns

A fit makes its residuals smaller than the noise; the root undoes that. What is left is that the noise itself is known from only
n−p degrees of freedom: t = √((n−p)/χ²) with one χ² of n−p degrees for each sample turns the spread of a linear model's refitted
coefficients into the Student distribution that their errors have. Residuals are smoothed, because a robust fit passes exactly
through some runs, and their zeros drawn again make its coefficients look better known than they are: without it the intervals of a
Huber fit hold the truth in 90 of 100 cases, with it in 95 (`benchmarks/coverage.py`). Samples of runs have neither correction.

Intervals are percentiles of refitted coefficients. Efron's BCa ends (1987) on the same draws held the truth no more often, at the
price of a fit without each of the runs. Everything is a function of its seed.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.scaling.estimate import Estimate
from train.scaling.fits.runs import Array


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


def percentile_interval(value: float, draws: ArrayLike) -> Estimate:
    """The value with the 95 % of its draws that are left when as many are cut off at both ends."""
    low, high = quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def quantile(draws: ArrayLike, shares: ArrayLike) -> Array:
    """Where so many shares of the draws lie below, if one more draw is as likely to fall between any two of them."""
    return np.asarray(np.quantile(np.asarray(draws, float), np.asarray(shares, float), method="weibull"))


def scatter(residuals: ArrayLike, parameters: int) -> float | None:
    """How far a single run lies from a fitted law, relative, in 95 of 100 cases: Student's quantile times the residuals' sd.

    Args:
        residuals: ln measured − ln fit.
        parameters: how many the fit has taken; None is returned where it leaves no degree of freedom.
    """
    from scipy.stats import t  # half a second, which commands that fit nothing need not wait

    left = np.asarray(residuals, float)
    freedom = len(left) - parameters
    return float(t.ppf(0.975, freedom) * np.sqrt(left @ left / freedom)) if freedom > 0 else None


def of_a_run(law: Estimate, scatter: float | None) -> Estimate:
    """The interval of a single run: that of the law and the scatter around it, in quadrature. Unknown where one of them is."""
    if law.low is None or law.high is None or scatter is None:
        return Estimate(law.value)
    around = scatter * law.value
    return Estimate(
        law.value,
        law.value - float(np.hypot(law.value - law.low, around)),
        law.value + float(np.hypot(law.high - law.value, around)),
    )
