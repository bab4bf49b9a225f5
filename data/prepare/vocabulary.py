"""The fourth stage: the tokenizer, trained on a weighted sample of what is left, or copied from a folder."""

import shutil
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import tokenizers

from data import tokenizer
from data.documents import hash_number
from data.errors import DataError
from data.manifest import Record
from data.prepare.clean import clean_shard
from data.prepare.duplicates import is_kept
from data.prepare.encode import in_validation_split, tokenizer_folder
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item
from data.recipe import Given
from data.shards import read_columns


class Made(Record):
    """How the tokenizer was made."""

    record: dict[str, Any]


def items(job: Job, shards: list[Shard]) -> list[Item]:
    return [Item(job.folder / "tokenizer.json", (job, shards))]


def make_tokenizer(job: Job, shards: list[Shard]) -> str:
    """Train or copy the recipe's tokenizer."""
    config = job.recipe.tokenizer
    folder, unfinished = tokenizer_folder(job), job.folder / "tokenizer.unfinished"
    for leftover in (folder, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    if isinstance(config, Given):
        tokenizer.copy_folder(config.path, unfinished)
        record: dict[str, Any] = {"kind": config.kind}
    else:
        sample = weighted_sample(job, shards, config.sample_bytes)
        if config.kind == "bpe":
            tokenizer.train_bpe(sample, config.vocab_size, unfinished)
        else:
            tokenizer.train_sentencepiece(sample, config.vocab_size, unfinished, config.model)
        versions = {"tokenizers": tokenizers.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
        size = sum(len(text.encode()) for text in sample)
        record = {"kind": config.kind, "documents": len(sample), "bytes": size, "versions": versions}
    unfinished.rename(folder)
    write_record(job.folder / "tokenizer.json", Made(record=record))
    return str(record["kind"])


def made(job: Job) -> dict[str, Any]:
    """The manifest's record of the tokenizer."""
    return read_record(job.folder / "tokenizer.json", Made).record


def weighted_sample(job: Job, shards: list[Shard], size: int) -> list[str]:
    """Texts of the train split, about `size` bytes of them, shared among the sources by weight.

    Those with the smallest hashes are taken, a random sample that no order of reading changes.
    """
    weights = sum(source.weight for source in job.recipe.sources)
    texts: list[str] = []
    for number, source in enumerate(job.recipe.sources):
        own = [shard for shard in shards if shard.source == number]
        texts += _sample(job, own, int(size * source.weight / weights))
    if not texts:
        raise DataError("tokenizer: no document is left to train it on; loosen the steps, or lower `validation`")
    return texts


def _sample(job: Job, shards: list[Shard], size: int) -> list[str]:
    """Of one source, in the order of the hashes."""
    candidates = [_candidates(job, shard) for shard in shards]
    numbers, sizes, rows = (np.concatenate(column) for column in zip(*candidates))
    of_shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(own[0]) for own in candidates])
    order = np.argsort(numbers, kind="stable")
    taken = max(int(np.cumsum(sizes[order]).searchsorted(size, side="right")), 1)
    chosen = order[:taken]
    texts: dict[int, str] = {}
    for shard in np.unique(of_shard[chosen]).tolist():
        mine = chosen[of_shard[chosen] == shard]
        column = read_columns(clean_shard(job, shards[shard]), ["text"])["text"]
        texts |= dict(zip(mine.tolist(), column.take(pyarrow.array(rows[mine])).to_pylist()))
    return [texts[number] for number in chosen.tolist()]


def _candidates(job: Job, shard: Shard) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Hash, bytes and row of each document of a shard that is kept and belongs to the train split."""
    table = read_columns(clean_shard(job, shard), ["hash", "bytes"])
    hashes = table["hash"].to_pylist()
    in_train = np.asarray([not in_validation_split(digest, job.recipe.validation) for digest in hashes], np.bool_)
    rows = np.flatnonzero(in_train & is_kept(job, shard))
    numbers = np.asarray([hash_number(hashes[row]) for row in rows], np.uint64)
    return numbers, table["bytes"].to_numpy()[rows], rows.astype(np.int32)
