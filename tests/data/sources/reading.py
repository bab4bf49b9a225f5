"""What the tests of sources share: a source from its fields, and what it reads."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data.documents import Document, Unreadable
from data.sources import Source, inputs, read_input


def source(**fields: Any) -> Any:
    return TypeAdapter(Source).validate_python({"name": "it", **fields})


def records(cache: Path | None = None, **fields: Any) -> list[Document | Unreadable]:
    """Everything in every input of the source, in order."""
    it = source(**fields)
    return [record for item in inputs(it, cache) for record in read_input(it, item, cache)]


def texts(cache: Path | None = None, **fields: Any) -> list[str]:
    return [record.text for record in records(cache, **fields) if isinstance(record, Document)]


def reasons(cache: Path | None = None, **fields: Any) -> list[tuple[str, str]]:
    """(end of where, reason) of what is unreadable."""
    found = [record for record in records(cache, **fields) if isinstance(record, Unreadable)]
    return [(record.where.rpartition("/")[2], record.reason) for record in found]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
