"""Steps whose results are read late, so that a device has its next step before the host looks at the last one."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.samples import Batch
from parallel.engine import Pending
from train.schedule import Step


class Launched(NamedTuple):
    """A step that is under way, and what will be said of it."""

    number: int  # optimizer steps of the run, this one counted in
    step: Step
    batches: list[Batch]
    pending: Pending
    waited: float  # seconds without data
    consumed: dict[str, int]  # tokens of every source, those of this step counted in


class Late:
    """The steps that were launched and not yet read, oldest first. On a GPU one at most stays behind; on a CPU none does.

    Each comes out once, in order: what is written of a run is the same, whether it was late or not.
    """

    def __init__(self) -> None:
        self._unread: deque[Launched] = deque()

    def add(self, launched: Launched) -> None:
        self._unread.append(launched)

    def due(self, at_once: Callable[[], bool]) -> Iterator[Launched]:
        """The steps to read now; the newest only if its result is there, or if `at_once` says so when all others are read."""
        while self._unread and (len(self._unread) > 1 or self._unread[0].pending.is_here or at_once()):
            yield self._unread.popleft()
