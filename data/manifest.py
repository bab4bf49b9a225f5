"""What a store is made of: written last, so that a store without its manifest is an unfinished one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.files import replace_file

FILE_NAME = "manifest.json"
SPLITS = ("train", "validation")
CHECKSUM = "checksum"  # key of the manifest's own hash, in the file only


def _inside(name: str) -> str:
    """A name below the store's folder: a manifest that came from elsewhere names no other files."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r}: must be the name of a file in the store")
    return name


Inside = Annotated[str, AfterValidator(_inside)]


class Record(BaseModel):
    """A frozen record that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSpan(Record):
    """Where one source lies in the `.bin` of one split. Sources lie one after the other."""

    name: str
    weight: float  # share of the samples, relative to the other sources of the store
    first_document: int = 0
    last_document: int = -1  # inclusive; first_document − 1 for a source without documents
    documents: int
    tokens: int  # each document's end-of-sentence token included
    bytes: int  # UTF-8 bytes of the text, without end-of-sentence tokens


class SplitRecord(Record):
    """Counts of one split and its sources in the order in which they lie on disk."""

    documents: int
    tokens: int
    # Names of its `.bin`/`.idx` pairs without their endings, in order: ["train"], or ["train-00000", …].
    pieces: list[Inside] = Field(min_length=1)
    sources: list[SourceSpan]

    @classmethod
    def of(cls, spans: Iterable[SourceSpan], pieces: list[str]) -> "SplitRecord":
        """The record of sources that lie one after the other in this order."""
        placed: list[SourceSpan] = []
        first = 0
        for span in spans:
            last = first + span.documents - 1
            placed.append(span.model_copy(update={"first_document": first, "last_document": last}))
            first = last + 1
        return cls(documents=first, tokens=sum(span.tokens for span in placed), pieces=pieces, sources=placed)


class FileRecord(Record):
    """Size and content of one file of the store."""

    bytes: int
    sha256: str


class Manifest(Record):
    """`manifest.json`. It holds no times, so that equal text, recipe and library versions give an equal manifest."""

    format: Literal["rorqual-store"] = "rorqual-store"
    version: Literal[3] = 3
    dtype: str  # numpy name of a token on disk
    vocab_size: int  # number of ids of the tokenizer, special tokens included
    eos_token_id: int  # ends every document
    tokenizer_fingerprint: str
    splits: dict[str, SplitRecord]
    files: dict[Inside, FileRecord]
    steps: list[dict[str, Any]]  # how the store was made, in order
    versions: dict[str, str]  # of the libraries that made it
    recipe: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a store's folder: this record, and the hash of it."""
        content = self.model_dump(mode="json") | {CHECKSUM: self._checksum()}
        with replace_file(folder / FILE_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a finished store.

        Raises:
            DataError: there is no folder, no manifest, or one that this version does not read.
        """
        path = folder / FILE_NAME
        prepare = f"make one with `rorqual data prepare RECIPE --out {folder}`"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; a token store is needed; {prepare}")
        if not path.exists():
            raise DataError(f"{folder}: has no {FILE_NAME}, so it is no finished token store; {prepare}")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: no JSON ({reason}); not a manifest of a token store; {prepare}") from None
        if isinstance(content, dict) and content.get("version") in (1, 2):
            raise DataError(
                f"{path}: version = {content['version']}: its tokens have no checksums, and version 3 has them; {prepare}, or keep "
                "its tokens with `rorqual data import`"
            )
        checksum = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
        try:
            found = cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in problem["loc"]) or "the file"
            raise DataError(f"{path}: {field}: {problem['msg']}; not a manifest of a token store; {prepare}") from None
        if checksum != found._checksum():
            raise DataError(f"{path}: is not what was written (its {CHECKSUM} differs); copy it again, or {prepare}")
        return found

    def _checksum(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
