"""JSON lines: one object a line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data.compressed import DAMAGE, TooLong, damaged, opened, records
from data.documents import Document, Unreadable
from data.sources.base import Input, expand, one_each
from data.sources.fields import FieldsSource

ENDINGS = (".jsonl", ".ndjson", ".json")


class JsonLines(FieldsSource):
    """One JSON object a line; plain, or compressed as .gz, .xz, .bz2, .zst."""

    kind: Literal["jsonl"]
    path: str | list[str]  # a file, a folder (its .jsonl, .ndjson and .json), a pattern, or a list of these

    def inputs(self, cache: Path) -> list[Input]:
        return one_each(expand(self.path, self.name, ENDINGS))

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        (path,) = item.files
        number = 0
        try:
            with opened(path) as file:
                for number, line in enumerate(records(file, b"\n", self.max_document_bytes), start=1):
                    where = f"{path}:{number}"
                    if isinstance(line, TooLong):
                        yield self.too_long(where, line.bytes)
                        continue
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if line and not line.isspace() and (document := self._document(line, where)) is not None:
                        yield document
        except DAMAGE as error:
            raise damaged(path, f"line {number}", error) from None

    def _document(self, line: bytearray, where: str) -> Document | Unreadable | None:
        try:
            record: Any = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return Unreadable(
                where, "not_utf8", f"byte {error.start} of the line is not UTF-8; convert the file to UTF-8"
            )
        except json.JSONDecodeError as error:
            return Unreadable(
                where, "not_json", f"no JSON ({error.msg} at column {error.colno}); a line must be a JSON object"
            )
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            return Unreadable(where, "not_json", f"JSON that cannot be read ({error}); a line must be a JSON object")
        if not isinstance(record, dict):
            kind = type(record).__name__
            return Unreadable(
                where, "no_object", f"a JSON {kind}; a line must be a JSON object with a field {self.text_field!r}"
            )
        return self.document(record, where)
