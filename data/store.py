"""The token store: a folder with `{train,validation}.{bin,idx}`, `tokenizer/` and `manifest.json`.

Opening reads sizes and headers only, so that it is quick however large the store is. What is read of the tokens later is compared,
page by page, with the CRC-32 that was taken when the store was made (`data.checked`); `verify_store` reads every byte.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.checked import CHUNK, file_record, hash_file
from data.errors import DataError
from data.indexed import REMEDY, Indexed, Tokens
from data.manifest import FILE_NAME, SPLITS, FileRecord, Manifest, SourceSpan
from data.tokenizer import decode, fingerprint, token_bytes

MOST_DOCUMENTS = 2**31 - 1  # of a source, for batches hold their numbers as int32


class Split:
    """All documents of `train` or `validation`: one indexed file, or several that follow one another."""

    def __init__(self, pieces: list[Indexed]) -> None:
        self._pieces = pieces
        self._first_documents = np.cumsum([0] + [piece.document_count for piece in pieces])  # [pieces + 1]
        self._first_tokens = np.cumsum([0] + [piece.token_count for piece in pieces])  # [pieces + 1]

    @property
    def document_count(self) -> int:
        return int(self._first_documents[-1])

    @property
    def token_count(self) -> int:
        return int(self._first_tokens[-1])

    def document(self, number: int) -> Tokens:
        """Token ids [length] of one document."""
        piece = _piece_of(self._first_documents, number)
        return self._pieces[piece].document(number - int(self._first_documents[piece]))

    def start(self, number: int) -> int:
        """Position of a document's first token; the number of tokens for `number` = documents."""
        if number == self.document_count:
            return self.token_count
        piece = _piece_of(self._first_documents, number)
        return int(self._first_tokens[piece]) + self._pieces[piece].start(number - int(self._first_documents[piece]))

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the packed documents: a view of the file, or a copy where several files are crossed."""
        return _joined(
            [piece.read(begin, end) for piece, begin, end, _ in self._parts(self._first_tokens, start, stop)]
        )

    def documents_of(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Number of the document of each token in [start, stop): [stop − start]."""
        parts = self._parts(self._first_tokens, start, stop)
        return _joined([piece.documents_of(begin, end) + first for piece, begin, end, first in parts])

    def lengths(self, first: int, last: int) -> npt.NDArray[np.int32]:
        """Tokens of the documents first … last−1 [last − first]."""
        return _joined([piece.lengths(*part) for piece, *part, _ in self._parts(self._first_documents, first, last)])

    @property
    def pieces(self) -> list[Indexed]:
        return self._pieces

    def _parts(self, edges: npt.NDArray[np.int64], start: int, stop: int) -> Iterator[tuple[Indexed, int, int, int]]:
        """The pieces that hold [start, stop), what of it each holds, counted in the piece, and the piece's first document.

        Args:
            edges: [pieces + 1] the first of what is counted, tokens or documents, of each piece.
        """
        for number in range(_piece_of(edges, start), _piece_of(edges, max(stop - 1, start)) + 1):
            offset, end = int(edges[number]), int(edges[number + 1])
            yield (
                self._pieces[number],
                max(start - offset, 0),
                min(stop, end) - offset,
                int(self._first_documents[number]),
            )


def _piece_of(edges: npt.NDArray[np.int64], place: int) -> int:
    """The piece that holds a place; the last one for the end."""
    return min(int(edges.searchsorted(place, side="right")), len(edges) - 1) - 1


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The parts behind one another, without a copy where there is but one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class SourceTokens:
    """One source of one split as a stream of packed tokens: documents one after the other, each ended by the same token."""

    span: SourceSpan
    split: Split
    first_token: int  # where in the split the source begins

    @property
    def name(self) -> str:
        return self.span.name

    def __len__(self) -> int:
        """Number of tokens."""
        return self.span.tokens

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the source, without a copy where they lie in one file."""
        with self._named():
            return self.split.read(self.first_token + start, self.first_token + stop)

    def documents_of(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Number within this source of the document of each token in [start, stop): [stop − start]."""
        with self._named():
            numbers = self.split.documents_of(self.first_token + start, self.first_token + stop)
        return (numbers - self.span.first_document).astype(np.int32)

    def lengths(self, first: int = 0, last: int | None = None) -> npt.NDArray[np.int32]:
        """Tokens of the documents first … last−1 of the source [last − first]; of all of them where none are named."""
        last = self.span.documents if last is None else last
        with self._named():
            return self.split.lengths(self.span.first_document + first, self.span.first_document + last)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of a damage which source it meets."""
        try:
            yield
        except DataError as error:
            raise DataError(f"source {self.name}: {error}") from None


class Store:
    """A finished token store. `Store.open` is the way to get one."""

    def __init__(self, path: Path, manifest: Manifest, splits: dict[str, Split]) -> None:
        self.path = path
        self.manifest = manifest
        self._splits = splits

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Open a store after checking that its files are there and as long as index and manifest say.

        Raises:
            DataError: naming the file, what it is, what it should be, and the fix.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        for file, record in manifest.files.items():
            _check_size(folder / file, record)
            if file.startswith("tokenizer/"):  # small, and the ids mean nothing without it
                _check_hash(folder / file, record)
        splits = {}
        for name, split_record in manifest.splits.items():
            pieces = [_open_piece(folder / prefix, manifest.dtype) for prefix in split_record.pieces]
            splits[name] = Split(pieces)
            if (found := splits[name].document_count) != split_record.documents:
                raise DataError(
                    f"{folder}: {name} has {found} documents; the manifest says {split_record.documents}; {REMEDY}"
                )
            for span in split_record.sources:
                if span.documents > MOST_DOCUMENTS:
                    raise DataError(
                        f"{folder}: source {span.name} of {name} has {span.documents:,} documents; batches number at most "
                        f"{MOST_DOCUMENTS:,} of a source; prepare it as several sources"
                    )
        return cls(folder, manifest, splits)

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer folder."""
        return self.path / "tokenizer"

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer, special tokens included."""
        return self.manifest.vocab_size

    @cached_property
    def content(self) -> str:
        """A hash of the tokens and what they mean: the same whatever the weights, the paths and the report say."""
        tokens = {name: record for name, record in self.manifest.files.items() if name.endswith((".bin", ".idx"))}
        what = {
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "splits": {
                name: {
                    **record.model_dump(),
                    "sources": [span.model_dump(exclude={"weight"}) for span in record.sources],
                }
                for name, record in self.manifest.splits.items()
            },
            "files": {name: record.model_dump() for name, record in tokens.items()},
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def shares(self, split: str) -> dict[str, float]:
        """Share of each source in the samples of a split."""
        spans = self.manifest.splits[split].sources
        total = sum(span.weight for span in spans)
        return {span.name: span.weight / total for span in spans}

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for [V]; 0 for special tokens."""
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64]:
        return token_bytes(self.tokenizer_folder)

    def split(self, name: str) -> Split:
        """All documents of `train` or `validation`."""
        if name not in self._splits:
            raise DataError(f"split = {name!r}: the splits are {', '.join(SPLITS)}; choose one of them")
        return self._splits[name]

    def sources(self, split: str) -> list[SourceTokens]:
        """The sources of a split in the order of the recipe."""
        tokens = self.split(split)
        spans = self.manifest.splits[split].sources
        return [SourceTokens(span, tokens, tokens.start(span.first_document)) for span in spans]


def inspect_document(store: Store, split: str, number: int) -> str:
    """Text of document `number` of a split, without its end-of-sentence token."""
    documents = store.split(split).document_count
    if not 0 <= number < documents:
        raise DataError(
            f"document = {number}: {split} of {store.path} has {documents} documents; choose 0 to {documents - 1}"
        )
    return decode(store.tokenizer_folder, store.split(split).document(number)[:-1].tolist())


def store_stats(store: Store) -> dict[str, Any]:
    """Counts of each split and source: documents, tokens, bytes, bytes per token, share of the samples."""
    stats: dict[str, Any] = {"vocab_size": store.vocab_size, "dtype": store.manifest.dtype}
    for split, record in store.manifest.splits.items():
        shares = store.shares(split)
        stats[split] = {"documents": record.documents, "tokens": record.tokens}
        stats[split]["sources"] = {
            span.name: {
                "share": shares[span.name],
                "documents": span.documents,
                "tokens": span.tokens,
                "bytes": span.bytes,
                # The end-of-sentence tokens stand for no text.
                "bytes_per_token": round(span.bytes / max(span.tokens - span.documents, 1), 4),
            }
            for span in record.sources
        }
    return stats


def verify_store(path: Path | str) -> dict[str, Any]:
    """Read every byte of a store: hashes, token ids, ends of documents, counts of the sources, tokenizer.

    Returns:
        What was checked: {"files": n, "documents": n, "tokens": n}.

    Raises:
        DataError: the first thing that is not as the manifest says.
    """
    store = Store.open(path)
    manifest = store.manifest
    for name, record in manifest.files.items():
        _check_hash(store.path / name, record)
    if (found := fingerprint(store.tokenizer_folder)) != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{store.tokenizer_folder}: fingerprint {found[:12]}…; "
            f"the manifest says {manifest.tokenizer_fingerprint[:12]}…; {REMEDY}"
        )
    for split in SPLITS:
        for prefix, piece in zip(manifest.splits[split].pieces, store.split(split).pieces):
            _verify_piece(store, prefix, piece)
        for source in store.sources(split):
            stop = store.split(split).start(source.span.first_document + source.span.documents)
            if (counted := stop - source.first_token) != source.span.tokens:
                raise DataError(
                    f"{store.path}: source {source.name} of {split} has {counted} tokens; "
                    f"the manifest says {source.span.tokens}; {REMEDY}"
                )
    records = manifest.splits.values()
    return {
        "files": len(manifest.files),
        "documents": sum(r.documents for r in records),
        "tokens": sum(r.tokens for r in records),
    }


def _verify_piece(store: Store, prefix: str, piece: Indexed) -> None:
    """Ids within the vocabulary, and every document ended."""
    for start in range(0, piece.token_count, CHUNK):
        chunk = piece.read(start, min(start + CHUNK, piece.token_count))
        if chunk.min() < 0 or chunk.max() >= store.vocab_size:
            raise DataError(
                f"{store.path / prefix}.bin: token id {int(chunk.max())}; ids are 0 to {store.vocab_size - 1}; {REMEDY}"
            )
    end = store.manifest.eos_token_id
    documents = piece.document_count
    last = piece.pointers(0, documents) // piece.dtype.itemsize + piece.lengths(0, documents) - 1
    if (wrong := np.flatnonzero(piece.read(0, piece.token_count)[last] != end)).size:
        raise DataError(f"{store.path / prefix}.bin: document {wrong[0]} does not end with token {end}; {REMEDY}")


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below a folder but a manifest, by its name relative to the folder."""
    return {
        str(path.relative_to(folder)): file_record(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME
    }


def _open_piece(prefix: Path, dtype: str) -> Indexed:
    piece = Indexed(prefix)
    if piece.document_count and piece.dtype.name != dtype:
        raise DataError(f"{prefix}.idx: tokens are {piece.dtype.name}; the manifest says {dtype}; {REMEDY}")
    return piece


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing; the manifest lists it; {REMEDY}")
    if path.stat().st_size != record.bytes:
        raise DataError(f"{path}: {path.stat().st_size} bytes; the manifest says {record.bytes}; {REMEDY}")


def _check_hash(path: Path, record: FileRecord) -> None:
    if (found := hash_file(path)) != record.sha256:
        raise DataError(f"{path}: sha256 {found[:12]}…; the manifest says {record.sha256[:12]}…; {REMEDY}")
