"""The last stage: all documents of a split, source after source and each source in a seeded order, as pieces of bounded size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.indexed import Indexed, Tokens, token_dtype, write_indexed
from data.manifest import SPLITS, FileRecord, Record, SourceSpan, SplitRecord
from data.permutation import Permutation
from data.prepare.encode import account as encoding_of
from data.prepare.encode import open_encoded, tokenizer_folder
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item
from data.store import file_record
from data.tokenizer import vocab_size

AT_ONCE = 1 << 16  # documents whose places are looked up in one go


class Part(NamedTuple):
    """Documents [first, last) of one source in their final order."""

    source: int
    first: int
    last: int


class Piece(NamedTuple):
    """What one `.bin` and `.idx` of the store hold."""

    prefix: str  # "train", or "train-00000" where the split has several
    parts: list[Part]


class Written(Record):
    """Account of a written piece."""

    files: dict[str, FileRecord]


def items(job: Job, shards: list[Shard]) -> list[Item]:
    """One for each piece of each split."""
    (job.folder / "write").mkdir(exist_ok=True)
    found = []
    for split in SPLITS:
        for piece in pieces(job, shards, split):
            names = [[shard for shard in shards if shard.source == part.source] for part in piece.parts]
            found.append(Item(_account(job, piece.prefix), (job, split, piece, names)))
    return found


def write(job: Job, split: str, piece: Piece, shards: list[list[Shard]]) -> str:
    """Write one piece.

    Args:
        shards: all shards of the source of each of the piece's parts.
    """
    dtype = token_dtype(vocab_size(tokenizer_folder(job)))
    documents = (document for part, own in zip(piece.parts, shards) for document in _in_order(job, split, part, own))
    folder = job.folder / "write"
    write_indexed(folder / piece.prefix, documents, dtype)
    files = {name: file_record(folder / name) for name in (f"{piece.prefix}.bin", f"{piece.prefix}.idx")}
    write_record(_account(job, piece.prefix), Written(files=files))
    return piece.prefix


def pieces(job: Job, shards: list[Shard], split: str) -> list[Piece]:
    """Where a split is cut: before the document that would take a piece beyond `tokens_per_file`."""
    limit = job.recipe.tokens_per_file
    cut: list[list[Part]] = [[]]
    room = limit
    for source in range(len(job.recipe.sources)):
        lengths = _lengths(job, [shard for shard in shards if shard.source == source], split)
        ends = np.cumsum(lengths[_order(job, split, source, len(lengths))], dtype=np.int64)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = int(ends.searchsorted(before + room, side="right"))
            if last == first and cut[-1]:  # the next document has a piece of its own where it fits nowhere
                cut.append([])
                room = limit
                continue
            last = max(last, first + 1)
            cut[-1].append(Part(source, first, last))
            room -= int(ends[last - 1]) - before
            first = last
    names = [split] if len(cut) == 1 else [f"{split}-{number:05d}" for number in range(len(cut))]
    return [Piece(name, parts) for name, parts in zip(names, cut)]


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
    first = 0
    for number, source in enumerate(job.recipe.sources):
        counts = [encoding_of(job, shard).splits[split] for shard in shards if shard.source == number]
        documents = sum(count.documents for count in counts)
        spans.append(
            SourceSpan(
                name=source.name,
                weight=source.weight,
                first_document=first,
                last_document=first + documents - 1,
                documents=documents,
                tokens=sum(count.tokens for count in counts),
                bytes=sum(count.bytes for count in counts),
            )
        )
        first += documents
    prefixes = [piece.prefix for piece in pieces(job, shards, split)]
    return SplitRecord(documents=first, tokens=sum(span.tokens for span in spans), pieces=prefixes, sources=spans)


def file_records(job: Job, records: dict[str, SplitRecord]) -> dict[str, FileRecord]:
    """Sizes and hashes of all pieces, as their writers took them."""
    found: dict[str, FileRecord] = {}
    for record in records.values():
        for prefix in record.pieces:
            found |= read_record(_account(job, prefix), Written).files
    return found


def _in_order(job: Job, split: str, part: Part, shards: list[Shard]) -> Iterator[Tokens]:
    """The documents of a part, each from the shard that holds it."""
    opened = [open_encoded(job, shard, split) for shard in shards]
    first_of = np.cumsum([0] + [len(shard.sizes) for shard in opened])  # [shards + 1]
    order = _permutation(job, split, part.source, int(first_of[-1]))
    for start in range(part.first, part.last, AT_ONCE):
        numbers = order(np.arange(start, min(start + AT_ONCE, part.last)))
        of_shard = first_of.searchsorted(numbers, side="right") - 1
        for shard, number in zip(of_shard.tolist(), (numbers - first_of[of_shard]).tolist()):
            yield opened[shard].document(number)


def _lengths(job: Job, shards: list[Shard], split: str) -> npt.NDArray[np.int32]:
    """Tokens of every document of a source in the order of reading [documents]."""
    opened: list[Indexed] = [open_encoded(job, shard, split) for shard in shards]
    return np.concatenate([np.zeros(0, np.int32), *(shard.sizes for shard in opened)])


def _order(job: Job, split: str, source: int, documents: int) -> npt.NDArray[np.int64]:
    """Number in the order of reading of each document in its final order [documents]."""
    if documents == 0:
        return np.zeros(0, np.int64)
    return _permutation(job, split, source, documents)(np.arange(documents))


def _permutation(job: Job, split: str, source: int, documents: int) -> Permutation:
    return Permutation(documents, "documents", job.recipe.seed, job.recipe.sources[source].name, split)


def _account(job: Job, prefix: str) -> Path:
    return job.folder / "write" / f"{prefix}.json"
