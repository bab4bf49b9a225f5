"""What changes during a run, as pure functions of the tokens consumed: learning rate, batch, γ, α, λ, and the sequence length.

Nothing here remembers anything. A step is described by the tokens consumed before it, so that a resumed run, a longer run or a
run on another number of processes sees the same values at the same place.

    lr(tokens) = peak · min(1, (s + 1) / warmup_steps) · shape(tokens / total) · (batch / last batch)^e       s = steps made before

e is `lr_batch_exponent`: 0, and ½ where a law lets the batch grow (`train.scaling.apply`).

The first step has s = 0 and so 1/warmup_steps of the peak; step warmup_steps - 1 is the first at the peak. Step numbers follow
from the tokens by counting whole batches stage by stage, so a warm-up in steps is exact under a growing batch.

Batches are never cut. What changes at a token count, the batch or a stage of the data, changes with the first step that starts at
or after it, and all sequences of a step have one length. The run ends with the first step that reaches `tokens`: up to one batch
less one sequence is trained on beyond it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from parallel.engine import StepSettings
from parallel.layout import Layout
from train.fields import WholePoints, as_points, value_at
from train.guard.passed_over import begin
from train.sections import SampleRanges, ScheduleSection

Shape = Callable[[float], float]  # share of the tokens consumed, in [0, 1) -> multiple of the peak


class Step(NamedTuple):
    """One optimizer step: its settings, and what it reads: `settings.batch` samples."""

    settings: StepSettings
    first_token: int  # tokens consumed before it
    first_sample: int  # the first that it reads
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens of its batch."""
        return self.settings.batch * self.sequence_length

    @property
    def end_sample(self) -> int:
        """Samples consumed after it."""
        return self.first_sample + self.settings.batch


class Schedule:
    """The schedules of one run.

    Args:
        config: the recipe's schedule section; its batches must be multiples of the sequence length beside them.
        sequence_length: T, tokens of a sample, or [tokens, T] with an entry for every stage of the data (`DataSection.lengths`).
        passed_over: [first, last] samples that no step reads, ascending.

    Attributes:
        tokens: the tokens asked for.
        spans: the whole run in steps of one kind.
        total_steps: steps from the first to the last.
        final_tokens: tokens consumed after the last step; `tokens` rounded up to whole batches.
    """

    def __init__(
        self, config: ScheduleSection, sequence_length: int | WholePoints, passed_over: SampleRanges = ()
    ) -> None:
        self.config = config
        self.passed_over = passed_over
        self.tokens = config.tokens
        self._batches = as_points(config.batch_tokens)
        self._lengths = as_points(sequence_length)
        self._shape = shape_of(config)
        self.spans = self.spans_from(0)
        assert all(span.batch_tokens % span.sequence_length == 0 for span in self.spans), self.spans
        last = self.spans[-1]
        self.total_steps = last.first_step + last.steps
        self.final_tokens = last.end

    def settings(self, tokens: int) -> StepSettings:
        """The settings of the step that starts after `tokens` tokens."""
        return StepSettings(
            lr=self.learning_rate(tokens),
            gamma=value_at(as_points(self.config.gamma), tokens),
            alpha=value_at(as_points(self.config.alpha), tokens),
            lambda_=value_at(as_points(self.config.lambda_), tokens),
            batch=value_at(self._batches, tokens) // value_at(self._lengths, tokens),
        )

    def steps(self, from_tokens: int = 0, from_sample: int = 0) -> Iterator[Step]:
        """The steps of the run from one that starts after so many tokens and samples to the last."""
        tokens, sample = from_tokens, from_sample
        while tokens < self.tokens:
            settings = self.settings(tokens)
            first = begin(sample, settings.batch, self.passed_over)
            step = Step(settings, tokens, first, value_at(self._lengths, tokens))
            yield step
            tokens, sample = tokens + step.tokens, step.end_sample

    def spans_from(self, tokens: int) -> list["Span"]:
        """The steps from one that starts after `tokens` tokens to the last, where a batch and a stage of the data hold."""
        return spans(self._batches, self._lengths, self.tokens, tokens)

    def batches(self) -> list[int]:
        """Every global batch of the run in sequences, ascending, each once; the layout must divide all of them."""
        return sorted({span.sequences for span in self.spans})

    def check_layout(self, layout: Layout, micro_batch: Callable[[int], int], is_begun: bool = False) -> None:
        """Refuse processes that cannot share every batch evenly, or a pipeline that one of them does not fill.

        Args:
            micro_batch: sequences of a micro-batch in the step that starts after so many tokens.
            is_begun: the run has begun, so that its law chooses no more.

        Raises:
            LayoutError: it says what would help.
        """
        law, ranks = self.config.from_law, layout.data_ranks
        fix = None
        if law and law.batch_tokens and not is_begun:
            asked = "ramp" if isinstance(law.batch_tokens, tuple) else "auto"
            multiple = math.lcm(self.config.batch_multiple, ranks)
            fix = f"write schedule.batch_tokens={asked} schedule.batch_multiple={multiple}"
        for sequences, size in sorted({(span.sequences, micro_batch(span.first_token)) for span in self.spans}):
            layout.check_batch(sequences, size, fix)

    def step_at(self, tokens: int) -> float:
        """Steps made when `tokens` have been consumed: whole where a step starts, between two whole numbers elsewhere."""
        span = self.spans[bisect_right(self.spans, tokens, key=lambda span: span.first_token) - 1]
        return span.first_step + (tokens - span.first_token) / span.batch_tokens

    def learning_rate(self, tokens: int) -> float:
        """Learning rate of the step that starts after `tokens` tokens."""
        warmed = min(1.0, (self.step_at(tokens) + 1) / max(self.config.warmup_steps, 1))
        grown = (value_at(self._batches, tokens) / self._batches[-1][1]) ** self.config.lr_batch_exponent
        return self.config.lr * warmed * self._shape(tokens / self.tokens) * grown


@dataclass(frozen=True)
class Span:
    """Steps of equal batch in one stage of the data, one after the other."""

    first_token: int
    first_step: int
    steps: int
    batch_tokens: int
    sequence_length: int

    @property
    def sequences(self) -> int:
        """Sequences of a batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def end(self) -> int:
        """Tokens consumed after its last step."""
        return self.first_token + self.steps * self.batch_tokens


def spans(batches: WholePoints, lengths: WholePoints, tokens: int, from_tokens: int = 0) -> list[Span]:
    """Cut the part of a run from `from_tokens` to `tokens` where the batch changes or a stage of the data begins.

    A change comes with the first step that starts at or after its position. A stage shorter than the batch before it may have no
    step at all.
    """
    starts = {start for start, _ in (*batches, *lengths)}
    token, step = from_tokens, 0
    found = []
    for end in [*sorted(start for start in starts if from_tokens < start < tokens), tokens]:
        batch, length = value_at(batches, token), value_at(lengths, token)
        steps = -((token - end) // batch)  # ceil((end - token) / batch)
        if steps > 0:
            found.append(Span(token, step, steps, batch, length))
            token, step = token + steps * batch, step + steps
    return found


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
