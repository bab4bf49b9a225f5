"""A ladder that chooses its own cells: how often the intervals of everything that is fitted to it contain the truth.

The losses are made, on a surface whose laws are known; which cells are run is decided by `train.scaling.ladder.wanted`, as for real
runs: grids grow around what happens to be low, the lowest single run is repeated, and rows are run at its learning rate and batch.
What that chooses by luck is in the intervals' coverage here, and in no other experiment. Those of learning rate and batch hold the
truth as often as they say; that of the loss at ten times the largest budget in 92 of 100 ladders of 0.1 % noise, in 83 of 0.2 %.

    ln L = ln L(N, D) + ½ uᵀHu + noise · ε,        u = (ln lr, ln batch) − their laws in C,   ε standard normal
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.scaling.fits.fit import fit_runs
from train.scaling.fits.loss_law import optimum
from train.scaling.fits.runs import Runs
from train.scaling.ladder.ladder import Ladder
from train.scaling.ladder.wanted import Cell, wanted
from train.scaling.law import LossLaw, PowerLaw

LENGTH = 128  # tokens of a sequence
LAYERS = 4
LOSS = LossLaw(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
LR = PowerLaw(coefficient=0.3, exponents={"flops": -0.12})
BATCH = PowerLaw(coefficient=0.3, exponents={"flops": 0.33})
LAWS = {"lr": LR, "batch": BATCH}
CURVATURE = np.array([[0.02, -0.008], [-0.008, 0.02]])


@dataclass(frozen=True)
class GrownLadder:
    """Budgets that each double the last, grids of 3 × 3 that grow, rows of 5 widths, 3 seeds of the best cell."""

    what: Literal["lr, batch", "loss"]
    budgets: int = 5
    noise: float = 0.002
    draws: int = 400
    claimed: bool = True

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.what} of a ladder that grows: {self.budgets} budgets, noise {100 * self.noise:g} %"

    def ladder(self) -> Ladder:
        """Its file."""
        budgets = [1e15 * 2.0**k for k in range(self.budgets)]
        lr, batch = float(LR(flops=budgets[2])), LENGTH * round(float(BATCH(flops=budgets[2])) / LENGTH)
        row = [round(64 * 1.25**k / 8) * 8 for k in range(14)]
        grid = {
            "widths": [min(row, key=lambda w: abs(size_of(w) - optimum(LOSS, c).params)) for c in budgets],
            "lr": [lr / 2, lr, 2 * lr],
            "batch_tokens": [batch // 2, batch, 2 * batch],
            "max_cells": 25,
        }
        return Ladder.model_validate(
            {
                "recipe": "made",
                "budgets": budgets,
                "hyperparameters": grid,
                "allocation": {"widths": row},
                "dir": "made",
            }
        )

    def runs(self, seed: int) -> Runs:
        """All that it asks for, run."""
        generator, ladder = np.random.default_rng(seed), self.ladder()
        losses: dict[Cell, float] = {}
        while new := [cell for cell in wanted(ladder, losses, LENGTH) if cell not in losses]:
            for cell in new:
                losses[cell] = true_loss(cell) * float(np.exp(self.noise * generator.normal()))
        cells = [(c.budget, size_of(c.width), c.lr, c.batch_tokens, c.seed, loss) for c, loss in losses.items()]
        return Runs.of(**dict(zip(("flops", "params", "lr", "batch", "seed", "loss"), zip(*cells))))

    def inside(self, seed: int) -> dict[str, bool]:
        """Fit one ladder: for each coefficient, whether its 95 % interval contains the truth."""
        fit = fit_runs(self.runs(seed), draws=self.draws, seed=seed, hold_out=False)
        far = 10 * self.ladder().budgets[-1]
        if self.what == "loss":
            best = optimum(LOSS, far)
            assert fit.law.loss is not None
            return {"at 10 C": best.loss in fit.law.loss.estimate(best.params, best.tokens)}
        hyper = fit.hyper["surface C"]
        coefficients = hyper.coefficients()
        slopes = {
            f"{name} flops": law.exponents["flops"] in coefficients[f"{name} flops"] for name, law in LAWS.items()
        }
        values = {
            f"{name} at 10 C": float(law(flops=far)) in fitted.estimate(flops=far)
            for (name, law), fitted in zip(LAWS.items(), (hyper.lr, hyper.batch))
        }
        return slopes | values


def size_of(width: int) -> float:
    """N of a model of so many channels."""
    return 12.0 * LAYERS * width**2


def true_loss(cell: Cell) -> float:
    """The loss of a run without noise."""
    n = size_of(cell.width)
    best = [float(law(flops=cell.budget)) for law in LAWS.values()]
    u = np.log([cell.lr, cell.batch_tokens]) - np.log(best)
    return float(LOSS(n, cell.budget / (6 * n)) * np.exp(u @ CURVATURE @ u / 2))


GROWN = (
    GrownLadder("lr, batch", noise=0.001),
    GrownLadder("lr, batch"),
    GrownLadder("loss", noise=0.001, claimed=False),
    GrownLadder("loss", claimed=False),
)
