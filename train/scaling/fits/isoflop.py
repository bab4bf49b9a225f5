"""The best allocation of a budget, from rows of runs that spent the same C on models of different sizes (IsoFLOP).

    loss = L_opt + κ·(ln M − ln M_opt)²             a parabola for each row
    M_opt = k·C^a,   D_opt = C/M_opt = C^(1−a)/k    a line through the logarithms of the minima (DeepSeek LLM, eq. 4)
    L_opt = E + k/C^γ                               the best loss of a budget, from 4 budgets up

M_opt's interval is Fieller's: of the ratio of two coefficients that are both uncertain, exact for a parabola and normal noise, and
open where the curvature may as well be none. The noise is that of all rows together, relative to the loss: a row of five sizes
alone has two degrees of freedom. A parabola is the surface's shape only near the minimum: where α ≠ β, rows that reach far to
both sides put the minimum off by some per cent (arXiv 2603.22339); `loss_law` has no such error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import t

from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import SAME_CELL, SAME_SIZE, clusters, same_size, together
from train.scaling.fits.least_squares import minimise
from train.scaling.fits.runs import Array, Runs
from train.scaling.law import BestLoss, PowerLaw

SAME_BUDGET = 1.02  # of the runs of one row
SIZES = 3  # of a row, for a parabola
BUDGETS_OF_LOSS = 4  # for the three parameters of L_opt
GAMMAS = np.geomspace(0.01, 1.0, 40)  # where the search for γ begins
STEEPEST = 10.0  # γ that a draw may have; a greater one overflows
FAR = 50.0  # ln M beside a row where the turning point of a straight one is put
NO_NOISE = 1e-9  # relative sd of losses that lie on their parabolas to the last digit


@dataclass(frozen=True)
class IsoFlop:
    """One budget's row: S sizes, the smallest first, and the parabola through them.

    Attributes:
        flops: C.
        flops_per_token: [S] M.
        tokens: [S] D.
        loss: [S] of each size's best run.
        optimum: M of the parabola's turning point. Where `edge` is set it is no answer and has no interval.
        best_loss: at the turning point.
        curvature: κ, nats for a factor of e in M, squared.
        edge: on which side of the measured sizes the least loss lies; None where it is among them.
        noise: relative standard deviation of a loss, and the degrees of freedom that it is known from; None where nothing tells it.
    """

    flops: float
    flops_per_token: Array
    tokens: Array
    loss: Array
    optimum: Estimate
    best_loss: Estimate
    curvature: float
    edge: Literal["low", "high"] | None
    noise: tuple[float, float] | None

    @property
    def advice(self) -> str | None:
        """Which sizes would show the minimum; None where it shows."""
        if self.edge is None:
            return None
        side, end = ("below", self.flops_per_token[0]) if self.edge == "low" else ("above", self.flops_per_token[-1])
        return f"C = {self.flops:.3g}: the loss has no minimum among the sizes that were run; add runs with M {side} {end:.3g}"


def isoflop_rows(runs: Runs, *, noise: float | None = None) -> list[IsoFlop]:
    """The rows among some runs, the smallest budget first.

    A row is three or more sizes at one C, within 2 %. Runs of a size that differ in the seed alone count by their mean, of several
    learning rates or batches the best. Diverged runs are left out, and so are budgets of fewer sizes.

    Args:
        noise: relative standard deviation of the loss over seeds, where it is known. What the parabolas leave tells it too, and the
            greater of the two is used.

    Raises:
        ScalingError: a column is missing, all runs diverged, or no budget has three sizes.
    """
    if runs.flops is None or runs.tokens is None:
        lacking = "flops" if runs.flops is None else "tokens"
        raise ScalingError(
            f"column {lacking} = missing: IsoFLOP needs flops and tokens, or params and one of them; name it"
        )
    finite = runs.take(np.isfinite(runs.loss))
    if not len(finite):
        raise ScalingError(
            f"loss = no number in all {len(runs)} runs: they diverged; run them again with lower learning rates"
        )
    assert finite.flops is not None
    budget = clusters(finite.flops, SAME_BUDGET)
    found = [_Points.of(finite.take(budget == number)) for number in np.unique(budget)]
    rows = [points for points in found if len(points.loss) >= SIZES]
    if not rows:
        most = max(len(points.loss) for points in found)
        raise ScalingError(
            f"sizes = {most} at most in one budget: a parabola needs {SIZES} at the same C, within 2 %; "
            f"add {SIZES - most} or more to each budget"
        )
    known = _noise(rows, noise)
    return [_row(points, known) for points in rows]


@dataclass(frozen=True)
class Allocation:
    """How to spend a budget, by the rows whose minimum shows.

    Attributes:
        M: FLOPs per token over C.
        D: tokens over C.
        best_loss: over C; None from fewer than 4 budgets, or where the best loss does not fall with C.
    """

    M: PowerLaw
    D: PowerLaw
    best_loss: BestLoss | None


def fit_allocation(rows: Sequence[IsoFlop], *, draws: int = 400, seed: int = 0) -> Allocation:
    """The laws through the minima of rows, each weighted by how well its row tells it; rows with an edge are left out.

    Each draw fits parabolas and laws again, to losses with other noise. Where the minima lie farther from their line than the noise
    explains, the draws are spread by as much (Birge's ratio).

    Raises:
        ScalingError: fewer than two rows have their minimum among the sizes that were run.
    """
    inside = [row for row in rows if row.edge is None]
    if len(inside) < 2:
        advice = next((row.advice for row in rows if row.advice), "add runs of 3 sizes at another C")
        raise ScalingError(
            f"budgets = {len(inside)} with a minimum among their sizes: the allocation needs 2; {advice}"
        )
    known = inside[0].noise
    points = [_Points(row.flops, row.flops_per_token, row.tokens, row.loss) for row in inside]
    turns = [p.turn(p.fit(losses)) for p, losses in zip(points, _losses(points, known, draws, seed))]
    ln_c = np.log([row.flops for row in inside])
    minima = np.stack([turn.ln_m for turn in turns], axis=1)  # [1 + draws, rows]
    errors = np.array([p.error_of_minimum() for p in points])  # for a relative noise of 1
    lines = _lines(ln_c, minima, 1 / errors)  # [1 + draws, 2]  ln k, a
    if known:
        lines[1:] = lines[0] + _birge(ln_c, minima[0], lines[0], known[0] * errors) * (lines[1:] - lines[0])
    best = np.stack([turn.loss for turn in turns], axis=1)
    return Allocation(
        M=_power_law(lines),
        D=_power_law(np.stack([-lines[:, 0], 1 - lines[:, 1]], axis=1)),
        best_loss=_best_loss(ln_c, best) if len(inside) >= BUDGETS_OF_LOSS else None,
    )


class _Turn(NamedTuple):
    """[…] where parabolas turn, and their loss there."""

    ln_m: Array
    loss: Array


@dataclass(frozen=True)
class _Points:
    """One budget's sizes, and parabolas c₀ + c₁u + c₂u² through their losses, u = ln M − its mean."""

    flops: float
    flops_per_token: Array
    tokens: Array
    loss: Array

    @classmethod
    def of(cls, runs: Runs) -> "_Points":
        """The best loss of each M of one budget's runs; models of one M that differ in N are apart until the best is taken."""
        assert runs.flops is not None and runs.tokens is not None
        sizes = clusters(runs.flops_per_token, SAME_SIZE)
        settings = [clusters(column, SAME_CELL) for column in (runs.lr, runs.batch) if column is not None]
        cells = together([sizes, same_size(runs), *settings])
        among = np.mean if runs.seed is not None else np.min  # without seeds, runs of a cell may differ in anything
        loss = np.array([among(runs.loss[cells == cell]) for cell in range(cells.max() + 1)])
        best = [loss[np.unique(cells[sizes == size])].min() for size in np.unique(sizes)]
        m, d = (
            np.array([column[sizes == size].mean() for size in np.unique(sizes)])
            for column in (runs.flops_per_token, runs.tokens)
        )
        return cls(float(np.median(runs.flops)), m, d, np.array(best))

    @cached_property
    def u(self) -> Array:
        """[S]."""
        return np.asarray(np.log(self.flops_per_token) - np.log(self.flops_per_token).mean())

    @cached_property
    def design(self) -> Array:
        """[S, 3]."""
        return np.asarray(self.u[:, None] ** np.arange(3))

    @cached_property
    def covariance(self) -> Array:
        """[3, 3] of the coefficients, for a relative noise of 1."""
        return np.asarray(np.linalg.inv(self.design.T @ self.design) * self.loss.mean() ** 2)

    def fit(self, losses: Array) -> Array:
        """[…, S] losses → […, 3] coefficients."""
        return np.asarray(losses @ np.linalg.pinv(self.design).T)

    def turn(self, coefficients: Array) -> _Turn:
        """Of coefficients [..., 3]; a parabola without a minimum, or with a far one, is cut off a row's length outside the row."""
        c0, c1, c2 = np.moveaxis(coefficients, -1, 0)
        low, high = 2 * self.u[0] - self.u[-1], 2 * self.u[-1] - self.u[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c2 > 0, -c1 / (2 * c2), np.where(c1 < 0, high, low))
        at = np.clip(at, low, high)
        return _Turn(at + np.log(self.flops_per_token).mean(), c0 + c1 * at + c2 * at**2)

    def error_of_minimum(self) -> float:
        """Standard deviation of ln M_opt for a relative noise of 1, to first order."""
        _, c1, c2 = self.fit(self.loss)
        gradient = np.array([0, -1 / (2 * c2), c1 / (2 * c2**2)])
        return float(np.sqrt(gradient @ self.covariance @ gradient))


def _noise(rows: Sequence[_Points], seeds: float | None) -> tuple[float, float] | None:
    """Relative sd and degrees of freedom: what the parabolas leave, or the seeds' where that is more."""
    left = [(row.loss - row.design @ row.fit(row.loss)) / row.loss.mean() for row in rows]
    freedom = sum(len(r) - SIZES for r in left)
    parabolas = np.sqrt(sum(float(r @ r) for r in left) / freedom) if freedom else 0.0
    if seeds is not None:
        return max(seeds, parabolas, NO_NOISE), np.inf
    return (max(parabolas, NO_NOISE), float(freedom)) if freedom else None


def _row(points: _Points, noise: tuple[float, float] | None) -> IsoFlop:
    coefficients = points.fit(points.loss)
    c0, c1, c2 = (float(c) for c in coefficients)
    u = float(np.clip(-c1 / (2 * c2), -FAR, FAR)) if c2 else FAR
    if c2 <= 0:  # it bends the other way: the least loss is at the end that lies lower
        edge: Literal["low", "high"] | None = "high" if points.loss[-1] < points.loss[0] else "low"
    else:
        edge = "low" if u < points.u[0] else "high" if u > points.u[-1] else None
    middle = float(np.exp(np.log(points.flops_per_token).mean()))
    loss = c0 + c1 * u + c2 * u**2
    optimum, best = Estimate(float(middle * np.exp(u))), Estimate(loss)
    if noise and edge is None:
        deviation = noise[0] * t.ppf(0.975, noise[1])
        at = u ** np.arange(3)
        reach = deviation * np.sqrt(at @ points.covariance @ at)
        best = Estimate(loss, float(loss - reach), float(loss + reach))
        ends = _fieller(coefficients, deviation**2 * points.covariance)
        if ends:
            optimum = Estimate(optimum.value, middle * float(np.exp(ends[0])), middle * float(np.exp(ends[1])))
    return IsoFlop(points.flops, points.flops_per_token, points.tokens, points.loss, optimum, best, c2, edge, noise)


def _fieller(coefficients: Array, square: Array) -> tuple[float, float] | None:
    """The u at which the slope c₁ + 2c₂u may be none: its square is within its variance times the quantile's square.

    Args:
        square: [3, 3] covariance of the coefficients times the square of the quantile.
    """
    _, c1, c2 = coefficients
    leading = 4 * (c2**2 - square[2, 2])
    if leading <= 0:
        return None  # the curvature may be none: no u is ruled out on one side at least
    half = 2 * (c1 * c2 - square[1, 2])
    root = np.sqrt(max(half**2 - leading * (c1**2 - square[1, 1]), 0.0))
    low, high = np.clip([(-half - root) / leading, (-half + root) / leading], -FAR, FAR)
    return float(low), float(high)


def _losses(points: Sequence[_Points], noise: tuple[float, float] | None, draws: int, seed: int) -> list[Array]:
    """[1 + draws, S] for each row: its losses, then the parabola's with normal noise of a size as uncertain as it is known."""
    if noise is None:
        return [p.loss[None] for p in points]
    generator = np.random.default_rng(seed)
    deviation, freedom = noise
    scale = (
        np.ones((draws, 1)) if np.isinf(freedom) else np.sqrt(freedom / generator.chisquare(freedom, size=(draws, 1)))
    )
    samples = []
    for p in points:
        errors = deviation * scale * generator.normal(size=(draws, len(p.loss)))
        samples.append(np.concatenate([p.loss[None], p.design @ p.fit(p.loss) + p.loss.mean() * errors]))
    return samples


def _lines(x: Array, y: Array, weights: Array) -> Array:
    """[R, n] → [R, 2]: offset and slope of the weighted lines through n points."""
    design = np.stack([np.ones_like(x), x - x.mean()], axis=1) * weights[:, None]
    offset, slope = np.linalg.pinv(design) @ (y * weights).T
    return np.stack([offset - slope * x.mean(), slope], axis=1)


def _birge(x: Array, y: Array, line: Array, errors: Array) -> float:
    """By how much points lie farther from their line than their errors explain; 1 where they do not."""
    if len(x) < 3:
        return 1.0
    distances = (y - line[0] - line[1] * x) / errors
    return float(np.sqrt(max(1.0, distances @ distances / (len(x) - 2))))


def _power_law(lines: Array) -> PowerLaw:
    return PowerLaw(
        coefficient=float(np.exp(lines[0, 0])),
        exponents={"flops": float(lines[0, 1])},
        draws=tuple((float(ln_k), float(a)) for ln_k, a in lines[1:]),
    )


def _best_loss(ln_c: Array, losses: Array) -> BestLoss | None:
    """E + k/C^γ through the first of [1 + draws, n] losses, and through the others as its draws."""
    x = ln_c - ln_c.mean()
    projected = [
        nnls(np.stack([np.ones_like(x), np.exp(-gamma * x)], axis=1) / losses[0][:, None], np.ones_like(x))
        for gamma in GAMMAS
    ]
    best = int(np.argmin([left for _, left in projected]))
    (e, k), _ = projected[best]
    if k == 0:
        return None
    start = np.array([[np.log(max(e, 1e-3 * losses.min())), np.log(k), GAMMAS[best]]])
    measured = np.log(np.maximum(losses, losses[0].min() * 1e-3))

    def residuals(theta: Array, measured: Array) -> tuple[Array, Array]:
        terms = np.exp(
            np.stack(np.broadcast_arrays(theta[:, :1], theta[:, 1:2] - theta[:, 2:] * x), axis=-1)
        )  # [R, n, 2]
        value = terms.sum(axis=-1)
        shares = terms / value[..., None]
        return np.log(value) - measured, np.concatenate([shares, -shares[..., 1:] * x[:, None]], axis=-1)

    first = minimise(residuals, start, measured[:1]).parameters
    theta = np.concatenate([first, minimise(residuals, np.repeat(first, len(losses) - 1, 0), measured[1:]).parameters])
    gamma = np.clip(theta[:, 2], -STEEPEST, STEEPEST)
    rows = np.stack([np.exp(theta[:, 0]), np.exp(theta[:, 1] + gamma * ln_c.mean()), gamma], axis=1).tolist()
    return BestLoss(E=rows[0][0], k=rows[0][1], gamma=rows[0][2], draws=tuple(map(tuple, rows[1:])))
