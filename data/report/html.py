"""Pages of one file that ask for nothing from elsewhere: how they are filled and written."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.errors import DataError
from data.files import replace_file


def environment(folder: Path) -> Environment:
    """Jinja for a folder's templates; look.html, the style of every page, is at hand in each of them."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write(page: str, path: Path) -> None:
    """Write a page, or nothing where that fails.

    Raises:
        DataError: there is no place for a file at `path`.
    """
    if path.is_dir() or not path.parent.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise DataError(f"html = {str(path)!r}: {found}; give the page a file's name in a folder that exists")
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
