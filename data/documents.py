"""What flows through a preparation: a document, and the two ways in which one leaves it early."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from. Steps return changed copies (`dataclasses.replace`)."""

    text: str
    where: str  # for people, e.g. "web/00.jsonl.gz:17", "wiki.xml.bz2:Anarchism"
    language: str | None = None  # ISO 639-1 code, once identified or where the source says it
    metadata: dict[str, str] = field(default_factory=dict)  # the fields that the source's `metadata` names

    @property
    def size(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Rejected:
    """A step's verdict on a document. Reasons are counted, so they are few and say no numbers: "too_short"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record of a source that gives no document: located, counted by its reason, and passed over."""

    where: str  # file and line, as `Document.where`
    reason: str  # counted: "not_utf8", "not_json", "no_text_field", "text_is_no_string", "too_long", …
    detail: str  # for the person who looks at it


def text_hash(text: str) -> bytes:
    """sha256 of a text: decides its split, its place in samples, and which documents are equal."""
    return hashlib.sha256(text.encode()).digest()


def hash_number(digest: bytes) -> int:
    """The first 64 bits of a hash as a number, evenly spread over 0 … 2^64 − 1."""
    return int.from_bytes(digest[:8], "big")
