"""A budget in, a run out: size, tokens, learning rate, batch and loss by a law.

    C            →  M, D of the best loss: the law's allocation, or the minimum of its L(N, D) on C = k·N·D
    M            →  the member of a family of models that is nearest; its tokens keep the budget: D = C / M
    N, D, C      →  learning rate, batch, loss

C is what the law counts: without embedding, head and MTP. What all of it costs stands beside it, and GPU hours pay for all of it.
Intervals are those of the law's coefficients: they say how sure the fit is, not whether a law holds so far outside. A recipe that
trains the run is in `recipes`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.flops import flops_mfu
from train.config import Recipe
from train.planning.advice import store_tokenizer, tokenizer_warning
from train.planning.devices import lookup
from train.scaling.apply import Advice, Course, advise
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.family import with_flops
from train.scaling.fits.bootstrap import quantile
from train.scaling.fits.loss_law import EXPONENTS, optimum
from train.scaling.law import Law, LossLaw, load_law
from train.scaling.recipes import template_of
from train.scaling.size import Size, size_of

MFU = (
    0.4  # DeepSeek-V3's: 14.8T tokens in 2.664M H800 hours (arXiv 2412.19437 table 1) by `flops_mfu` over the bf16 peak
)
HYPERPARAMETERS = "step-law"  # of laws that have none
ANOTHER = 1.1  # ratio to what was asked for, or is best, from which on a run is said to be another
UNTOLD = 30.0  # high over low of the interval of M, from which on a law does not tell the size
TOLD = 0.95  # share of the draws that must divide a budget
LARGEST = 1e17  # FLOPs per token of a model
LOG_LARGEST = 500.0  # of the scale of sizes in a division, so that powers of it stay numbers
ROUNDS = 8  # of finding a size whose ratios are its own; two or three are enough
MOST = {"flops": 1e28, "device_flops": 1e28, "params": 1e15, "tokens": 1e18}


@dataclass(frozen=True)
class Forecast:
    """A run, and what a law says of it.

    Attributes:
        law: of the allocation and the loss.
        lr_law, batch_law: the laws of learning rate and batch: the same where it has them, else Step Law.
        template: the recipe that the run is like.
        model, size: the member of the template's family.
        tokens: of the run; C / M where a budget was given.
        flops: C.
        all_flops: with output head and MTP, attention counted full as in M.
        best_flops_per_token, best_tokens: C/D and D of the best loss at C, wherever the run lies; None where the law has none.
        loss: in the law's unit, on its data and tokenizer; None where it has none.
        distances: decades outside of what was measured, by law and quantity.
    """

    law: Law
    template: Recipe
    model: ModelConfig
    size: Size
    tokens: float
    flops: float
    best_flops_per_token: Estimate | None
    best_tokens: Estimate | None
    lr_law: Law
    lr: Estimate
    batch_law: Law
    batch_tokens: Estimate
    loss: Estimate | None
    distances: dict[str, dict[str, float]]
    warnings: tuple[str, ...]

    @property
    def all_flops(self) -> float:
        return self.size.all_flops_per_token * self.tokens

    @property
    def distance(self) -> float:
        """Decades outside of what was measured, the farthest of all quantities of all laws."""
        return max((decades for law in self.distances.values() for decades in law.values()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; an interval's ends are null where nothing is known of the error."""
        estimates = ("best_flops_per_token", "best_tokens", "lr", "batch_tokens", "loss")
        return {
            "law": self.law.name,
            "compute": self.law.compute,
            "lr_law": self.lr_law.name,
            "batch_law": self.batch_law.name,
            "flops": self.flops,
            "all_flops": self.all_flops,
            "params": self.size.params,
            "active": self.size.active,
            "flops_per_token": self.size.flops_per_token,
            "all_flops_per_token": self.size.all_flops_per_token,
            "hidden_size": self.model.hidden_size,
            "num_hidden_layers": self.model.num_hidden_layers,
            "tokens": self.tokens,
            **{name: None if (e := getattr(self, name)) is None else dataclasses.asdict(e) for name in estimates},
            "loss_unit": self.law.loss_unit,
            "distance": self.distance,
            "distances": self.distances,
            "warnings": list(self.warnings),
        }


def forecast(
    law: Law,
    *,
    flops: float | None = None,
    device_flops: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    template: Recipe | None = None,
) -> Forecast:
    """What a law makes of a budget.

    Give one of `flops`, `device_flops`, or `params` with `tokens`.

    Args:
        flops: C.
        device_flops: what devices compute, as MFU counts it (`gpu_hours`): causal attention, head and MTP.
        params: N, without embedding and head, all experts counted.
        template: whose family has the sizes, and whose sequence length M is counted at; the law's own by default, else `small`.

    Raises:
        ScalingError: not one budget was given, or the law cannot divide it.
    """
    asked = {"flops": flops, "device_flops": device_flops, "params": params, "tokens": tokens}
    _check(asked)
    doubts = []
    template = template or template_of(law)
    family, length = template.model_config_resolved(), template.data.sequence_length
    if params is not None and tokens is not None:
        model = _with_params(family, params, length)
        doubts += _another_size(model, size_of(model, length).params, params)
    elif flops is not None:
        model = _allocated(law, flops, family, length)
        tokens = flops / _rate(law, size_of(model, length))
    else:
        assert device_flops is not None
        model = _affordable(law, device_flops, family, length)
        tokens = device_flops / flops_mfu(model, length)
    return _describe(law, template, model, tokens, doubts)


def gpu_hours(device: str, hours: float, mfu: float = MFU) -> float:
    """FLOPs that so many hours of one device compute: its dense bf16 peak times the model FLOPs utilisation.

    Raises:
        DeviceError: the table does not know the device.
        ScalingError: hours or mfu are out of range.
    """
    if not hours > 0:
        raise ScalingError(f"gpu_hours = {hours:g}: must be more than 0; give the hours of all devices together")
    if not 0 < mfu <= 1:
        raise ScalingError(f"mfu = {mfu:g}: must be in (0, 1]; give for example {MFU}")
    return lookup(device).bf16 * 3600 * hours * mfu


def _check(asked: dict[str, float | None]) -> None:
    given = {name for name, value in asked.items() if value is not None}
    for one, other, example in (("tokens", "params", "1e9"), ("params", "tokens", "2e10")):
        if given == {one}:
            raise ScalingError(
                f"{one} = {asked[one]:g}: is no budget without {other}; give it too, for example {other}={example}, or flops alone"
            )
    if given not in ({"flops"}, {"device_flops"}, {"params", "tokens"}):
        raise ScalingError(
            f"forecast of {', '.join(sorted(given)) or 'nothing'}: must have one budget; give flops, or GPU hours and a device, or "
            "params together with tokens"
        )
    for name in sorted(given):
        if not 0 < (value := asked[name] or 0) <= MOST[name]:
            raise ScalingError(
                f"{name} = {value:g}: must be more than 0 and at most {MOST[name]:g}; write it like 1e20"
            )


def _another_size(model: ModelConfig, params: float, asked: float) -> list[str]:
    """A line where the family has no model of the size that was asked for."""
    if 1 / ANOTHER < params / asked < ANOTHER:
        return []
    return [
        f"params = {asked:.4g}: the nearest model of the family has N = {params:.4g} (width {model.hidden_size}, "
        f"{model.num_hidden_layers} layers), and the forecast is of that one"
    ]


def _describe(law: Law, template: Recipe, model: ModelConfig, tokens: float, doubts: list[str]) -> Forecast:
    length = template.data.sequence_length
    size = size_of(model, length)
    if tokens < length:
        raise ScalingError(
            f"tokens = {tokens:.3g}: is less than a sequence of {length}, for {size.params:,} parameters; give a larger budget"
        )
    advice = advise(law, Course.of(law, model, ((0, length),)), tokens)
    flops = advice.variables["flops"]
    best = _best(law, flops, size)
    found, doubtful = _loss(law, advice, best)
    theirs, borrowed = advice, []
    if missing := [words for words, has in (("learning rate", advice.lr), ("batch", advice.batch_tokens)) if not has]:
        other = load_law(HYPERPARAMETERS)
        theirs = advise(other, Course.of(other, model, ((0, length),)), tokens)
        borrowed = [f"law {law.name} has no {' and no '.join(missing)}: taken from {other.name}", *theirs.warnings()]
    lr, batch = advice.lr or theirs.lr, advice.batch_tokens or theirs.batch_tokens
    assert lr is not None and batch is not None
    warnings = [*doubts, *advice.warnings(), *doubtful]
    if doubt := tokenizer_warning(law, store_tokenizer(template)):
        warnings.append(doubt)
    warnings += [*borrowed, *_division(law, model.hidden_size, size, flops, best), *_text(law, template)]
    return Forecast(
        law=law,
        template=template,
        model=model,
        size=size,
        tokens=tokens,
        flops=flops,
        best_flops_per_token=best[0] if best else None,
        best_tokens=best[1] if best else None,
        lr_law=law if advice.lr else theirs.law,
        lr=lr,
        batch_law=law if advice.batch_tokens else theirs.law,
        batch_tokens=batch,
        loss=found,
        distances={one.law.name: one.distances for one in (advice, theirs)},
        warnings=tuple(warnings),
    )


def _division(law: Law, width: int, size: Size, flops: float, best: tuple[Estimate, Estimate] | None) -> Iterator[str]:
    """What there is to doubt in the division of C into size and tokens."""
    loss = law.loss if law.flops_per_token is None and law.tokens is None else None
    if best is None:
        if loss:
            yield f"law {law.name} does not tell the size: {_no_minimum(loss)}"
        return
    value, low, high = best[0].value, best[0].low, best[0].high
    at = f"at C = {flops:.3g} the best model has {value:.3g} FLOPs per token"
    doubt = ""
    if loss and not all(EXPONENTS[0] < exponent < EXPONENTS[-1] for exponent in (loss.alpha, loss.beta)):
        doubt = (
            f"alpha = {loss.alpha:.3g} and beta = {loss.beta:.3g} must lie inside {EXPONENTS[0]:g} to {EXPONENTS[-1]:g}"
        )
    elif loss and loss.draws and (whole := sum(map(_has_minimum, _drawn(loss)))) < TOLD * len(loss.draws):
        doubt = f"{len(loss.draws) - whole} of {len(loss.draws)} draws of its L(N, D) have no best division"
    elif low is not None and high is not None and high > UNTOLD * low:
        doubt = f"{at}, between {low:.3g} and {high:.3g}"
    if doubt:
        yield f"law {law.name} does not tell the size: {doubt}; give params and tokens, or fit a law to more sizes and tokens"
    if not 1 / ANOTHER < (rate := _rate(law, size)) / value < ANOTHER:
        yield f"the run does not divide its budget as law {law.name} does: {at}, the run's (width {width}) has {rate:.3g}"


def _text(law: Law, template: Recipe) -> list[str]:
    """A line where the recipe's text is not here to train on."""
    missing = [source.path for source in template.data.train if not Path(source.path).is_dir()]
    if not missing:
        return []
    theirs = f", the text of law {law.name} ({law.data})" if law.family and law.data else ""
    return [
        f"there is no token store {missing[0]}{theirs}: a recipe of this forecast needs data.train=STORE at `rorqual train`, or "
        "give the forecast a recipe with a store of yours (--recipe)"
    ]


def _loss(law: Law, advice: Advice, best: tuple[Estimate, Estimate] | None) -> tuple[Estimate | None, list[str]]:
    """The loss of a run, and what there is to doubt in it."""
    at = advice.variables
    near = best is not None and 1 / ANOTHER < at["tokens"] / best[1].value < ANOTHER
    of_budget = law.best_loss.estimate(at["flops"]) if law.best_loss else None
    if law.loss is None and of_budget is None:
        return None, [
            f"law {law.name} has no loss; one is fitted to runs of several sizes and tokens (rorqual scaling)"
        ]
    doubts = []
    if law.loss is None:
        found = of_budget
        if not near:
            doubts.append("the loss is that of the best allocation of the budget, and the run has another")
    else:
        found = law.loss.estimate(at[law.loss.size], at["tokens"])
        if near and of_budget and of_budget.low is not None and found.low is not None and not found.overlaps(of_budget):
            doubts.append(
                f"two forecasts of the loss disagree by more than their intervals: {_show(found)} by L(N, D), "
                f"{_show(of_budget)} by the best loss of each budget"
            )
    if law.tokenizer is None:
        doubts.append(
            f"the loss is that of {law.data or 'its own text'}, cut by its own tokenizer; another text has another"
        )
    return found, doubts


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def _rate(law: Law, size: Size) -> float:
    """C / D."""
    return size.flops_per_token if law.compute == "M*D" else 6 * size.active


def _best(law: Law, flops: float, size: Size) -> tuple[Estimate, Estimate] | None:
    """C/D and D of the best loss at C; of an L(N, D) for models with the ratio of C/D to N that `size` has."""
    if law.flops_per_token:
        rate = law.flops_per_token.estimate(flops=flops)
        return rate, law.tokens.estimate(flops=flops) if law.tokens else _quotient(flops, rate)
    if law.tokens:
        tokens = law.tokens.estimate(flops=flops)
        return _quotient(flops, tokens), tokens
    if law.loss and _has_minimum(law.loss):
        per_parameter = _rate(law, size) / getattr(size, law.loss.size)
        laws = [law.loss, *filter(_has_minimum, _drawn(law.loss))]
        value, *draws = [per_parameter * optimum(one, flops, per_parameter).params for one in laws]
        low, high = map(float, quantile(draws, [0.025, 0.975])) if draws else (None, None)
        rate = Estimate(value, low, high)
        return rate, _quotient(flops, rate)
    return None


def _has_minimum(law: LossLaw) -> bool:
    """Whether more parameters and more tokens both help, so that a budget has a best division, and one that numbers can hold."""
    if min(law.A, law.B, law.alpha, law.beta) <= 0:
        return False
    log_g = math.log(law.alpha) + math.log(law.A) - math.log(law.beta) - math.log(law.B)
    return abs(log_g) / (law.alpha + law.beta) < LOG_LARGEST


def _no_minimum(law: LossLaw) -> str:
    return (
        f"its L(N, D) has no minimum on a budget: A = {law.A:g}, B = {law.B:g}, alpha = {law.alpha:g} and beta = {law.beta:g} must "
        "be more than 0, and not by a trifle; fit it to runs of more sizes and tokens, or give params and tokens"
    )


def _drawn(law: LossLaw) -> Iterator[LossLaw]:
    """The law by each of its draws."""
    for e, a, b, alpha, beta in law.draws:
        yield LossLaw(E=e, A=a, B=b, alpha=alpha, beta=beta, size=law.size)


def _quotient(flops: float, by: Estimate) -> Estimate:
    if by.low is None or by.high is None:
        return Estimate(flops / by.value)
    return Estimate(flops / by.value, flops / by.high, flops / by.low)


def _allocated(law: Law, flops: float, family: ModelConfig, length: int) -> ModelConfig:
    """The member with the C/D of the best loss; its other ratios are those of its size, found by going there."""
    model = family
    for _ in range(ROUNDS):
        size = size_of(model, length)
        best = _best(law, flops, size)
        if best is None:
            if law.loss:
                raise ScalingError(f"law = {law.name!r}: {_no_minimum(law.loss)}")
            raise ScalingError(
                f"law = {law.name!r}: has neither an allocation of compute nor L(N, D), so that it gives no size; give params and "
                "tokens, or use another law, for example deepseek-llm"
            )
        if best[0].value > min(flops, LARGEST):
            raise ScalingError(
                f"law = {law.name!r}: its best model for C = {flops:.3g} has {best[0].value:.3g} FLOPs per token, which is no run; "
                "give params and tokens, or use another law"
            )
        wanted = best[0].value * size.flops_per_token / _rate(law, size)
        before, model = model, with_flops(family, wanted, length)
        if model == before:
            break
    return model


def _affordable(law: Law, device_flops: float, family: ModelConfig, length: int) -> ModelConfig:
    """The member for the C that is left when all that is trained is paid for."""
    model, flops = family, device_flops
    for _ in range(ROUNDS):
        before, model = model, _allocated(law, flops, family, length)
        flops = device_flops * _rate(law, size_of(model, length)) / flops_mfu(model, length)
        if model == before:
            break
    return model


def _with_params(family: ModelConfig, params: float, length: int) -> ModelConfig:
    """The member whose N is nearest."""
    model = family
    for _ in range(ROUNDS):
        size = size_of(model, length)
        before, model = model, with_flops(family, params * size.flops_per_token / size.params, length)
        if model == before:
            break
    return model
