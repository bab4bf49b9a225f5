"""Many small robust least-squares problems at once: the fit of a form to every sample of a bootstrap.

Minimises the SUM over a sample's runs of Huber's function of the residual r,

    H(r) = r²/2 for |r| ≤ δ,  else δ·(|r| − δ/2)                            δ = ∞: least squares

by damped Newton steps with the analytic Jacobian J = ∂r/∂θ (Levenberg-Marquardt). Of two curvatures, each step takes the one that
comes lower: JᵀJ over the runs within δ, H's own, is fast near the minimum; JᵀWJ with W = min(1, δ/|r|) always goes down.

It stops when the sum falls by no more than a share of itself. A tolerance that is not relative stops early as soon as the sum
becomes a mean, which is what happened to the published fit of Hoffmann et al. (Besiroglu et al., arXiv 2404.10102).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from train.scaling.fits.runs import Array

Residuals = Callable[[Array, Array], tuple[Array, Array]]  # θ [R, P], measured [R, n] → r [R, n], J [R, n, P]

LONGEST = 3.0  # step in one parameter; parameters are logarithms, so a factor of 20
STILL = 4  # steps in a row without progress after which a problem is solved


class Solution(NamedTuple):
    """[R, P] the parameters of each problem, [R] the sums that they reach."""

    parameters: Array
    objective: Array


def huber(residuals: Array, delta: float) -> Array:
    """[…, n] → […]: the SUM of Huber's function."""
    size = np.abs(residuals)
    inside = np.minimum(size, delta)
    return np.asarray(np.sum(inside * (size - inside / 2), axis=-1))


def minimise(
    residuals: Residuals,
    start: Array,
    measured: Array,
    delta: float = np.inf,
    *,
    steps: int = 500,
    tolerance: float = 1e-10,
) -> Solution:
    """Solve R problems, each from its own start.

    Args:
        residuals: of the form to be fitted; parameters are best of the order of 1.
        start: [R, P].
        measured: [R, n] what each problem fits.
        delta: where Huber's function turns from square to straight.
        steps: at most.
        tolerance: share of the sum that is no progress.
    """
    theta = start.copy()
    r, j = residuals(theta, measured)
    reached = huber(r, delta)
    damping = np.full(len(theta), 1e-3)
    still = np.zeros(len(theta), dtype=int)
    for _ in range(steps):
        on = np.flatnonzero(still < STILL)
        if not len(on):
            break
        tried = [
            _step(residuals, theta[on], measured[on], r[on], j[on], weights, damping[on], delta)
            for weights in _curvatures(r[on], delta)
        ]
        best = np.argmin([value for *_, value in tried], axis=0)
        new, new_r, new_j, value = (np.stack(part)[best, np.arange(len(on))] for part in zip(*tried, strict=True))
        lower = value < reached[on]
        still[on] = np.where(reached[on] - value > tolerance * reached[on], 0, still[on] + 1)
        damping[on] = np.clip(damping[on] * np.where(lower, 0.2, 4.0), 1e-12, 1e8)
        to = on[lower]
        theta[to], r[to], j[to], reached[to] = new[lower], new_r[lower], new_j[lower], value[lower]
    return Solution(theta, reached)


def _curvatures(r: Array, delta: float) -> list[Array]:
    """[n] weights of the runs in JᵀWJ, by each of the two rules; without a δ they are one."""
    if np.isinf(delta):
        return [np.ones_like(r)]
    size = np.abs(r)
    return [delta / np.maximum(size, delta), (size <= delta).astype(float)]


def _step(
    residuals: Residuals,
    theta: Array,
    measured: Array,
    r: Array,
    j: Array,
    weights: Array,
    damping: Array,
    delta: float,
) -> tuple[Array, Array, Array, Array]:
    """Where one damped step leads: parameters, residuals, Jacobian and sum."""
    gradient = np.einsum("rnp,rn->rp", j, np.clip(r, -delta, delta))
    curvature = np.swapaxes(j * weights[..., None], 1, 2) @ j  # [R, P, P]
    diagonal = np.einsum("rpp->rp", curvature)
    ridge = damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300
    step = np.linalg.solve(curvature + ridge[:, :, None] * np.eye(theta.shape[1]), gradient[..., None])[..., 0]
    new = theta - np.clip(step, -LONGEST, LONGEST)
    with np.errstate(all="ignore"):  # a step too far overflows, and is not taken
        new_r, new_j = residuals(new, measured)
        value = huber(new_r, delta)
    return new, new_r, new_j, np.where(np.isfinite(value), value, np.inf)
