"""Megatron's indexed token files (MMIDIDX), which Megatron-LM and GPT-NeoX read and write.

`NAME.bin` holds the tokens of all documents one after the other and nothing else. `NAME.idx`, little-endian:

    9 bytes  "MMIDIDX\\0\\0"                 u64  version, 1               u8  code of the tokens' type
    u64      number of sequences S          u64  number of documents + 1
    i32[S]   tokens of each sequence        i64[S]  byte at which each starts in the .bin
    i64[documents + 1]                      first sequence of each document, and S

Here every document is one sequence.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import replace_file
from data.mapped import map_file

MOST_TOKENS = 2**31 - 1  # of a document: the index holds its length as int32
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
REMEDY = "prepare the store again, or copy the file again"

Tokens = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where all ids fit into it, else int32: the two types that Megatron writes.

    Megatron itself takes int32 from 65,500 ids on; its readers go by the type that the index names.
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def file_of(prefix: Path, ending: str) -> Path:
    """A file of a pair, whose prefix may have dots of its own."""
    return prefix.with_name(f"{prefix.name}.{ending}")


def write_indexed(prefix: Path, documents: Iterable[Tokens], dtype: np.dtype[Any]) -> None:
    """Write `prefix.bin` and `prefix.idx`; each document is an array of token ids [length], stored as `dtype`."""
    lengths: list[int] = []
    with replace_file(file_of(prefix, "bin")) as temporary, temporary.open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, dtype=dtype).data)
            lengths.append(len(document))
    write_index(prefix, np.asarray(lengths, np.int64), dtype)


def write_index(prefix: Path, lengths: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> None:
    """Write `prefix.idx` for tokens that lie in `prefix.bin`: documents of these lengths [documents], one after the other.

    Raises:
        DataError: a document is too long for an index.
    """
    index = file_of(prefix, "idx")
    if (wrong := np.flatnonzero(lengths > MOST_TOKENS)).size:
        raise DataError(
            f"{index}: document {wrong[0]} has {lengths[wrong[0]]:,} tokens; an index holds at most {MOST_TOKENS:,} of one; "
            "cut the document into several"
        )
    code = next(code for code, known in DTYPES.items() if known == dtype)
    with replace_file(index) as temporary, temporary.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((np.cumsum(lengths) - lengths) * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_sizes(prefix: Path) -> npt.NDArray[np.int32]:
    """Tokens of each document [documents] of a pair, read into memory without a look at the tokens.

    Raises:
        DataError: the index is missing, foreign or cut off.
    """
    _, sequences, _ = _read_header(file_of(prefix, "idx"))
    return np.fromfile(file_of(prefix, "idx"), "<i4", sequences, offset=HEADER.size)


@dataclass(frozen=True)
class Indexed:
    """A pair `.bin`/`.idx`, memory-mapped: opening reads a header, a document reads its own bytes."""

    tokens: Tokens  # [tokens] all documents one after the other
    sizes: npt.NDArray[np.int32]  # [documents] tokens of each
    pointers: npt.NDArray[np.int64]  # [documents] byte at which each starts

    @classmethod
    def open(cls, prefix: Path) -> "Indexed":
        """Map `prefix.bin` and `prefix.idx`.

        Raises:
            DataError: a file is missing, foreign, or not as long as the index says.
        """
        index, binary = file_of(prefix, "idx"), file_of(prefix, "bin")
        dtype, sequences, size = _read_header(index)
        if not binary.is_file():
            raise DataError(f"{binary}: missing; {REMEDY}")
        mapped = map_file(index, np.dtype(np.uint8), size)
        sizes, pointers = mapped[HEADER.size :][: 4 * sequences], mapped[HEADER.size + 4 * sequences :][: 8 * sequences]
        sizes, pointers = sizes.view("<i4"), pointers.view("<i8")
        expected = int(pointers[-1]) + int(sizes[-1]) * dtype.itemsize if sequences else 0
        if binary.stat().st_size != expected:
            raise DataError(f"{binary}: {binary.stat().st_size} bytes; its index says {expected}; {REMEDY}")
        return cls(map_file(binary, dtype, expected // dtype.itemsize), sizes, pointers)

    def document(self, number: int) -> Tokens:
        """Token ids [length] of one document."""
        start = int(self.pointers[number]) // self.tokens.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[number])]

    def start(self, number: int) -> int:
        """Position in `tokens` of a document's first token; the number of tokens for `number` = documents."""
        if number == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[number]) // self.tokens.dtype.itemsize

    def documents_of(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Number of the document of each token in [start, stop): [stop − start]."""
        itemsize = self.tokens.dtype.itemsize
        # Not numpy's search: the pointers lie unaligned in the file, and it would copy all of them first.
        first = bisect_right(self.pointers, start * itemsize) - 1
        last = bisect_right(self.pointers, (stop - 1) * itemsize, lo=first) - 1
        if first == last:
            return np.full(stop - start, first, np.int64)
        edges = self.pointers[first : last + 2] // itemsize  # where these documents, and the one after them, start
        edges = np.clip(np.append(edges, stop)[: last - first + 2], start, stop)
        return np.repeat(np.arange(first, last + 1, dtype=np.int64), np.diff(edges))


def _read_header(index: Path) -> tuple[np.dtype[Any], int, int]:
    """Type of the tokens, number of sequences and size in bytes of an index that is long enough for them."""
    if not index.is_file():
        raise DataError(f"{index}: missing; {REMEDY}")
    size = index.stat().st_size
    if size < HEADER.size:
        raise DataError(f"{index}: {size} bytes; an index has at least {HEADER.size}; {REMEDY}")
    with index.open("rb") as file:
        magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise DataError(f"{index}: starts with {magic!r}; a token index starts with {MAGIC!r}; {REMEDY}")
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{index}: version {version}, type code {code}; version 1 and one of {list(DTYPES)} are read; {REMEDY}"
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise DataError(f"{index}: {size} bytes; {sequences} sequences need {expected}; {REMEDY}")
    return np.dtype(DTYPES[code]), sequences, size
