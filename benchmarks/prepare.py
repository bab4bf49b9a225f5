"""Text to token files, by Rorqual, by datatrove and by Megatron-LM's way, side by side on the same text and tokenizer.

    python benchmarks/prepare.py --text train.jsonl.xz --megabytes 16 --json prepare.json

    rorqual               data.prepare without cleaning or deduplication: documents in a seeded order, manifest and hashes
    datatrove             reader of JSON lines → DocumentTokenizer, documents in the order of the input
    datatrove_shuffled    the same with shuffled documents, which is what ours have
    megatron              the loop of tools/preprocess_data.py: lines through a pool of processes, a tokenizer call for each
                          document, IndexedDatasetBuilder; documents in the order of the input

Each runs in a process of its own, pinned with its workers to as many cores as there are workers, one thread each. They run one
after the other, round after round in turn, and ratios are taken within a round. The clock starts when the libraries are
imported and stops when the files are complete. All must write the same number of tokens, or nothing is reported.
"""

import argparse
import json
import lzma
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from data.files import replace_file
from data.tokenizer import eos_token_id, train_bpe

FILES = 4  # that the text is cut into: a reader of datatrove takes whole files
TOKENIZER_BYTES = 8_000_000  # text that a tokenizer is trained on where none is given
LINES_AT_ONCE = 32  # that preprocess_data gives a worker
SAMPLE_SECONDS = 0.05  # between two looks at the memory

Tokenize = Callable[[], int]  # returns the number of tokens that it wrote


class Task(NamedTuple):
    """The same for every contestant."""

    files: list[Path]
    tokenizer: Path
    workers: int


class Result(NamedTuple):
    """Of one run."""

    tokens: int
    seconds: float
    cpu_seconds: float  # of all its processes
    peak_bytes: int  # of memory, over all its processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field `text`, plain or .xz")
    parser.add_argument("--megabytes", type=float, default=16.0, help="of it that are taken, evenly over the file")
    parser.add_argument(
        "--tokenizer", type=Path, help="a Hugging Face folder; default: a BPE of 16,384 tokens is trained"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="contestants beside ours")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; inherited by all
    names = [name for name in CONTESTANTS if name == "rorqual" or name in arguments.only]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments, names)
    text = json.dumps(result, indent=2)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(text + "\n")
    print(text)


def compare(folder: Path, arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """All rounds of all contestants; ratios are ours / theirs."""
    lines = _sample(arguments.text, int(arguments.megabytes * 1e6))
    files = _write(lines, folder)
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        every = max(sum(map(len, lines)) // TOKENIZER_BYTES, 1)
        train_bpe((json.loads(line)["text"] for line in lines[::every]), 16_384, tokenizer)
    report: dict[str, Any] = {
        "documents": len(lines),
        "bytes": sum(len(json.loads(line)["text"].encode()) for line in lines),
    }
    report["versions"] = {name: version(name) for name in ("tokenizers", "datatrove", "megatron-core")}
    for workers in arguments.workers:
        rounds = []
        for number in range(arguments.rounds):
            turn = names[number % len(names) :] + names[: number % len(names)]
            results = {name: run(name, Task(files, tokenizer, workers), folder / "out") for name in turn}
            found = {name: result.tokens for name, result in results.items()}
            if len(set(found.values())) > 1:
                raise SystemExit(f"the contestants wrote different numbers of tokens: {found}")
            rounds.append(results)
        report["tokens"] = rounds[0]["rorqual"].tokens
        report[f"workers_{workers}"] = {name: _summary(name, rounds, workers) for name in names}
    return report


def _summary(name: str, rounds: list[dict[str, Result]], workers: int) -> dict[str, Any]:
    own = [results[name] for results in rounds]
    ours = [results["rorqual"] for results in rounds]
    by_time = [theirs.seconds / our.seconds for theirs, our in zip(own, ours)]
    by_cpu = [theirs.cpu_seconds / our.cpu_seconds for theirs, our in zip(own, ours)]
    return {
        "tokens_per_second_and_core": round(statistics.median(each.tokens / each.seconds / workers for each in own)),
        "tokens_per_cpu_second": round(statistics.median(each.tokens / each.cpu_seconds for each in own)),
        "peak_bytes": max(each.peak_bytes for each in own),
        "ratio": _spread(by_time),
        "ratio_of_cpu_time": _spread(by_cpu),
    }


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}


def run(name: str, task: Task, out: Path) -> Result:
    """One contestant in a process of its own, watched from here."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_contest, args=(name, task, out, there))
    process.start()
    there.close()
    peak = 0
    while not here.poll(SAMPLE_SECONDS):
        peak = max(peak, _memory(process.pid))
    try:
        tokens, seconds, cpu_seconds = here.recv()
    except EOFError:
        log = (out / "log.txt").read_text(encoding="utf-8", errors="replace") if (out / "log.txt").exists() else ""
        raise SystemExit(f"{name} failed:\n{log}") from None
    process.join()
    return Result(tokens, seconds, cpu_seconds, peak)


def _memory(pid: int | None) -> int:
    """Bytes that a process and its descendants hold; pages that they share count once."""
    total = 0
    with suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def _contest(name: str, task: Task, out: Path, parent: Connection) -> None:
    """In the contestant's process: import, then work against the clock."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.workers])
    with (out / "log.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    tokenize = CONTESTANTS[name](task, out)
    cpu, start = _cpu_seconds(), time.perf_counter()
    tokens = tokenize()
    parent.send((tokens, time.perf_counter() - start, _cpu_seconds() - cpu))


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rorqual(task: Task, out: Path) -> Tokenize:
    from data.prepare import prepare
    from data.recipe import DataRecipe

    recipe = DataRecipe.model_validate(
        {
            "sources": [{"name": "text", "kind": "jsonl", "path": [str(file) for file in task.files]}],
            "tokenizer": {"kind": "folder", "path": task.tokenizer},
            "dedup": {"exact": False, "minhash": None},
            "validation": 0.01,
        }
    )

    def tokenize() -> int:
        store = prepare(recipe, out / "store", task.workers)
        return sum(record.tokens for record in store.manifest.splits.values())

    return tokenize


def datatrove(task: Task, out: Path, shuffled: bool) -> Tokenize:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers.base import BaseDiskReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    class JsonLines(BaseDiskReader):  # type: ignore[misc]
        """As datatrove's JsonlReader, with the standard library's json, which the others have too, for orjson."""

        name = "JSON lines"

        def read_file(self, filepath: str) -> Iterator[Any]:
            with self.data_folder.open(filepath, "r") as file:
                for number, line in enumerate(file):
                    yield self.get_document_from_dict(json.loads(line), filepath, number)

    end = json.loads((task.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    executor = LocalPipelineExecutor(
        [
            JsonLines(str(task.files[0].parent), glob_pattern="*.jsonl"),
            DocumentTokenizer(
                str(out / "tokens"),
                str(task.tokenizer / "tokenizer.json"),
                eos_token=end if isinstance(end, str) else end["content"],
                shuffle_documents=shuffled,
                seed=0,
            ),
        ],
        tasks=task.workers,
        workers=task.workers,
        logging_dir=str(out / "logs"),
        start_method="fork",  # the cheapest to start, and its processes' time is counted
    )

    def tokenize() -> int:
        executor.run()
        return sum(np.fromfile(file, "<u8")[-1].item() for file in (out / "tokens").glob("*.index"))

    return tokenize


def megatron(task: Task, out: Path) -> Tokenize:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import PreTrainedTokenizerFast

    load = partial(PreTrainedTokenizerFast.from_pretrained, task.tokenizer)
    end = eos_token_id(task.tokenizer)

    def tokenize() -> int:
        builder = IndexedDatasetBuilder(str(out / "text.bin"), DType.optimal_dtype(len(load())))
        tokens = 0
        with multiprocessing.get_context("fork").Pool(task.workers, _begin, (load, end)) as pool:
            for ids in pool.imap(_encode_line, _lines(task.files), LINES_AT_ONCE):
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
            pool.close()
            pool.join()
        builder.finalize(str(out / "text.idx"))
        return tokens

    return tokenize


class _Worker:
    """What a worker of the pool keeps between lines."""

    tokenizer: Any
    end: int


def _begin(load: Callable[[], Any], end: int) -> None:
    _Worker.tokenizer, _Worker.end = load(), end


def _encode_line(line: str) -> list[int]:
    ids: list[int] = _Worker.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
    return [*ids, _Worker.end]


def _lines(files: list[Path]) -> Iterator[str]:
    for file in files:
        with file.open(encoding="utf-8") as opened:
            yield from opened


CONTESTANTS: dict[str, Callable[[Task, Path], Tokenize]] = {
    "rorqual": rorqual,
    "datatrove": partial(datatrove, shuffled=False),
    "datatrove_shuffled": partial(datatrove, shuffled=True),
    "megatron": megatron,
}


def _sample(path: Path, size: int) -> list[bytes]:
    """About `size` bytes of the lines of a file, evenly over it."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        lines = [line.strip() for line in file]
    total = sum(map(len, lines))
    step = max(total / size, 1.0)
    return [lines[int(number * step)] for number in range(int(len(lines) / step))]


def _write(lines: list[bytes], folder: Path) -> list[Path]:
    (folder / "text").mkdir()
    files = [folder / "text" / f"{number}.jsonl" for number in range(FILES)]
    for number, file in enumerate(files):
        file.write_bytes(b"".join(line + b"\n" for line in lines[number::FILES]))
    return files


if __name__ == "__main__":
    main()
