"""The last stage: all documents of a split, source after source and each source in a seeded order, as pieces of bounded size."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.checked import seal
from data.indexed import Tokens, read_sizes, token_dtype, write_indexed
from data.manifest import SPLITS, FileRecord, Record, SourceSpan, SplitRecord
from data.permutation import Permutation
from data.prepare.encode import account as encoding_of
from data.prepare.encode import encoded_shard, tokenizer_folder
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item
from data.tokenizer import vocab_size

AT_ONCE = 1 << 16  # documents whose places are looked up in one go
OPEN_FILES = 256  # of the encoded shards of a source, whose documents are read in no order


class Part(Record):
    """Documents [first, last) of one source in their final order."""

    source: int
    first: int
    last: int


class Piece(Record):
    """What one `.bin` and `.idx` of the store hold."""

    prefix: str  # "train", or "train-00000" where the split has several
    parts: list[Part]


class Plan(Record):
    """The pieces of each split."""

    splits: dict[str, list[Piece]]


class Written(Record):
    """Account of a written piece."""

    files: dict[str, FileRecord]


def plans(job: Job, shards: list[Shard]) -> list[Item]:
    """One for the whole store."""
    (job.folder / "write").mkdir(exist_ok=True)
    return [Item(_plan(job), (job, shards))]


def plan(job: Job, shards: list[Shard]) -> str:
    """Decide where the splits are cut into pieces."""
    found = Plan(splits={split: _pieces(job, shards, split) for split in SPLITS})
    write_record(_plan(job), found)
    return f"{sum(map(len, found.splits.values()))} pieces"


def items(job: Job, shards: list[Shard]) -> list[Item]:
    """One for each piece of each split."""
    found = []
    for split, pieces in read_record(_plan(job), Plan).splits.items():
        for piece in pieces:
            own = [[shard for shard in shards if shard.source == part.source] for part in piece.parts]
            found.append(Item(_account(job, piece.prefix), (job, split, piece, own)))
    return found


def write(job: Job, split: str, piece: Piece, shards: list[list[Shard]]) -> str:
    """Write one piece.

    Args:
        shards: all shards of the source of each of the piece's parts.
    """
    dtype = token_dtype(vocab_size(tokenizer_folder(job)))
    documents = (
        document for part, own in zip(piece.parts, shards) for document in _in_order(job, split, part, own, dtype)
    )
    folder = job.folder / "write"
    write_indexed(folder / piece.prefix, documents, dtype)
    write_record(_account(job, piece.prefix), Written(files=seal(folder / piece.prefix)))
    return piece.prefix


def _pieces(job: Job, shards: list[Shard], split: str) -> list[Piece]:
    """Where a split is cut: before the document that would take a piece beyond `tokens_per_file`."""
    limit = job.recipe.tokens_per_file
    cut: list[list[Part]] = [[]]
    room = limit
    for source in range(len(job.recipe.sources)):
        lengths = _lengths(job, [shard for shard in shards if shard.source == source], split)
        if not len(lengths):
            continue
        order = _permutation(job, split, source, len(lengths))
        ends = np.cumsum(lengths[order(np.arange(len(lengths)))], dtype=np.int64)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = int(ends.searchsorted(before + room, side="right"))
            if last == first and cut[-1]:  # the next document has a piece of its own where it fits nowhere
                cut.append([])
                room = limit
                continue
            last = max(last, first + 1)
            cut[-1].append(Part(source=source, first=first, last=last))
            room -= int(ends[last - 1]) - before
            first = last
    names = [split] if len(cut) == 1 else [f"{split}-{number:05d}" for number in range(len(cut))]
    return [Piece(prefix=name, parts=parts) for name, parts in zip(names, cut)]


def first_lengths(job: Job, shards: list[Shard], split: str, most: int) -> list[npt.NDArray[np.int32]]:
    """Tokens of the first documents of each source of a split in their final order, at most `most` of each."""
    found = []
    for source in range(len(job.recipe.sources)):
        lengths = _lengths(job, [shard for shard in shards if shard.source == source], split)
        first = np.arange(min(most, len(lengths)))
        found.append(lengths[_permutation(job, split, source, len(lengths))(first)] if len(first) else lengths)
    return found


def split_record(job: Job, shards: list[Shard], split: str) -> SplitRecord:
    """Counts of a split, and where each source lies in it."""
    spans: list[SourceSpan] = []
    for number, source in enumerate(job.recipe.sources):
        counts = [encoding_of(job, shard).splits[split] for shard in shards if shard.source == number]
        spans.append(
            SourceSpan(
                name=source.name,
                weight=source.weight,
                documents=sum(count.documents for count in counts),
                tokens=sum(count.tokens for count in counts),
                bytes=sum(count.bytes for count in counts),
            )
        )
    prefixes = [piece.prefix for piece in read_record(_plan(job), Plan).splits[split]]
    return SplitRecord.of(spans, prefixes)


def file_records(job: Job, records: dict[str, SplitRecord]) -> dict[str, FileRecord]:
    """Sizes and hashes of all pieces, as their writers took them."""
    found: dict[str, FileRecord] = {}
    for record in records.values():
        for prefix in record.pieces:
            found |= read_record(_account(job, prefix), Written).files
    return found


def _in_order(job: Job, split: str, part: Part, shards: list[Shard], dtype: np.dtype) -> Iterator[Tokens]:
    """The documents of a part, each from the shard that holds it."""
    prefixes = [encoded_shard(job, shard, split) for shard in shards]
    sizes = [read_sizes(prefix) for prefix in prefixes]
    first_of = np.cumsum([0] + [len(own) for own in sizes])  # [shards + 1]
    bytes_of = np.concatenate(sizes).astype(np.int64) * dtype.itemsize  # [documents]
    starts = (
        np.concatenate([np.cumsum(own, dtype=np.int64) - own for own in sizes]) * dtype.itemsize
    )  # in the shard's file
    order = _permutation(job, split, part.source, int(first_of[-1]))
    with _Files([prefix.with_name(f"{prefix.name}.bin") for prefix in prefixes]) as files:
        for start in range(part.first, part.last, AT_ONCE):
            numbers = order(np.arange(start, min(start + AT_ONCE, part.last)))
            of_shard = first_of.searchsorted(numbers, side="right") - 1
            for shard, begin, size in zip(of_shard.tolist(), starts[numbers].tolist(), bytes_of[numbers].tolist()):
                yield np.frombuffer(files.read(shard, begin, size), dtype)


class _Files:
    """Files that are read here and there, of which a few are kept open: a process may have about a thousand."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, number: int, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of a file."""
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) == OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[number] = FileIO(self._paths[number])
        found = os.pread(self._open[number].fileno(), size, start)
        assert len(found) == size, (self._paths[number], start, size, len(found))
        return found


def _lengths(job: Job, shards: list[Shard], split: str) -> npt.NDArray[np.int32]:
    """Tokens of every document of a source in the order of reading [documents]."""
    sizes = (read_sizes(encoded_shard(job, shard, split)) for shard in shards)
    return np.concatenate([np.zeros(0, np.int32), *sizes])


def _permutation(job: Job, split: str, source: int, documents: int) -> Permutation:
    return Permutation(documents, "documents", job.recipe.seed, job.recipe.sources[source].name, split)


def _plan(job: Job) -> Path:
    return job.folder / "write" / "plan.json"


def _account(job: Job, prefix: str) -> Path:
    return job.folder / "write" / f"{prefix}.json"
