"""Batches for training and validation, the same ones whatever the number of ranks, micro-batches and threads.

Window k of a source holds tokens [k·T, k·T + T + 1 + D_mtp) of its packed stream: T inputs, and the D_mtp + 1 tokens that
follow them, so that every position has a real target at the main head and at every MTP depth. The next window starts T
later. In each epoch the windows of a source come in the order of a permutation keyed by (seed, source, epoch); a mixture
says which source each sample comes from. Nothing is remembered, so the number of samples consumed is the whole state.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Full, Queue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.errors import DataError
from data.mixture import Mixture
from data.permutation import Permutation
from data.store import SourceTokens, Store

STEPS_AHEAD = 4  # global batches prepared before they are asked for


class Batch(NamedTuple):
    """Some sequences with the tokens that follow them."""

    tokens: Tensor  # int64 [B, T+1+D_mtp]
    documents: Tensor  # int32 [B, T+1+D_mtp] number of the packed document within its source


@dataclass(frozen=True)
class StoreEntry:
    """One entry of the recipe's `data.train`: a store, its share of the samples, how often it may be repeated."""

    path: Path
    weight: float = 1.0
    max_epochs: float | None = None  # per source of the store


class Samples:
    """The endless sequence of training samples: `samples[i]` is a pure function of (entries, T, D_mtp, seed, i).

    Args:
        entries: the stores; an entry's weight is shared among its sources by their weights in the store.
        sequence_length: T.
        mtp_depth: D_mtp.
        seed: of the order within each epoch.

    Raises:
        DataError: a store cannot be used, its tokenizer differs from the first one's, a source is too short for one
            sample, or two sources have one name.
    """

    def __init__(self, entries: Sequence[StoreEntry], sequence_length: int, mtp_depth: int, seed: int) -> None:
        self.sequence_length = sequence_length
        self.width = sequence_length + 1 + mtp_depth
        self.stores = [Store.open(entry.path) for entry in entries]
        self._seed = seed
        self._sources: dict[str, SourceTokens] = {}
        weights: list[float] = []
        limits: list[int | None] = []
        for entry, store in zip(entries, self.stores):
            _check_same_tokenizer(self.stores[0], store)
            sources = store.sources("train")
            total = sum(source.span.weight for source in sources)
            for source in sources:
                name = source.name if len(entries) == 1 else f"{store.path.name}/{source.name}"
                if name in self._sources:
                    raise DataError(f"data.train: two sources are called {name}; rename one of the stores' folders")
                windows = _windows(source, sequence_length, self.width)
                if windows == 0:
                    raise DataError(
                        f"data.sequence_length = {sequence_length}: source {name} of {store.path} has {len(source)} tokens, "
                        f"one sample needs {self.width}; lower it, or prepare more text"
                    )
                self._sources[name] = source
                weights.append(entry.weight * source.span.weight / total)
                limits.append(None if entry.max_epochs is None else int(entry.max_epochs * windows))
        self._mixture = Mixture(weights)
        self._permutation = lru_cache(maxsize=4 * len(weights))(self._make_permutation)
        self.available = self._mixture.samples_until(limits)  # None: repeated without end
        self._limits = dict(zip(self._sources, limits))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Sample i: tokens int64 [T+1+D_mtp] and documents int32 [T+1+D_mtp]."""
        batch = self.batch(i, 1)
        return batch.tokens[0], batch.documents[0]

    def batch(self, first: int, n: int) -> Batch:
        """Samples first … first+n−1 as one batch of n sequences.

        Raises:
            DataError: a source would be repeated more often than its `max_epochs`.
        """
        self.check_available(first + n)
        tokens, documents = np.empty((n, self.width), np.int64), np.empty((n, self.width), np.int32)
        of_source, index = self._mixture.locate(first, n)
        for number, (name, source) in enumerate(self._sources.items()):
            rows = np.flatnonzero(of_source == number)
            if len(rows):
                _fill(tokens, documents, rows, source, self._window_numbers(name, index[rows]), self.sequence_length)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(documents))

    def consumed(self, n: int) -> dict[str, int]:
        """How many of the first n samples come from each source."""
        return dict(zip(self._sources, self._mixture.counts(n)))

    def epochs(self, n: int) -> dict[str, float]:
        """How often each source has been read after n samples."""
        return {name: used / self._window_count(name) for name, used in self.consumed(n).items()}

    def check_available(self, n: int) -> None:
        """Raise DataError unless n samples can be drawn within every source's `max_epochs`; call it before a run."""
        if self.available is None or n <= self.available:
            return
        used = self.consumed(n)
        name = next(name for name, limit in self._limits.items() if limit is not None and used[name] > limit)
        raise DataError(
            f"data.train: {n} samples need {used[name]} of source {name}, max_epochs allows {self._limits[name]} "
            f"({self.available} samples in all); raise max_epochs, lower its weight, or train on fewer tokens"
        )

    def _window_count(self, name: str) -> int:
        return _windows(self._sources[name], self.sequence_length, self.width)

    def _window_numbers(self, name: str, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Windows [n] of the n samples with these indices within the source."""
        epochs, positions = np.divmod(index, self._window_count(name))
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            windows[mine] = self._permutation(name, int(epoch))(positions[mine])
        return windows

    def _make_permutation(self, name: str, epoch: int) -> Permutation:
        return Permutation(self._window_count(name), self._seed, name, epoch)


class Loader:
    """One rank's part of each global batch, made by a background thread a few steps ahead.

    Args:
        samples: where the sequences come from.
        rank, world_size: this process among those that share the global batch.
        micro_batch: most sequences in one Batch.
        pin: put batches into page-locked memory, for copies to a GPU that do not wait.
    """

    def __init__(
        self, samples: Samples, rank: int = 0, world_size: int = 1, micro_batch: int = 1, pin: bool = False
    ) -> None:
        self.samples = samples
        self._rank, self._world_size, self._micro_batch, self._pin = rank, world_size, micro_batch, pin

    def steps(self, plan: Iterable[tuple[int, int]]) -> Iterator[list[Batch]]:
        """Micro-batches of each step. Closing the iterator ends its thread.

        Args:
            plan: (first sample, sequences of the global batch) of each step; drawn a few steps ahead, in the thread.

        Raises:
            DataError: a global batch that `world_size` does not divide, or samples that run out.
        """
        stop = threading.Event()
        queue: Queue[list[Batch] | BaseException | None] = Queue(STEPS_AHEAD)
        thread = threading.Thread(target=self._produce, args=(plan, queue, stop), name="data-loader", daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def step(self, first: int, sequences: int) -> list[Batch]:
        """This rank's micro-batches of the global batch of samples first … first+sequences−1."""
        if sequences % self._world_size:
            nearest = max(sequences // self._world_size, 1) * self._world_size
            raise DataError(
                f"batch = {sequences} sequences: {self._world_size} ranks must divide it; use a multiple, e.g. {nearest}"
            )
        share = sequences // self._world_size
        start = first + self._rank * share
        sizes = [min(self._micro_batch, share - done) for done in range(0, share, self._micro_batch)]
        starts = range(start, start + share, self._micro_batch)
        batches = [self.samples.batch(begin, size) for begin, size in zip(starts, sizes)]
        return [Batch(*(part.pin_memory() for part in batch)) for batch in batches] if self._pin else batches

    def _produce(
        self, plan: Iterable[tuple[int, int]], queue: "Queue[list[Batch] | BaseException | None]", stop: threading.Event
    ) -> None:
        """Fill the queue until the plan ends, something fails, or the consumer has stopped."""
        item: list[Batch] | BaseException | None
        try:
            for first, sequences in plan:
                if not _put(queue, self.step(first, sequences), stop):
                    return
            item = None
        except BaseException as error:  # raised again where the batches are asked for
            item = error
        _put(queue, item, stop)


def validation_batches(
    stores: Sequence[Store] | Store,
    sequence_length: int,
    mtp_depth: int,
    batch: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[str, Batch]]:
    """Fixed windows of the validation split, each source in turn: every token but the first is a target once.

    Over all ranks the set of sequences is the same whatever `world_size` and `batch`. Every rank gets the same number of
    batches; in the last ones of a source, a rank may get fewer rows, or none (B = 0).

    Args:
        batch: most sequences in one Batch of one rank.
        max_tokens: targets in all, shared equally among the sources; at least one sequence of each. None: all there are.

    Yields:
        (source, Batch). The last tokens of a source, too few for a whole window, are left out.

    Raises:
        DataError: no source holds a whole window.
    """
    width = sequence_length + 1 + mtp_depth
    stores = [stores] if isinstance(stores, Store) else list(stores)
    sources: list[tuple[str, SourceTokens, int]] = []
    for store in stores:
        for source in store.sources("validation"):
            name = source.name if len(stores) == 1 else f"{store.path.name}/{source.name}"
            if windows := _windows(source, sequence_length, width):
                sources.append((name, source, windows))
    if not sources:
        raise DataError(
            f"data.validation: no source of {', '.join(str(s.path) for s in stores)} has the {width} tokens of one window in its "
            f"validation split; lower data.sequence_length, or raise `validation` in the data recipe"
        )
    limit = None if max_tokens is None else max(max_tokens // len(sources) // sequence_length, 1)
    for name, source, windows in sources:
        windows = windows if limit is None else min(windows, limit)
        for start in range(0, windows, batch * world_size):
            mine = np.arange(start, min(start + batch * world_size, windows))[rank::world_size]
            tokens, documents = np.empty((len(mine), width), np.int64), np.empty((len(mine), width), np.int32)
            _fill(tokens, documents, np.arange(len(mine)), source, mine, sequence_length)
            yield name, Batch(torch.from_numpy(tokens), torch.from_numpy(documents))


def _windows(source: SourceTokens, sequence_length: int, width: int) -> int:
    """Whole windows in a source: the last one needs D_mtp + 1 tokens after its T."""
    return max((len(source) - (width - sequence_length)) // sequence_length, 0)


def _fill(
    tokens: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    source: SourceTokens,
    windows: npt.NDArray[np.int64],
    stride: int,
) -> None:
    """Copy windows [n] of a source into rows [n] of tokens and documents, both [B, T+1+D_mtp]."""
    width = tokens.shape[1]
    for row, window in zip(rows.tolist(), windows.tolist()):
        start = window * stride
        tokens[row] = source.read(start, start + width)
        documents[row] = source.documents_of(start, start + width)


def _check_same_tokenizer(first: Store, other: Store) -> None:
    if first.manifest.tokenizer_fingerprint != other.manifest.tokenizer_fingerprint:
        raise DataError(
            f"data.train: {other.path} was made with another tokenizer than {first.path}; prepare it again with "
            f"`tokenizer: {{kind: folder, path: {first.tokenizer_folder}}}` in its recipe"
        )


def _put(
    queue: "Queue[list[Batch] | BaseException | None]", item: list[Batch] | BaseException | None, stop: threading.Event
) -> bool:
    """Wait for room in the queue; False when the consumer has stopped instead."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)
            return True
        except Full:
            continue
    return False
