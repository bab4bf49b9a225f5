"""The token store: a folder with `{train,validation}.{bin,idx}`, `tokenizer/` and `manifest.json`.

Opening reads sizes and headers only, so that it is quick however large the store is; `verify_store` reads every byte.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.indexed import REMEDY, Indexed, Tokens
from data.manifest import FILE_NAME, SPLITS, FileRecord, Manifest, SourceSpan
from data.tokenizer import decode, fingerprint, token_bytes

CHUNK = 1 << 24  # bytes or tokens looked at in one go by what reads a whole store


@dataclass(frozen=True)
class SourceTokens:
    """One source of one split as a stream of packed tokens."""

    span: SourceSpan
    tokens: Tokens  # [tokens] ids, documents one after the other, each ended by the end-of-sentence token
    starts: npt.NDArray[np.int64]  # [documents] byte at which each document starts in the .bin

    @property
    def name(self) -> str:
        return self.span.name

    def documents_of(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Number within this source of the document of each token in [start, stop): [stop − start]."""
        itemsize = self.tokens.dtype.itemsize
        base = int(self.starts[0])
        first, last = (
            self.starts.searchsorted((base + start * itemsize, base + (stop - 1) * itemsize), side="right") - 1
        )
        edges = (
            self.starts[first : last + 2] - base
        ) // itemsize  # where these documents, and the one after them, start
        edges = np.clip(np.append(edges, stop)[: last - first + 2], start, stop)
        return np.repeat(np.arange(first, last + 1, dtype=np.int32), np.diff(edges))


class Store:
    """A finished token store. `Store.open` is the way to get one."""

    def __init__(self, path: Path, manifest: Manifest, splits: dict[str, Indexed]) -> None:
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
        for name, record in manifest.files.items():
            _check_size(folder / name, record)
        splits = {split: Indexed.open(folder / split) for split in SPLITS}
        for split, indexed in splits.items():
            documents, dtype = manifest.splits[split].documents, indexed.tokens.dtype.name
            if len(indexed.sizes) != documents:
                raise DataError(
                    f"{folder / split}.idx: {len(indexed.sizes)} documents; the manifest says {documents}; {REMEDY}"
                )
            if documents and dtype != manifest.dtype:
                raise DataError(
                    f"{folder / split}.idx: tokens are {dtype}; the manifest says {manifest.dtype}; {REMEDY}"
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

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for [V]; 0 for special tokens."""
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64]:
        return token_bytes(self.tokenizer_folder)

    def split(self, name: str) -> Indexed:
        """All documents of `train` or `validation`."""
        if name not in self._splits:
            raise DataError(f"split = {name!r}: the splits are {', '.join(SPLITS)}; choose one of them")
        return self._splits[name]

    def sources(self, split: str) -> list[SourceTokens]:
        """The sources of a split in the order of the recipe."""
        indexed = self.split(split)
        found = []
        for span in self.manifest.splits[split].sources:
            stop = span.first_document + span.documents
            tokens = indexed.tokens[indexed.start(span.first_document) : indexed.start(stop)]
            found.append(SourceTokens(span, tokens, indexed.pointers[span.first_document : stop]))
        return found


def inspect_document(store: Store, split: str, number: int) -> str:
    """Text of document `number` of a split, without its end-of-sentence token."""
    indexed = store.split(split)
    if not 0 <= number < len(indexed.sizes):
        raise DataError(
            f"document = {number}: {split} of {store.path} has {len(indexed.sizes)} documents; choose 0 to {len(indexed.sizes) - 1}"
        )
    return decode(store.tokenizer_folder, indexed.document(number)[:-1].tolist())


def store_stats(store: Store) -> dict[str, Any]:
    """Counts of each split and source: documents, tokens, bytes, bytes per token, share of the samples."""
    stats: dict[str, Any] = {"vocab_size": store.vocab_size, "dtype": store.manifest.dtype}
    for split, record in store.manifest.splits.items():
        weights = sum(span.weight for span in record.sources)
        stats[split] = {"documents": record.documents, "tokens": record.tokens}
        stats[split]["sources"] = {
            span.name: {
                "share": span.weight / weights,
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
        found = hash_file(store.path / name)
        if found != record.sha256:
            raise DataError(
                f"{store.path / name}: sha256 {found[:12]}…; the manifest says {record.sha256[:12]}…; {REMEDY}"
            )
    if (found := fingerprint(store.tokenizer_folder)) != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{store.tokenizer_folder}: fingerprint {found[:12]}…; "
            f"the manifest says {manifest.tokenizer_fingerprint[:12]}…; {REMEDY}"
        )
    for split in SPLITS:
        indexed = store.split(split)
        for start in range(0, len(indexed.tokens), CHUNK):
            chunk = indexed.tokens[start : start + CHUNK]
            if chunk.min() < 0 or chunk.max() >= store.vocab_size:
                raise DataError(
                    f"{store.path / split}.bin: token id {int(chunk.max())}; ids are 0 to {store.vocab_size - 1}; {REMEDY}"
                )
        last = (indexed.pointers // indexed.tokens.dtype.itemsize + indexed.sizes - 1).astype(np.int64)
        if (wrong := np.flatnonzero(indexed.tokens[last] != manifest.eos_token_id)).size:
            raise DataError(
                f"{store.path / split}.bin: document {wrong[0]} does not end with token {manifest.eos_token_id}; {REMEDY}"
            )
        for source in store.sources(split):
            if len(source.tokens) != source.span.tokens:
                raise DataError(
                    f"{store.path / split}.bin: source {source.name} has {len(source.tokens)} tokens; "
                    f"the manifest says {source.span.tokens}; {REMEDY}"
                )
    records = manifest.splits.values()
    return {
        "files": len(manifest.files),
        "documents": sum(r.documents for r in records),
        "tokens": sum(r.tokens for r in records),
    }


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of a store but its manifest, by name relative to the folder."""
    return {
        str(path.relative_to(folder)): FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))
        for path in sorted(_files(folder))
        if path.name != FILE_NAME
    }


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing; the manifest lists it; {REMEDY}")
    if path.stat().st_size != record.bytes:
        raise DataError(f"{path}: {path.stat().st_size} bytes; the manifest says {record.bytes}; {REMEDY}")
