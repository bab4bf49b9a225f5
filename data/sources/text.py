"""Text files: a document each, or several that a separator or Markdown headings part."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from pydantic import Field

from data.compressed import DAMAGE, TooLong, damaged, opened, records
from data.documents import Document, Unreadable
from data.sources import markdown
from data.sources.base import Input, SourceBase, expand, grouped


class TextSource(SourceBase):
    """A source of UTF-8 texts, one document each or cut."""

    separator: str | None = Field(default=None, min_length=1)  # ends a document and belongs to none
    markdown_sections: int | None = Field(default=None, ge=1, le=6)  # one document per heading of at most this level

    def cut(self, file: IO[bytes], name: str) -> Iterator[Document | Unreadable]:
        """The documents of one text. The n-th of several is located as `name#n`."""
        separator = self.separator.encode() if self.separator and self.markdown_sections is None else None
        offset = 0  # bytes before the record
        found = records(file, separator, self.max_document_bytes)
        for number, record in enumerate(_ended(found) if separator else found, start=1):
            where = f"{name}#{number}" if separator else name
            if isinstance(record, TooLong):
                yield self.too_long(where, record.bytes)
                offset += record.bytes + len(separator or b"")
                continue
            try:
                text = record.decode()
            except UnicodeDecodeError as error:
                yield Unreadable(
                    where,
                    "not_utf8",
                    f"byte {offset + error.start} is not UTF-8; convert the file to UTF-8 or leave it out",
                )
            else:
                yield from self._documents(text, where)
            offset += len(record) + len(separator or b"")

    def _documents(self, text: str, where: str) -> Iterator[Document]:
        if self.markdown_sections is None:
            yield Document(text, where, self.language)
            return
        number = 0
        for number, section in enumerate(markdown.sections(text, self.markdown_sections), start=1):
            yield Document(section, f"{where}#{number}", self.language)
        if not number:
            yield Document("", where, self.language)


def _ended(found: Iterator[bytearray | TooLong]) -> Iterator[bytearray | TooLong]:
    """Records but for a last one of white space alone: what follows the separator that ends the file."""
    blank: bytearray | None = None
    for record in found:
        if blank is not None:
            yield blank
        blank = None if isinstance(record, TooLong) or record.strip() else record
        if blank is None:
            yield record


class TextFiles(TextSource):
    """UTF-8 text files, plain or compressed as .gz, .xz, .bz2, .zst."""

    kind: Literal["text"]
    path: str | list[str]  # a file, a folder, a pattern, or a list of these

    def inputs(self, cache: Path) -> list[Input]:
        return grouped(expand(self.path, self.name))

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        for path in item.files:
            last = "the start"
            try:
                with opened(path) as file:
                    for record in self.cut(file, path):
                        last = record.where
                        yield record
            except DAMAGE as error:
                raise damaged(path, last, error) from None
