"""Regret: what a law's choice costs.

    regret = L(lr, batch) / min L − 1        L(lr, batch): the measured grid of a basin, interpolated

A refit of other people's runs need not return their coefficients, and a wide basin forgives much: what counts is the loss. Between
cells the loss is linear in (ln lr, ln batch) on the triangles of Delaunay, which takes grids with holes; of the two ways to cut
a rectangle neither is better, and the mean of both counts. A choice outside of what was measured is moved to the nearest point
of it: what it costs is then not known, and `inside` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import Delaunay

from train.scaling.errors import ScalingError
from train.scaling.fits.basins import Basin
from train.scaling.fits.hyperparameters import Method, fit_hyperparameters
from train.scaling.fits.runs import Array
from train.scaling.law import PowerLaw, Variable

DIAGONALS = tuple(
    np.array([[1.0, 0.0], [shear, 1.0]]) for shear in (1e-3, -1e-3)
)  # a slight shear settles how rectangles are cut
EDGE = 1e-6  # of a triangle: rounding leaves points of an edge a little outside


@dataclass(frozen=True)
class Regret:
    """What a choice costs in one basin.

    Attributes:
        value: relative excess loss; below 0 where single runs were luckier than the mean of the best cell.
        inside: whether the choice lies in what was measured.
    """

    basin: Basin
    lr: float
    batch: float
    value: float
    inside: bool


def regret(basin: Basin, lr: float, batch: float) -> Regret:
    """Of one choice. A cell that diverged counts as the highest loss that did not.

    Raises:
        ScalingError: the cells lie on a line, so that there is nothing between them.
    """
    cells, choice = np.log(np.stack([basin.lr, basin.batch], axis=1)), np.log([lr, batch])
    loss = np.minimum(basin.loss, basin.loss[np.isfinite(basin.loss)].max())
    if np.linalg.matrix_rank(cells - cells.mean(0), tol=1e-3) < 2:
        raise ScalingError(
            f"{len(cells)} cells at {basin.label} = on a line: a regret is measured on a grid of lr × batch; "
            "add cells with another lr and another batch"
        )
    sides = [_interpolated(cells @ turn, loss, choice @ turn) for turn in DIAGONALS]
    value = float(np.mean([value for value, _ in sides]))
    return Regret(basin, lr, batch, value / basin.minimum[2] - 1, inside=all(inside for _, inside in sides))


def regrets(basins: Sequence[Basin], lr: PowerLaw, batch: PowerLaw) -> list[Regret]:
    """Of a law, basin by basin."""
    return [regret(basin, _value(lr, basin), _value(batch, basin)) for basin in basins]


def cross_validated(basins: Sequence[Basin], variables: Sequence[Variable], method: Method) -> list[Regret]:
    """Of our own fit, where each basin is predicted by the law of all others."""
    found = []
    for i, basin in enumerate(basins):
        fit = fit_hyperparameters([*basins[:i], *basins[i + 1 :]], variables, method=method, draws=0)
        found += regrets([basin], fit.lr, fit.batch)
    return found


def _value(law: PowerLaw, basin: Basin) -> float:
    sizes = {name: getattr(basin, name) for name in law.exponents}
    if lacking := [name for name, size in sizes.items() if size is None]:
        raise ScalingError(
            f"column {lacking[0]} = missing: the law is one of {' and '.join(law.exponents)}; name the column"
        )
    return float(law(**sizes))


def _interpolated(points: Array, values: Array, choice: Array) -> tuple[float, bool]:
    """The value at a choice [2] between points [P, 2], or at their nearest edge; and whether the choice is among them."""
    triangles = Delaunay(points)
    inside = bool(triangles.find_simplex(choice, tol=EDGE) >= 0)
    nearest = choice if inside else _nearest(points[triangles.convex_hull], choice)
    simplex = triangles.find_simplex(nearest, tol=EDGE)
    to_weights, origin = triangles.transform[simplex][:2], triangles.transform[simplex][2]
    weights = to_weights @ (nearest - origin)
    return float(np.append(weights, 1 - weights.sum()) @ values[triangles.simplices[simplex]]), inside


def _nearest(edges: Array, point: Array) -> Array:
    """The point of some segments [E, 2, 2] that is nearest to a point [2]."""
    start, way = edges[:, 0], edges[:, 1] - edges[:, 0]
    share = np.clip(np.sum((point - start) * way, axis=1) / np.sum(way**2, axis=1), 0, 1)
    candidates = start + share[:, None] * way
    return np.asarray(candidates[np.argmin(np.sum((candidates - point) ** 2, axis=1))])
