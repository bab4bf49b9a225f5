"""What changes during a run, as pure functions of the tokens consumed: learning rate, batch, γ, α, λ.

Nothing here remembers anything. A step is described by the tokens consumed before it, so that a resumed run, a longer run or a
run on another number of processes sees the same values at the same place.

    lr(tokens) = peak · min(1, (s + 1) / warmup_steps) · shape(tokens / total)        s = steps made before

The first step has s = 0 and so 1/warmup_steps of the peak; step warmup_steps - 1 is the first at the peak. Step numbers follow
from the tokens by counting whole batches stage by stage, so a warm-up in steps is exact under a growing batch.

The run ends with the first step that reaches `tokens`: batches are never cut, so up to one batch less one sequence is trained
on beyond it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from parallel.engine import StepSettings
from train.fields import WholePoints
from train.sections import ScheduleSection

V = TypeVar("V", int, float)
Shape = Callable[[float], float]  # share of the tokens consumed, in [0, 1) -> multiple of the peak


class Step(NamedTuple):
    """One optimizer step: its settings, and the index of the first of its `settings.batch` samples."""

    settings: StepSettings
    first_sample: int


class Schedule:
    """The schedules of one run.

    Args:
        config: the recipe's schedule section; its batches must be multiples of `sequence_length`.
        sequence_length: T, tokens of a sample.

    Attributes:
        tokens: the tokens asked for.
        total_steps: steps from the first to the last.
        final_tokens: tokens consumed after the last step; `tokens` rounded up to whole batches.
    """

    def __init__(self, config: ScheduleSection, sequence_length: int) -> None:
        self.config = config
        self.sequence_length = sequence_length
        self.tokens = config.tokens
        self._batches = as_points(config.batch_tokens)
        assert all(size % sequence_length == 0 for _, size in self._batches), (self._batches, sequence_length)
        self._shape = shape_of(config)
        self._spans = spans(self._batches, config.tokens)
        last = self._spans[-1]
        self.total_steps = last.first_step + last.steps
        self.final_tokens = last.first_token + last.steps * last.batch_tokens

    def settings(self, tokens: int) -> StepSettings:
        """The settings of the step that starts after `tokens` tokens."""
        return StepSettings(
            lr=self.learning_rate(tokens),
            gamma=value_at(as_points(self.config.gamma), tokens),
            alpha=value_at(as_points(self.config.alpha), tokens),
            lambda_=value_at(as_points(self.config.lambda_), tokens),
            batch=value_at(self._batches, tokens) // self.sequence_length,
        )

    def steps(self, from_tokens: int = 0) -> Iterator[Step]:
        """The steps of the run from one that starts after `from_tokens` tokens to the last.

        What the loader reads of them is `(step.first_sample, step.settings.batch)`.
        """
        assert from_tokens % self.sequence_length == 0, (from_tokens, self.sequence_length)
        tokens = from_tokens
        while tokens < self.tokens:
            settings = self.settings(tokens)
            yield Step(settings, tokens // self.sequence_length)
            tokens += settings.batch * self.sequence_length

    def batches(self) -> list[int]:
        """Every global batch of the run in sequences, ascending, each once; the layout must divide all of them."""
        return sorted({span.batch_tokens // self.sequence_length for span in self._spans})

    def step_at(self, tokens: int) -> float:
        """Steps made when `tokens` have been consumed: whole where a step starts, between two whole numbers elsewhere."""
        span = self._spans[bisect_right(self._spans, tokens, key=lambda span: span.first_token) - 1]
        return span.first_step + (tokens - span.first_token) / span.batch_tokens

    def learning_rate(self, tokens: int) -> float:
        """Learning rate of the step that starts after `tokens` tokens."""
        warmed = min(1.0, (self.step_at(tokens) + 1) / max(self.config.warmup_steps, 1))
        return self.config.lr * warmed * self._shape(tokens / self.tokens)


@dataclass(frozen=True)
class Span:
    """Steps of equal batch, one after the other."""

    first_token: int
    first_step: int
    steps: int
    batch_tokens: int


def spans(batches: WholePoints, tokens: int) -> list[Span]:
    """Cut a run into spans of equal batch.

    A stage begins with the first step that starts at or after its position. A stage shorter than the batch before it may have no
    step at all.
    """
    ends = [start for start, _ in batches[1:]] + [tokens]
    token = step = 0
    found = []
    for (_, batch), end in zip(batches, ends, strict=True):
        steps = -((token - end) // batch)  # ceil((end - token) / batch)
        if steps > 0:
            found.append(Span(token, step, steps, batch))
            token, step = token + steps * batch, step + steps
    return found


def as_points(value: V | tuple[tuple[int, V], ...]) -> tuple[tuple[int, V], ...]:
    """A constant as a list of one [tokens, value]."""
    return value if isinstance(value, tuple) else ((0, value),)


def value_at(points: tuple[tuple[int, V], ...], tokens: int) -> V:
    """The value of the last point at or before `tokens`."""
    return points[bisect_right(points, tokens, key=lambda point: point[0]) - 1][1]


def shape_of(config: ScheduleSection) -> Shape:
    """The function that the recipe's `shape` names."""
    if config.shape == "multistep":
        assert config.milestones is not None
        return multistep(config.milestones)
    return {"v3": v3, "cosine": cosine, "wsd": wsd}[config.shape]


# DeepSeek-V3 §4.2, of 14.8T tokens: the peak for 10T, a cosine over 4.3T, a tenth for 333B, 7.3e-6 for the last 167B.
V3_CONSTANT_UNTIL = 10_000 / 14_800
V3_COSINE_UNTIL = 14_300 / 14_800
V3_TENTH_UNTIL = 14_633 / 14_800
V3_LAST = 7.3e-6 / 2.2e-4


def v3(share: float) -> float:
    """Constant, cosine to a tenth, constant, and a last smaller constant."""
    if share < V3_CONSTANT_UNTIL:
        return 1.0
    if share < V3_COSINE_UNTIL:
        return cosine((share - V3_CONSTANT_UNTIL) / (V3_COSINE_UNTIL - V3_CONSTANT_UNTIL))
    return 0.1 if share < V3_TENTH_UNTIL else V3_LAST


def cosine(share: float) -> float:
    """Half a cosine from 1 to 0.1 (the yardstick of DeepSeek LLM §2.3)."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2


def multistep(milestones: tuple[tuple[float, float], ...]) -> Shape:
    """Constant stages: 1, then each milestone's factor from its share of the tokens on (DeepSeek LLM §2.3)."""

    def shape(share: float) -> float:
        return next((factor for start, factor in reversed(milestones) if share >= start), 1.0)

    return shape


def wsd(share: float) -> float:
    """Warm-up, stable, decay: constant, then 1 - √ towards zero over the last tenth.

    A tenth of the tokens is enough to decay (MiniCPM, arXiv 2404.06395); 1 - √ was the best of the forms that Hägele et al.
    compared (arXiv 2405.18392).
    """
    return 1.0 if share < 0.9 else 1 - math.sqrt((share - 0.9) / 0.1)
