"""Whether a step went wrong, and how: in words that follow on `step 12`."""

from typing import NamedTuple

from parallel.engine import StepResult


class Wrong(NamedTuple):
    """What a step did that it should not have."""

    reason: str
    is_spike: bool  # its loss stands out; else a gradient is not finite, or a tensor exploded
    skipped: bool

    def of(self, step: int) -> str:
        """A line of the log begins so."""
        return f"step {step} {self.reason}{' and is skipped' if self.skipped else ''}"


def what_went_wrong(result: StepResult, limit: float) -> Wrong | None:
    """Of a step whose loss stands out above `limit`; None: nothing did."""
    if result.exploded:
        return Wrong(f"exploded ({result.exploded[0]})", False, result.skipped)
    if result.losses.main > limit:
        return Wrong(f"had a loss of {result.losses.main:.4g}, above {limit:.4g}", True, result.skipped)
    # While fp16's loss scale still falls, a skip is no sign of divergence.
    if result.skipped and result.loss_scale <= 1:
        return Wrong(f"had no finite gradient (first in {result.non_finite[0]})", False, True)
    return None
