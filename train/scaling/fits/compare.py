"""Which of several fits of one thing to trust, and where they disagree by more than their intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from train.scaling.estimate import Estimate
from train.scaling.fits.attempt import Attempt
from train.scaling.fits.basins import SAME_SIZE, Basin
from train.scaling.fits.bootstrap import percentile_interval
from train.scaling.fits.hyperparameters import HyperFit, Method
from train.scaling.fits.isoflop import Allocation
from train.scaling.fits.loss_law import LossFit
from train.scaling.fits.regret import Regret, cross_validated
from train.scaling.fits.runs import Array
from train.scaling.law import Variable

FORMS: dict[str, tuple[Variable, ...]] = {
    "C": ("flops",),
    "N, D": ("params", "tokens"),
    "active, D": ("active", "tokens"),
}
FREEDOM = 2  # degrees of freedom of each fold of a cross-validation
METHODS: tuple[Method, ...] = ("surface", "band")  # the first is trusted more: see `hyperparameters`


def choose(found: Sequence[Basin], hyper: Mapping[str, HyperFit], attempt: Attempt) -> tuple[HyperFit | None, str]:
    """The form of the method that is trusted most whose forecasts of left-out basins cost least, and why, in words.

    A form takes the place of a simpler one if it is better by more than one standard error: in the regret over the folds where the
    choices of both lie in the measured grid, or in the number of folds whose choice lies outside, where the regret is unknown; and
    in the other not worse by as much. A form that leaves a fold fewer than 2 degrees of freedom is no candidate.
    """
    method = next((m for m in METHODS if any(f"{m} {form}" in hyper for form in FORMS)), None)
    if method is None:
        return None, ""
    forms = [form for form in FORMS if f"{method} {form}" in hyper]
    best, said = forms[0], []
    folds = {form: _left_out(found, form, method, attempt) for form in forms} if len(forms) > 1 else {}
    for form in forms[1:]:
        mine, theirs = folds[best], folds[form]
        if mine is None or theirs is None:
            lacking = form if theirs is None else best
            said.append(f"{form} not compared: {len(found)} basins are too few for folds of {lacking}")
            continue
        better, words = _better(best, mine, form, theirs)
        said.append(words)
        best = form if better else best
    return hyper[f"{method} {best}"], f"{method} in {best}" + (f"; {'; '.join(said)}" if said else "")


def _left_out(found: Sequence[Basin], form: str, method: Method, attempt: Attempt) -> list[Regret] | None:
    """Each basin's regret by the law of all others; None where a fold would have too few of them."""
    if len(found) - 1 - (1 + len(FORMS[form])) < FREEDOM:
        return None
    return attempt(f"cross-validation of {method} in {form}", cross_validated, found, FORMS[form], method)


def _better(simple: str, mine: Sequence[Regret], form: str, theirs: Sequence[Regret]) -> tuple[bool, str]:
    """Whether the second form is better than the first by more than one standard error."""
    pairs = list(zip(mine, theirs, strict=True))
    both = np.array([(one.value, other.value) for one, other in pairs if one.inside and other.inside]).reshape(-1, 2)
    lower = both[:, 0] - both[:, 1]
    gain, error = (
        (float(lower.mean()), float(lower.std(ddof=1) / math.sqrt(len(lower)))) if len(lower) > 2 else (0.0, math.inf)
    )
    fewer = sum(other.inside and not one.inside for one, other in pairs)
    more = sum(one.inside and not other.inside for one, other in pairs)
    chance = math.sqrt(fewer + more)
    better = (gain > error and more - fewer <= chance) or (fewer - more > chance and gain >= -error)
    outside = [sum(not one.inside for one in each) for each in (mine, theirs)]
    means = both.mean(0) if len(both) else [math.nan, math.nan]
    words = (
        f"left-out basins cost {means[0]:.3%} in {simple}, {means[1]:.3%} in {form}, difference {gain:.3%} ± {error:.3%} over "
        f"{len(both)} of {len(pairs)}; outside of the grid: {outside[0]} and {outside[1]}"
    )
    return better, words


def trusted_loss(losses: Mapping[str, LossFit]) -> tuple[LossFit | None, str]:
    """Huber's before vpnls's; of the active N where it describes the runs better by more than one standard error; and why."""
    for method in ("huber", "vpnls"):
        total, active = losses.get(method), losses.get(f"{method} active")
        if total is None or active is None:
            if total or active:
                return total or active, ""
            continue
        gain = np.abs(total.residuals) - np.abs(active.residuals)
        mean, error = float(gain.mean()), float(gain.std(ddof=1) / math.sqrt(len(gain)))
        chosen = active if mean > error else total
        return chosen, (
            f"of N = {chosen.law.size}; runs lie {np.abs(total.residuals).mean():.3%} off the law of params, "
            f"{np.abs(active.residuals).mean():.3%} off that of active, difference {mean:.3%} ± {error:.3%}"
        )
    return None, ""


def in_proportion(params: Array, active: Array) -> bool:
    """Whether the active part is the same share of N everywhere, so that laws of either say the same."""
    share = active / params
    return bool(np.all(share <= SAME_SIZE * share.min(initial=np.inf)))


def disagreements(
    hyper: Mapping[str, HyperFit], losses: Mapping[str, LossFit], allocation: Allocation | None
) -> Iterator[str]:
    """Coefficients that two methods give with intervals that have no point in common."""
    for form in FORMS:
        if (one := hyper.get(f"surface {form}")) and (other := hyper.get(f"band {form}")):
            yield from _apart(f"lr and batch in {form}", "surface", one.coefficients(), "band", other.coefficients())
    for size in ("", " active"):
        huber, vpnls = losses.get(f"huber{size}"), losses.get(f"vpnls{size}")
        if huber and vpnls:
            yield from _apart(
                f"L(N, D){size and ' of' + size + ' N'}", "huber", huber.intervals, "vpnls", vpnls.intervals
            )
    trusted, _ = trusted_loss(losses)
    if allocation is not None and trusted is not None:
        rows, law = allocated(allocation)["M flops"], trusted.intervals["a"]
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


def allocated(allocation: Allocation) -> dict[str, Estimate]:
    """Every coefficient of the allocation with its 95 % interval."""
    found = {}
    for name, law in (("M", allocation.M), ("D", allocation.D)):
        values: dict[str, float] = {"ln k": math.log(law.coefficient)} | dict(law.exponents.items())
        columns = np.array(law.draws).T if law.draws else [None] * len(values)
        for (key, value), draws in zip(values.items(), columns):
            found[f"{name} {key}"] = Estimate(value) if draws is None else percentile_interval(value, draws)
    return found
