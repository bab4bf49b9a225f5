"""How long one waits for another before it is said, and before the run is given up."""

import math
from dataclasses import dataclass

TELL = 60.0  # seconds
LONG = 7200.0  # seconds in which a save, or a load, need not move
START = 1800.0  # seconds in which nothing need move while kernels are built, weights made and the first step compiled


@dataclass(frozen=True)
class Patience:
    """Of a run, in seconds: `tell` until a line says who does not answer, `hang` until the run ends; infinite never ends it."""

    hang: float = math.inf

    @classmethod
    def of(cls, hang_seconds: float | None) -> "Patience":
        return cls(math.inf if hang_seconds is None else hang_seconds)

    @property
    def tell(self) -> float:
        return min(TELL, self.hang / 2)

    @property
    def alone(self) -> float:
        """For one rank to move while all others rest, which they have done for `hang` by then."""
        return 2 * self.hang

    @property
    def beat(self) -> float:
        """Between two signs of life."""
        return min(5.0, self.tell / 8)

    @property
    def grace(self) -> float:
        """Between a rank's own end and that of the others, who mostly come to the same end by themselves."""
        return min(3.0, self.tell)

    @property
    def answer(self) -> float:
        """For saying where one stands, when asked."""
        return min(5.0, self.tell)
