"""How often 95 % intervals contain the truth: laws fitted to made ladders whose laws are known.

    python benchmarks/coverage.py --repetitions 200 --json coverage.json

An experiment makes a ladder with noise of its own for each repetition, fits it as `rorqual scaling fit` does, and asks of every
coefficient whether its interval holds the truth. A share outside of 95 ± 4 %, which right intervals have in less than one of 100
experiments of 200 repetitions, ends the program with 1. Fits whose intervals are not said to hold are listed for comparison.

Here are L(N, D) and the allocation; the laws of learning rate and batch are in `coverage_hyper.py`, ladders
that choose their own cells in `coverage_ladder.py`.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from train.scaling.fits.bootstrap import percentile_interval
from train.scaling.fits.isoflop import fit_allocation, isoflop_rows
from train.scaling.fits.loss_law import Method, fit_loss, optimum
from train.scaling.fits.runs import Array, Runs
from train.scaling.law import LossLaw

LOW, HIGH = 0.91, 0.99  # of a share that is called right
CHINCHILLA = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al., arXiv 2404.10102
BEYOND = 10  # times the largest budget, where the forecast is asked


class Experiment(Protocol):
    """A kind of ladder and a fit of it."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    @property
    def claimed(self) -> bool:
        """Whether its intervals are said to hold."""

    def inside(self, seed: int) -> dict[str, bool]:
        """One repetition: for each coefficient, whether its interval holds the truth."""


@dataclass(frozen=True)
class Design:
    """Rows of sizes at several budgets, each row put around the optimum with an error of up to half a spacing.

    Attributes:
        first: C of the first budget; each next has `step` times as much.
        spacing: ratio of neighbouring sizes.
        noise: relative standard deviation of the loss.
        tails: "heavy": Student's with 4 degrees of freedom instead of normal noise, of the same standard deviation.
    """

    budgets: int
    sizes: int
    first: float
    step: float
    spacing: float
    noise: float
    tails: Literal["normal", "heavy"] = "normal"

    def __str__(self) -> str:
        reach = f"{self.budgets} budgets × {self.step:g} from {self.first:.0e}, {self.sizes} sizes × {self.spacing:g}"
        return f"{reach}, {self.tails} noise {100 * self.noise:g} %"

    @property
    def flops(self) -> Array:
        """[budgets] C."""
        return np.asarray(self.first * self.step ** np.arange(self.budgets))

    def runs(self, seed: int) -> Runs:
        """One ladder."""
        generator = np.random.default_rng(seed)
        steps = np.arange(self.sizes) - (self.sizes - 1) / 2
        offsets = generator.uniform(-0.5, 0.5, size=(self.budgets, 1))
        best = np.array([[optimum(CHINCHILLA, c).params] for c in self.flops])
        params = (best * self.spacing ** (steps + offsets)).ravel()
        flops = np.repeat(self.flops, self.sizes)
        normal = self.tails == "normal"
        draws = generator.normal(size=len(flops)) if normal else generator.standard_t(4, size=len(flops)) / 2**0.5
        loss = CHINCHILLA(params, flops / (6 * params)) * np.exp(self.noise * draws)
        return Runs.of(params=params, flops=flops, loss=loss)


@dataclass(frozen=True)
class LossExperiment:
    """L(N, D): the five coefficients, the exponent of the allocation and the best loss of ten times the largest budget."""

    design: Design
    method: Method
    claimed: bool = True

    @property
    def name(self) -> str:
        return f"L(N, D) by {self.method}: {self.design}"

    def inside(self, seed: int) -> dict[str, bool]:
        runs = self.design.runs(seed)
        assert runs.params is not None and runs.tokens is not None
        fit = fit_loss(runs.params, runs.tokens, runs.loss, method=self.method, draws=400, seed=seed)
        truth = {name: getattr(CHINCHILLA, name) for name in ("E", "A", "B", "alpha", "beta")} | {"a": exponent()}
        far = optimum(CHINCHILLA, BEYOND * self.design.flops[-1])
        forecast = fit.law.estimate(far.params, far.tokens)
        return {name: truth[name] in interval for name, interval in fit.intervals.items()} | {
            "forecast": far.loss in forecast
        }


@dataclass(frozen=True)
class AllocationExperiment:
    """IsoFLOP: the exponent of M over C and that of the best loss, and both laws at ten times the largest budget."""

    design: Design
    claimed: bool = True

    @property
    def name(self) -> str:
        return f"IsoFLOP: {self.design}"

    def inside(self, seed: int) -> dict[str, bool]:
        allocation = fit_allocation(isoflop_rows(self.design.runs(seed)), seed=seed)
        far = optimum(CHINCHILLA, BEYOND * self.design.flops[-1])
        slopes = percentile_interval(allocation.M.exponents["flops"], np.array(allocation.M.draws)[:, 1])
        found = {
            "a": exponent() in slopes,
            "M": 6 * far.params in allocation.M.estimate(flops=BEYOND * self.design.flops[-1]),
        }
        if best := allocation.best_loss:
            gammas = percentile_interval(best.gamma, np.array(best.draws)[:, 2])
            found["gamma"] = exponent() * CHINCHILLA.alpha in gammas
            found["forecast"] = far.loss in best.estimate(BEYOND * self.design.flops[-1])
        return found


def exponent() -> float:
    """a of M_opt = k·C^a, by the true law."""
    return CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta)


DESIGNS = (
    Design(budgets=5, sizes=5, first=1e15, step=2, spacing=1.6, noise=0.004),
    Design(budgets=6, sizes=7, first=1e18, step=4, spacing=1.6, noise=0.004),
    Design(budgets=9, sizes=8, first=1e17, step=3, spacing=1.5, noise=0.003),
    Design(budgets=6, sizes=5, first=1e17, step=3, spacing=1.6, noise=0.005, tails="heavy"),
)
METHODS: tuple[Method, ...] = ("vpnls", "huber")
EXPERIMENTS: tuple[Experiment, ...] = (
    *(LossExperiment(design, method) for design in DESIGNS for method in METHODS),
    *(AllocationExperiment(design) for design in DESIGNS[1:]),
)


def coverage(experiment: Experiment, repetitions: int) -> dict[str, float]:
    """The share of repetitions in which each coefficient's interval held the truth."""
    found = [experiment.inside(seed) for seed in range(repetitions)]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def misses(shares: Mapping[str, float]) -> list[str]:
    """Coefficients whose share is not 95 ± 4 %."""
    return [name for name, share in shares.items() if not LOW <= share <= HIGH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--only", default="", help="experiments with this in their name")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    from coverage_hyper import LADDERS
    from coverage_ladder import GROWN

    report = measure([*EXPERIMENTS, *LADDERS, *GROWN], arguments.repetitions, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(entry["outside"] for entry in report if entry["claimed"]))


def measure(experiments: Sequence[Experiment], repetitions: int, only: str = "") -> list[dict[str, object]]:
    """Run and print every experiment."""
    report: list[dict[str, object]] = []
    for experiment in experiments:
        if only not in experiment.name:
            continue
        started = time.perf_counter()
        shares = coverage(experiment, repetitions)
        seconds = time.perf_counter() - started
        outside = misses(shares)
        said = "" if experiment.claimed else "   (not claimed)"
        print(f"{experiment.name}   {seconds:.0f} s{said}")
        print(
            "    " + "   ".join(f"{name} {100 * share:.1f}{' !' * (name in outside)}" for name, share in shares.items())
        )
        sys.stdout.flush()
        entry = {"experiment": experiment.name, "claimed": experiment.claimed, "shares": shares, "outside": outside}
        report.append(entry | {"repetitions": repetitions, "seconds": round(seconds, 1)})
    return report


if __name__ == "__main__":
    main()
