"""Which of several fits of one thing to trust, and where they disagree by more than their intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from train.scaling.attempt import Attempt
from train.scaling.basins import Basin
from train.scaling.bootstrap import percentile_interval
from train.scaling.estimate import Estimate
from train.scaling.hyperparameters import HyperFit, Method
from train.scaling.isoflop import Allocation
from train.scaling.law import Variable
from train.scaling.loss_law import LossFit
from train.scaling.regret import cross_validated

FORMS: dict[str, tuple[Variable, ...]] = {
    "C": ("flops",),
    "N, D": ("params", "tokens"),
    "active, D": ("active", "tokens"),
}
METHODS: tuple[Method, ...] = ("surface", "band")  # the first is trusted more: see `hyperparameters`


def choose(found: Sequence[Basin], hyper: Mapping[str, HyperFit], attempt: Attempt) -> HyperFit | None:
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


def disagreements(
    hyper: Mapping[str, HyperFit], losses: Mapping[str, LossFit], allocation: Allocation | None
) -> Iterator[str]:
    """Coefficients that two methods give with intervals that have no point in common."""
    for form in FORMS:
        if (one := hyper.get(f"surface {form}")) and (other := hyper.get(f"band {form}")):
            yield from _apart(f"lr and batch in {form}", "surface", one.coefficients(), "band", other.coefficients())
    if "huber" in losses and "vpnls" in losses:
        yield from _apart("L(N, D)", "huber", losses["huber"].intervals, "vpnls", losses["vpnls"].intervals)
    if allocation is not None and "huber" in losses:
        rows, law = allocated(allocation)["M flops"], losses["huber"].intervals["a"]
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
