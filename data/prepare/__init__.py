"""From a recipe to a token store: read, train the tokenizer, encode, shuffle, write.

What comes out depends on the recipe and the text only, never on the number of workers: documents are encoded in the order
in which they are read, and only then put into a seeded order. A document's split hangs on a hash of its text, so that equal
documents never lie on both sides.
"""

import hashlib
import heapq
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from data import tokenizer
from data.errors import DataError
from data.files import sync
from data.indexed import Tokens, token_dtype, write_indexed
from data.manifest import FILE_NAME, SPLITS, Manifest, SourceSpan, SplitRecord
from data.permutation import Permutation
from data.progress import Progress
from data.recipe import DataRecipe, Given, load_data_recipe
from data.sources import Source, read_documents
from data.store import Store, record_files

CHUNK_BYTES = 1 << 18  # text handed to a worker at a time
CHUNKS_AHEAD = 4  # chunks per worker that are read before their turn has come

STAGING = ".preparing"
OWN_NAMES = {STAGING, FILE_NAME, "tokenizer", *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx"))}


def prepare(recipe: DataRecipe | Path | str, out: Path | str, workers: int = 1, cache: Path | None = None) -> Store:
    """Make the token store that a recipe describes.

    A store that the same recipe made before is kept as it is. One that was interrupted is made anew.

    Args:
        recipe: a recipe, its YAML file, or the name of a built-in one.
        out: folder of the store.
        workers: processes that encode; the store does not depend on it.
        cache: folder of fetched wheels; None: `~/.cache/rorqual`.

    Raises:
        DataError: the recipe or its text cannot be used, or `out` holds something else.
    """
    out = Path(out)
    if not isinstance(recipe, DataRecipe):
        recipe = load_data_recipe(recipe)
    if workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1")
    with Progress() as progress:
        if (finished := _finished(recipe, out)) is not None:
            progress.line(
                f"{out} already holds the store of this recipe; delete it to prepare it again from changed text"
            )
            return finished
        staging = out / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        steps = [_make_tokenizer(recipe, staging / "tokenizer", cache, progress)]
        with _pool(workers) as pool:
            spills = [_encode_source(source, recipe, staging, pool, cache, progress) for source in recipe.sources]
        steps += [
            {"step": "encode", "source": s.source.name, "documents": s.documents, "bytes": s.size} for s in spills
        ]
        splits = {split: _write_split(split, spills, staging, recipe.seed) for split in SPLITS}
        steps.append({"step": "shuffle", "seed": recipe.seed})
        progress.line("documents shuffled and written")
        _publish(staging, out)
        folder = out / "tokenizer"
        Manifest(
            dtype=token_dtype(tokenizer.vocab_size(folder)).name,
            vocab_size=tokenizer.vocab_size(folder),
            eos_token_id=tokenizer.eos_token_id(folder),
            tokenizer_fingerprint=tokenizer.fingerprint(folder),
            splits=splits,
            files=record_files(out),
            steps=steps,
            recipe=_as_record(recipe),
        ).write(out)
        counts = ", ".join(
            f"{split} {record.tokens:,} tokens in {record.documents:,} documents" for split, record in splits.items()
        )
        progress.line(f"{out}: {counts}")
    return Store.open(out)


def train_tokenizer(recipe: DataRecipe | Path | str, out: Path | str, cache: Path | None = None) -> Path:
    """Only the tokenizer of a recipe, as a Hugging Face folder.

    Raises:
        DataError: the recipe or its text cannot be used, or `out` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; give a new folder")
    if not isinstance(recipe, DataRecipe):
        recipe = load_data_recipe(recipe)
    with Progress() as progress:
        _make_tokenizer(recipe, out, cache, progress)
    return out


def in_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    return _hash(text) < share * 2**64


def _finished(recipe: DataRecipe, out: Path) -> Store | None:
    """The store that is already there, if this recipe made it."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"--out = {out}: is a file; give a folder")
    if foreign := sorted(
        path.name for path in out.iterdir() if path.name not in OWN_NAMES and not path.name.endswith(".tmp")
    ):
        raise DataError(f"--out = {out}: holds {foreign[0]}, which is no part of a store; give an empty or new folder")
    if not (out / FILE_NAME).exists():
        return None
    store = Store.open(out)
    if store.manifest.recipe != _as_record(recipe):
        raise DataError(f"--out = {out}: holds the store of another recipe; give another folder, or delete this one")
    return store


def _as_record(recipe: DataRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _hash(text: str) -> int:
    """The first 64 bits of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _make_tokenizer(recipe: DataRecipe, folder: Path, cache: Path | None, progress: Progress) -> dict[str, Any]:
    """Train or copy the recipe's tokenizer; returns the manifest's record of it."""
    config = recipe.tokenizer
    if isinstance(config, Given):
        tokenizer.copy_folder(config.path, folder)
        return {"step": "tokenizer", "kind": config.kind}
    total = sum(source.weight for source in recipe.sources)
    sample: list[str] = []
    for source in recipe.sources:
        documents = (text for text in read_documents(source, cache) if not in_validation(text, recipe.validation))
        sample += _sample(documents, int(config.sample_bytes * source.weight / total))
        progress.update(f"sampling text for the tokenizer: {len(sample):,} documents")
    train = tokenizer.train_bpe if config.kind == "bpe" else tokenizer.train_sentencepiece
    train(sample, config.vocab_size, folder)
    size = sum(len(text.encode()) for text in sample)
    progress.line(f"{config.kind} tokenizer of {config.vocab_size:,} tokens trained on {size / 1e6:.1f} MB")
    versions = {"tokenizers": tokenizers.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    return {"step": "tokenizer", "kind": config.kind, "documents": len(sample), "bytes": size, "versions": versions}


def _sample(documents: Iterable[str], size: int) -> list[str]:
    """Documents with the smallest hashes, about `size` bytes of them: a random sample that no order of reading changes."""
    kept: list[tuple[int, str]] = []  # a heap whose first entry has the largest hash
    total = 0
    for text in documents:
        heapq.heappush(kept, (-_hash(text), text))
        total += len(text.encode())
        while total > size and len(kept) > 1:
            total -= len(heapq.heappop(kept)[1].encode())
    return [text for _, text in sorted(kept, reverse=True)]


class _Encoded(NamedTuple):
    """What a worker makes of a chunk of documents."""

    tokens: Tokens  # [tokens] each document ended by the end-of-sentence token
    lengths: npt.NDArray[np.int64]  # [documents]
    bytes: npt.NDArray[np.int64]  # [documents]
    validation: npt.NDArray[np.bool_]  # [documents]


@dataclass
class _Spill:
    """One source, encoded, in the order in which it was read: a file of tokens for each split, and the lengths."""

    source: Source
    dtype: np.dtype[Any]
    paths: dict[str, Path]
    lengths: dict[str, list[npt.NDArray[np.int64]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: int = 0

    @property
    def size(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(self.sizes.values())

    def add(self, encoded: _Encoded, files: Mapping[str, IO[bytes]]) -> None:
        """Append a chunk, each document to its split."""
        in_validation = np.repeat(encoded.validation, encoded.lengths)
        for split, documents, tokens in (
            ("train", ~encoded.validation, ~in_validation),
            ("validation", encoded.validation, in_validation),
        ):
            files[split].write(encoded.tokens[tokens].tobytes())
            self.lengths[split].append(encoded.lengths[documents])
            self.sizes[split] += int(encoded.bytes[documents].sum())
        self.documents += len(encoded.lengths)


def _encode_source(
    source: Source, recipe: DataRecipe, staging: Path, pool: "_Pool | None", cache: Path | None, progress: Progress
) -> _Spill:
    """Encode every document of a source into the staging folder."""
    folder = staging / "tokenizer"
    dtype = token_dtype(tokenizer.vocab_size(folder))
    spill = _Spill(source, dtype, {split: staging / f"{source.name}.{split}.tokens" for split in SPLITS})
    files = {split: path.open("wb") for split, path in spill.paths.items()}
    try:
        for encoded in _encode_all(_chunks(read_documents(source, cache)), folder, recipe.validation, pool):
            spill.add(encoded, files)
            progress.update(f"encoding {source.name}: {spill.documents:,} documents, {spill.size / 1e6:.1f} MB")
    finally:
        for file in files.values():
            file.close()
    if spill.documents == 0:
        raise DataError(f"source {source.name}: has no documents with text; check its path, files or separator")
    if recipe.validation < 1 and not any(len(lengths) for lengths in spill.lengths["train"]):
        raise DataError(
            f"source {source.name}: all {spill.documents} documents fell to validation; add documents or lower `validation`"
        )
    progress.line(f"{source.name}: {spill.documents:,} documents, {spill.size / 1e6:.1f} MB encoded")
    return spill


def _chunks(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups of about CHUNK_BYTES characters."""
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_all(chunks: Iterator[list[str]], folder: Path, share: float, pool: "_Pool | None") -> Iterator[_Encoded]:
    """Chunks encoded, in order; only a few of them are in memory at a time."""
    if pool is None:
        for chunk in chunks:
            yield _encode_chunk(chunk, folder, share)
        return
    waiting: deque[Future[_Encoded]] = deque()
    for chunk in chunks:
        waiting.append(pool.executor.submit(_encode_chunk, chunk, folder, share))
        if len(waiting) >= pool.workers * CHUNKS_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Pool(NamedTuple):
    """Processes that encode."""

    executor: ProcessPoolExecutor
    workers: int


@contextmanager
def _pool(workers: int) -> Iterator[_Pool | None]:
    """Worker processes, or None where this process does the work itself."""
    if workers == 1:
        yield None
        return
    # Spawned, since a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_one_thread_each)
    try:
        yield _Pool(executor, workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _one_thread_each() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only way to be told; processes share out the cores


def _encode_chunk(texts: list[str], folder: Path, share: float) -> _Encoded:
    ids = tokenizer.encode(folder, texts)
    end = tokenizer.eos_token_id(folder)
    dtype = token_dtype(tokenizer.vocab_size(folder))
    tokens = np.concatenate([np.asarray([*document, end], dtype=dtype) for document in ids])
    return _Encoded(
        tokens,
        np.asarray([len(document) + 1 for document in ids], np.int64),
        np.asarray([len(text.encode()) for text in texts], np.int64),
        np.asarray([in_validation(text, share) for text in texts], np.bool_),
    )


def _write_split(split: str, spills: list[_Spill], staging: Path, seed: int) -> SplitRecord:
    """Write one split's `.bin` and `.idx`: the sources one after the other, each in its seeded order."""
    spans: list[SourceSpan] = []
    first = 0
    for spill in spills:
        lengths = np.concatenate([np.zeros(0, np.int64), *spill.lengths[split]])
        spans.append(
            SourceSpan(
                name=spill.source.name,
                weight=spill.source.weight,
                first_document=first,
                last_document=first + len(lengths) - 1,
                documents=len(lengths),
                tokens=int(lengths.sum()),
                bytes=spill.sizes[split],
            )
        )
        first += len(lengths)
    documents = (document for spill in spills for document in _shuffled(spill, split, seed))
    write_indexed(staging / split, documents, spills[0].dtype)
    for spill in spills:
        spill.paths[split].unlink()
    return SplitRecord(documents=first, tokens=sum(span.tokens for span in spans), pieces=[split], sources=spans)


def _shuffled(spill: _Spill, split: str, seed: int) -> Iterator[Tokens]:
    """A source's documents of one split in the order of a permutation keyed by (seed, source, split)."""
    lengths = np.concatenate([np.zeros(0, np.int64), *spill.lengths[split]])
    if not len(lengths):
        return
    tokens = np.asarray(np.memmap(spill.paths[split], spill.dtype, mode="r"))
    starts = np.cumsum(lengths) - lengths
    order = Permutation(len(lengths), "documents", seed, spill.source.name, split)
    for number in order(np.arange(len(lengths))).tolist():
        yield tokens[starts[number] : starts[number] + lengths[number]]


def _publish(staging: Path, out: Path) -> None:
    """Move what was made to its place. The manifest is not there yet, so a stop in between leaves an unfinished store."""
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    for path in sorted(staging.iterdir()):
        os.replace(path, out / path.name)
    staging.rmdir()
    sync(out)
