"""How many rows experts get in a step that is only simulated: the routers of such a step decide nothing.

A token chooses K of E experts. Rows that leave a rank go to all expert ranks alike; at the rank that is looked at, the fullest,
`imbalance` times the mean arrives, from all alike:

    leave    N·K            N·K / ranks to each
    arrive   imbalance·N·K  imbalance·N·K / ranks from each

in every layer and micro-batch, since memory must suffice for the worst of them.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Load:
    """The load of the fullest expert rank.

    Args:
        imbalance: rows that arrive there over the mean of all ranks; at least 1, and at most their number
            (`PlannedStep.skew`).
    """

    imbalance: float = 1.0

    def rows(self, leaving: Tensor, arriving: Tensor, total: int) -> tuple[list[int], list[int]]:
        """In the place of `AllToAllDispatcher.rows`, for counts that have no values."""
        ranks = len(leaving)
        return evenly(total, ranks), evenly(round(self.imbalance * total), ranks)


def evenly(rows: int, ranks: int) -> list[int]:
    """A number of rows for each rank, the first having one more where it does not come out even."""
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
