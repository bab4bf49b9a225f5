"""A step of the cleaning, and what a recipe says of it."""

from pathlib import Path
from typing import Protocol

from data.documents import Document, Rejected
from data.manifest import Record


class Step(Protocol):
    """Looks at one document at a time and knows nothing of the others, so that any number of processes may share the work."""

    def apply(self, document: Document) -> Document | Rejected:
        """The document, changed or not, or why it is left out."""
        ...


class StepRecord(Record):
    """What a recipe says of one step. Subclasses have a `kind` and the step's settings, papers' values as defaults."""

    def build(self) -> Step:
        """The step itself; called once in every process that cleans.

        Raises:
            DataError: a package or a file that the step needs is missing.
        """
        raise NotImplementedError

    def files(self) -> list[Path]:
        """What the step reads beside the documents; while a store is made, none of it may change."""
        return []
