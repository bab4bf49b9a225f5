"""The source of the Python that runs: text that is everywhere and needs no download."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from data.documents import Document, Unreadable
from data.sources.base import Input, SourceBase

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


class StandardLibrary(SourceBase):
    """The source files of the Python that runs, one document each, without tests and generated tables."""

    kind: Literal["stdlib"]
    # Files are taken by the hash of their name until the next would pass it.
    max_bytes: int | None = Field(default=None, ge=1)

    def inputs(self, cache: Path) -> list[Input]:
        return [Input("the standard library")]

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        root = Path(sysconfig.get_path("stdlib"))
        taken = 0
        for name in sorted(_names(root), key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
            where, content = f"stdlib:{name.as_posix()}", (root / name).read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                yield Unreadable(where, "not_utf8", f"byte {error.start} is not UTF-8")
                continue
            if self.max_bytes is not None and taken + len(content) > self.max_bytes:
                return
            taken += len(content)
            yield Document(text, where, self.language)


def _names(root: Path) -> Iterator[Path]:
    """Its files, relative to its folder; the packages that are installed in it are not walked through."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name).relative_to(root) for name in files if name.endswith(".py"))
