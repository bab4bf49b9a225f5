"""What every source has: its fields in a recipe, its inputs, and how one of them is read."""

from collections.abc import Iterator
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from data.clean import StepConfig
from data.documents import Document, Unreadable
from data.errors import DataError
from data.manifest import Record
from data.yaml_io import matching

MAX_FILES = 1000  # of one input: many small files make few inputs …
MAX_FILES_BYTES = 256 << 20  # … and large files still make many, so that processes can share them


class Input(NamedTuple):
    """One unit of reading: what one process reads from start to end."""

    name: str  # for people and files, e.g. "corpus/00.jsonl.gz"; no two inputs of a source share it
    files: tuple[str, ...] = ()  # read one after the other
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n shards, where no files tell the inputs apart


class SourceBase(Record):
    """What every source has. A kind adds its own fields, `inputs` and `records`."""

    name: Annotated[str, matching(r"\w[\w.-]*", "letters, digits, . _ -, beginning with a letter, a digit or _")]
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # share of the samples, relative to the other sources
    priority: int = 0  # of two equal documents, the one of the higher priority stays
    steps: tuple[StepConfig, ...] | None = None  # its cleaning; None: the recipe's `steps`
    language: str | None = None  # ISO 639-1 code of all its documents; None: unknown
    max_document_bytes: int = Field(default=16 << 20, ge=1)  # longer records are unreadable
    max_unreadable: float = Field(default=0.01, ge=0, le=1)  # share of an input's records; more, and it is refused

    def inputs(self, cache: Path) -> list[Input]:
        """What there is to read, in an order that depends on nothing but the content."""
        raise NotImplementedError

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        """What one input holds, in order, without a judgement on how much of it is unreadable."""
        raise NotImplementedError

    def too_long(self, where: str, size: int) -> Unreadable:
        """The verdict on a record of more than `max_document_bytes`."""
        return Unreadable(
            where,
            "too_long",
            f"{size:,} bytes; max_document_bytes of source {self.name} is {self.max_document_bytes:,}",
        )


def expand(paths: str | list[str], source: str, endings: tuple[str, ...] = ()) -> list[Path]:
    """Files of paths, folders (files below with one of the endings, none of them hidden) and patterns.

    Each group is in the order of its names, and a file that two of them name comes once.

    Raises:
        DataError: one of the paths gives no file.
    """
    patterns = [paths] if isinstance(paths, str) else paths
    if not patterns:
        raise DataError(f"source {source}: path = []: must name at least one file, folder or pattern")
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        if expanded.is_dir():
            files = sorted(path for path in expanded.rglob("*") if _counts(path, expanded, endings))
        else:
            files = sorted(Path(match) for match in glob(str(expanded), recursive=True) if Path(match).is_file())
        if not files and expanded.is_dir():
            wanted = f" that ends in {' or '.join(endings)} (or that, compressed)" if endings else ""
            raise DataError(
                f"source {source}: path = {pattern!r}: a folder that has no file{wanted}; "
                "mend the path, or name the files by a pattern"
            )
        if not files:
            raise DataError(
                f"source {source}: path = {pattern!r}: no such file, folder or pattern; mend the path (relative to {Path.cwd()})"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def one_each(files: list[Path]) -> list[Input]:
    """An input for each file."""
    return [Input(str(file), (str(file),)) for file in files]


def grouped(files: list[Path]) -> list[Input]:
    """Inputs of consecutive files: at most MAX_FILES of them, and no more than MAX_FILES_BYTES but for the last."""
    groups: list[int] = []  # of each file
    group = count = size = 0
    for file in files:
        if count == MAX_FILES or size >= MAX_FILES_BYTES:
            group, count, size = group + 1, 0, 0
        count, size = count + 1, size + file.stat().st_size
        groups.append(group)
    numbered = groupby(zip(groups, map(str, files)), key=lambda pair: pair[0])
    return [_group(tuple(file for _, file in pairs)) for _, pairs in numbered]


def _group(files: tuple[str, ...]) -> Input:
    return Input(files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more", files)


def _counts(path: Path, root: Path, endings: tuple[str, ...]) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    return path.is_file() and (not endings or any(suffix in endings for suffix in path.suffixes[-2:]))
