"""Ladders whose laws are known: how often the intervals of learning rate and batch contain the truth.

A made ladder has budgets that each double the last, and at each a grid of cells a factor of two apart, 4 learning rates × 3 or 4
batches, put around the optimum with an error of up to half a spacing, as a real grid is. The loss of a cell is

    ln L = l + ½ uᵀHu + s · (u₁³ − ½ u₁²u₂ + u₂³) + noise · ε,        u = (ln lr, ln batch) − their laws,   ε standard normal

so that the minimum is on the laws whatever the skew s is. One factor of two off costs 0.5 %; on Step Law's grids, of larger models,
it is 0.3 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.scaling.fits.hyperparameters import Method, basins, fit_hyperparameters
from train.scaling.fits.runs import Runs
from train.scaling.law import PowerLaw, Variable

CURVATURE = np.array([[0.02, -0.008], [-0.008, 0.02]])
SPACING = 2.0


@dataclass(frozen=True)
class Ladder:
    """A made ladder, and the fit that is tried on it.

    Attributes:
        variables: of the laws. Of C, there are 5 budgets at one D/N; of N and D, 3 sizes × 3 numbers of tokens.
        batches: of a grid of 4 learning rates.
        noise: relative sd of the loss.
        skew: s, in ln loss.
        drift: by how many spacings the grids lie beside the optimum: below it at the smallest size, above it at the largest, as
            grids do that a law with a wrong exponent has placed.
        claimed: whether the intervals are said to hold.
    """

    variables: tuple[Variable, ...]
    method: Method
    batches: int = 4
    noise: float = 0.002
    skew: float = 0.0
    drift: float = 0.0
    claimed: bool = True

    @property
    def name(self) -> str:
        """What a table calls it."""
        fit = f"lr, batch of {', '.join(self.variables)}: {self.method}"
        extra = [f"{key} {value:g}" for key, value in (("skew", self.skew), ("drift", self.drift)) if value]
        return ", ".join([fit, f"4 × {self.batches} cells", f"noise {100 * self.noise:g} %", *extra])

    def laws(self) -> tuple[PowerLaw, PowerLaw]:
        """The truth: exponents of DeepSeek LLM and of Step Law, with coefficients that suit small models."""
        if self.variables == ("flops",):
            return PowerLaw(coefficient=0.1, exponents={"flops": -0.125}), PowerLaw(
                coefficient=0.5, exponents={"flops": 0.3271}
            )
        return (
            PowerLaw(coefficient=1.79, exponents={"params": -0.713, "tokens": 0.307}),
            PowerLaw(coefficient=0.58, exponents={"params": -0.1, "tokens": 0.571}),
        )

    def runs(self, seed: int) -> Runs:
        """Its table of runs."""
        generator = np.random.default_rng(seed)
        sizes = self._sizes()
        drifts = self.drift * np.linspace(-1, 1, len(sizes))
        tables = [self._grid(n, d, drift, generator) for (n, d), drift in zip(sizes, drifts)]
        columns = np.concatenate(tables, axis=1)
        return Runs.of(**dict(zip(("params", "tokens", "lr", "batch", "loss"), columns)))

    def inside(self, seed: int) -> dict[str, bool]:
        """Fit one ladder: for each coefficient, whether its 95 % interval contains the truth."""
        fit = fit_hyperparameters(
            basins(self.runs(seed), noise=self.noise), self.variables, method=self.method, seed=seed
        )
        truth = {
            f"{name} {key}": value
            for name, law in zip(("lr", "batch"), self.laws())
            for key, value in [("ln k", float(np.log(law.coefficient))), *law.exponents.items()]
        }
        return {name: truth[name] in interval for name, interval in fit.coefficients().items()}

    def _sizes(self) -> Sequence[tuple[float, float]]:
        if self.variables == ("flops",):
            return [(n, 20 * n) for n in np.sqrt(1e14 * 2.0 ** np.arange(5) / 120)]
        return [(n, ratio * n) for n in (1e6, 2e6, 4e6) for ratio in (10, 20, 40)]

    def _grid(self, n: float, d: float, drift: float, generator: np.random.Generator) -> np.ndarray:
        """[5, cells] N, D, lr, batch, loss."""
        best = np.log([float(law(params=n, tokens=d, flops=6 * n * d)) for law in self.laws()])
        middle = best + (drift + generator.uniform(-0.5, 0.5, size=2)) * np.log(SPACING)
        steps = [np.arange(count) - (count - 1) / 2 for count in (4, self.batches)]
        z = middle + np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 2) * np.log(SPACING)
        u = z - best
        skewed = self.skew * (u[:, 0] ** 3 - u[:, 0] ** 2 * u[:, 1] / 2 + u[:, 1] ** 3)
        log = (
            np.log(1.7 + 60 * n**-0.3)
            + np.sum(u @ CURVATURE * u, axis=1) / 2
            + skewed
            + self.noise * generator.normal(size=len(z))
        )
        return np.stack([np.full(len(z), n), np.full(len(z), d), *np.exp(z).T, np.exp(log)])


LADDERS = (
    Ladder(("flops",), "surface"),
    Ladder(("flops",), "surface", batches=3, noise=0.003),
    Ladder(("flops",), "surface", noise=0.001),
    Ladder(("flops",), "surface", noise=0.001, skew=0.003),
    Ladder(("flops",), "surface", drift=1.0),
    Ladder(("params", "tokens"), "surface", batches=3),
    Ladder(("flops",), "band", claimed=False),
    Ladder(("flops",), "band", noise=0.0005, claimed=False),
    Ladder(("flops",), "band", drift=1.0, claimed=False),
    Ladder(("flops",), "band", noise=0.0005, drift=1.0, claimed=False),
    Ladder(("params", "tokens"), "band", batches=3, claimed=False),
)
