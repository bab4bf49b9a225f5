"""What a law says for one run: its learning rate and batch, and how far that lies from what was measured.

A run stands at N, active and, after D tokens, at C = M·D. Batches come out as 2^k or 3·2^(k-1) units of whole sequences, the next
in ratio, so that they are the same on any number of processes and most numbers of processes divide them.

A batch that grows follows the law's best batch of what has been spent so far: a run that ended here should have had this batch. It
grows by doubling, from a sixteenth of the last one at the least, so that what divides the first batch divides all. The learning
rate belongs to the last batch; before, it goes with the square root of the batch, with which the noise of Adam's steps stays the
same (arXiv 2205.10287; what it says of Adam's β is not followed).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Self

from model.config import ModelConfig
from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.law import Law, PowerLaw
from train.scaling.size import size_of

WARNED_DECADES = 1.0  # decades outside of what was measured, from which on a law's answer is warned of
GROWTH = 16  # last batch over first, at most
LR_EXPONENT = 0.5  # of the batch, while it grows
NAMES = {"flops": "C", "params": "N", "active": "active N", "tokens": "D", "lr": "learning rate", "batch": "batch"}

Lengths = tuple[tuple[int, int], ...]  # [tokens, T]


@dataclass(frozen=True)
class Course:
    """A run as a law counts it: its size, and its compute after so many tokens.

    Attributes:
        rates: [tokens, FLOPs per token] from there on: M, or 6·N where the law's C is 6·N·D.
    """

    params: int
    active: int
    rates: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, law: Law, model: ModelConfig, lengths: Lengths) -> Self:
        """Of a model that reads sequences of these lengths."""
        sizes = [(start, size_of(model, length)) for start, length in lengths]
        first = sizes[0][1]
        rates = [(start, s.flops_per_token if law.compute == "M*D" else 6 * s.active) for start, s in sizes]
        return cls(first.params, first.active, tuple(rates))

    def at(self, tokens: float) -> dict[str, float]:
        """N, active, D and C when so many tokens have been consumed."""
        ends = [start for start, _ in self.rates[1:]] + [math.inf]
        flops = sum(rate * (min(tokens, end) - start) for (start, rate), end in zip(self.rates, ends) if start < tokens)
        return {"params": self.params, "active": self.active, "tokens": tokens, "flops": flops}


@dataclass(frozen=True)
class Advice:
    """What a law says at one place.

    Attributes:
        lr, batch_tokens: None where the law has none.
        distances: decades outside of what was measured, of each quantity that was.
    """

    law: Law
    variables: dict[str, float]
    lr: Estimate | None
    batch_tokens: Estimate | None
    distances: dict[str, float]

    def warnings(self) -> list[str]:
        """A line for what is far outside of what was measured."""
        far = {name: distance for name, distance in self.distances.items() if distance > WARNED_DECADES}
        if not far:
            return []
        places = ", ".join(
            f"{NAMES[name]} by {distance:.1f} decades ({self._range(name)})" for name, distance in far.items()
        )
        return [
            f"law {self.law.name} is far outside of what it was measured on: {places}; compare a few runs around its answer, or "
            "fit a law to runs nearer to this one (rorqual scaling)"
        ]

    def _range(self, name: str) -> str:
        low, high = self.law.measured[name]  # type: ignore[index]
        return f"{self.variables[name]:.3g}, measured {low:.3g} to {high:.3g}"


def advise(law: Law, course: Course, tokens: float) -> Advice:
    """A law's answer for a run of so many tokens."""
    at = course.at(tokens)
    lr = law.lr.estimate(**at) if law.lr else None
    batch = law.batch_tokens.estimate(**at) if law.batch_tokens else None
    return Advice(law, at, lr, batch, law.distances(**at))


def whole_batch(batch_tokens: float, unit: int) -> int:
    """Tokens of the batch of 2^k or 3·2^(k-1) units that is nearest in ratio.

    Args:
        batch_tokens: what it should be.
        unit: tokens; a sequence, or as many as shall divide every batch.
    """
    wanted = max(batch_tokens / unit, 1.0)
    power = 2 ** math.floor(math.log2(wanted))
    near = [power, 2 * power] + ([3 * power // 2] if power > 1 else [])
    return unit * min(near, key=lambda units: abs(math.log(units / wanted)))


def growing_batch(law: Law, course: Course, tokens: int, unit: int) -> tuple[tuple[int, int], ...]:
    """[tokens, batch_tokens] of a run whose batch follows the law's best batch of what has been spent.

    Raises:
        ScalingError: the law's batch does not grow with the tokens.
    """
    batch = required(law, "batch_tokens")

    def best(at: float) -> float:
        return float(batch(**course.at(at)))

    if sum(exponent for name, exponent in batch.exponents.items() if name in ("tokens", "flops")) <= 0:
        raise ScalingError(
            f"law = {law.name!r}: its best batch does not grow with the tokens, so there is no ramp; use auto"
        )
    levels = [whole_batch(best(tokens), unit)]
    while levels[0] % (2 * unit) == 0 and levels[0] * GROWTH > levels[-1]:
        levels.insert(0, levels[0] // 2)
    points = [(0, levels[0])]
    for level in levels[1:]:  # from √½ of it on a level is nearer, in ratio, than its half
        start = 1 + bisect_left(range(1, tokens), level / math.sqrt(2), key=best)
        if start < tokens:
            points.append((start, level))
    return tuple(points)


def required(law: Law, part: str) -> PowerLaw:
    """A part of the law that is a power law.

    Raises:
        ScalingError: the law has none.
    """
    found: PowerLaw | None = getattr(law, part)
    if found is None:
        has = [name for name in ("lr", "batch_tokens", "flops_per_token", "loss", "best_loss") if getattr(law, name)]
        raise ScalingError(
            f"law = {law.name!r}: has no {part}, only {', '.join(has) or 'provenance'}; use another law, for example step-law"
        )
    return found
