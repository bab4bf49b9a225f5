"""Many problems at once are solved as one by one, and Huber's sum as a general optimizer solves it."""

import numpy as np
import pytest
from scipy.optimize import minimize

from train.scaling.fits.least_squares import huber, minimise
from train.scaling.fits.runs import Array

X = np.linspace(-1, 1, 12)


def decay(theta: Array, measured: Array) -> tuple[Array, Array]:
    """exp(a) + exp(b − c·x), less what was measured."""
    constant, falling = np.exp(theta[:, :1]), np.exp(theta[:, 1:2] - theta[:, 2:] * X)
    jacobian = np.stack([constant + 0 * X, falling, -X * falling], axis=-1)
    return constant + falling - measured, jacobian


def problems(noise: float) -> Array:
    draws = np.random.default_rng(0).normal(size=(6, len(X)))
    return np.asarray(1 + 2 * np.exp(-0.8 * X) + noise * draws)


START = np.tile([0.3, 0.3, 0.3], (6, 1))


def test_huber_is_the_sum_of_squares_inside_and_of_straight_lines_outside() -> None:
    r = np.array([[0.5, -2.0, 3.0]])
    assert huber(r, 1.0) == pytest.approx([0.125 + (2 - 0.5) + (3 - 0.5)])
    assert huber(r, np.inf) == pytest.approx([(0.25 + 4 + 9) / 2])


@pytest.mark.parametrize("delta", [np.inf, 0.02])
def test_every_problem_reaches_the_minimum_of_a_general_optimizer(delta: float) -> None:
    measured = problems(noise=0.05)
    found = minimise(decay, START, measured, delta)
    for theta, value, row in zip(found.parameters, found.objective, measured, strict=True):
        other = minimize(
            lambda t, row=row: huber(decay(t[None], row[None])[0], delta)[0], theta + 0.05, method="Powell"
        )
        assert value <= other.fun * (1 + 1e-8)


def test_problems_do_not_touch_each_other() -> None:
    measured = problems(noise=0.05)
    together = minimise(decay, START, measured, 0.02)
    for i in range(len(measured)):
        alone = minimise(decay, START[i : i + 1], measured[i : i + 1], 0.02)
        assert np.allclose(alone.parameters[0], together.parameters[i])


def test_a_scale_of_the_residuals_does_not_stop_it_early() -> None:
    # the trap of an absolute tolerance: residuals of 1e-6 have squares of 1e-12
    measured = problems(noise=0.05)

    def small(theta: Array, measured: Array) -> tuple[Array, Array]:
        r, j = decay(theta, measured)
        return 1e-6 * r, 1e-6 * j

    assert np.allclose(
        minimise(small, START, measured).parameters, minimise(decay, START, measured).parameters, atol=1e-6
    )
