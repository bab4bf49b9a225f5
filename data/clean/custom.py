"""A step of the user's own, by its import path: any class with `apply(document) -> Document | Rejected`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data.clean.step import Step, StepRecord
from data.documents import Document, Rejected
from data.errors import DataError
from data.yaml_io import matching


class Custom(StepRecord):
    """`step: "package.module:Class"`, made as `Class(**options)` once in every process that cleans."""

    kind: Literal["custom"] = "custom"
    step: Annotated[str, matching(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", "package.module:Class")]
    options: dict[str, Any] = Field(default={})

    def build(self) -> Step:
        """Import the module and make the step.

        Raises:
            DataError: there is no such module or class, it refuses the options, or it has no `apply`.
        """
        where = f"steps: custom: step: {self.step}"
        module_name, class_name = self.step.split(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise DataError(
                f"{where}: no module {error.name!r}; install it, or put its folder on PYTHONPATH (PYTHONPATH=. for the current one)"
            ) from None
        except Exception as error:
            raise DataError(f"{where}: importing {module_name} raised {_one_line(error)}; mend the module") from error
        if not hasattr(module, class_name):
            raise DataError(f"{where}: {module.__file__} has no {class_name!r}; write package.module:Class")
        try:
            step = getattr(module, class_name)(**self.options)
        except Exception as error:
            raise DataError(f"{where}: options {self.options}: {_one_line(error)}; give what it takes") from error
        if not callable(getattr(step, "apply", None)):
            raise DataError(f"{where}: has no method apply(document); a step returns the document, or a Rejected")
        return _Custom(step, where)

    def files(self) -> list[Path]:
        """The file of the step's module; none where there is no such file, which `build` says."""
        try:
            found = importlib.util.find_spec(self.step.split(":")[0])
        except Exception:  # the packages above the module are imported, and raise what they like
            return []
        return [Path(found.origin)] if found and found.has_location and found.origin else []


class _Custom:
    """Checks what the user's step returns, and says on which document it failed."""

    def __init__(self, step: Step, where: str) -> None:
        self._step = step
        self._where = where

    def apply(self, document: Document) -> Document | Rejected:
        try:
            result = self._step.apply(document)
        except Exception as error:
            error.add_note(f"{self._where}: on the document {document.where}")
            raise
        if not isinstance(result, Document | Rejected):
            raise DataError(
                f"{self._where}: returned a {type(result).__name__} for {document.where}; "
                "apply must return a data.documents.Document or Rejected"
            )
        return result


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
