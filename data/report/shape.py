"""`report.json` of a store: where documents and bytes went, in every step of the preparation.

It holds no times and no paths of the machine, so that equal text and recipe give an equal report. Everything is kept by source.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from data.counts import Count
from data.dedup.duplicates import Summary
from data.errors import DataError
from data.files import replace_file
from data.manifest import Record

FILE_NAME = "report.json"


class Stage(Record):
    """What one step left."""

    name: str  # "read", a step of the cleaning, "exact duplicates", "near duplicates"
    sources: dict[str, Count]  # a source that has no such step may be missing


class UnreadableRecord(Record):
    """A record of a source that gave no document, to look at."""

    reason: str
    where: str
    detail: str


class Unreadable(Record):
    """The records of one source that gave no document."""

    reasons: dict[str, int]
    examples: list[UnreadableRecord] = Field(default_factory=list)


class RejectedDocument(Record):
    """A document that a step rejected, to look at."""

    source: str
    step: str
    reason: str
    where: str
    text: str  # its beginning


class Tokens(Record):
    """What one source gives to one split."""

    documents: int
    tokens: int  # each document's end-of-sentence token included
    bytes: int
    reference_bytes_per_token: float | None = None  # of the same documents under the reference tokenizer

    @property
    def bytes_per_token(self) -> float:
        """Without end-of-sentence tokens."""
        return self.bytes / max(self.tokens - self.documents, 1)


class Packing(Record):
    """What the two ways of packing the train split into sequences of one length do to it, measured on its beginning."""

    cut_by_windows: float  # share of the documents that windows of the stream cut though they would fit into a sequence
    cut_by_best_fit: (
        float  # share of the documents that are longer than a sequence, the only ones that best-fit packing cuts
    )
    padding_of_best_fit: float  # share of the positions


class Report(Record):
    """The whole report. Lengths are counted in powers of two: k stands for 2^(k−1) … 2^k − 1."""

    recipe: str  # its name
    versions: dict[str, str]
    stages: list[Stage]  # in order; the first is "read"
    rejected: dict[str, dict[str, dict[str, Count]]]  # source → step → reason
    unreadable: dict[str, Unreadable]  # source
    languages: dict[str, dict[str, Count]]  # source → code, or "unknown"
    lengths: dict[str, dict[int, int]]  # source → k → documents of so many bytes
    token_lengths: dict[str, dict[int, int]]  # source → k → documents of so many tokens
    duplicates: Summary
    tokens: dict[str, dict[str, Tokens]]  # source → split
    reference: str | None = None  # name of the reference tokenizer
    packing: dict[int, Packing] = Field(default_factory=dict)  # sequence length
    examples: list[RejectedDocument] = Field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write `report.json` into a store's folder."""
        with replace_file(folder / FILE_NAME) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Read the report of a finished store.

        Raises:
            DataError: there is none, or one that this version does not read.
        """
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); give the folder of a store that `rorqual data prepare` finished"
            ) from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in problem["loc"]) or "the file"
            raise DataError(
                f"{path}: {field}: {problem['msg']}; not a report of this version; prepare the store again"
            ) from None
