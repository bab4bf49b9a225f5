"""Locks among processes and machines that share a folder."""

import fcntl
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from data.errors import DataError


def try_lock(path: Path, stack: ExitStack, mode: str = "a+") -> IO[str] | None:
    """Lock a file until the stack is closed or this process ends, however it ends.

    Returns:
        the open file, or None where another process has it locked. A child that inherits the file holds the lock too.

    Raises:
        DataError: the file system has no locks.
    """
    file = stack.enter_context(path.open(mode))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be locked ({error.strerror}); mount the file system with locks (flock), or give a folder on another"
        ) from None
    return file
