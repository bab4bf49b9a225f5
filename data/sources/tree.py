"""Source trees: the files of a program that people wrote, without what tools and other projects put beside them."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import Literal

from pydantic import Field

from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources.base import Input, SourceBase, grouped

# Besides hidden folders, which hold the state of version control and of tools.
BUILT_FOLDERS = {"CVS", "_darcs", "_build", "__pycache__", "venv"}
PACKAGE_FOLDERS = {"node_modules", "bower_components", "site-packages", "dist-packages", "Pods", "Carthage"}
VENDORED_FOLDERS = {"vendor", "vendored", "_vendor", "third_party", "third-party", "thirdparty", "3rdparty"}
SKIPPED_FOLDERS = BUILT_FOLDERS | PACKAGE_FOLDERS | VENDORED_FOLDERS

BINARY_PREFIX = 8192  # a NUL byte this early shows a binary file without reading it whole
BINARY = "holds a NUL byte; exclude such files"


class SourceTree(SourceBase):
    """The UTF-8 files of folders, one document each; hidden and vendored ones and links are left out, binary ones are counted."""

    kind: Literal["tree"]
    path: str | list[str]  # a folder, a pattern of folders, or a list of these
    # Patterns of a file's name or of its path below the folder; * also crosses folders.
    include: list[str] = Field(default=["*"], min_length=1)
    exclude: list[str] = Field(default=[])  # of these, the files that are left out all the same

    def inputs(self, cache: Path) -> list[Input]:
        files: dict[Path, None] = {}
        for pattern in [self.path] if isinstance(self.path, str) else self.path:
            roots = sorted(
                path for path in glob(str(Path(pattern).expanduser()), recursive=True) if Path(path).is_dir()
            )
            if not roots:
                raise DataError(
                    f"source {self.name}: path = {pattern!r}: no such folder; mend the path (relative to {Path.cwd()})"
                )
            files.update(dict.fromkeys(file for root in roots for file in self._files(Path(root))))
        if not files:
            raise DataError(
                f"source {self.name}: path = {self.path!r}: has no file that `include` and `exclude` leave; mend the path or "
                f"the patterns (include: {self.include}, exclude: {self.exclude})"
            )
        return grouped(list(files))

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        for file in item.files:
            yield self._read(file)

    def _files(self, root: Path) -> list[Path]:
        found: list[Path] = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            found += (path for path in paths if self._wanted(path, root) and path.is_file() and not path.is_symlink())
        return sorted(found)

    def _wanted(self, path: Path, root: Path) -> bool:
        names = (path.name, path.relative_to(root).as_posix())
        included, excluded = (
            any(fnmatch(name, pattern) for name in names for pattern in patterns)
            for patterns in (self.include, self.exclude)
        )
        return included and not excluded

    def _read(self, path: str) -> Document | Unreadable:
        try:
            with open(path, "rb") as file:
                content = file.read(BINARY_PREFIX)
                if b"\0" in content:
                    return Unreadable(path, "binary", BINARY)
                size = os.fstat(file.fileno()).st_size
                if size > self.max_document_bytes:
                    return self.too_long(path, size)
                content += file.read()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}); check the file and its rights"
            ) from None
        if b"\0" in content:
            return Unreadable(path, "binary", BINARY)
        try:
            return Document(content.decode(), path, self.language)
        except UnicodeDecodeError as error:
            return Unreadable(
                path, "not_utf8", f"byte {error.start} is not UTF-8; convert the file to UTF-8 or exclude it"
            )
