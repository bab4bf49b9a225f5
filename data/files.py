"""Writing files so that a reader sees the old file or the whole new one, never a part; and where a cache lies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept when no other place is named."""
    return Path.home() / ".cache" / "rorqual"


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, what was written there becomes `path`.

    The data reaches the disk before the name does: the file is synced, renamed over `path`, then the folder is synced.
    When the block raises, the temporary file is removed and `path` is untouched.

    Raises:
        OSError: the folder is missing, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
