"""Everything that a table of runs can tell: hyper-parameters, allocation, loss, with intervals, and how far to trust them.

What is fitted follows from the columns: lr and batch give basins and laws of both; several sizes at equal compute give IsoFLOP
rows; sizes and tokens give L(N, D). Each is fitted by more than one method, and where two disagree by more than their intervals
the result says so. The hold-out leaves the largest budget away, fits the rest, and compares its forecast with what was measured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from train.scaling.basins import Basin, basins, clusters, seed_noise
from train.scaling.bootstrap import percentile_interval
from train.scaling.common import Common
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.hyperparameters import HyperFit, Method, fit_hyperparameters
from train.scaling.isoflop import Allocation, IsoFlop, fit_allocation, isoflop_rows
from train.scaling.law import Family, Law, PowerLaw, Variable
from train.scaling.loss_law import LossFit, drop_highest, fit_loss
from train.scaling.regret import cross_validated, regret
from train.scaling.runs import Array, Runs

T = TypeVar("T")

DRAWS = 400  # of each bootstrap
FORMS: dict[str, tuple[Variable, ...]] = {"C": ("flops",), "N, D": ("params", "tokens")}
METHODS: tuple[Method, ...] = ("surface", "band")
SAME = 1.02  # sizes, budgets and tokens within this ratio are one: runs end with a whole batch


@dataclass(frozen=True)
class HoldOut:
    """The largest budget, forecast by a fit that has not seen it.

    Attributes:
        flops: its C.
        loss: forecast for its best run's N and D, with the noise of a run; None where the rest gives no law of the loss.
        lr, batch: forecast for it; None where the rest gives no law of them.
        measured_loss, measured_lr, measured_batch: of its best cell.
        regret: what the forecast lr and batch cost there, relative; None where there is no grid.
    """

    flops: float
    loss: Estimate | None
    measured_loss: float
    lr: Estimate | None = None
    batch: Estimate | None = None
    measured_lr: float | None = None
    measured_batch: float | None = None
    regret: float | None = None


@dataclass(frozen=True)
class Fit:
    """What was fitted, by which methods.

    Attributes:
        runs: those that the fits have used.
        dropped: what was left out, in words.
        noise: relative sd of the loss over seeds; None where nothing was repeated.
        hyper: by method and form: "surface C", "surface N, D", "band C", "band N, D".
        losses: by method: "huber", "vpnls".
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
            yield {"what": "allocation", "method": "isoflop", "form": form} | _table(_allocated(self.allocation))


def fit_runs(
    runs: Runs,
    *,
    name: str = "fit",
    source: str = "a table of runs",
    common: Common | None = None,
    highest: int = 0,
    draws: int = DRAWS,
    seed: int = 0,
    hold_out: bool = True,
) -> Fit:
    """Fit what the columns allow.

    Args:
        runs: at least a loss, and lr and batch with C, or two of N, D and C.
        name, source, common: of the law: what it is called, where its runs are from, what they have in common.
        highest: runs of the highest loss to leave out of the law of the loss, as Besiroglu et al. leave 5 out.
        draws, seed: of the bootstraps.
        hold_out: whether to forecast the largest budget from the others.

    Raises:
        ScalingError: nothing can be fitted; the line says what to add first.
    """
    finite = np.isfinite(runs.loss)
    if not finite.any():
        raise ScalingError(f"runs = {len(runs)}: all diverged; add runs with lower learning rates")
    dropped = [f"{(~finite).sum()} runs diverged"] if not finite.all() else []
    problems: list[str] = []
    attempt = _Attempt(problems)
    noise = seed_noise(runs)
    found = attempt("hyper-parameters", basins, runs, noise=noise) if runs.lr is not None else None
    hyper = _fit_hyper(found or [], draws, seed, attempt)
    best = best_runs(runs.take(finite))
    rows = (attempt("IsoFLOP rows", isoflop_rows, best, noise=noise) or []) if best.tokens is not None else []
    allocation = attempt("allocation", fit_allocation, rows, draws=draws, seed=seed) if rows else None
    kept = best
    if highest:
        kept = best.take(drop_highest(best.loss, highest))
        dropped.append(f"the {highest} highest losses, from the law of the loss")
    losses = _fit_losses(kept, draws, seed, attempt)
    if not (hyper or allocation or losses):
        raise ScalingError(f"runs = {len(runs)}: nothing can be fitted; {'; '.join(problems) or 'name more columns'}")
    held = _hold_out(runs, found or [], draws, seed, attempt) if hold_out else []
    warnings = [
        *problems,
        *(w for fit in hyper.values() for w in fit.warnings),
        *_disagreements(hyper, losses, allocation),
    ]
    law = _law(runs, found or [], hyper, allocation, losses, attempt)
    provenance = _provenance(common)
    law = law.model_copy(update={"name": name, "source": source, "runs": len(runs), **provenance})
    return Fit(
        runs, dropped, noise, found or [], hyper, rows, allocation, losses, held, list(dict.fromkeys(warnings)), law
    )


def best_runs(runs: Runs) -> Runs:
    """The best cell of each size and number of tokens, with its seeds' mean loss; every run where no lr and batch are known."""
    if runs.lr is None or runs.batch is None or runs.params is None or runs.tokens is None:
        return runs
    sizes = np.stack([clusters(runs.params, SAME), clusters(runs.tokens, SAME)], axis=1)
    cells = np.stack([clusters(runs.lr, SAME), clusters(runs.batch, SAME)], axis=1)
    chosen, losses = [], []
    for size in np.unique(sizes, axis=0):
        members = np.flatnonzero((sizes == size).all(1))
        means = {
            tuple(cell): runs.loss[members[(cells[members] == cell).all(1)]].mean()
            for cell in np.unique(cells[members], axis=0)
        }
        best, loss = min(means.items(), key=lambda item: item[1])
        chosen.append(members[(cells[members] == best).all(1)][0])
        losses.append(loss)
    return replace(runs.take(chosen), loss=np.array(losses))


@dataclass
class _Attempt:
    """Does a fit, or notes why it cannot be done."""

    problems: list[str]
    seen: set[str] = field(default_factory=set)

    def __call__(self, what: str, fit: Callable[..., T], *arguments: Any, **settings: Any) -> T | None:
        try:
            return fit(*arguments, **settings)
        except ScalingError as error:
            self.problems.append(f"{what}: not fitted: {error}")
            return None


def _fit_hyper(found: Sequence[Basin], draws: int, seed: int, attempt: _Attempt) -> dict[str, HyperFit]:
    hyper = {}
    for method in METHODS if found else ():
        for form, variables in FORMS.items():
            what = f"lr and batch by {method} in {form}"
            settings = {"method": method, "draws": draws, "seed": seed}
            fit = attempt(what, fit_hyperparameters, found, variables, **settings)
            if fit is not None:
                hyper[f"{method} {form}"] = fit
    return hyper


def _fit_losses(runs: Runs, draws: int, seed: int, attempt: _Attempt) -> dict[str, LossFit]:
    params, tokens = runs.params, runs.tokens
    if params is None or tokens is None:
        return {}
    fits = {}
    for method in ("huber", "vpnls"):
        settings = {"method": method, "draws": draws, "seed": seed}
        fit = attempt(f"L(N, D) by {method}", fit_loss, params, tokens, runs.loss, **settings)
        if fit is not None:
            fits[method] = fit
    return fits


def _hold_out(runs: Runs, found: Sequence[Basin], draws: int, seed: int, attempt: _Attempt) -> list[HoldOut]:
    """The largest budget, if there are three others."""
    if runs.flops is None or runs.params is None or runs.tokens is None:
        return []
    budgets = _budgets(runs, found)
    if len(budgets) < 4:
        return []
    largest = runs.flops > budgets[-1] / 1.2
    best = best_runs(runs.take(largest & np.isfinite(runs.loss)))
    at = int(np.argmin(best.loss))
    assert best.params is not None and best.tokens is not None
    flops, n, d = budgets[-1], float(best.params[at]), float(best.tokens[at])
    what, settings = "the forecast of the largest budget", {"draws": draws, "seed": seed, "hold_out": False}
    rest = attempt(what, fit_runs, runs.take(~largest), **settings)
    if rest is None:
        return []
    law, held = rest.law, HoldOut(flops, None, float(best.loss[at]))
    if law.loss is not None:
        held = replace(held, loss=_of_one_run(law.loss.estimate(n, d), rest))
    basin = next((b for b in found if b.flops > budgets[-1] / 1.2), None)
    if basin is not None and law.lr is not None and law.batch_tokens is not None:
        size = {name: getattr(basin, name) for name in ("flops", "params", "active", "tokens")}
        lr, batch = law.lr.estimate(**size), law.batch_tokens.estimate(**size)
        held = replace(held, lr=lr, batch=batch, measured_lr=basin.minimum[0], measured_batch=basin.minimum[1])
        cost = attempt("regret of the forecast", regret, basin, lr.value, batch.value)
        held = replace(held, regret=None if cost is None else cost.value)
    return [held]


def _budgets(runs: Runs, found: Sequence[Basin]) -> list[float]:
    """C of every budget, ascending: those of the basins, else groups of runs of nearly equal C."""
    if found:
        return sorted({round(basin.flops, -int(math.log10(basin.flops)) + 1): basin.flops for basin in found}.values())
    assert runs.flops is not None
    groups = clusters(runs.flops, 1.2)
    counts = np.bincount(groups)
    return sorted(float(np.exp(np.log(runs.flops[groups == g]).mean())) for g in range(len(counts)) if counts[g] >= 3)


def _of_one_run(estimate: Estimate, fit: Fit) -> Estimate:
    """The interval of a single run: that of the law and the scatter of runs around it, in quadrature."""
    if estimate.low is None or estimate.high is None:
        return estimate
    residuals: Array = fit.losses["huber" if "huber" in fit.losses else "vpnls"].residuals
    freedom = max(1, len(residuals) - 5)
    scatter = 1.96 * math.sqrt(float(np.sum(residuals**2)) / freedom) * estimate.value
    below, above = (
        math.hypot(estimate.value - estimate.low, scatter),
        math.hypot(estimate.high - estimate.value, scatter),
    )
    return Estimate(estimate.value, estimate.value - below, estimate.value + above)


def _disagreements(
    hyper: dict[str, HyperFit], losses: dict[str, LossFit], allocation: Allocation | None
) -> Iterator[str]:
    """Coefficients that two methods give with intervals that have no point in common."""
    for form in FORMS:
        if (one := hyper.get(f"surface {form}")) and (other := hyper.get(f"band {form}")):
            yield from _apart(f"lr and batch in {form}", "surface", one.coefficients(), "band", other.coefficients())
    if "huber" in losses and "vpnls" in losses:
        yield from _apart("L(N, D)", "huber", losses["huber"].intervals, "vpnls", losses["vpnls"].intervals)
    if allocation is not None and "huber" in losses:
        rows, law = _allocated(allocation)["M flops"], losses["huber"].intervals["a"]
        yield from _apart(
            "allocation", "IsoFLOP", {"exponent of size in C": rows}, "L(N, D)", {"exponent of size in C": law}
        )


def _apart(
    what: str, name: str, one: dict[str, Estimate], other_name: str, other: dict[str, Estimate]
) -> Iterator[str]:
    for key, mine in one.items():
        theirs = other[key]
        if mine.low is not None and theirs.low is not None and not mine.overlaps(theirs):
            yield (
                f"{what}: the methods disagree on {key}: {name} {mine.value:.3g} ({mine.low:.3g} to {mine.high:.3g}), "
                f"{other_name} {theirs.value:.3g} ({theirs.low:.3g} to {theirs.high:.3g})"
            )


def _law(
    runs: Runs,
    found: Sequence[Basin],
    hyper: dict[str, HyperFit],
    allocation: Allocation | None,
    losses: dict[str, LossFit],
    attempt: _Attempt,
) -> Law:
    """The law of the methods that are trusted most: surface before band, huber before vpnls."""
    chosen = _choose(found, hyper, attempt)
    loss = losses.get("huber") or losses.get("vpnls")
    ranges = {name: getattr(runs, name) for name in ("flops", "params", "active", "tokens")}
    if found:
        ranges |= {"lr": runs.lr, "batch": runs.batch}
    return Law(
        name="fit",
        source="",
        lr=chosen.lr if chosen else None,
        batch_tokens=chosen.batch if chosen else None,
        flops_per_token=_exactly_in_flops(allocation.M) if allocation else None,
        tokens=_exactly_in_flops(allocation.D) if allocation else None,
        best_loss=allocation.best_loss if allocation else None,
        loss=loss.law if loss else None,
        measured={name: (float(c.min()), float(c.max())) for name, c in ranges.items() if c is not None},  # type: ignore[misc]
    )


def _exactly_in_flops(law: PowerLaw) -> PowerLaw:
    assert set(law.exponents) == {"flops"}
    return law


def _choose(found: Sequence[Basin], hyper: dict[str, HyperFit], attempt: _Attempt) -> HyperFit | None:
    """The form whose forecasts of left-out basins cost less; of C where (N, D) cannot be told."""
    for method in METHODS:
        forms = [form for form in FORMS if f"{method} {form}" in hyper]
        costs = {}
        for form in forms if len(forms) > 1 else ():
            what = f"cross-validation of {method} in {form}"
            left_out = attempt(what, cross_validated, found, FORMS[form], method)
            if left_out is not None:
                costs[form] = float(np.mean([cost.value for cost in left_out]))
        if forms:
            best = min(costs, key=costs.__getitem__) if costs else forms[0]
            return hyper[f"{method} {best}"]
    return None


def _provenance(common: Common | None) -> dict[str, Any]:
    if common is None:
        return {}
    model, length = common.recipe["model"], common.recipe["data"]["sequence_length"]
    return {
        "data": "; ".join(common.data),
        "tokenizer": common.tokenizer,
        "family": Family(model=model, sequence_length=length),
    }


def _allocated(allocation: Allocation) -> dict[str, Estimate]:
    """Every coefficient of the allocation with its 95 % interval."""
    found = {}
    for name, law in (("M", allocation.M), ("D", allocation.D)):
        values: dict[str, float] = {"ln k": math.log(law.coefficient)} | dict(law.exponents.items())
        columns = np.array(law.draws).T if law.draws else [None] * len(values)
        for (key, value), draws in zip(values.items(), columns):
            found[f"{name} {key}"] = Estimate(value) if draws is None else percentile_interval(value, draws)
    return found


def _table(coefficients: dict[str, Estimate]) -> dict[str, Any]:
    return {"coefficients": {name: _plain(estimate.__dict__) for name, estimate in coefficients.items()}}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _plain(value.__dict__) if isinstance(value, Estimate) else value for key, value in values.items()}
