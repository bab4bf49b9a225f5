"""What a command line may ask for, checked before anything is measured: argparse refuses the rest in one line, with exit code 2."""

from argparse import ArgumentTypeError
from pathlib import Path

from contestants import Shape
from matplotlib.figure import Figure

from data.store import Store
from model.config import ConfigError


def shape(text: str) -> Shape:
    """A file of `benchmarks/shapes`."""
    try:
        return Shape.read(Path(text))
    except OSError as error:
        raise ArgumentTypeError(f"{text}: {error.strerror}; give a file of benchmarks/shapes") from None
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ArgumentTypeError(f"{text} is no shape ({error}); give a file like those of benchmarks/shapes") from None


def count(text: str) -> int:
    """How many of something; none is allowed."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text}: must be an integer of at least 0")
    return int(text)


def new_file(text: str) -> Path:
    """A file to be written."""
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"{text}: there is no folder {path.parent}; make it first")
    return path


def picture(text: str) -> Path:
    """A file to be drawn into."""
    path, kinds = new_file(text), Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ArgumentTypeError(f"{text}: must end in one of {', '.join(sorted(kinds))}")
    return path


def store(text: str) -> Path:
    """A token store."""
    try:
        Store.open(Path(text))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{text}: {error}") from None
    return Path(text)
