"""Basins: the grids of learning rates × batches that were run at one size and one number of tokens.

The loss of a grid is a wide basin, and every cell within a band of its minimum is as good as the best one (DeepSeek LLM,
arXiv 2401.02954, §3.1):

    near-optimal:   loss ≤ (1 + max(0.25 %, 2 · noise)) · minimum        noise: relative sd of the loss over seeds

A basin says whether its band is covered: where a near-optimal cell has no measured cell beyond it in a direction, the true minimum
may lie outside. A run that diverged has an infinite loss. It is no part of the basin's bottom, but it covers its side.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.bootstrap import percentile_interval, residual_samples
from train.scaling.fits.runs import Array, Runs

Mask = NDArray[np.bool_]

SAME_SIZE = 1.02  # sizes and numbers of tokens of one basin: whole layers and steps make them differ a little
BAND = 0.0025  # of near-optimal losses over the minimum (DeepSeek LLM §3.1), where the noise is small
SAME_CELL = 1.01  # learning rates and batches of one cell: tables round them
CELLS = 4  # fewer different cells are no grid: an IsoFLOP row has one cell at each size
DRAWS = 400


@dataclass(frozen=True)
class Surface:
    """The quadratic form in (ln lr, ln batch) around the bottom of one basin.

    Attributes:
        lr, batch: where its minimum is.
        loss: the minimum.
        curvature: [2, 2] second derivatives of ln loss in (ln lr, ln batch).
    """

    lr: Estimate
    batch: Estimate
    loss: float
    curvature: Array


@dataclass(frozen=True)
class Basin:
    """The cells of one size and number of tokens.

    Attributes:
        flops, params, active, tokens: C, N, active N and D; None where the table does not have them.
        lr, batch, loss: [cells] the loss is the mean over the seeds of a cell, infinite where a run diverged.
        seeds: [cells] runs of the cell.
        band: of near-optimal losses, relative to the minimum.
        edges: "lr low", "lr high", "batch low", "batch high" where the band reaches the edge of what was measured.
        surface: None where the cells around the bottom are too few, or have no minimum among them.
    """

    flops: float
    params: float | None
    active: float | None
    tokens: float | None
    lr: Array
    batch: Array
    loss: Array
    seeds: Array
    band: float

    @cached_property
    def best(self) -> int:
        """The best cell."""
        return best_cell(self.loss, self.seeds, self.band)

    @cached_property
    def minimum(self) -> tuple[float, float, float]:
        """Learning rate, batch and loss of the best cell, as `best_cell` finds it."""
        best = self.best
        return float(self.lr[best]), float(self.batch[best]), float(self.loss[best])

    @cached_property
    def excess(self) -> Array:
        """[cells] loss over the minimum, less one; below 0 where a run was luckier than the mean of the best cell."""
        return np.asarray(self.loss / self.minimum[2] - 1)

    @cached_property
    def near(self) -> Mask:
        """[cells] the near-optimal ones."""
        return np.asarray(self.excess <= self.band)

    def bottom(self, least: int) -> Mask:
        """[cells] within twice the band of the minimum, and at least so many of the lowest.

        Farther out a basin is not quadratic: it rises steeply towards high learning rates and gently towards low ones.
        """
        finite = np.isfinite(self.loss)
        enough = np.sort(self.excess[finite])[min(least, finite.sum()) - 1]
        return np.asarray(self.excess <= max(2 * self.band, enough))

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Where the band is not covered."""
        found = []
        for name, along, across in (("lr", self.lr, self.batch), ("batch", self.batch, self.lr)):
            row = clusters(across, SAME_CELL)
            for side, sign in (("low", -1), ("high", 1)):
                reach = np.array([np.max(sign * along[row == r]) for r in row])  # the farthest cell of each cell's row
                if np.any(self.near & (sign * along >= reach)):
                    found.append(f"{name} {side}")
        return tuple(found)

    @cached_property
    def advice(self) -> str | None:
        """Which cells would cover the band; None where it is covered."""
        if not self.edges:
            return None
        values = {"lr": self.lr[self.near], "batch": self.batch[self.near]}
        wanted = []
        for edge in self.edges:
            name, side = edge.split()
            end = values[name].min() if side == "low" else values[name].max()
            wanted.append(f"{name} {'below' if side == 'low' else 'above'} {end:.4g}")
        return (
            f"{self.label}: the near-optimal band reaches the edge of what was measured; add runs with {', '.join(wanted)} "
            f"(best cell: lr {self.minimum[0]:.4g}, batch {self.minimum[1]:.4g})"
        )

    @cached_property
    def label(self) -> str:
        """Its size, as messages and tables name it."""
        named = (("C", self.flops), ("N", self.params), ("active", self.active), ("D", self.tokens))
        return ", ".join(f"{name} = {value:.3g}" for name, value in named if value is not None)

    @cached_property
    def surface(self) -> Surface | None:
        """Its own quadratic form, from its lowest cells alone."""
        return _surface(self)


def basins(runs: Runs, *, noise: float | None = None, band: float = BAND) -> list[Basin]:
    """The basins among some runs, the smallest budget first.

    Args:
        runs: with lr, batch, and flops or what gives them; runs of one size and number of tokens make a basin if they have at
            least 4 different cells, others are left out.
        noise: relative sd of the loss over seeds, as `seed_noise` finds it.
        band: of near-optimal losses, where the noise is small.

    Raises:
        ScalingError: a column is missing, there is no basin, or all runs of one diverged.
    """
    if runs.lr is None or runs.batch is None or runs.flops is None:
        lacking = [name for name in ("lr", "batch", "flops") if getattr(runs, name) is None]
        raise ScalingError(
            f"column {lacking[0]} = missing: a basin needs lr, batch and loss, and flops or params and tokens; name it"
        )
    groups = same_size(runs)
    width = near_optimal(noise, band)
    cells = together([groups, clusters(runs.lr, SAME_CELL), clusters(runs.batch, SAME_CELL)])
    grids = [g for g in np.unique(groups) if len(np.unique(cells[groups == g])) >= CELLS]
    if not grids:
        raise ScalingError(
            f"learning rates × batches = {len(np.unique(cells))} cells at {len(np.unique(groups))} sizes: none has a "
            f"grid of {CELLS}; add runs that differ in lr and batch alone"
        )
    found = [_basin(runs.take(groups == g), cells[groups == g], width) for g in grids]
    return sorted(found, key=lambda b: (b.flops, b.params or 0, b.tokens or 0))


def seed_noise(runs: Runs) -> float | None:
    """Relative sd of the loss over seeds, pooled over all cells that have several; None where none has.

    Runs that differ in nothing but the seed are one cell; s² = Σ (ln L − mean of the cell)² / Σ (n − 1).
    """
    columns = [c for c in (runs.params, runs.active, runs.flops, runs.tokens, runs.lr, runs.batch) if c is not None]
    finite = np.isfinite(runs.loss)
    if not columns or not finite.any():
        return None
    cell = together([clusters(column[finite], 1 + 1e-6) for column in columns])
    log = np.log(runs.loss[finite])
    count = np.bincount(cell)
    freedom = len(cell) - len(count)
    if freedom == 0:
        return None
    mean = np.bincount(cell, log) / count
    return float(np.sqrt(np.sum((log - mean[cell]) ** 2) / freedom))


def best_runs(runs: Runs) -> Runs:
    """The best cell of each size and number of tokens, with its seeds' mean loss; every run where no lr and batch are known."""
    if runs.lr is None or runs.batch is None or runs.tokens is None:
        return runs
    sizes, band = same_size(runs), near_optimal(seed_noise(runs))
    cells = together([sizes, clusters(runs.lr, SAME_CELL), clusters(runs.batch, SAME_CELL)])
    chosen, losses = [], []
    for size in np.unique(sizes):
        members = [np.flatnonzero(cells == cell) for cell in np.unique(cells[sizes == size])]
        means = np.array([runs.loss[one].mean() for one in members])
        best = best_cell(means, np.array([float(len(one)) for one in members]), band)
        chosen.append(members[best][0])
        losses.append(means[best])
    return replace(runs.take(chosen), loss=np.array(losses))


def best_cell(loss: Array, seeds: Array, band: float) -> int:
    """The lowest of the cells that were repeated most, among those within twice the band of the lowest of all.

    The lowest of many single runs is lucky, by 0.8 to 1.7 standard deviations of a run on made grids of 16 cells. Where such a
    cell is then repeated, its mean over three seeds is still 0.3 to 0.6 low. Without the run that selected it the mean is right on
    average but off by as much (0.70 to 0.72 root mean square, against 0.61 to 0.77), so that all seeds count.

    Args:
        loss: [cells] the mean over the seeds of each.
        seeds: [cells] how many.
        band: of near-optimal losses: a cell far above them was repeated for another reason.
    """
    near = loss <= loss.min() * (1 + 2 * band)
    most = np.where(near, seeds, 0).max()
    return int(np.argmin(np.where(near & (seeds == most), loss, np.inf)))


def near_optimal(noise: float | None, band: float = BAND) -> float:
    """How far above the minimum a loss may lie to be as good, relative to it."""
    return max(band, 2 * (noise or 0.0))


def same_size(runs: Runs) -> NDArray[np.int64]:
    """[R] a number for each size and number of tokens: N, active N and D as far as the table has them, and C where they do not do.

    Models of one N may use different parts of it. Each column is divided within the groups of those before it, so that what
    rounding makes of one size does not cut another in two.
    """
    columns = [column for column in (runs.params, runs.active, runs.tokens) if column is not None]
    if runs.tokens is None or len(columns) < 2:
        columns += [runs.flops] if runs.flops is not None else []
    groups = np.zeros(len(runs), dtype=np.int64)
    for column in columns:
        parts = np.zeros(len(runs), dtype=np.int64)
        for group in np.unique(groups):
            parts[groups == group] = clusters(column[groups == group], SAME_SIZE)
        groups = together([groups, parts])
    return groups


def clusters(values: Array, ratio: float) -> NDArray[np.int64]:
    """[R] a number for each value, the same for values that are within so small a ratio of the smallest of them."""
    distinct, place = np.unique(values, return_inverse=True)
    number, start = np.zeros(len(distinct), dtype=np.int64), distinct[0]
    for i, value in enumerate(distinct[1:], start=1):
        new = value > start * ratio
        start = value if new else start
        number[i] = number[i - 1] + new
    return np.asarray(number[place.ravel()])


def together(labels: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[R] a number for each combination of some labels [R]."""
    return np.asarray(np.unique(np.stack(labels, axis=1), axis=0, return_inverse=True)[1].ravel())


def quadratic(z: Array) -> Array:
    """[n, 2] → [n, 3]: the columns that H₁₁, H₁₂ and H₂₂ of ½ zᵀHz multiply."""
    return np.stack([z[:, 0] ** 2 / 2, z[:, 0] * z[:, 1], z[:, 1] ** 2 / 2], axis=1)


def hessian(parts: Array) -> Array:
    """[…, 3] H₁₁, H₁₂, H₂₂ → [..., 2, 2]."""
    return np.stack([parts[..., [0, 1]], parts[..., [1, 2]]], axis=-2)


def has_minimum(curvature: Array) -> Mask:
    """[…] whether a form [..., 2, 2] rises in every direction."""
    return np.asarray(np.linalg.eigvalsh(curvature)[..., 0] > 0)


def _basin(runs: Runs, cells: NDArray[np.int64], band: float) -> Basin:
    assert runs.flops is not None and runs.lr is not None and runs.batch is not None
    members = [cells == c for c in np.unique(cells)]
    loss = np.where(np.isfinite(runs.loss), runs.loss, np.inf)

    def size(column: Array | None) -> float | None:
        return None if column is None else float(np.exp(np.mean(np.log(column))))

    basin = Basin(
        flops=float(np.exp(np.mean(np.log(runs.flops)))),
        params=size(runs.params),
        active=size(runs.active),
        tokens=size(runs.tokens),
        lr=np.array([runs.lr[m].mean() for m in members]),
        batch=np.array([runs.batch[m].mean() for m in members]),
        loss=np.array([loss[m].mean() for m in members]),
        seeds=np.array([m.sum() for m in members], dtype=float),
        band=band,
    )
    if not np.isfinite(basin.loss).any():
        raise ScalingError(
            f"loss of all {len(members)} cells at {basin.label} = not finite: all runs diverged; "
            f"add runs with lr below {basin.lr.min():.4g}"
        )
    return basin


def _surface(basin: Basin) -> Surface | None:
    """ln L = c + gᵀz + ½ zᵀHz by least squares, z = (ln lr, ln batch) from their means; the minimum is at −H⁻¹g."""
    rows = basin.bottom(least=10)
    z = np.log(np.stack([basin.lr, basin.batch], axis=1)[rows])
    centre, log = z.mean(0), np.log(basin.loss[rows])
    weight = np.sqrt(basin.seeds[rows])
    design = np.concatenate([np.ones((len(z), 1)), z - centre, quadratic(z - centre)], axis=1) * weight[:, None]
    if len(z) < 8 or np.linalg.matrix_rank(design) < 6:
        return None
    solve = np.linalg.pinv(design)
    fitted = design @ (parameters := solve @ (log * weight))
    samples = residual_samples(fitted, log * weight - fitted, parameters=6, repetitions=DRAWS, seed=0) @ solve.T
    form = hessian(parameters[3:])
    if not has_minimum(form):
        return None
    bottom = -np.linalg.solve(form, parameters[1:3])
    low, high = (z - centre).min(0), (z - centre).max(0)
    if np.any(bottom < low) or np.any(bottom > high):
        return None
    drawn = samples[has_minimum(hessian(samples[:, 3:]))]
    minima = np.exp(centre - np.linalg.solve(hessian(drawn[:, 3:]), drawn[:, 1:3, None])[..., 0])
    lr, batch = (float(v) for v in np.exp(centre + bottom))
    certain = len(drawn) >= 0.95 * DRAWS  # else some other tables that might have been measured have no minimum at all
    return Surface(
        lr=percentile_interval(lr, minima[:, 0]) if certain else Estimate(lr),
        batch=percentile_interval(batch, minima[:, 1]) if certain else Estimate(batch),
        loss=float(np.exp(parameters[0] + parameters[1:3] @ bottom / 2)),
        curvature=form,
    )
