"""Documents on disk between two steps of a preparation: a Parquet file of at most a few tens of megabytes of text.

Such a file is written whole or not at all, and any tool that knows Parquet can look at it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data.documents import Document
from data.files import replace_file

ROWS_AT_ONCE = 256  # documents that a reader holds


def write_shard(path: Path, documents: Sequence[Document], columns: Mapping[str, Any] | None = None) -> None:
    """Write documents, and further columns with a value for each of them, as `path`."""
    table = {
        "text": pyarrow.array([document.text for document in documents], pyarrow.large_string()),
        "where": pyarrow.array([document.where for document in documents], pyarrow.string()),
        "language": pyarrow.array([document.language for document in documents], pyarrow.string()),
        "metadata": pyarrow.array([json.dumps(document.metadata) for document in documents], pyarrow.string()),
        **(columns or {}),
    }
    with replace_file(path) as temporary:
        pyarrow.parquet.write_table(
            pyarrow.table(table), temporary, compression="zstd", compression_level=1, row_group_size=ROWS_AT_ONCE
        )


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of a shard, in order."""
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=["text", "where", "language", "metadata"]):
            for row in batch.to_pylist():
                yield Document(row["text"], row["where"], row["language"], json.loads(row["metadata"]))


def read_columns(path: Path, names: Iterable[str]) -> pyarrow.Table:
    """Some columns of a shard, without its texts."""
    return pyarrow.parquet.read_table(path, columns=list(names))
