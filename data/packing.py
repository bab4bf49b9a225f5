"""Best-fit packing: sequences in which no document is cut that fits into one (Ding et al. 2024, arXiv 2404.10830).

Windows of the packed stream cut a document wherever they end, and a model then reads text whose beginning it has not seen. Here a
document that fits into a sequence lies in one sequence, and what is left free is padding, a few positions in ten thousand.

Capacity. A row has T + 1 + D_mtp tokens as everywhere, and room for T + 1 of text: T inputs, and the one token after them that is
a target only. A longer document is cut into pieces that begin T apart and share one token, the last target of a piece being
the first input of the next: every token of a document but its first is a target once. A piece that is not its document's last fills
a row, and the D_mtp positions behind it hold the tokens that follow in the document, so that every MTP depth has each of its
targets once too. Elsewhere they are padding, and so is the rest of a row that is not full: document number −1, no target.

Packing is best-fit decreasing: the longest piece first, each into the row with the least room that holds it. Documents are
packed in groups in the order in which they are stored, which is shuffled. The rows are worked out once and kept in a file
beside the store, or in `~/.cache/rorqual` where the store cannot be written; what reads them maps the file.

    40 bytes  "RQROWS2\\0", u64 T, u64 documents, u64 number of pieces P, u64 number of rows R
    16·P      of each piece: i64 first token in the source, i32 tokens of the document from there on, i32 document; row by row
    8·(R+1)   i64 first piece of each row, and P
    4·blocks  u32 CRC-32 of each 4,096 bytes of all this, compared as they are read (`data.checked`)
"""

import hashlib
import os
import struct
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.checked import BLOCK, SUM, Checked, summed
from data.errors import DataError
from data.files import cache_folder, replace_file
from data.mapped import map_file
from data.store import SourceTokens, Store

MAGIC = b"RQROWS2\x00"
HEADER = struct.Struct("<8s4Q")
EDGE = np.dtype("<i8")
PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("document", "<i4")])
GROUP = 1 << 20  # documents that are packed together
BESIDE = "packing"  # folder of a store that holds its rows
PADDING = -1  # document number of positions that hold nothing

Numbers = npt.NDArray[np.int64]


class PackedRows:
    """The best-fit rows of a source, `data.windows.Sequences` in which padding may follow the text.

    Args:
        path: the file that `pack` has written.
        filler: token id of the padding; any that the model knows.
    """

    def __init__(self, source: SourceTokens, path: Path, filler: int) -> None:
        self._source, self._filler = source, filler
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        magic, _, _, pieces, rows = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0, 0)
        self._first_edge = HEADER.size + pieces * PIECE.itemsize  # byte of it
        end = self._first_edge + EDGE.itemsize * (rows + 1)
        remedy = "delete it, and it is made again"
        if magic != MAGIC or size != end + SUM.itemsize * -(-end // BLOCK):
            raise DataError(f"{path}: {size} bytes that are no packed rows; {remedy}")
        self._file = Checked(path, end, map_file(path, SUM, -(-end // BLOCK), end), remedy)
        self._file.read(0, HEADER.size)
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def pieces(self, number: int) -> npt.NDArray[np.void]:
        """The pieces of a row [pieces]: first token in the source, tokens of the document from there on, and the document."""
        first, last = self._file.array(EDGE, self._first_edge, number, number + 2).tolist()
        return self._file.array(PIECE, HEADER.size, first, last)

    def fill(
        self, tokens: npt.NDArray[np.int64], documents: npt.NDArray[np.int32], rows: Numbers, numbers: Numbers
    ) -> None:
        width = tokens.shape[1]
        for row, number in zip(rows.tolist(), numbers.tolist()):
            at = 0
            for start, length, document in self.pieces(number).tolist():
                end = min(at + length, width)  # only a piece that has its row for itself is longer than T + 1
                tokens[row, at:end] = self._source.read(start, start + end - at)
                documents[row, at:end] = document
                at = end
            tokens[row, at:] = self._filler
            documents[row, at:] = PADDING


def packed_rows(store: Store, source: SourceTokens, sequence_length: int) -> PackedRows:
    """The rows of a source of `train`; they are packed now if nobody has done it before.

    Two processes may do so at once: both write the same bytes, each file in one move.
    """
    path = packed_file(store, source, sequence_length)
    return PackedRows(source, path, store.manifest.eos_token_id)


def packed_file(store: Store, source: SourceTokens, sequence_length: int) -> Path:
    """Where the rows of a source lie, packed now if they are not there."""
    key = hashlib.sha256(f"{store.content} {source.name} {GROUP}".encode()).hexdigest()[:16]
    name = f"{sequence_length}-{key}.rows"
    folders = (store.path / BESIDE, cache_folder() / "packing")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    beside, cache = folders
    try:
        beside.mkdir(exist_ok=True)
        pack(source, sequence_length, beside / name)
    except OSError:  # a store that cannot be written, or a disk without room
        cache.mkdir(parents=True, exist_ok=True)
        pack(source, sequence_length, cache / name)
        return cache / name
    return beside / name


def pack(source: SourceTokens, sequence_length: int, path: Path) -> None:
    """Pack a source into rows and write them to a file. Memory is that of one group of documents."""
    counted = sum(len(pieces) for pieces, _ in _groups(source, sequence_length, packs=False))
    end = HEADER.size + counted * PIECE.itemsize
    written = rows = 0
    with replace_file(path) as temporary, temporary.open("wb") as file:
        for pieces, edges in _groups(source, sequence_length):
            file.seek(HEADER.size + written * PIECE.itemsize)
            file.write(pieces.tobytes())
            file.seek(end + EDGE.itemsize * rows)
            file.write((edges + written).astype(EDGE).tobytes())
            written, rows = written + len(pieces), rows + len(edges) - 1
        if not rows:
            file.seek(end)
            file.write(bytes(EDGE.itemsize))
        file.seek(0)
        file.write(HEADER.pack(MAGIC, sequence_length, source.span.documents, written, rows))
        file.flush()
        sums, _ = summed(temporary)
        file.seek(0, os.SEEK_END)
        file.write(sums.tobytes())


def best_fit(lengths: npt.NDArray[np.integer], capacity: int) -> Numbers:
    """Best-fit decreasing over integer lengths: the bin of each item [n].

    Items of one length are placed together. The tightest bin for one of them stays the tightest for the next until it holds no more
    of that length, so that all bins with the same room take `room // length` items each, in one operation on arrays. That
    is the packing of the item-by-item algorithm in about as many operations as there are lengths.

    Args:
        lengths: [n] each in 1 … capacity.
        capacity: of every bin.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ordered = lengths[order]
    bins = np.empty(len(order), np.int64)
    room: dict[int, deque[Numbers]] = {}  # bins by the room that is left in them
    spaces: list[int] = []  # the keys of `room`, ascending
    opened = 0

    def keep(space: int, which: Numbers) -> None:
        if not len(which) or not space:
            return
        if space not in room:
            room[space] = deque()
            insort(spaces, space)
        room[space].append(which)

    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ordered)] if len(ordered) else [0]
    for done, end in pairwise(edges):
        length = int(ordered[done])
        while done < end:
            place = bisect_left(spaces, length)
            if place < len(spaces):
                space = spaces[place]
                found = room[space].popleft()
                if not room[space]:
                    del room[space], spaces[place]
            else:
                space = capacity
                needed = -(-(end - done) // (capacity // length))
                found = np.arange(opened, opened + needed)
                opened += needed
            each = space // length
            used = found[: -(-(end - done) // each)]
            placed = min(end - done, len(used) * each)
            bins[done : done + placed] = np.repeat(used, each)[:placed]
            in_last = placed - (len(used) - 1) * each
            keep(space - each * length, used if in_last == each else used[:-1])
            if in_last < each:
                keep(space - in_last * length, used[-1:])
            if len(used) < len(found):
                keep(space, found[len(used) :])
            done += placed
    of_item = np.empty_like(bins)
    of_item[order] = bins
    return of_item


def packing_statistics(
    source_lengths: Iterable[npt.NDArray[np.integer]], sequence_length: int
) -> dict[str, dict[str, float]]:
    """What both ways of packing do to documents of these lengths: {"concat": …, "best_fit": …}.

    Args:
        source_lengths: [documents] tokens of each document, of each source; sources are packed apart.
        sequence_length: T.

    Returns:
        sequences; cut, the share of the documents that lie in several sequences; cut_needlessly, the share that does although
        they would fit into one; padding, the share of the sequences·T positions that have no target.
    """
    concat, packed = _Tally(), _Tally()
    for lengths in source_lengths:
        ends = np.cumsum(lengths, dtype=np.int64)
        starts, fits = ends - lengths, lengths <= sequence_length + 1
        # A window's last target is the first input of the next one, so a document may end there and be whole.
        cut = ends - 1 > (starts // sequence_length + 1) * sequence_length
        windows = max(int(ends[-1]) - 1, 0) // sequence_length if len(ends) else 0
        concat.add(len(lengths), windows, int(cut.sum()), int((cut & fits).sum()), windows * sequence_length)
        for first in range(0, len(lengths), GROUP):
            group = lengths[first : first + GROUP]
            pieces, edges = _pack_group(group, sequence_length, 0, 0)
            filled = (
                np.add.reduceat(np.minimum(pieces["length"], sequence_length + 1), edges[:-1]) if len(pieces) else 0
            )
            rows = len(edges) - 1
            packed.add(len(group), rows, int((group > sequence_length + 1).sum()), 0, int(np.sum(filled)) - rows)
    return {"concat": concat.shares(sequence_length), "best_fit": packed.shares(sequence_length)}


class _Tally:
    """Counts over sources."""

    def __init__(self) -> None:
        self.documents = self.sequences = self.cut = self.needless = self.targets = 0

    def add(self, documents: int, sequences: int, cut: int, needless: int, targets: int) -> None:
        self.documents += documents
        self.sequences += sequences
        self.cut += cut
        self.needless += needless
        self.targets += targets

    def shares(self, sequence_length: int) -> dict[str, float]:
        documents = max(self.documents, 1)
        return {
            "sequences": self.sequences,
            "cut": self.cut / documents,
            "cut_needlessly": self.needless / documents,
            "padding": 1 - self.targets / max(self.sequences * sequence_length, 1),
        }


def _groups(
    source: SourceTokens, sequence_length: int, packs: bool = True
) -> Iterator[tuple[npt.NDArray[np.void], Numbers]]:
    """Pieces and edges of the rows of each group of documents, as `_pack_group` gives them; without `packs`, pieces only."""
    token = 0
    for document in range(0, source.span.documents, GROUP):
        stop = min(document + GROUP, source.span.documents)
        lengths = source.lengths(document, stop)
        if packs:
            yield _pack_group(lengths, sequence_length, document, token)
        else:
            yield _pieces(lengths, sequence_length, document, token), np.zeros(0, np.int64)
        token += int(lengths.sum(dtype=np.int64))


def _pack_group(
    lengths: npt.NDArray[np.integer], sequence_length: int, first_document: int, first_token: int
) -> tuple[npt.NDArray[np.void], Numbers]:
    """Pieces [P] of consecutive documents, row by row and in each row in the order of the documents; edges [R+1] of the rows."""
    pieces = _pieces(lengths, sequence_length, first_document, first_token)
    shared = pieces["length"] <= sequence_length + 1
    row = np.empty(len(pieces), np.int64)
    row[shared] = best_fit(pieces["length"][shared], sequence_length + 1)
    alone = np.flatnonzero(~shared)
    row[alone] = np.arange(len(alone)) + (int(row[shared].max()) + 1 if shared.any() else 0)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    return pieces[order], np.append(0, np.cumsum(counts))


def _pieces(
    lengths: npt.NDArray[np.integer], sequence_length: int, first_document: int, first_token: int
) -> npt.NDArray[np.void]:
    """Pieces [P] of consecutive documents, T apart."""
    lengths = lengths.astype(np.int64)
    counts = np.maximum(-(-(lengths - 1) // sequence_length), lengths > 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    pieces = np.empty(len(document), PIECE)
    pieces["start"] = first_token + (np.cumsum(lengths) - lengths)[document] + within
    pieces["length"] = lengths[document] - within
    pieces["document"] = first_document + document
    return pieces
