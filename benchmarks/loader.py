"""How fast batches come, against what a training step consumes and against torch's DataLoader over Megatron's reader.

    python benchmarks/loader.py --json FILE

A store of random tokens is written into a temporary folder. The same windows of it, as tokens and document numbers, are then read
by `data.loader.Loader` and by `torch.utils.data.DataLoader` over a map dataset of the plain kind: megatron-core's `IndexedDataset`,
an array with the first document and offset of every window, a shuffled index, each sample put together document by document.
Nothing trains meanwhile: what takes the batches does nothing else. Both sides are timed in turn.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.checked import seal
from data.files import replace_file
from data.indexed import write_indexed
from data.loader import Loader, Planned
from data.manifest import Manifest, SourceSpan, SplitRecord
from data.packing import GROUP, pack, packing_statistics
from data.samples import Packing, Phase, Samples, StoreEntry
from data.store import Store

LENGTHS = (512, 4096)
MTP_DEPTH = 1
BATCH = 16  # sequences of 4,096 tokens in a batch; of shorter ones, as many as make the same number of tokens


class Batches(Protocol):
    """An endless iterator of batches; closing it ends its processes."""

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--tokens", type=float, default=1e8, help="of the store")
    parser.add_argument("--seconds", type=float, default=2, help="that each reader is timed in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--training", type=float, default=20_000, help="tokens/s of the fastest training step here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", int(arguments.tokens))
        result = {
            "machine": f"{os.cpu_count()} cores, torch {torch.__version__}, one thread",
            "store_tokens": store.split("train").token_count,
            "first_batch_seconds": {packing: first_batch(store, packing) for packing in ("concat", "best_fit")},
            "packing": packing_speed(store, Path(folder)),
            "readers": readers(store, arguments.seconds, arguments.turns, arguments.training),
        }
    text = json.dumps(result, indent=2)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(text + "\n")
    print(text)


def make_store(folder: Path, tokens: int) -> Store:
    """A store of one source of random documents, of 700 tokens at the median and 1,400 in the mean."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(700), np.sqrt(2 * np.log(2)), 2 * tokens // 1400 + 10).astype(np.int64) + 2
    lengths = lengths[: int(np.cumsum(lengths).searchsorted(tokens)) + 1]
    text = random.integers(1, 32_000, int(lengths.max()) + 65_536).astype(np.uint16)

    def documents() -> Iterator[npt.NDArray[np.uint16]]:
        for length in lengths.tolist():
            start = int(random.integers(65_536))
            yield np.append(text[start : start + length - 1], np.uint16(0))

    write_indexed(folder / "train", documents(), np.dtype(np.uint16))
    write_indexed(folder / "validation", [], np.dtype(np.uint16))
    total, number = int(lengths.sum()), len(lengths)
    span = SourceSpan(
        name="random", weight=1, first_document=0, last_document=number - 1, documents=number, tokens=total, bytes=0
    )
    splits = {
        "train": SplitRecord(documents=number, tokens=total, pieces=["train"], sources=[span]),
        "validation": SplitRecord(documents=0, tokens=0, pieces=["validation"], sources=[]),
    }
    Manifest(
        dtype="uint16",
        vocab_size=32_000,
        eos_token_id=0,
        tokenizer_fingerprint="none",
        splits=splits,
        files=seal(folder / "train") | seal(folder / "validation"),
        steps=[],
        versions={},
        recipe={},
    ).write(folder)
    return Store.open(folder)


def first_batch(store: Store, packing: Packing) -> dict[str, float]:
    """Seconds from nothing opened to the batch in the middle of the store, as a run that continues there asks for it."""
    found = {}
    for length in LENGTHS:
        samples_of(store, length, packing)  # the rows are packed once, before the first run
        batch = sequences(length)
        started = time.perf_counter()
        samples = samples_of(store, length, packing)
        steps = Loader(samples).steps([Planned(store.split("train").token_count // length // 2, batch, batch)])
        next(steps)
        found[str(length)] = round(time.perf_counter() - started, 4)
        steps.close()
    return found


def packing_speed(store: Store, folder: Path) -> dict[str, Any]:
    """Documents/s of `data.packing.pack`, and what packing does to the documents."""
    (source,) = store.sources("train")
    found = {}
    for length in LENGTHS:
        started = time.perf_counter()
        pack(source, length, folder / "rows")
        seconds = time.perf_counter() - started
        shares = packing_statistics([source.lengths()], length)
        found[str(length)] = {"documents_per_second": round(source.span.documents / seconds), **shares}
    return {"documents": source.span.documents, "group": GROUP, **found}


def readers(store: Store, seconds: float, turns: int, training: float) -> list[dict[str, Any]]:
    """Tokens/s of every reader. Those of one length are timed in turn, and the median over the turns counts."""
    found = []
    for length in LENGTHS:
        for workers in (1, 2):
            sides = {
                "concat": partial(ours, store, length, "concat", workers),
                "best_fit": partial(ours, store, length, "best_fit", workers),
                "torch": partial(theirs, store, length, workers),
            }
            timed: dict[str, list[Rate]] = {name: [] for name in sides}
            for _ in range(turns):
                for name, make in sides.items():
                    timed[name].append(rate(make, sequences(length) * length, seconds))
            speed = {name: statistics.median(rate.of_clock for rate in rates) for name, rates in timed.items()}
            of_cpu = {name: statistics.median(rate.of_cpu for rate in rates) for name, rates in timed.items()}
            ratios = sorted(a.of_clock / b.of_clock for a, b in zip(timed["concat"], timed["torch"]))
            found.append(
                {
                    "sequence_length": length,
                    "workers": workers,
                    "tokens_per_second": {name: round(value) for name, value in speed.items()},
                    "tokens_per_cpu_second": {name: round(value) for name, value in of_cpu.items()},
                    "ratio_to_training": {name: round(value / training, 1) for name, value in speed.items()},
                    "ratio_to_torch": round(statistics.median(ratios), 2),
                    "ratio_to_torch_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
                    "ratio_to_torch_of_cpu_time": round(of_cpu["concat"] / of_cpu["torch"], 2),
                }
            )
    return found


class Rate(NamedTuple):
    """Tokens/s of a reader."""

    of_clock: float
    of_cpu: float  # by the CPU time of all its processes, which a busy machine disturbs less


def rate(make: Callable[[], Batches], tokens: int, seconds: float) -> Rate:
    """Take batches for some seconds; `tokens` in each."""
    batches = make()
    before = os.times()
    for _ in range(2):
        next(batches)
    started, done = time.perf_counter(), 0
    while (now := time.perf_counter()) < started + seconds or not done:
        next(batches)
        done += 1
    batches.close()  # the time of a process counts from its end on
    after = os.times()
    spent = sum(after[:4]) - sum(before[:4])
    return Rate(done * tokens / (now - started), (done + 2) * tokens / spent)


def sequences(length: int) -> int:
    return BATCH * max(LENGTHS) // length


def samples_of(store: Store, length: int, packing: Packing) -> Samples:
    return Samples([Phase(0, [StoreEntry(store.path)], length, packing)], MTP_DEPTH, seed=0)


def ours(store: Store, length: int, packing: Packing, workers: int) -> Batches:
    batch = sequences(length)
    plan = (Planned(batch * step, batch, batch) for step in count())
    return Loader(samples_of(store, length, packing), workers=workers).steps(plan)


def theirs(store: Store, length: int, workers: int) -> Batches:
    dataset = MegatronWindows(store.path / "train", length)
    loader = DataLoader(dataset, batch_size=sequences(length), sampler=range(len(dataset)), num_workers=workers)

    def batches() -> Generator[Any, None, None]:
        while True:
            yield from loader

    return batches()


class MegatronWindows(Dataset[tuple[Tensor, Tensor]]):
    """Shuffled windows of T + 1 + D_mtp tokens over an `IndexedDataset`."""

    def __init__(self, prefix: Path, length: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.tokens = IndexedDataset(str(prefix))
        self.width = length + 1 + MTP_DEPTH
        ends = np.cumsum(self.tokens.sequence_lengths, dtype=np.int64)
        starts = np.arange((int(ends[-1]) - 1 - MTP_DEPTH) // length) * length
        self.documents = ends.searchsorted(starts, side="right")
        self.offsets = starts - np.append(0, ends)[self.documents]
        self.order = np.random.default_rng(0).permutation(len(starts))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.order[index]
        document, offset, left = int(self.documents[window]), int(self.offsets[window]), self.width
        tokens, numbers = [], []
        while left:
            length = min(left, int(self.tokens.sequence_lengths[document]) - offset)
            tokens.append(self.tokens.get(document, offset, length))
            numbers.append(np.full(length, document, np.int32))
            document, offset, left = document + 1, 0, left - length
        return torch.from_numpy(np.concatenate(tokens).astype(np.int64)), torch.from_numpy(np.concatenate(numbers))


if __name__ == "__main__":
    main()
