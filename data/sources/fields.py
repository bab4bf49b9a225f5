"""A record of named fields as a document: what JSON lines, Parquet and data sets have in common."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from data.documents import Document, Unreadable
from data.sources.base import SourceBase


class FieldsSource(SourceBase):
    """A source whose records have named fields."""

    text_field: str = "text"
    metadata: list[str] = Field(default=[])  # further fields that are kept, as strings; a record may be without one

    only: dict[str, list[str]] = Field(
        default={}
    )  # field → values; a record with another value, or none, is not of this source

    def document(self, record: Mapping[str, Any], where: str) -> Document | Unreadable | None:
        """The document that a record holds; None where it belongs to another source."""
        if any(record.get(name) not in values for name, values in self.only.items()):
            return None
        text = record.get(self.text_field)
        if not isinstance(text, str):
            return self._no_text(record, where)
        document = Document(utf8(text), where, self.language, self._metadata(record))
        # A character has at most 4 bytes, so that most texts need no counting.
        if len(text) * 4 > self.max_document_bytes and document.size > self.max_document_bytes:
            return self.too_long(where, document.size)
        return document

    @property
    def fields(self) -> list[str]:
        """All fields that are looked at."""
        return list(dict.fromkeys([self.text_field, *self.metadata, *self.only]))

    def _no_text(self, record: Mapping[str, Any], where: str) -> Unreadable:
        if self.text_field not in record:
            fields = ", ".join(map(str, record)) or "none"
            return Unreadable(
                where, "no_text_field", f"{self.text_field}: missing; fields here are {fields[:200]}; set text_field"
            )
        value = str(record[self.text_field])[:40]
        return Unreadable(
            where, "text_is_no_string", f"{self.text_field} = {value!r}: must be a string; set text_field"
        )

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, str]:
        return {name: _string(record[name]) for name in self.metadata if record.get(name) is not None}


def utf8(text: str) -> str:
    """The text with `?` for each lone surrogate, which JSON can spell and UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _string(value: Any) -> str:
    return utf8(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
