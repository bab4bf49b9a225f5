"""Parquet files, read by the page and the batch, never by the row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from data.compressed import damaged
from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources.base import Input, expand, one_each
from data.sources.fields import FieldsSource

BUFFER_BYTES = 256 << 10  # of a column read at a time
BATCH_BYTES = 256 << 10  # of a row group's columns aimed at in one batch
BATCH_ROWS = 1000


class Parquet(FieldsSource):
    """The rows of Parquet files, one document each. Fields are columns; a binary column is taken for UTF-8."""

    kind: Literal["parquet"]
    path: str | list[str]  # a file, a folder (its .parquet), a pattern, or a list of these

    def inputs(self, cache: Path) -> list[Input]:
        return one_each(expand(self.path, self.name, (".parquet",)))

    def records(self, item: Input, cache: Path) -> Iterator[Document | Unreadable]:
        (path,) = item.files
        if Path(path).stat().st_size == 0:
            return
        row = 0  # rows are counted from 1, as lines are
        try:
            # Without pre_buffer, and with a buffer, a column chunk is streamed instead of loaded whole.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
                columns = self._columns(file.schema_arrow, path)
                for batch in _batches(file, columns):
                    fields = {name: _values(batch.column(name)) for name in columns}
                    for values in zip(*fields.values()):
                        row += 1
                        document = self._document(dict(zip(columns, values)), f"{path}:{row}")
                        if document is not None:
                            yield document
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(path, f"row {row}", error) from None

    def _columns(self, schema: pyarrow.Schema, path: str) -> list[str]:
        for name in self.fields:
            if name not in schema.names:
                key = "text_field" if name == self.text_field else "metadata" if name in self.metadata else "only"
                raise DataError(
                    f"{path}: {name}: no such column; columns are {', '.join(schema.names)}; "
                    f"mend {key} of source {self.name}"
                )
        kind = schema.field(self.text_field).type
        if not _is_text(kind):
            raise DataError(
                f"{path}: {self.text_field}: a column of {kind}; must be one of strings; mend text_field of source {self.name}"
            )
        return self.fields

    def _document(self, record: dict[str, Any], where: str) -> Document | Unreadable | None:
        text = record[self.text_field]
        try:
            decoded = {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}
        except UnicodeDecodeError as error:
            return Unreadable(where, "not_utf8", f"byte {error.start} of {text[:20]!r} … is not UTF-8; mend the row")
        return self.document(decoded, where)


def _batches(file: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    """Each row group in batches of about BATCH_BYTES."""
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        chunks = (metadata.column(index) for index in range(metadata.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(1, size)))
        yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _is_text(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    return any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    ) or kind in (pyarrow.string_view(), pyarrow.binary_view())


def _values(column: pyarrow.Array) -> list[Any]:
    """Python values; strings as bytes, since a string that is no UTF-8 would take the whole batch with it."""
    if not _is_text(column.type):
        return column.to_pylist()
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()
