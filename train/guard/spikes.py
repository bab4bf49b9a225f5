"""Which losses stand out: a loss is held against the median of those before it, in robust standard deviations.

    limit(n) = median + threshold · max(1.4826 · MAD, median / 1000)        of the losses of steps n − 1 − window … n − 2

MAD is the median distance from the median; 1.4826 of it is the standard deviation where losses are normal (Hampel 1974). A curve
that stands still, by huge batches or because little is left to learn, must not make its median the limit. Median and MAD
forget up to half of the window: a spike of some steps does not move the limit of the next. If losses stay where they jumped to,
half a window later the limit is there too. One-sided: a loss that falls is none of this.

A limit is a function of the results up to step n − 2, always: a GPU's results are read one step late, and a run must not depend on
whether they were. Losses of another stage of the data (other text, another length) are not looked at. Until half a window is known
there is no limit.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from train.sections import SpikesSection


class Seen(NamedTuple):
    """What is remembered of a step."""

    number: int
    stage: int  # of the data
    first_sample: int
    loss: float | None  # None: not finite


class SpikeDetector:
    """Limits of losses to come.

    Args:
        record: what `record` returned for the checkpoint that the run continues from.
    """

    def __init__(self, section: SpikesSection, record: Iterable[Sequence[Any]] = ()) -> None:
        self.window, self.threshold = section.window, section.threshold
        self._seen = deque((Seen(*seen) for seen in record), maxlen=self.window + 1)

    def see(self, number: int, stage: int, first_sample: int, loss: float) -> None:
        """A step's result; every step, in order."""
        self._seen.append(Seen(number, stage, first_sample, loss if math.isfinite(loss) else None))

    def limit(self, number: int, stage: int) -> float:
        """Above which loss a step stands out that has not been seen yet; infinite while too little is known."""
        losses = [
            seen.loss
            for seen in self._seen
            if number - 1 - self.window <= seen.number <= number - 2 and seen.stage == stage and seen.loss is not None
        ]
        if len(losses) < (self.window + 1) // 2:
            return math.inf
        middle, deviation = center(losses)
        return middle + self.threshold * deviation

    def first_sample(self, number: int, steps: int) -> int:
        """Of the earliest of so many steps up to `number`, which has been seen, as far back as is known."""
        return next(seen.first_sample for seen in self._seen if seen.number > number - steps)

    def record(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [list(seen) for seen in self._seen]


def center(losses: Sequence[float]) -> tuple[float, float]:
    """Median, and robust standard deviation."""
    middle = median(losses)
    return middle, max(NORMAL * median(abs(loss - middle) for loss in losses), FLOOR * abs(middle))


NORMAL = 1.4826  # standard deviation of a normal distribution over its MAD
FLOOR = 1e-3  # of the median: smaller deviations are none
