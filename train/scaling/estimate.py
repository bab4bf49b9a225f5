"""A number with its interval."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and, where it is known, the interval that contains the truth with 95 % confidence."""

    value: float
    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether the interval contains a value; an unknown interval contains nothing."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high

    def overlaps(self, other: "Estimate") -> bool:
        """Whether two intervals have a point in common; unknown ones have none."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high
