"""The second stage: a shard's documents pass the steps, one after another; what is left gets the hashes that find duplicates."""

from functools import cache
from pathlib import Path

import pyarrow

from data.clean import Step
from data.dedup.signatures import Dedup, MinHash, Signer
from data.dedup.signatures import columns as names
from data.documents import Document, Rejected, text_hash
from data.errors import DataError
from data.prepare.accounts import Cleaning, Tally
from data.prepare.job import Job, Shard, built_steps, names_of, read_record, steps_of, write_record
from data.prepare.read import raw_shard
from data.prepare.work import Item
from data.shards import read_shard, write_shard


def items(job: Job, shards: list[Shard]) -> list[Item]:
    """One for each shard."""
    for source in job.recipe.sources:
        (job.folder / "clean" / source.name).mkdir(parents=True, exist_ok=True)
    return [Item(_account(job, shard), (job, shard)) for shard in shards]


def clean(job: Job, shard: Shard) -> str:
    """Clean one shard."""
    if _account(job, shard).exists():  # by another task, and this one's file system was slow to tell
        return shard.name
    records = steps_of(job.recipe, shard.source)
    names, steps = names_of(records), built_steps(records)
    tally = Tally(len(steps))
    kept = []
    for document in read_shard(raw_shard(job, shard)):
        result = _apply(document, names, steps, tally)
        if result is not None:
            tally.kept(result)
            kept.append(result)
    write_shard(clean_shard(job, shard), kept, _columns(kept, job.recipe.dedup))
    write_record(_account(job, shard), tally.account())
    raw_shard(job, shard).unlink(missing_ok=True)
    return shard.name


def clean_shard(job: Job, shard: Shard) -> Path:
    """The documents of a shard that the steps left."""
    return job.folder / "clean" / f"{shard.name}.parquet"


def account(job: Job, shard: Shard) -> Cleaning:
    return read_record(_account(job, shard), Cleaning)


def _account(job: Job, shard: Shard) -> Path:
    return job.folder / "clean" / f"{shard.name}.json"


def _apply(document: Document, names: list[str], steps: list[Step], tally: Tally) -> Document | None:
    """The document after all steps, or None where one of them rejects it."""
    for number, (name, step) in enumerate(zip(names, steps)):
        try:
            result = step.apply(document)
            if not isinstance(result, Rejected):
                result = Rejected("empty") if not result.text.strip() else result
            size = 0 if isinstance(result, Rejected) else result.size
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"step {name} fails on {document.where} ({type(error).__name__}: {error}); mend the step or leave it out"
            ) from error
        if isinstance(result, Rejected):
            tally.fell(document, name, result.reason)
            return None
        document = result
        tally.passed(number, size)
    return document


def _columns(documents: list[Document], dedup: Dedup) -> dict[str, pyarrow.Array]:
    """What finds a document's duplicates, and its size."""
    columns = {
        "hash": pyarrow.array([text_hash(document.text) for document in documents], pyarrow.binary(32)),
        "bytes": pyarrow.array([document.size for document in documents], pyarrow.int64()),
    }
    if dedup.minhash is not None:
        sign = _signer(dedup.minhash)
        keys = [sign(document) for document in documents]
        bands = names(dedup)[-dedup.minhash.bands :]
        for band, name in enumerate(bands):
            columns[name] = pyarrow.array([None if key is None else int(key[band]) for key in keys], pyarrow.uint64())
    return columns


@cache
def _signer(config: MinHash) -> Signer:
    return Signer(config)
