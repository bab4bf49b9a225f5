"""Files opened for what they hold, whether or not they are compressed, and read in pieces of bounded size."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow

from data.errors import DataError

CHUNK_BYTES = 1 << 20  # unpacked at a time
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, OSError)  # what reading a truncated or damaged file raises


class TooLong(NamedTuple):
    """Stands for a record that was passed over without being held."""

    bytes: int


@contextmanager
def opened(path: Path | str) -> Iterator[IO[bytes]]:
    """A file by its last ending: .gz, .bz2, .xz, .zst, else as it is. One of 0 bytes holds nothing, whatever its ending.

    All parts of a file of several (`cat a.gz b.gz`, pzstd, multistream dumps of Wikipedia) are read.

    Raises:
        DataError: the file cannot be opened. Reading from it raises one of DAMAGE where it is damaged.
    """
    path = Path(path)
    try:
        file = _open(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror or error}); check the file and its rights"
        ) from None
    with file:
        yield file


def _open(path: Path) -> IO[bytes]:
    if path.stat().st_size == 0:
        return path.open("rb")
    match path.suffix:
        case ".gz":
            return cast(IO[bytes], gzip.open(path))
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            # pyarrow notices a truncated file, and reads all frames of one that has several.
            return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd", buffer_size=None))
        case _:
            return path.open("rb")


def damaged(path: Path | str, after: str, error: Exception) -> DataError:
    """The error for a file that ends or breaks within what it should hold; `after`: its last whole record."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{path}: damaged after {after} ({reason}); fetch the file again")


def records(file: IO[bytes], separator: bytes | None, limit: int) -> Iterator[bytearray | TooLong]:
    """What lies between separators (None: all there is). The last record is empty where a separator ends the file.

    At most `limit` bytes of a record and one chunk are held.
    """
    overlap = len(separator) - 1 if separator else 0
    pending = bytearray()  # the record under way; never holds a whole separator
    passed_over = 0  # bytes of it that were too many to hold
    while chunk := file.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
        start = max(0, len(pending) - overlap)
        pending += chunk
        if separator is not None and pending.find(separator, start) >= 0:
            *complete, pending = pending.split(separator)
            for record in complete:
                size = passed_over + len(record)
                yield TooLong(size) if size > limit else record
                passed_over = 0
            del complete, record
        if passed_over + len(pending) > limit + overlap:
            passed_over += len(pending) - overlap
            del pending[: len(pending) - overlap]
    size = passed_over + len(pending)
    yield TooLong(size) if size > limit else pending
