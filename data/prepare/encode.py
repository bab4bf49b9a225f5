"""The fifth stage: a shard's documents, without duplicates, become token ids, each in the split that the hash of its text names."""

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow

from data.documents import hash_number
from data.errors import DataError
from data.fim import Encoder
from data.indexed import write_indexed
from data.manifest import SPLITS
from data.prepare.accounts import Encoding, SplitCount
from data.prepare.clean import clean_shard
from data.prepare.duplicates import is_kept
from data.prepare.job import Job, Shard, read_record, write_record
from data.prepare.work import Item
from data.shards import read_columns


def items(job: Job, shards: list[Shard]) -> list[Item]:
    """One for each shard."""
    for source in job.recipe.sources:
        (job.folder / "encode" / source.name).mkdir(parents=True, exist_ok=True)
    return [Item(_account(job, shard), (job, shard)) for shard in shards]


def encode(job: Job, shard: Shard) -> str:
    """Encode one shard."""
    recipe = job.recipe
    table = read_columns(clean_shard(job, shard), ["text", "hash", "bytes"]).filter(pyarrow.array(is_kept(job, shard)))
    texts, hashes = table["text"].to_pylist(), table["hash"].to_pylist()
    sizes = table["bytes"].to_numpy()
    in_validation = np.asarray([in_validation_split(digest, recipe.validation) for digest in hashes], np.bool_)
    folder = tokenizer_folder(job)
    encoder = Encoder(folder, recipe.fim_rate, recipe.split_joined_rate, recipe.seed)
    ids = encoder.encode(texts, hashes, plain=in_validation.tolist())
    reference = _reference_tokens(recipe.reference_tokenizer, texts)
    splits = {}
    for split in SPLITS:
        mine = np.flatnonzero(in_validation == (split == "validation"))
        write_indexed(encoded_shard(job, shard, split), (ids[number] for number in mine), encoder.dtype)
        tokens = sum(len(ids[number]) for number in mine)
        splits[split] = SplitCount(
            documents=len(mine),
            tokens=tokens,
            bytes=int(sizes[mine].sum()),
            reference_tokens=int(reference[mine].sum()),
        )
    lengths = Counter(len(document).bit_length() for document in ids)
    write_record(_account(job, shard), Encoding(splits=splits, lengths=dict(sorted(lengths.items()))))
    return shard.name


def _reference_tokens(folder: Path | None, texts: list[str]) -> npt.NDArray[np.int64]:
    """How many tokens the reference tokenizer makes of each text, its end-of-sentence token left out."""
    if folder is None:
        return np.zeros(len(texts), np.int64)
    ids = Encoder(folder).encode(texts, [b""] * len(texts), plain=[True] * len(texts))
    return np.asarray([len(document) - 1 for document in ids], np.int64)


def in_validation_split(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text's hash alone, so that equal ones never part."""
    return hash_number(digest) < share * 2**64


def check_splits(job: Job, shards: list[Shard]) -> None:
    """Each source must have something to train on, unless all of it is for validation.

    Raises:
        DataError: all documents of a source fell to validation.
    """
    trained = {shard.source for shard in shards if account(job, shard).splits["train"].documents}
    for number, source in enumerate(job.recipe.sources):
        if job.recipe.validation < 1 and number not in trained:
            raise DataError(
                f"source {source.name}: all its documents fell to validation; add documents or lower `validation`"
            )


def tokenizer_folder(job: Job) -> Path:
    return job.folder / "tokenizer"


def encoded_shard(job: Job, shard: Shard, split: str) -> Path:
    """Where a shard's token ids lie, without the files' endings."""
    return job.folder / "encode" / f"{shard.name}-{split}"


def account(job: Job, shard: Shard) -> Encoding:
    return read_record(_account(job, shard), Encoding)


def _account(job: Job, shard: Shard) -> Path:
    return job.folder / "encode" / f"{shard.name}.json"
