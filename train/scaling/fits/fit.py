"""Everything that a table of runs can tell: hyper-parameters, allocation, loss, with intervals, and how far to trust them.

What is fitted follows from the columns: lr and batch give basins and laws of both; several sizes at equal compute give IsoFLOP
rows; sizes and tokens give L(N, D). Each is fitted by more than one method, and where two disagree by more than their intervals
the result says so. The hold-out leaves the largest budget away, fits the rest, and compares its forecast with what was measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.attempt import Attempt
from train.scaling.fits.basins import Basin, basins, best_runs, seed_noise
from train.scaling.fits.compare import FORMS, METHODS, allocated, choose, disagreements, in_proportion, trusted_loss
from train.scaling.fits.held_out import HoldOut, forecast_largest
from train.scaling.fits.hyperparameters import HyperFit, fit_hyperparameters
from train.scaling.fits.isoflop import Allocation, IsoFlop, fit_allocation, isoflop_rows
from train.scaling.fits.loss_law import LossFit, Size, drop_highest, fit_loss, outliers
from train.scaling.fits.runs import Array, Runs
from train.scaling.ladder.common import Common
from train.scaling.law import Family, Law

DRAWS = 400  # of each bootstrap
LossUnit = Literal["nats per token", "bits per byte"]


@dataclass(frozen=True)
class Fit:
    """What was fitted, by which methods.

    Attributes:
        runs: those that the fits have used.
        dropped: what was left out, in words.
        noise: relative sd of the loss over seeds; None where nothing was repeated.
        hyper: by method and form: "surface C", "surface N, D", "band C", "band N, D".
        losses: by method: "huber", "vpnls"; of the active N "huber active", "vpnls active", where that says something else.
        warnings: what could not be fitted, what is not covered, what disagrees.
    """

    runs: Runs
    dropped: list[str]
    noise: float | None
    basins: list[Basin]
    hyper: dict[str, HyperFit]
    rows: list[IsoFlop]
    allocation: Allocation | None
    losses: dict[str, LossFit]
    held_out: list[HoldOut]
    warnings: list[str]
    law: Law

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: each method with its objective, coefficients and intervals."""
        return {
            "runs": len(self.runs),
            "dropped": self.dropped,
            "noise": self.noise,
            "fits": list(self._fits()),
            "held_out": [_plain(held.__dict__) for held in self.held_out],
            "warnings": self.warnings,
            "law": self.law.model_dump(mode="json", exclude_none=True),
        }

    def _fits(self) -> Iterator[dict[str, Any]]:
        for method, fit in self.losses.items():
            form = f"L = E + A/N^alpha + B/D^beta, N = {fit.law.size}; a = beta/(alpha + beta)"
            yield {"what": "loss", "method": method, "form": form, "objective": fit.objective} | _table(fit.intervals)
        for name, hyper in self.hyper.items():
            form = "lr, batch = k · " + " · ".join(f"{v}^e" for v in hyper.variables)
            chosen = {"cells": hyper.cells, "residual": hyper.residual}
            yield {"what": "hyper-parameters", "method": name, "form": form, **chosen} | _table(hyper.coefficients())
        if self.allocation:
            form = "M, D = k · flops^e"
            yield {"what": "allocation", "method": "isoflop", "form": form} | _table(allocated(self.allocation))


def fit_runs(
    runs: Runs,
    *,
    name: str = "fit",
    source: str = "a table of runs",
    common: Common | None = None,
    loss_unit: LossUnit = "nats per token",
    highest: int = 0,
    without_outliers: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
    hold_out: bool = True,
) -> Fit:
    """Fit what the columns allow.

    Args:
        runs: at least a loss, and lr and batch with C, or two of N, D and C.
        name, source, common: of the law: what it is called, where its runs are from, what they have in common.
        loss_unit: what the runs' losses are in.
        highest: runs of the highest loss to leave out of the law of the loss, as Besiroglu et al. leave 5 out.
        without_outliers: leave runs out of it that lie more than 5 robust standard deviations off a first fit.
        draws, seed: of the bootstraps.
        hold_out: whether to forecast the largest budget from the others.

    Raises:
        ScalingError: nothing can be fitted; the line says what to add first.
    """
    finite = np.isfinite(runs.loss)
    if not finite.any():
        raise ScalingError(f"runs = {len(runs)}: all diverged; add runs with lower learning rates")
    dropped = [f"{(~finite).sum()} runs that diverged"] if not finite.all() else []
    attempt, noise = Attempt(), seed_noise(runs)
    found = (attempt("hyper-parameters", basins, runs, noise=noise) or []) if runs.lr is not None else []
    hyper = _fit_hyper(found, draws, seed, attempt)
    best = best_runs(runs.take(finite))
    rows = (attempt("IsoFLOP rows", isoflop_rows, best, noise=noise) or []) if best.tokens is not None else []
    allocation = attempt("allocation", fit_allocation, rows, draws=draws, seed=seed) if rows else None
    kept, left_out = _kept(best, highest, without_outliers)
    losses = _fit_losses(kept, draws, seed, attempt)
    if not (hyper or allocation or losses):
        problems = "; ".join(attempt.problems) or "name more columns"
        raise ScalingError(f"runs = {len(runs)}: nothing can be fitted; {problems}")
    refit = partial(_refit, draws=draws, seed=seed)
    held = forecast_largest(runs, found, refit, attempt) if hold_out else []
    law = _law(runs, found, hyper, allocation, losses, attempt)
    about = {"name": name, "source": source, "runs": len(runs), "loss_unit": loss_unit} | _provenance(common)
    law = law.model_copy(update=about)
    warnings = [*attempt.problems, *_uncovered(found, rows, hyper), *_far_off(losses)]
    warnings += disagreements(hyper, losses, allocation)
    return Fit(runs, dropped + left_out, noise, found, hyper, rows, allocation, losses, held, warnings, law)


def _kept(best: Runs, highest: int, without_outliers: bool) -> tuple[Runs, list[str]]:
    """The runs that the law of the loss is fitted to, and what is left out, in words."""
    left_out = []
    if highest:
        best = best.take(drop_highest(best.loss, highest))
        left_out.append(f"the {highest} highest losses, from the law of the loss")
    if without_outliers and best.params is not None and best.tokens is not None:
        off = outliers(fit_loss(best.params, best.tokens, best.loss).residuals)
        best = best.take(~off)
        left_out.append(f"{off.sum()} runs far off the law of the loss, from it")
    return best, left_out


def _uncovered(found: Sequence[Basin], rows: Sequence[IsoFlop], hyper: dict[str, HyperFit]) -> Iterator[str]:
    """Minima that were not surrounded, and what the fits say themselves."""
    edges = [basin.advice for basin in found if basin.advice]
    yield from edges
    yield from (row.advice for row in rows if row.advice)
    yield from (f"{name}: {said}" for name, fit in hyper.items() for said in fit.warnings if said not in edges)


def _far_off(losses: dict[str, LossFit]) -> Iterator[str]:
    """Runs that the law of the loss does not describe."""
    loss, _ = trusted_loss(losses)
    if loss is not None and (count := int(outliers(loss.residuals).sum())):
        yield (
            f"L(N, D): {count} runs lie more than 5 robust standard deviations off the law; look at them, or fit without them "
            "(--drop-outliers)"
        )


def _fit_hyper(found: Sequence[Basin], draws: int, seed: int, attempt: Attempt) -> dict[str, HyperFit]:
    hyper = {}
    sizes = np.array([(basin.params, basin.active) for basin in found], float).reshape(-1, 2)  # None is nan
    forms = [form for form in FORMS if form != "active, D" or not in_proportion(*sizes.T)]
    for method in METHODS if found else ():
        for form in forms:
            what = f"lr and batch by {method} in {form}"
            settings = {"method": method, "draws": draws, "seed": seed}
            fit = attempt(what, fit_hyperparameters, found, FORMS[form], **settings)
            if fit is not None:
                hyper[f"{method} {form}"] = fit
    return hyper


def _fit_losses(runs: Runs, draws: int, seed: int, attempt: Attempt) -> dict[str, LossFit]:
    """Of N by both methods, then of the active N where it says something else."""
    tokens, fits = runs.tokens, {}
    same = runs.params is not None and runs.active is not None and in_proportion(runs.params, runs.active)
    sizes: list[tuple[Size, str]] = [("params", ""), ("active", " active")]
    for size, suffix in sizes[: 1 if same else 2]:
        column = getattr(runs, size)
        for method in ("huber", "vpnls") if column is not None and tokens is not None else ():
            what, settings = (
                f"L(N, D) by {method}{suffix}",
                {"method": method, "size": size, "draws": draws, "seed": seed},
            )
            fit = attempt(what, fit_loss, column, tokens, runs.loss, **settings)
            if fit is not None:
                fits[f"{method}{suffix}"] = fit
    return fits


def _law(
    runs: Runs,
    found: Sequence[Basin],
    hyper: dict[str, HyperFit],
    allocation: Allocation | None,
    losses: dict[str, LossFit],
    attempt: Attempt,
) -> Law:
    """The law of the methods that are trusted most: surface before band, huber before vpnls."""
    chosen, why = choose(found, hyper, attempt)
    if allocation is not None and not _is_told(allocation):
        attempt.problems.append(
            "allocation: the exponent of size in C is not known to lie between 0 and 1, so that the law leaves it to L(N, D); "
            "add budgets that are farther apart, or more sizes of each"
        )
        allocation = None
    loss, which = trusted_loss(losses)
    ranges = {name: getattr(runs, name) for name in ("flops", "params", "active", "tokens")}
    if found:
        ranges |= {"lr": runs.lr, "batch": runs.batch}
    return Law(
        name="fit",
        source="",
        compute=runs.compute,
        lr=chosen.lr if chosen else None,
        batch_tokens=chosen.batch if chosen else None,
        flops_per_token=allocation.M if allocation else None,
        tokens=allocation.D if allocation else None,
        best_loss=allocation.best_loss if allocation else None,
        loss=loss.law if loss else None,
        notes={what: words for what, words in (("lr, batch", why), ("loss", which)) if words},
        measured={name: (float(c.min()), float(c.max())) for name, c in ranges.items() if c is not None},  # type: ignore[misc]
    )


def _is_told(allocation: Allocation) -> bool:
    """Whether the rows tell an allocation at all: more compute is for larger models and for more tokens."""
    exponent = allocated(allocation)["M flops"]
    return exponent.low is None or exponent.high is None or (exponent.low > 0 and exponent.high < 1)


def _refit(runs: Runs, draws: int, seed: int) -> tuple[Law, Array | None]:
    """The law of some of the runs, and the residuals of its loss."""
    fit = fit_runs(runs, draws=draws, seed=seed, hold_out=False)
    trusted, _ = trusted_loss(fit.losses)
    return fit.law, trusted.residuals if trusted else None


def _provenance(common: Common | None) -> dict[str, Any]:
    if common is None:
        return {}
    return {
        "data": "; ".join(common.data),
        "tokenizer": common.tokenizer,
        "family": Family(recipe=common.recipe, warmup_tokens=common.warmup_tokens),
    }


def _table(coefficients: dict[str, Estimate]) -> dict[str, Any]:
    return {"coefficients": {name: _plain(estimate.__dict__) for name, estimate in coefficients.items()}}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _plain(value.__dict__) if isinstance(value, Estimate) else value for key, value in values.items()}
