"""Files that a command was asked to write: refused before the work where they cannot be written, and whole once they are there."""

import tempfile
from pathlib import Path

from data.files import replace_file
from train.scaling.errors import ScalingError


def check_output(path: str | Path, option: str = "out") -> None:
    """See that a file can be written at `path`.

    Raises:
        ScalingError: it is a folder, its folder is missing, or nothing can be written there.
    """
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise ScalingError(
            f"{option} = {str(path)!r}: is a folder; give the path of a file, for example {path / option}"
        )
    if not folder.is_dir():
        raise ScalingError(f"{option} = {str(path)!r}: there is no folder {path.parent}; make it or give another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, option, error) from None


def write_output(path: str | Path, text: str, option: str = "out") -> None:
    """Write a file that is there whole or not at all.

    Raises:
        ScalingError: it cannot be written.
    """
    path = Path(path)
    check_output(path, option)
    try:
        with replace_file(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise _unwritable(path, option, error) from None


def _unwritable(path: Path, option: str, error: OSError) -> ScalingError:
    return ScalingError(f"{option} = {str(path)!r}: cannot be written ({error.strerror}); give another place")
