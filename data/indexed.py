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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.checked import Checked, of_prefix, sealed
from data.errors import DataError
from data.files import replace_file

MOST_TOKENS = 2**31 - 1  # of a document: the index holds its length as int32
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
SIZE, POINTER = np.dtype("<i4"), np.dtype("<i8")  # of a sequence, in the index
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
REMEDY = "prepare the store again, or copy the file again"

Tokens = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where all ids fit into it, else int32: the two types that Megatron writes.

    Megatron itself takes int32 from 65,500 ids on; its readers go by the type that the index names.
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def write_indexed(prefix: Path, documents: Iterable[Tokens], dtype: np.dtype[Any]) -> None:
    """Write `prefix.bin` and `prefix.idx`; each document is an array of token ids [length], stored as `dtype`."""
    lengths: list[int] = []
    with replace_file(of_prefix(prefix, "bin")) as temporary, temporary.open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, dtype=dtype).data)
            lengths.append(len(document))
    write_index(prefix, np.asarray(lengths, np.int64), dtype)


def write_index(prefix: Path, lengths: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> None:
    """Write `prefix.idx` for tokens that lie in `prefix.bin`: documents of these lengths [documents], one after the other.

    Raises:
        DataError: a document is too long for an index.
    """
    index = of_prefix(prefix, "idx")
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
    _, sequences, _ = _read_header(of_prefix(prefix, "idx"))
    return np.fromfile(of_prefix(prefix, "idx"), SIZE, sequences, offset=HEADER.size)


class Indexed:
    """A pair `.bin`/`.idx`, memory-mapped: opening reads a header, a document reads its own bytes.

    Args:
        is_sealed: compare every block that is read with the sums in `prefix.crc`; what is no store's has none.

    Raises:
        DataError: from here, a file is missing, foreign, or not as long as the index says; from here and every method,
            a block that is needed is not what was written.
    """

    def __init__(self, prefix: Path, is_sealed: bool = True) -> None:
        binary, index = of_prefix(prefix, "bin"), of_prefix(prefix, "idx")
        self.dtype, self.document_count, size = _read_header(index)
        if not binary.is_file():
            raise DataError(f"{binary}: missing; {REMEDY}")
        sums = sealed(prefix, REMEDY) if is_sealed else {}
        remedy = f"`rorqual data verify {prefix.parent}` reads all of the store; {REMEDY}"
        self._index = Checked(index, size, sums.get("idx"), remedy)
        self._index.read(0, HEADER.size)  # the header has been read already
        self._first_pointer = HEADER.size + SIZE.itemsize * self.document_count  # byte of it
        end = 0
        if last := self.document_count:
            end = int(self.pointers(last - 1, last)[0]) + int(self.lengths(last - 1, last)[0]) * self.dtype.itemsize
        if binary.stat().st_size != end:
            raise DataError(f"{binary}: {binary.stat().st_size} bytes; its index says {end}; {REMEDY}")
        self._binary = Checked(binary, end, sums.get("bin"), remedy)
        self.token_count = end // self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of all documents one after the other [stop − start]."""
        return self._binary.array(self.dtype, 0, start, stop)

    def document(self, number: int) -> Tokens:
        """Token ids [length] of one document."""
        start = self.start(number)
        return self.read(start, start + int(self.lengths(number, number + 1)[0]))

    def start(self, number: int) -> int:
        """Position of a document's first token; the number of tokens for `number` = documents."""
        if number == self.document_count:
            return self.token_count
        return int(self.pointers(number, number + 1)[0]) // self.dtype.itemsize

    def lengths(self, first: int, last: int) -> npt.NDArray[np.int32]:
        """Tokens of the documents first … last−1 [last − first]."""
        return self._index.array(SIZE, HEADER.size, first, last)

    def pointers(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Bytes at which the documents first … last−1 start [last − first]."""
        return self._index.array(POINTER, self._first_pointer, first, last)

    def documents_of(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Number of the document of each token in [start, stop): [stop − start].

        The search itself compares nothing: it would touch a block for each of its steps. What it ends at is compared, and being
        right, it proves that the search was.
        """
        begin, end = start * self.dtype.itemsize, stop * self.dtype.itemsize
        # Not numpy's search: the pointers lie unaligned in the file, and it would copy all of them first.
        pointers = self._index.unchecked[self._first_pointer :][: POINTER.itemsize * self.document_count].view(POINTER)
        first = max(bisect_right(pointers, begin) - 1, 0)
        last = max(bisect_right(pointers, end - 1, lo=first) - 1, first)
        # Where these documents start, and the one after them.
        edges = np.append(self.pointers(first, min(last + 2, self.document_count)), len(self._binary))[
            : last - first + 2
        ]
        if not edges[0] <= begin <= end <= edges[-1]:
            self._index.read(0, len(self._index))  # finds what misled the search
            raise AssertionError(
                f"{self._index.path}: documents {first} to {last} do not hold tokens {start} to {stop}"
            )
        if first == last:
            return np.full(stop - start, first, np.int64)
        edges = np.clip(edges // self.dtype.itemsize, start, stop)
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
