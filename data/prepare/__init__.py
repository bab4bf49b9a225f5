"""From a recipe to a token store: read, clean, deduplicate, train the tokenizer, encode, shuffle, write.

What comes out depends on the recipe and the text only, never on the number of processes or tasks, nor on how often the work was
interrupted. Between two stages documents lie in shards on disk, so memory is bounded whatever the size of the text:

    a worker     about 4 · shard_bytes, 60 times its longest document in the rules that count words, and 500 MB of libraries
    duplicates   90 bytes a document for the hashes, 42 for a band, one of them a worker at a time; 210 a duplicate
    tokenizer    32 bytes a document, and the sample
    shuffling    the lengths and the order of one source's documents: 48 bytes a document

On disk the work needs about the text's size compressed with zstd, twice the tokens, and accounts of a few kilobytes a shard (a
hundred where all reasons occur with examples). It lies in `.preparing` in the store's folder and is gone in the end.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import tokenizer
from data.checked import file_record
from data.counts import Count
from data.errors import DataError
from data.files import sync
from data.indexed import token_dtype
from data.manifest import FILE_NAME, SPLITS, Manifest
from data.prepare import clean, duplicates, encode, read, report, vocabulary, write
from data.prepare.beginning import as_record, begin, versions
from data.prepare.job import Job, Shard
from data.prepare.work import ALONE, Item, Share, Work, remove_if_unused
from data.progress import Progress
from data.recipe import DataRecipe, load_data_recipe
from data.report.shape import FILE_NAME as REPORT
from data.store import Store, record_files

STAGING = ".preparing"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
OWN_NAMES = re.compile(
    r"\.preparing|manifest\.json|report\.json|tokenizer|packing|(train|validation)(-\d+)?\.(bin|idx|crc)|.*\.tmp"
)


def prepare(
    recipe: DataRecipe | Path | str,
    out: Path | str,
    workers: int = 1,
    share: Share = ALONE,
    cache: Path | None = None,
) -> Store:
    """Make the token store that a recipe describes, or finish making it.

    A store that the same recipe made before is kept as it is. One that was interrupted is continued.

    Args:
        recipe: a recipe, its YAML file, or the name of a built-in one.
        out: folder of the store.
        workers: processes; the store does not depend on it.
        share: which of several tasks this is that make the store together; returns when the store is finished.
        cache: folder of fetched wheels; None: `~/.cache/rorqual`.

    Raises:
        DataError: the recipe or its text cannot be used, `out` holds something else, or another process is at it.
    """
    out = Path(out)
    recipe, name = _loaded(recipe)
    if workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1")
    if not 0 <= share.task < share.tasks:
        raise DataError(f"task = {share.task}: {share.tasks} tasks are numbered 0 to {share.tasks - 1}")
    with Progress() as progress, _said_plainly(out, progress):
        store = _finished(recipe, out)
        if store is not None:
            progress.line(
                f"{out} already holds the store of this recipe; delete it to prepare it again from changed text"
            )
        else:
            store = _make(recipe, name, out, workers, share, cache, progress)
            counts = (
                f"{split} {record.tokens:,} tokens in {record.documents:,} documents"
                for split, record in store.manifest.splits.items()
            )
            progress.line(f"{out}: {', '.join(counts)}")
    remove_if_unused(out / STAGING)
    return store


def train_tokenizer(
    recipe: DataRecipe | Path | str, out: Path | str, workers: int = 1, cache: Path | None = None
) -> Path:
    """Only the tokenizer of a recipe, as a Hugging Face folder.

    Raises:
        DataError: the recipe or its text cannot be used, or `out` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty; give a new folder")
    recipe, name = _loaded(recipe)
    staging = out.with_name(f".{out.name}.preparing")
    with Progress() as progress, _said_plainly(out, progress):
        with Work(staging, workers, ALONE, progress) as work:
            job = Job(recipe, name, work.folder, cache)
            begin(job, work)
            _make_tokenizer(job, work)
            encode.tokenizer_folder(job).replace(out)
        remove_if_unused(staging)
    return out


def _loaded(recipe: DataRecipe | Path | str) -> tuple[DataRecipe, str]:
    """A recipe and its name."""
    return (recipe, "recipe") if isinstance(recipe, DataRecipe) else (load_data_recipe(recipe), Path(recipe).stem)


def _make(
    recipe: DataRecipe, name: str, out: Path, workers: int, share: Share, cache: Path | None, progress: Progress
) -> Store:
    """This task's part of all stages, until the store is there."""
    with Work(out / STAGING, workers, share, progress) as work:
        if (store := _finished(recipe, out)) is not None:  # between the first look and the lock
            return store
        job = Job(recipe, name, work.folder, cache)
        begin(job, work)
        shards = _make_tokenizer(job, work)
        work.run("encoding", encode.encode, encode.items(job, shards))
        encode.check_splits(job, shards)
        work.run("planning", write.plan, write.plans(job, shards))
        work.run("writing", write.write, write.items(job, shards))
        work.run("finishing", _publish, [Item(out / FILE_NAME, (job, shards, out))])
    return Store.open(out)


def _make_tokenizer(job: Job, work: Work) -> list[Shard]:
    """All stages until there are documents and a tokenizer; returns the shards of documents."""
    work.run("reading", read.read, read.items(job))
    shards = read.shards(job)
    work.progress.line(f"read {_amount(read.total(job))}")
    work.run("cleaning", clean.clean, clean.items(job, shards))
    work.run("comparing documents", duplicates.compare, duplicates.comparisons(job, shards))
    work.run("choosing among duplicates", duplicates.choose, duplicates.choices(job, shards))
    work.progress.line(f"kept {_amount(report.kept(job, shards))}")
    report.check_every_source(job, shards)
    work.run("making the tokenizer", vocabulary.make_tokenizer, vocabulary.items(job, shards))
    return shards


def _publish(job: Job, shards: list[Shard], out: Path) -> str:
    """Move what was made to its place. The manifest is last, so a stop in between leaves an unfinished store."""
    for leftover in out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    shutil.copytree(encode.tokenizer_folder(job), out / "tokenizer", dirs_exist_ok=True)
    report.report(job, shards, versions()).write(out)
    splits = {split: write.split_record(job, shards, split) for split in SPLITS}
    pieces = write.file_records(job, splits)
    for name in pieces:
        if (made := job.folder / "write" / name).exists():  # else a start before this one has moved it
            made.replace(out / name)
    for leftover in (
        path for path in out.iterdir() if path.suffix in (".bin", ".idx", ".crc") and path.name not in pieces
    ):
        leftover.unlink()  # of a store of another recipe that was given up
    sync(out)
    folder = out / "tokenizer"
    others = {REPORT: file_record(out / REPORT)}
    others |= {f"tokenizer/{name}": record for name, record in record_files(folder).items()}
    Manifest(
        dtype=token_dtype(tokenizer.vocab_size(folder)).name,
        vocab_size=tokenizer.vocab_size(folder),
        eos_token_id=tokenizer.eos_token_id(folder),
        tokenizer_fingerprint=tokenizer.fingerprint(folder),
        splits=splits,
        files=dict(sorted((pieces | others).items())),
        steps=report.manifest_steps(job, shards),
        versions=versions(),
        recipe=as_record(job.recipe),
    ).write(out)
    return FILE_NAME


@contextmanager
def _said_plainly(out: Path, progress: Progress) -> Iterator[None]:
    """What a user needs to know of an interruption or a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        progress.line("interrupted; start the same command again to continue")
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"--out = {out}: {error.strerror}; make room and start the same command again: what is finished is kept"
        ) from error


def _finished(recipe: DataRecipe, out: Path) -> Store | None:
    """The store that is already there, if this recipe made it."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"--out = {out}: is a file; give a folder")
    if not (out / FILE_NAME).exists():
        if foreign := sorted(path.name for path in out.iterdir() if not OWN_NAMES.fullmatch(path.name)):
            raise DataError(
                f"--out = {out}: holds {foreign[0]}, which is no part of a store; give an empty or new folder"
            )
        return None
    store = Store.open(out)
    if store.manifest.recipe != as_record(recipe):
        raise DataError(f"--out = {out}: holds the store of another recipe; give another folder, or delete this one")
    return store


def _amount(count: Count) -> str:
    return f"{count.documents:,} documents, {count.bytes / 1e6:.1f} MB"
