"""A law: what a fit found, as a file that a schedule and a forecast read.

    lr = k · C^a                        or of (N, D): k · N^a · D^b
    batch = k · C^a                     tokens
    M = k · C^a,   D = C / M            allocation: FLOPs per token and tokens of the best loss
    L(N, D) = E + A/N^α + B/D^β         nats per token, on the law's own data and tokenizer
    L(C) = E + k/C^γ                    the best loss of a budget

A law knows where it was measured. It answers outside too, and says how far outside that is. Intervals come from `draws`:
parameters of refitted bootstrap samples, which keep what the parameters of one form have to do with each other.

Published laws lie in `laws/`; a ladder's own is a file of the same form.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from train import named
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.bootstrap import quantile
from train.scaling.fits.runs import Array
from train.scaling.output import write_output

LAWS = Path(__file__).parent / "laws"
REMEDY = "give a law.json of `rorqual scaling fit`"

Variable = Literal["flops", "params", "active", "tokens"]  # C = M·D; N, all experts counted; N of one token; D
Quantity = Variable | Literal["lr", "batch"]  # what a law can have been measured over; batch in tokens
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PowerLaw(_Form):
    """k · Π variable^exponent.

    Attributes:
        draws: rows (ln k, exponents in their order) of a bootstrap; none where nothing is known of the error.
    """

    coefficient: PositiveFinite
    exponents: dict[Variable, Finite]
    draws: tuple[tuple[Finite, ...], ...] = ()

    @model_validator(mode="after")
    def _draws_fit(self) -> Self:
        width = 1 + len(self.exponents)
        if any(len(draw) != width for draw in self.draws):
            raise ValueError(f"draws must be rows of {width} numbers: ln k, then an exponent for each variable")
        return self

    def __call__(self, **variables: ArrayLike) -> Array:
        """Its value; every variable of `exponents` must be given, others are ignored."""
        logs = sum(exponent * np.log(np.asarray(variables[name], float)) for name, exponent in self.exponents.items())
        return np.asarray(self.coefficient * np.exp(logs))

    def estimate(self, **variables: float) -> Estimate:
        """Its value at one point with the draws' 95 % interval."""
        value = float(self(**variables))
        if not self.draws:
            return Estimate(value)
        rows = np.array([1.0, *(math.log(variables[name]) for name in self.exponents)])
        low, high = quantile(np.array(self.draws) @ rows, [0.025, 0.975])
        return Estimate(value, float(np.exp(low)), float(np.exp(high)))


class LossLaw(_Form):
    """L(N, D) = E + A/N^α + B/D^β (Hoffmann et al., arXiv 2203.15556, approach 3).

    Attributes:
        size: what N is.
        draws: rows (E, A, B, alpha, beta) of a bootstrap.
    """

    E: Finite
    A: Finite
    B: Finite
    alpha: Finite
    beta: Finite
    size: Literal["params", "active"] = "params"
    draws: tuple[tuple[Finite, Finite, Finite, Finite, Finite], ...] = ()

    def __call__(self, size: ArrayLike, tokens: ArrayLike) -> Array:
        """Nats per token of N parameters trained on D tokens."""
        n, d = np.asarray(size, float), np.asarray(tokens, float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def estimate(self, size: float, tokens: float) -> Estimate:
        """Its value at one point with the draws' 95 % interval."""
        value = float(self(size, tokens))
        if not self.draws:
            return Estimate(value)
        e, a, b, alpha, beta = np.array(self.draws).T
        low, high = quantile(e + a * size**-alpha + b * tokens**-beta, [0.025, 0.975])
        return Estimate(value, float(low), float(high))


class BestLoss(_Form):
    """L(C) = E + k/C^γ: what the best allocation of a budget reaches.

    Attributes:
        draws: rows (E, k, gamma) of a bootstrap.
    """

    E: Finite
    k: Finite
    gamma: Finite
    draws: tuple[tuple[Finite, Finite, Finite], ...] = ()

    def __call__(self, flops: ArrayLike) -> Array:
        """The best loss of C FLOPs."""
        return np.asarray(self.E + self.k * np.asarray(flops, float) ** -self.gamma)

    def estimate(self, flops: float) -> Estimate:
        """Its value at one budget with the draws' 95 % interval."""
        value = float(self(flops))
        if not self.draws:
            return Estimate(value)
        e, k, gamma = np.array(self.draws).T
        low, high = quantile(e + k * flops**-gamma, [0.025, 0.975])
        return Estimate(value, float(low), float(high))


class Family(_Form):
    """What the runs of a law had in common: one recipe at many widths (`train.scaling.family`).

    Attributes:
        recipe: theirs, without what they differ in; the law is silent about other models, text, schedules and optimizers.
        warmup_tokens: of every run; None where they had the recipe's steps.
    """

    recipe: dict[str, Any]
    warmup_tokens: Annotated[int, Field(gt=0)] | None = None


class Law(_Form):
    """What is known of a family of runs. What was not fitted is None.

    Attributes:
        source: the paper or the ladder that it is from, with the place.
        compute: what C is: M·D (DeepSeek LLM §3.1), or 6·N·D with the parameters that one token uses.
        lr, batch_tokens: the peak learning rate and the tokens of a global batch that give the best loss.
        flops_per_token, tokens: M and D of the best loss at C FLOPs.
        measured: lowest and highest value of what its runs varied.
        notes: definitions and conditions by name, for people: which N, which C, which schedule.
        loss_unit: what `loss` and `best_loss` are in.
        data, tokenizer, family, runs: provenance; the tokenizer by its fingerprint, the runs by their number.
    """

    version: Literal[1] = 1
    name: str
    source: str
    compute: Literal["M*D", "6*N*D"] = "M*D"
    lr: PowerLaw | None = None
    batch_tokens: PowerLaw | None = None
    flops_per_token: PowerLaw | None = None
    tokens: PowerLaw | None = None
    loss: LossLaw | None = None
    best_loss: BestLoss | None = None
    loss_unit: Literal["nats per token", "bits per byte"] = "nats per token"
    measured: dict[Quantity, tuple[PositiveFinite, PositiveFinite]] = {}
    notes: dict[str, str] = {}
    data: str | None = None
    tokenizer: str | None = None
    family: Family | None = None
    runs: int | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for quantity, (low, high) in self.measured.items():
            if low > high:
                raise ValueError(f"measured.{quantity} must be lowest and highest, not {low:g} and {high:g}")
        for name in ("flops_per_token", "tokens"):
            allocation: PowerLaw | None = getattr(self, name)
            if allocation and set(allocation.exponents) != {"flops"}:
                raise ValueError(f"{name} must be a power law of flops alone")
        return self

    @property
    def hash(self) -> str:
        """Of all that it says, however its file is laid out."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def distance(self, **variables: float) -> float:
        """Decades by which the farthest of some values lies outside of what was measured; 0 inside, or where nothing is known."""
        return max(self.distances(**variables).values(), default=0.0)

    def distances(self, **variables: float) -> dict[str, float]:
        """The same for each of the values whose range is known."""
        ranges = {name: self.measured[name] for name in variables if name in self.measured}  # type: ignore[index]
        return {
            name: float(max(np.log10(low / variables[name]), np.log10(variables[name] / high), 0.0))
            for name, (low, high) in ranges.items()
        }


def shipped_laws() -> list[str]:
    """Names of the published laws that come with the code."""
    return named.names(LAWS, ".json")


def load_law(name_or_path: str | Path) -> Law:
    """A published law by its name, or a law file.

    Raises:
        ScalingError: there is no such law, or the file is none.
    """
    path = _find(str(name_or_path))
    try:
        values = from_json(path.read_bytes())
    except OSError as error:
        raise ScalingError(f"law = {str(path)!r}: cannot be read ({error.strerror}); give another file") from None
    except ValueError:
        raise ScalingError(f"law = {str(path)!r}: is not a JSON file; {REMEDY}") from None
    try:
        return Law.model_validate(_known_version(path, values))
    except ValidationError as error:
        raise ScalingError(f"law = {str(path)!r}: {_first_mistake(error)}") from None


def save_law(law: Law, path: str | Path) -> None:
    """Write a law file; who reads it meanwhile has the old one or the new one.

    Raises:
        ScalingError: the path is none that can be written.
    """
    text = json.dumps(law.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
    short = re.sub(
        r"\[[^\[\]{}\"]*\]", lambda row: "[" + " ".join(row[0][1:-1].split()) + "]", text
    )  # a row of numbers on one line
    write_output(path, short + "\n")


def _known_version(path: Path, values: Any) -> dict[str, Any]:
    """What a file has, if it says that it is a law of this version."""
    if not isinstance(values, dict):
        raise ScalingError(f"law = {str(path)!r}: {values!r:.40} is not a map of keys; {REMEDY}")
    if "version" not in values:
        raise ScalingError(f"law = {str(path)!r}: version: missing, so that it is no law; {REMEDY}")
    if values["version"] != (known := Law.model_fields["version"].default):
        raise ScalingError(
            f"law = {str(path)!r}: version = {values['version']!r:.40}: must be {known}, the only one that this code reads; "
            "fit the law again with it"
        )
    return values


def _first_mistake(error: ValidationError) -> str:
    """`key = value: rule; fix` of the first of them."""
    first = error.errors(include_url=False)[0]
    where, value = ".".join(map(str, first["loc"])), f"{first['input']!r:.40}"
    if first["type"] == "missing":
        return f"{where}: missing; {REMEDY}"
    if first["type"] == "extra_forbidden":
        return f"{where} = {value}: unknown key; leave it out, or read the law with the code that wrote it"
    rule = first["msg"].removeprefix("Value error, ")
    return f"{where} = {value}: {rule}; {REMEDY}" if where else f"{rule}; {REMEDY}"


def _find(name: str) -> Path:
    try:
        return named.find(name, LAWS, ".json", "law file")
    except LookupError as error:
        raise ScalingError(f"law = {name!r}: {error}") from None
