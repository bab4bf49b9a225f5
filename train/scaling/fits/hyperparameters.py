"""Learning rate and batch as power laws of a run's size, fitted to basins.

    lr* = k · Π x^e,   B* = k' · Π x^e'        x: C; or N and D, with N of all experts or of the active ones

"surface": quadratic forms in z = (ln lr, ln B) with one curvature H that all basins share,

    ln L = l + ½ (z − m)ᵀ H (z − m)  =  c + gᵀz + ½ zᵀHz,        m = −H⁻¹g

c and g are each basin's own. This is linear in c, g and H: least squares without a start, and its residual bootstrap is a product
of matrices. The minima m then lie on the laws, straight lines in ln x. Only the bottom of each basin takes part: cells within
twice the near-optimal band, and at least the 9 lowest. What biases it: a basin that rises faster on one side than on the other,
the more the farther up its cells lie, and basins whose curvatures differ; both show in a `residual` above the noise. Choosing
cells by their noisy losses favours lucky ones; `benchmarks/coverage.py` finds that harmless: on ladders with known laws the
intervals contain the truth as often as they say. Minima that scatter about the lines by more than their own errors show that the
laws are no power laws of x: a warning says so, and the draws have the scatter added.

"band": DeepSeek LLM (arXiv 2401.02954, §3.1). A straight line through ln lr, and one through ln B, of every near-optimal cell of
every basin, each cell alike. What biases it: it knows where cells were put, not how the loss falls between them. A band that the
grid cuts off pulls the law inwards, a band with more cells on one side pulls it there, and a basin with a wide band counts more.
Where cells are a factor of two apart the band holds few of them, and luck decides which. Its intervals come from cells drawn with
replacement within each basin. On ladders with known laws they are about three times as wide as they need be, and contain the
truth always; the error itself is between the surface's and several times that (`benchmarks/coverage.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import f as f_distribution

from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.basins import Basin, basins, has_minimum, hessian, quadratic, seed_noise
from train.scaling.fits.bootstrap import percentile_interval, quantile, resample, residual_samples
from train.scaling.fits.runs import Array
from train.scaling.law import PowerLaw, Variable

__all__ = ["Basin", "HyperFit", "Method", "basins", "fit_hyperparameters", "seed_noise"]

Method = Literal["band", "surface"]

LEAST = 9  # cells of each basin for the surface: a 3 × 3 neighbourhood
SPREAD = 0.1  # sd of ln x in the direction in which basins differ least; below it exponents are noise


@dataclass(frozen=True)
class HyperFit:
    """Laws of the learning rate and of the batch.

    Attributes:
        lr, batch: the laws with their bootstrap's draws; batch in tokens.
        minima: learning rate and batch of each basin's minimum, as the surface finds it; None for the band.
        cells: how many the fit has used.
        residual: surface: sd of the relative loss around the form; above the noise where the form does not describe the basins.
        warnings: sentences; what to add where a minimum is not covered.
    """

    method: Method
    variables: tuple[Variable, ...]
    lr: PowerLaw
    batch: PowerLaw
    minima: tuple[tuple[Estimate, Estimate], ...] | None
    cells: int
    residual: float | None
    warnings: tuple[str, ...]

    def coefficients(self) -> dict[str, Estimate]:
        """Every ln k and exponent with its 95 % interval: "lr ln k", "lr flops", …, "batch ln k", …"""
        found = {}
        for name, law in (("lr", self.lr), ("batch", self.batch)):
            values = [("ln k", float(np.log(law.coefficient))), *law.exponents.items()]
            for i, (key, value) in enumerate(values):
                draws = [draw[i] for draw in law.draws]
                found[f"{name} {key}"] = percentile_interval(value, draws) if draws else Estimate(value)
        return found


def fit_hyperparameters(
    basins: Sequence[Basin], variables: Sequence[Variable], *, method: Method, draws: int = 400, seed: int = 0
) -> HyperFit:
    """Fit both laws.

    Args:
        basins: of `train.scaling.fits.basins.basins`.
        variables: ("flops",), ("params", "tokens") or ("active", "tokens").
        draws: of the bootstrap.

    Raises:
        ScalingError: basins lack a variable, or are too few or too alike to tell its exponent; the runs have no minimum.
    """
    x = _variables(basins, variables)
    centre = x.mean(0)
    powers = np.concatenate([np.ones((len(x), 1)), x - centre], axis=1)  # [basins, 1 + v]
    warnings = [b.advice for b in basins if b.advice]
    minima, residual = None, None
    if method == "band":
        laws, cells = _band(basins, powers, draws, seed)
    else:
        bottom = _minima(basins, draws, seed)
        laws, cells, residual = bottom.points @ np.linalg.pinv(powers).T, bottom.cells, bottom.residual
        minima = tuple((_estimate(lr), _estimate(batch)) for lr, batch in bottom.points.transpose(2, 1, 0))
        warnings += _scatter(laws, bottom, powers, seed)
        if (lost := draws + 1 - len(laws)) > 0.025 * draws:
            warnings.append(
                f"{lost} of {draws} bootstrap samples have no minimum: the intervals are too narrow; add cells around the best ones"
            )
    laws[:, :, 0] -= laws[:, :, 1:] @ centre  # ln k at x = 1
    lr, batch = (_power_law(laws[:, i], variables) for i in (0, 1))
    return HyperFit(method, tuple(variables), lr, batch, minima, cells, residual, tuple(warnings))


def _variables(basins: Sequence[Basin], variables: Sequence[Variable]) -> Array:
    """[basins, variables] their logarithms."""
    for name in variables:
        if any(getattr(b, name) is None for b in basins):
            raise ScalingError(
                f"column {name} = missing: a law in {' and '.join(variables)} needs it; name the column, or fit in flops"
            )
    x = np.log(
        np.array([[getattr(b, name) for name in variables] for b in basins], dtype=float).reshape(-1, len(variables))
    )
    needed = len(variables) + 1
    if len(x) < needed:
        raise ScalingError(
            f"basins = {len(x)}: a law in {' and '.join(variables)} needs at least {needed}; add a grid of lr × batch at another "
            + ("budget" if len(variables) == 1 else "size and number of tokens")
        )
    _, spread, directions = np.linalg.svd((x - x.mean(0)) / np.sqrt(len(x)), full_matrices=False)
    if spread[-1] < SPREAD:
        if len(variables) == 1:
            raise ScalingError(
                f"{variables[0]} = {np.exp(x.min()):.3g} … {np.exp(x.max()):.3g} in {len(x)} basins: one budget cannot tell an "
                "exponent; add a grid of lr × batch at twice the budget or more"
            )
        powers = directions[-1] / directions[-1][np.argmax(np.abs(directions[-1]))]
        terms = [(name, power) for name, power in zip(variables, powers) if abs(power) > 0.05]
        fixed = " · ".join(name if power == 1 else f"{name}^{power:.2g}" for name, power in terms)
        raise ScalingError(
            f"{', '.join(variables)} = hardly any change of {fixed} in {len(x)} basins: their exponents cannot be told "
            "apart; add a grid of lr × batch with another ratio of tokens to parameters, or fit in flops"
        )
    return x


def _band(basins: Sequence[Basin], powers: Array, draws: int, seed: int) -> tuple[Array, int]:
    """[1 + draws, 2, 1 + v] (value at the centre, exponents) of lr and batch: least squares over near-optimal cells.

    A draw takes as many cells from each basin as it has, finds their minimum and band anew, and counts a cell as often as it was
    drawn.
    """
    normal, moment, cells = 0.0, 0.0, 0
    for i, basin in enumerate(basins):
        finite = np.isfinite(basin.loss)
        z = np.log(np.stack([basin.lr, basin.batch], axis=1)[finite])
        loss, n = basin.loss[finite], int(finite.sum())
        drawn = (
            resample(n, draws, seed + 7919 * i) + n * np.arange(draws)[:, None]
        )  # each draw counts in a row of its own
        counts = np.concatenate([np.ones((1, n)), np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)])
        lowest = np.where(counts > 0, loss, np.inf).min(1, keepdims=True)
        weight = counts * (loss <= lowest * (1 + basin.band))  # [1 + draws, cells]
        normal = normal + weight.sum(1)[:, None, None] * np.outer(powers[i], powers[i])
        moment = moment + (weight @ z)[:, None, :] * powers[i][:, None]
        cells += int(basin.near.sum())
    return np.linalg.solve(np.asarray(normal), np.asarray(moment)).swapaxes(1, 2), cells


@dataclass(frozen=True)
class _Minima:
    """Minima of all basins under one curvature.

    Attributes:
        points: [1 + draws or fewer, 2, basins] of (ln lr, ln batch); the first is the fit's, the others those of its bootstrap.
        cells: n; freedom: n − p.
    """

    points: Array
    cells: int
    freedom: int
    residual: float


def _minima(basins: Sequence[Basin], draws: int, seed: int) -> _Minima:
    bottoms = [b.bottom(LEAST) for b in basins]
    of = np.eye(len(basins))[np.repeat(np.arange(len(basins)), [int(rows.sum()) for rows in bottoms])]  # [n, basins]
    lr, batch, loss, seeds = (
        np.concatenate([getattr(b, name)[rows] for b, rows in zip(basins, bottoms)])
        for name in ("lr", "batch", "loss", "seeds")
    )
    z = np.log(np.stack([lr, batch], axis=1))
    centre = z.mean(0)
    z = z - centre
    weight = np.sqrt(seeds)  # the mean over seeds is that much better known
    design = np.concatenate([quadratic(z), of, of * z[:, :1], of * z[:, 1:]], axis=1) * weight[:, None]
    n, p = design.shape
    if n < p + 2 or np.linalg.matrix_rank(design) < p:
        raise ScalingError(
            f"cells = {n} around the minima of {len(basins)} basins: too few, or too few different lr and batch, for {p} "
            "parameters; add cells on both sides of the best ones, in lr and in batch"
        )
    solve = np.linalg.pinv(design)
    measured = np.log(loss) * weight
    parameters = solve @ measured
    fitted = design @ parameters
    table = np.concatenate([parameters[None], residual_samples(fitted, measured - fitted, p, draws, seed) @ solve.T])
    curvature, slopes = hessian(table[:, :3]), table[:, 3 + len(basins) :].reshape(len(table), 2, len(basins))
    rises = has_minimum(curvature)
    if not rises[0]:
        edges = [b.advice for b in basins if b.advice] or [
            "add cells on both sides of the best ones, in lr and in batch"
        ]
        raise ScalingError(
            f"minimum of {len(basins)} basins = none: the fitted loss falls in some direction; {edges[0]}"
        )
    points = centre[:, None] - np.linalg.solve(curvature[rises], slopes[rises])
    return _Minima(points, n, n - p, float(np.sqrt(np.sum((measured - fitted) ** 2) / (n - p))))


def _scatter(laws: Array, bottom: _Minima, powers: Array, seed: int) -> list[str]:
    """Add to the laws' draws what the minima scatter beyond their own errors, where an F test at 5 % finds that they do."""
    freedom, draws = len(powers) - powers.shape[1], len(laws) - 1
    if freedom == 0 or draws == 0:
        return []
    off = bottom.points - laws @ powers.T  # [1 + draws, 2, basins] minima from their line
    own = (
        np.mean(np.sum((off[1:] - off[0]) ** 2, axis=2), axis=0) / freedom
    )  # [2] variance that the noise of the losses gives
    found = np.sum(off[0] ** 2, axis=1) / freedom
    generator, warnings = np.random.default_rng(seed), []
    for i, name in enumerate(("lr", "batch")):
        if found[i] > own[i] * f_distribution.ppf(0.95, freedom, bottom.freedom):
            scale = np.sqrt((found[i] - own[i]) * freedom / generator.chisquare(freedom, size=(draws, 1)))
            laws[1:, i] += (scale * generator.normal(size=(draws, len(powers)))) @ np.linalg.pinv(powers).T
            by, noise = (100 * np.expm1(np.sqrt(variance[i])) for variance in (found, own))
            warnings.append(
                f"best {name} of {len(powers)} basins scatters by {by:.0f} % about its power law, {noise:.0f} % is noise: "
                "intervals are widened; the law lacks a variable, or the basins are no quadratic forms where their cells lie"
            )
    return warnings


def _estimate(logs: Array) -> Estimate:
    """e to the first of some numbers, with the interval of the others."""
    value = float(np.exp(logs[0]))
    return Estimate(value, *np.exp(quantile(logs[1:], [0.025, 0.975])).tolist()) if len(logs) > 1 else Estimate(value)


def _power_law(rows: Array, variables: Sequence[Variable]) -> PowerLaw:
    """The first of the rows (ln k, exponents) is the law, the others its draws."""
    return PowerLaw(
        coefficient=float(np.exp(rows[0, 0])),
        exponents=dict(zip(variables, rows[0, 1:].tolist())),
        draws=tuple(tuple(row) for row in rows[1:].tolist()),
    )
