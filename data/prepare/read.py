"""The first stage: every input of every source becomes shards of documents of about equal size."""

from collections import Counter
from pathlib import Path

from data.counts import Count
from data.documents import Document, Unreadable
from data.errors import DataError
from data.prepare.accounts import EXAMPLES_KEPT, Reading, UnreadableExample
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item
from data.shards import write_shard
from data.sources import Input, inputs, read_input


def items(job: Job) -> list[Item]:
    """One for each input.

    Raises:
        DataError: a source has no inputs.
    """
    found = []
    for number, source in enumerate(job.recipe.sources):
        (job.folder / "read" / source.name).mkdir(parents=True, exist_ok=True)
        for index, item in enumerate(inputs(source, job.cache)):
            found.append(Item(_account(job, number, index), (job, number, index, item)))
    return found


def read(job: Job, source: int, index: int, item: Input) -> str:
    """Read one input into its shards."""
    record = job.recipe.sources[source]
    unreadable: Counter[str] = Counter()
    examples: list[UnreadableExample] = []
    documents: list[Document] = []
    total, size, shards = Count(), 0, 0

    def flush() -> None:
        nonlocal total, size, shards
        write_shard(job.folder / "read" / f"{_shard_name(record.name, index, shards)}.parquet", documents)
        total += Count(documents=len(documents), bytes=size)
        size, shards = 0, shards + 1
        documents.clear()

    for found in read_input(record, item, job.cache):
        if isinstance(found, Unreadable):
            unreadable[found.reason] += 1
            if unreadable[found.reason] <= EXAMPLES_KEPT:
                examples.append(UnreadableExample(reason=found.reason, where=found.where, detail=found.detail))
            continue
        documents.append(found)
        size += found.size
        if size >= job.recipe.shard_bytes:
            flush()
    if documents:
        flush()
    account = Reading(shards=shards, read=total, unreadable=dict(sorted(unreadable.items())), examples=examples)
    write_record(_account(job, source, index), account)
    return item.name


def accounts(job: Job, source: int) -> list[Reading]:
    """The accounts of a source's inputs, in order."""
    folder = job.folder / "read" / job.recipe.sources[source].name
    return [read_record(path, Reading) for path in sorted(folder.glob("*.json"))]


def total(job: Job) -> Count:
    """All documents that were read."""
    return sum((own.read for number in range(len(job.recipe.sources)) for own in accounts(job, number)), Count())


def shards(job: Job) -> list[Shard]:
    """All shards in the order in which their documents were read: source by source, input by input.

    Raises:
        DataError: a source without documents.
    """
    found = []
    for number, source in enumerate(job.recipe.sources):
        own = [
            Shard(number, _shard_name(source.name, index, part))
            for index, account in enumerate(accounts(job, number))
            for part in range(account.shards)
        ]
        if not own:
            raise DataError(f"source {source.name}: has no documents with text; check its path, files or separator")
        found += own
    return found


def _account(job: Job, source: int, index: int) -> Path:
    return job.folder / "read" / job.recipe.sources[source].name / f"{index:06d}.json"


def _shard_name(source: str, index: int, part: int) -> str:
    return f"{source}/{index:06d}-{part:06d}"


def raw_shard(job: Job, shard: Shard) -> Path:
    """The documents of a shard as they came."""
    return job.folder / "read" / f"{shard.name}.parquet"
