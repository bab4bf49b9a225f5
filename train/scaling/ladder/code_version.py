"""The source that a run is made of, as a hash: the same in a clone, another after a change to a file that the run imports."""

import ast
import hashlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("data", "model", "parallel", "train")
START = "train.trainer"
APART = "train.scaling"  # what a cell's schedule took from a law stands in its recipe as numbers


def code_version() -> str:
    """Of the files as they are now, which is what a process that starts now imports."""
    digest = hashlib.sha256()
    for name, path in sorted(imported().items()):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def imported() -> dict[str, Path]:
    """Our modules that a run imports, at its start or later, by following the import statements."""
    found: dict[str, Path] = {}
    left = [START]
    while left:
        name = left.pop()
        if name in found or name.startswith(APART) or (path := _file(name)) is None:
            continue
        found[name] = path
        left.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _file(name: str) -> Path | None:
    """Where the source of one of our modules lies."""
    package, *inside = name.split(".")
    if package not in PACKAGES:
        return None
    root = sys.modules.get(package)
    source = root.__file__ if root else getattr(find_spec(package), "origin", None)
    assert source is not None, f"{package} has no file"
    path = Path(source).parent.joinpath(*inside)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
