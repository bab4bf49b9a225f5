"""The marker that makes a folder a checkpoint: its files, their sizes and what is in them.

    COMPLETE    {"format": 2, "rorqual": "0.1.0", "step": 1000, "files": {name: {"bytes": …, "sha256": …}, …}, "sha256": …}

It is written last, and everything is held against it before anything is used: a file that is missing, cut off or changed by one
bit is found, and so is a change in the marker itself, whose last field is the SHA-256 of the rest. The hashes are taken from
memory while the files are written, so that they also tell of what the disk made of the bytes.

A checkpoint of another format, or of a newer version of Rorqual, is not damaged and must be neither stepped over nor replaced: it
is refused (`VersionError`). Format 1, of which only the sizes were known and whose index was a pickle, is not read any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from data.files import replace_file
from train.ranks import Ranks

FORMAT = 2
MARKER = "COMPLETE"
REMEDY = "delete the folder to continue from the checkpoint before it"
ALONE = Ranks(None)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is one line: folder, what was found, rule and fix."""


class VersionError(CheckpointError):
    """A checkpoint that may well be whole, but not for this version of Rorqual."""


class File(NamedTuple):
    """What a file of a checkpoint must be."""

    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> File:
        return cls(len(content), hashlib.sha256(content).hexdigest())


def seal(folder: Path, step: int, files: Mapping[str, File]) -> None:
    """Write the marker. `files`: by name, relative to the folder, with `/` between the parts."""
    listed = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in sorted(files.items())}
    content = {"format": FORMAT, "rorqual": version("rorqual"), "step": step, "files": listed}
    with replace_file(folder / MARKER) as path:
        path.write_bytes(_sealed(content))


def verify(path: Path | str, ranks: Ranks = ALONE) -> dict[str, File]:
    """Read every byte of a checkpoint and hold it against the marker; of several ranks each reads its share of the files.

    Raises:
        CheckpointError: on all ranks alike; no marker, or a file is not what was written.
        VersionError: the checkpoint is of another format, or of a newer version.
    """
    path = Path(path)
    files = ranks.first(lambda: verify_sizes(path))
    ranks.all(lambda: _verify_content(path, dict(list(files.items())[ranks.rank :: ranks.size])))
    return files


def verify_sizes(path: Path) -> dict[str, File]:
    """`verify`, but of the files only that they are there with their sizes, as plain files inside the folder; it reads none."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; give a folder step-… of a run")
    files = read_marker(path)
    for name, expected in files.items():
        if not _is_inside(path, name):
            raise CheckpointError(
                f"checkpoint {path}: {MARKER} lists {name!r}, which leads out of the folder; a checkpoint's files are plain files "
                f"in it; {REMEDY}"
            )
        try:
            status = (path / name).stat()  # once: a file system of many nodes answers in a millisecond
            found = f"has {status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "is no file"
        except FileNotFoundError:
            found = "is missing"
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        if found != f"has {expected.size:,} bytes":
            raise CheckpointError(f"checkpoint {path}: {name} {found} and must have {expected.size:,} bytes; {REMEDY}")
    return files


def read_marker(path: Path) -> dict[str, File]:
    """The files that the marker lists, whether or not they are there.

    Raises:
        CheckpointError: there is no marker, or it is damaged.
        VersionError: the checkpoint is of another format, or of a newer version.
    """
    damaged = f"checkpoint {path}: {MARKER} is not as it was written"
    if (path / MARKER).is_symlink():
        raise CheckpointError(f"{damaged} (it is a link); {REMEDY}")
    try:
        written = (path / MARKER).read_bytes()
        content: dict[str, Any] = json.loads(written)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path}: has no {MARKER} marker, its save was interrupted; {REMEDY}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{damaged} ({getattr(error, 'strerror', None) or str(error).splitlines()[0]}); {REMEDY}"
        ) from None
    try:
        _check_version(path, content)
        if written != _sealed({key: value for key, value in content.items() if key != "sha256"}):
            raise CheckpointError(f"{damaged} (its own sha256 is another); {REMEDY}")
        return {name: File(int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{damaged} ({type(error).__name__}: {error}); {REMEDY}") from None


def _check_version(path: Path, content: dict[str, Any]) -> None:
    own = version("rorqual")
    if content.keys() == {"step", "files"}:
        raise VersionError(
            f"checkpoint {path}: is of format 1, whose index is a pickle; rorqual {own} reads format {FORMAT} and unpickles "
            "nothing; export it with the version that wrote it and set run.initialize_from, or set another run.dir"
        )
    wrote = content["rorqual"]
    if content["format"] > FORMAT or _release(wrote) > _release(own):
        raise VersionError(
            f"checkpoint {path}: was written by rorqual {wrote} in format {content['format']}, and this is rorqual {own}, which "
            f"reads format {FORMAT}; a newer version's checkpoint is neither read nor replaced; install rorqual {wrote} or newer"
        )


def _release(name: str) -> tuple[int, ...]:
    """0.10.2rc1 → (0, 10, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", name)[:3])


def _sealed(content: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a plain file below the folder: no absolute path, no `..`, no link on the way."""
    parts = name.split("/")
    if not parts or {"", ".", ".."} & set(parts) or "\0" in name:
        return False
    return not any(os.path.islink(folder.joinpath(*parts[:depth])) for depth in range(1, len(parts) + 1))


def _verify_content(path: Path, files: dict[str, File]) -> None:
    """All of a share at once: one file is hashed slower than a disk reads."""

    def check(name: str) -> None:
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error.strerror}); {REMEDY}") from None
        if found != files[name].sha256:
            raise CheckpointError(
                f"checkpoint {path}: {name} is not what was written: its sha256 is {found[:12]}… and must be "
                f"{files[name].sha256[:12]}…; {REMEDY}"
            )

    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1))) as pool:
        list(pool.map(check, files))
