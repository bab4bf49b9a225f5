"""What a launch script reads of a run: torchrun and accelerate hide the exit codes of their processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Status:
    """The file of `train --status FILE`, which a node's first process writes.

        pid=4711     from here on SIGTERM and SIGUSR1 to this process save and stop
        exit=0       it has ended by its own decision

    Args:
        file: None writes nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def ready(self, process: int) -> None:
        """Signals are listened to."""
        if self._file:
            self._file.write_text(f"pid={process}\n", encoding="utf-8")

    def end(self, code: int) -> None:
        """The last thing that a process does."""
        if self._file:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"exit={code}\n")


@contextmanager
def reported_to(file: Path | None, code_of: Callable[[BaseException], int]) -> Iterator[Status]:
    """Write down how the block ends, if it ends by its own decision: not by a bug.

    Args:
        code_of: the exit code of an error; 1 is that of a bug.
    """
    status = Status(file)
    try:
        yield status
    except Exception as error:
        if (code := code_of(error)) > 1:
            status.end(code)
        raise
