"""Files whose bytes are compared with what was written, block by block, before anybody uses them.

A block is a page of 4,096 bytes with its CRC-32: what is looked at is what a mapped file fetches from the disk anyway, however
few tokens are wanted, and the sums are a thousandth of it. Nothing is remembered, so a page that had to go and is fetched again
is compared again. A damaged sum is found as surely as a damaged block, for the two then differ; `verify_store` tells which it is.

Of a pair of token files the sums lie beside it in `NAME.crc`, little-endian:

    8 bytes  "RQCRC32\\0"      u64  bytes of NAME.bin      u64  bytes of NAME.idx
    u32      of each block of NAME.bin, of which the last may be shorter; then of NAME.idx
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import replace_file
from data.manifest import FileRecord
from data.mapped import map_file

BLOCK = 4096
CHUNK = 1 << 24  # bytes or tokens looked at in one go by what reads whole files
MAGIC = b"RQCRC32\x00"
HEADER = struct.Struct("<8sQQ")
SUM = np.dtype("<u4")

Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint32]


class Checked:
    """The first `size` bytes of a file, mapped.

    Args:
        sums: CRC-32 of each block [blocks]; None: nothing is known of the file, and nothing is compared.
        remedy: what to do about a damaged block.
    """

    def __init__(self, path: Path, size: int, sums: Sums | None, remedy: str) -> None:
        self.path, self._sums, self._remedy = path, sums, remedy
        self.unchecked: Bytes = map_file(path, np.dtype(np.uint8), size)
        self._memory = self.unchecked.data

    def __len__(self) -> int:
        return len(self.unchecked)

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop): a view of the file.

        Raises:
            DataError: a block that holds some of them is not what was written.
        """
        if self._sums is not None and start < stop:
            first, last = start // BLOCK, -(-stop // BLOCK)
            for block, expected in enumerate(self._sums[first:last].tolist(), first):
                if zlib.crc32(self._memory[block * BLOCK : (block + 1) * BLOCK]) != expected:
                    raise self._damage(block)
        return self.unchecked[start:stop]

    def array(self, dtype: np.dtype[Any], offset: int, first: int, last: int) -> npt.NDArray[Any]:
        """Items [first, last) of an array that begins at byte `offset`; raises as `read` does."""
        return self.read(offset + first * dtype.itemsize, offset + last * dtype.itemsize).view(dtype)

    def _damage(self, block: int) -> DataError:
        end = min((block + 1) * BLOCK, len(self))
        return DataError(
            f"{self.path}: bytes {block * BLOCK:,} to {end:,} are not what was written (their CRC-32 differs); {self._remedy}"
        )


def seal(prefix: Path) -> dict[str, FileRecord]:
    """Write the sums of a finished pair of token files beside it; size and sha256 of the three files, by their names."""
    files = [of_prefix(prefix, ending) for ending in ("bin", "idx")]
    of_files = {file: summed(file) for file in files}
    sizes = [record.bytes for _, record in of_files.values()]
    with replace_file(sums := of_prefix(prefix, "crc")) as temporary, temporary.open("wb") as written:
        written.write(HEADER.pack(MAGIC, *sizes))
        for of_blocks, _ in of_files.values():
            written.write(of_blocks.tobytes())
    return {file.name: record for file, (_, record) in of_files.items()} | {sums.name: file_record(sums)}


def sealed(prefix: Path, remedy: str) -> dict[Literal["bin", "idx"], Sums]:
    """The sums of both files of a pair, mapped.

    Raises:
        DataError: they are missing, or those of files of other sizes.
    """
    path = of_prefix(prefix, "crc")
    if not path.is_file():
        raise DataError(f"{path}: missing; without it nobody sees a damaged token; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    magic, binary, index = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0)
    blocks = [-(-of // BLOCK) for of in (binary, index)]
    is_theirs = [of_prefix(prefix, ending).stat().st_size for ending in ("bin", "idx")] == [binary, index]
    if magic != MAGIC or not is_theirs or size != HEADER.size + SUM.itemsize * sum(blocks):
        raise DataError(f"{path}: does not hold the sums of the two files beside it; {remedy}")
    sums = map_file(path, SUM, sum(blocks), HEADER.size)
    return {"bin": sums[: blocks[0]], "idx": sums[blocks[0] :]}


def of_prefix(prefix: Path, ending: str) -> Path:
    """A file of a pair, whose prefix may have dots of its own."""
    return prefix.with_name(f"{prefix.name}.{ending}")


def summed(path: Path) -> tuple[Sums, FileRecord]:
    """CRC-32 of each block of a file [blocks], and its size and hash: the file is read once."""
    digest, sums = hashlib.sha256(), []
    for chunk in _chunks(path):
        digest.update(chunk)
        view = memoryview(chunk)
        sums += [zlib.crc32(view[start : start + BLOCK]) for start in range(0, len(chunk), BLOCK)]
    return np.asarray(sums, SUM), FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
