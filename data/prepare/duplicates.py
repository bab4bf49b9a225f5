"""The third stage: which documents are equal or similar to one that stays. Columns are compared one by one, then joined."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.dedup.duplicates import KEPT, Cleaned, Summary, decide, edges_of
from data.dedup.signatures import columns
from data.files import replace_file
from data.prepare.clean import clean_shard
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item


def comparisons(job: Job, shards: list[Shard]) -> list[Item]:
    """One for each column in which equal values mean duplicates."""
    (job.folder / "dedup").mkdir(exist_ok=True)
    return [Item(_edges(job, column), (job, column, shards)) for column in columns(job.recipe.dedup)]


def compare(job: Job, column: str, shards: list[Shard]) -> str:
    """Find the pairs of documents that are equal in one column."""
    pairs = edges_of([clean_shard(job, shard) for shard in shards], column)
    _write_array(_edges(job, column), pairs)
    return column


def choices(job: Job, shards: list[Shard]) -> list[Item]:
    """One for all documents, since what is alike may be in any two of them."""
    return [Item(_summary(job), (job, shards))]


def choose(job: Job, shards: list[Shard]) -> str:
    """Decide which of the documents that resemble each other stays."""
    edges = {column: np.load(_edges(job, column), mmap_mode="r") for column in columns(job.recipe.dedup)}
    sources = job.recipe.sources
    described = [
        Cleaned(clean_shard(job, shard), sources[shard.source].name, sources[shard.source].priority) for shard in shards
    ]
    decision = decide(described, edges)
    for shard, verdicts in zip(shards, decision.verdicts):
        _write_array(_verdicts(job, shard), verdicts)
    write_record(_summary(job), decision.summary)
    return f"{sum(int((verdicts != KEPT).sum()) for verdicts in decision.verdicts):,} duplicates"


def is_kept(job: Job, shard: Shard) -> npt.NDArray[np.bool_]:
    """Whether each document of a cleaned shard stays [documents]."""
    return np.load(_verdicts(job, shard)) == KEPT


def summary(job: Job) -> Summary:
    return read_record(_summary(job), Summary)


def _edges(job: Job, column: str) -> Path:
    return job.folder / "dedup" / f"{column}.npy"


def _summary(job: Job) -> Path:
    return job.folder / "dedup" / "summary.json"


def _verdicts(job: Job, shard: Shard) -> Path:
    return job.folder / "dedup" / f"{shard.name.replace('/', '-')}.npy"


def _write_array(path: Path, values: npt.NDArray[np.int64] | npt.NDArray[np.uint8]) -> None:
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)
