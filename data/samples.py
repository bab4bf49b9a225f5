"""The endless sequence of training samples: which tokens sample i holds is a pure function of the data section, the seed and i.

A mixture says which source sample i comes from and how many samples of that source came before it (`data.mixture`). The sequences
of a source come in the order of a permutation, another one in each epoch (`data.permutation`). Nothing is remembered, so the
number of samples consumed is the whole state.

Phases. A run may change its mixture, its sequence length T or its packing: each phase then begins with a sample, and counts its own
samples through a mixture of its own. Within its sources it continues. What has been read of a source is counted by T and packing:
with the same ones, a phase goes on in the source's permutation where the phases before it stopped, so that nothing comes twice
before an epoch ends; with others the sequences are other ones, and their order is a permutation keyed with T and the packing.

A source is known by its store's content and its name, wherever the store lies and whatever stands beside it in the mixture.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.errors import DataError
from data.mixture import Mixture
from data.packing import packed_rows
from data.permutation import Permutation
from data.store import SourceTokens, Store
from data.windows import Sequences, Windows

Packing = Literal["concat", "best_fit"]
N = TypeVar("N", int, float)


class Batch(NamedTuple):
    """Some sequences with the tokens that follow them."""

    tokens: Tensor  # int64 [B, T+1+D_mtp]
    documents: Tensor  # int32 [B, T+1+D_mtp] number of the packed document within its source; −1 is padding


def empty_batch(sequences: int, width: int) -> Batch:
    """Room for so many sequences, to be filled."""
    return Batch(torch.empty(sequences, width, dtype=torch.int64), torch.empty(sequences, width, dtype=torch.int32))


@dataclass(frozen=True)
class StoreEntry:
    """One entry of the recipe's `data.train`: a store, its share of the samples, how often it may be repeated."""

    path: Path
    weight: float = 1.0
    max_epochs: float | None = None  # per source of the store, over the whole run


@dataclass(frozen=True)
class Phase:
    """A stretch of samples of one mixture and one length; it lasts until the next one begins."""

    first_sample: int
    entries: Sequence[StoreEntry]
    sequence_length: int
    packing: Packing = "concat"


class Origin(NamedTuple):
    """Where a sample comes from."""

    source: str  # as it is called in metrics
    store: Path
    first_document: int  # of the source in its split, from which those of a batch are counted


@dataclass(frozen=True)
class Read:
    """How far a source has been read in sequences of one length and packing."""

    source: str  # as it is called in metrics
    sequence_length: int
    samples: int
    epochs: float

    @property
    def tokens(self) -> int:
        """T a sample; padding counts."""
        return self.samples * self.sequence_length


class Samples:
    """Samples by their index, from the first one of the first phase on.

    Args:
        phases: one after the other by their first samples; an entry's weight is shared among its store's sources by their weights.
        mtp_depth: D_mtp.
        seed: of the order within each epoch.
        read: what `read` returned for the first sample of the first phase, where that is not the first of the run.
        by_store: sources are called by the names of their stores too; None: if the phases name several stores.

    Raises:
        DataError: a store cannot be used, its tokenizer differs from the first one's, a source is too short for one
            sample, a weight is too small for one, or two sources have one name.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        mtp_depth: int,
        seed: int,
        read: Mapping[str, Read] | None = None,
        by_store: bool | None = None,
    ) -> None:
        assert all(one.first_sample < other.first_sample for one, other in pairwise(phases)), phases
        self._mtp_depth, self._seed = mtp_depth, seed
        self._already = dict(read or {})
        stores = {entry.path: None for phase in phases for entry in phase.entries}
        self._by_store = len(stores) > 1 if by_store is None else by_store
        self._stores = {path: Store.open(path) for path in stores}
        self.stores = list(self._stores.values())
        for store in self.stores[1:]:
            _check_same_tokenizer(self.stores[0], store)
        self._streams: dict[str, _Stream] = {}
        self._called: dict[str, str] = {}  # source by its name
        self._permutation = lru_cache(maxsize=256)(self._make_permutation)
        self._stretches: list[_Stretch] = []
        for phase in phases:
            self._begin(phase)
        self.available = self._count_available()  # None: repeated without end

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Sample i: tokens int64 [T+1+D_mtp] and documents int32 [T+1+D_mtp]."""
        batch = self.batch(i, 1)
        return batch.tokens[0], batch.documents[0]

    def batch(self, first: int, n: int) -> Batch:
        """Samples first … first+n−1, all of one phase, as one batch of n sequences."""
        batch = empty_batch(n, self.width(first))
        self.fill(first, batch.tokens.numpy(), batch.documents.numpy())
        return batch

    def width(self, i: int) -> int:
        """Tokens of sample i: its phase's T + 1 + D_mtp."""
        return self._stretch(i).sequence_length + 1 + self._mtp_depth

    def fill(self, first: int, tokens: npt.NDArray[np.int64], documents: npt.NDArray[np.int32]) -> None:
        """Write samples first … first+n−1, all of one phase, into arrays [n, T+1+D_mtp].

        Raises:
            DataError: a source would be repeated more often than its `max_epochs`.
        """
        n, stretch = len(tokens), self._stretch(first)
        self.check_available(first + n)
        assert n == 0 or stretch is self._stretch(first + n - 1), f"samples {first} … {first + n - 1} are of two phases"
        of_source, index = stretch.mixture.locate(first - stretch.first_sample, n)
        for number, name in enumerate(stretch.streams):
            rows = np.flatnonzero(of_source == number)
            if len(rows):
                numbers = self._numbers(name, index[rows] + stretch.before.get(name, 0))
                self._streams[name].sequences.fill(tokens, documents, rows, numbers)

    def origin(self, i: int) -> Origin:
        """Where sample i comes from."""
        stretch = self._stretch(i)
        of_source, _ = stretch.mixture.locate(i - stretch.first_sample, 1)
        return self._streams[stretch.streams[int(of_source[0])]].origin

    def read(self, n: int) -> dict[str, Read]:
        """How far the first n samples read into each source, by source, length and packing."""
        counts = self._counts(n)
        names = {stream.of: stream.source for stream in self._streams.values()}
        found = {
            name: replace(read, source=names.get(name.rpartition("@")[0], read.source))
            for name, read in self._already.items()
            if name not in self._streams
        }
        for name, stream in self._streams.items():
            samples = counts.get(name, 0)
            epochs = samples / len(stream.sequences)
            found[name] = Read(stream.source, stream.sequence_length, samples, epochs)
        return found

    def samples_by_source(self, n: int) -> dict[str, int]:
        """How many of the first n samples come from each source."""
        return _by_source((read.source, read.samples) for read in self.read(n).values())

    def tokens_by_source(self, n: int) -> dict[str, int]:
        """How many tokens the first n samples have from each source, T a sample; padding counts."""
        return _by_source((read.source, read.tokens) for read in self.read(n).values())

    def epochs(self, n: int) -> dict[str, float]:
        """How often each source has been read after n samples."""
        return _by_source((read.source, read.epochs) for read in self.read(n).values())

    def store(self, path: Path) -> Store:
        """The store that the phases name by this path."""
        return self._stores[path]

    def check_available(self, n: int) -> None:
        """Raise DataError unless n samples can be drawn within every source's `max_epochs`; call it before a run."""
        if self.available is None or n <= self.available:
            return
        stretch = self._stretch(self.available)
        counts = stretch.mixture.counts(min(n, stretch.end or n) - stretch.first_sample)
        for name, count, limit in zip(stretch.streams, counts, stretch.limits):
            if limit is not None and count > limit:
                before = stretch.before.get(name, 0)
                raise DataError(
                    f"data.train: {n} samples need {before + count} of source {self._streams[name].source}, max_epochs allows "
                    f"{before + limit} ({self.available} samples in all); raise max_epochs, lower its weight, or train on "
                    "fewer tokens"
                )

    def _begin(self, phase: Phase) -> None:
        """Add the stretch of a phase behind those that there are."""
        before = self._counts(phase.first_sample)
        _check_different({entry.path: self._stores[entry.path].content for entry in phase.entries})
        if self._stretches:
            self._stretches[-1].end = phase.first_sample
        names: list[str] = []
        weights, limits = [], []
        for entry in phase.entries:
            sources = self._stores[entry.path].sources("train")
            total = sum(source.span.weight for source in sources)
            for source in sources:
                name = self._open_stream(phase, entry.path, source, names)
                names.append(name)
                weights.append(entry.weight * source.span.weight / total)
                limits.append(None if entry.max_epochs is None else self._left(name, entry.max_epochs, before))
        mixture = Mixture(weights)
        for few in mixture.too_small:
            raise DataError(
                f"data.train: source {self._streams[names[few]].source} has {weights[few] / sum(weights):.2g} of the weight; "
                "with less than 2^-48 (3.6e-15) it may never be drawn; raise its weight, or leave it out"
            )
        self._stretches.append(
            _Stretch(phase.first_sample, phase.sequence_length, mixture, tuple(names), tuple(limits), before)
        )

    def _open_stream(self, phase: Phase, path: Path, source: SourceTokens, taken: Sequence[str]) -> str:
        """The name of a source's stream of sequences for a phase."""
        store, length = self._stores[path], phase.sequence_length
        of = f"{store.content[:16]}/{source.name}"
        name = f"{of}@{length}" + (f"-{phase.packing}" if phase.packing != "concat" else "")
        called = f"{store.path.name}/{source.name}" if self._by_store else source.name
        if name in taken or self._called.setdefault(called, of) != of:
            raise DataError(f"data.train: two sources are called {called}; rename one of the stores' folders")
        if name not in self._streams:
            sequences: Sequences
            if phase.packing == "best_fit":
                sequences = packed_rows(store, source, length)
            else:
                sequences = Windows(source, length, self._mtp_depth)
            if len(sequences) == 0:
                raise DataError(
                    f"data.sequence_length = {length}: source {called} of {store.path} has {len(source)} tokens, "
                    f"one sample needs {length + 1 + self._mtp_depth}; lower it, or prepare more text"
                )
            self._streams[name] = _Stream(of, Origin(called, path, source.span.first_document), length, sequences)
        return name

    def _left(self, name: str, max_epochs: float, before: Mapping[str, int]) -> int:
        """Samples that `max_epochs` leaves to a stream, after all that has been read of its source in whatever lengths."""
        stream, windows = self._streams[name], len(self._streams[name].sequences)
        others = 0.0
        for other, samples in before.items():
            if other != name and other.startswith(f"{stream.of}@"):
                opened = self._streams.get(other)
                others += samples / len(opened.sequences) if opened else self._already[other].epochs
        return max(int((max_epochs - others) * windows + 1e-9) - before.get(name, 0), 0)

    def _counts(self, n: int) -> dict[str, int]:
        """Samples of each stream among the first n of the run."""
        if not self._stretches:
            return {name: read.samples for name, read in self._already.items()}
        stretch = self._stretch(n)
        counts = dict(stretch.before)
        for name, count in zip(stretch.streams, stretch.mixture.counts(n - stretch.first_sample)):
            counts[name] = counts.get(name, 0) + count
        return counts

    def _count_available(self) -> int | None:
        for stretch in self._stretches:
            n = stretch.mixture.samples_until(stretch.limits)
            if n is not None and (stretch.end is None or stretch.first_sample + n < stretch.end):
                return stretch.first_sample + n
        return None

    def _stretch(self, i: int) -> "_Stretch":
        """The stretch that holds sample i."""
        starts = [stretch.first_sample for stretch in self._stretches]
        assert i >= starts[0], f"sample {i} comes before the first phase"
        return self._stretches[bisect_right(starts, i) - 1]

    def _numbers(self, name: str, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sequences [n] of the n samples with these indices within a stream."""
        epochs, positions = np.divmod(index, len(self._streams[name].sequences))
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            numbers[mine] = self._permutation(name, int(epoch))(positions[mine])
        return numbers

    def _make_permutation(self, name: str, epoch: int) -> Permutation:
        return Permutation(len(self._streams[name].sequences), self._seed, name, epoch)


class _Stream(NamedTuple):
    """A source in sequences of one length and packing."""

    of: str  # which source: its store's content and its name
    origin: Origin
    sequence_length: int
    sequences: Sequences

    @property
    def source(self) -> str:
        """As it is called."""
        return self.origin.source


@dataclass
class _Stretch:
    """A phase, and where it finds and leaves its sources."""

    first_sample: int
    sequence_length: int
    mixture: Mixture
    streams: tuple[str, ...]
    limits: tuple[int | None, ...]  # samples that each may give in this stretch
    before: dict[str, int]  # samples that have been read of every stream
    end: int | None = None  # first sample of the next one


def _by_source(amounts: Iterable[tuple[str, N]]) -> dict[str, N]:
    """The sum of each source's amounts."""
    totals: dict[str, N] = {}
    for source, amount in amounts:
        totals[source] = totals[source] + amount if source in totals else amount
    return totals


def _check_different(contents: Mapping[Path, str]) -> None:
    """A source is known by its content: under two paths it would be read twice, and counted once."""
    paths: dict[str, Path] = {}
    for path, content in contents.items():
        if (other := paths.setdefault(content, path)) != path:
            raise DataError(f"data.train: {path} and {other} hold the same; name one of them, with the weight of both")


def _check_same_tokenizer(first: Store, other: Store) -> None:
    if first.manifest.tokenizer_fingerprint != other.manifest.tokenizer_fingerprint:
        raise DataError(
            f"data.train: {other.path} was made with another tokenizer than {first.path}; prepare it again with "
            f"`tokenizer: {{kind: folder, path: {first.tokenizer_folder}}}` in its recipe"
        )
