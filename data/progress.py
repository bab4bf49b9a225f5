"""How far a long preparation is: a live line on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows what is being done, with counts that `update` brings up to date. Writes to standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status = Status("", console=self._console) if self._console.is_terminal else None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def update(self, text: str) -> None:
        """Something has moved: shown at once on a terminal, else at most every few seconds."""
        if self._status:
            self._status.update(text)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._console.print(text, soft_wrap=True, markup=False)

    def line(self, text: str) -> None:
        """A line that stays, with the seconds since the start."""
        self._last = time.monotonic()
        self._console.print(f"{self._last - self._started:6.1f} s  {text}", soft_wrap=True, markup=False)
