"""Where text comes from: each source of a recipe as inputs that processes share, each input a stream of documents in fixed order.

Memory. A source may be larger than memory by any factor. While an input is read, it holds one record and one piece of the file
(1 MiB unpacked, and what the decompressor needs). A record longer than `max_document_bytes` is passed over in pieces and never
held. A record within that bound is held as bytes, as a Python string and as the document's text: about 4 times its size, up to
10 times where a string of mostly ASCII holds a character beyond U+FFFF, since Python then spends 4 bytes on each character.
What the formats add:

    parquet      one page of each column (1 MiB, or as much as 1,024 rows take, as pyarrow writes them), and a batch of rows
                 that is 256 KiB on the row group's average; pyarrow's allocator keeps some 50 MiB for later
    wikipedia    the revision at hand whole, also one that is longer than `max_document_bytes`, and its parse tree
    text         Markdown sections: the whole file, of at most `max_document_bytes`
    dataset      what `datasets` holds: a row group of Parquet, some 10 MB of JSON lines

Bad input. A record that gives no document is an `Unreadable` in the stream, and reading goes on; where more than `max_unreadable`
of an input is unreadable, or its file is damaged, it is refused with a `DataError`. Records without text and binary files of a
tree are counted too, but speak against no input.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data.documents import Document, Unreadable
from data.errors import DataError
from data.files import cache_folder
from data.sources.base import Input
from data.sources.dataset import HubDataset
from data.sources.jsonl import JsonLines
from data.sources.parquet import Parquet
from data.sources.stdlib import StandardLibrary
from data.sources.text import TextFiles
from data.sources.tree import SourceTree
from data.sources.wheel import Wheel
from data.sources.wikipedia import Wikipedia

__all__ = ["Input", "Source", "inputs", "read_documents", "read_input"]

Source = Annotated[
    JsonLines | Parquet | TextFiles | SourceTree | Wikipedia | HubDataset | Wheel | StandardLibrary,
    Field(discriminator="kind"),
]

NO_FAULT = {"no_text", "binary"}  # reasons that max_unreadable does not count
FIRST_LOOK = 1000  # records after which a wrong text_field should have been noticed


def inputs(source: Source, cache: Path | None = None) -> list[Input]:
    """What there is to read of a source, in an order that depends on nothing but the content.

    Args:
        cache: folder of fetched wheels; None: `~/.cache/rorqual`.

    Raises:
        DataError: a path gives nothing, a wheel or a data set cannot be had, a package is missing.
    """
    return source.inputs(cache or cache_folder())


def read_input(source: Source, item: Input, cache: Path | None = None) -> Iterator[Document | Unreadable]:
    """The documents of one input, all of them with text, and what gives no document between them, in order.

    Raises:
        DataError: a file is damaged, or too much of the input is unreadable.
    """
    count = unreadable = 0
    first: Unreadable | None = None
    for record in source.records(item, cache or cache_folder()):
        count += 1
        if isinstance(record, Document) and (not record.text or record.text.isspace()):
            record = Unreadable(record.where, "no_text", "nothing but white space")
        if isinstance(record, Unreadable) and record.reason not in NO_FAULT:
            first = first or record
            unreadable += 1
        yield record
        if count == FIRST_LOOK:
            _judge(source, item, first, unreadable, count)
    _judge(source, item, first, unreadable, count)


def _judge(source: Source, item: Input, first: Unreadable | None, unreadable: int, count: int) -> None:
    """Refuse an input of which too much is unreadable."""
    if first is None or unreadable <= source.max_unreadable * count:
        return
    raise DataError(
        f"{first.where}: {first.detail}; {unreadable:,} of {count:,} records of {item.name} unreadable, more than "
        f"max_unreadable = {source.max_unreadable} of source {source.name}; mend or remove them, or raise max_unreadable"
    )
