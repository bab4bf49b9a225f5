"""Parquet: columns as fields, rows one by one, and files that are not what they should be."""

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.sources import parquet
from tests.data.sources.reading import reasons, records, texts


def write(path, table, **settings):
    pyarrow.parquet.write_table(pyarrow.table(table), path, **settings)


def test_rows_of_all_row_groups_come_in_order_with_the_columns_that_are_asked_for(tmp_path):
    table = {"id": list(range(2500)), "content": [f"t{i}" for i in range(2500)], "other": [None] * 2500}
    write(tmp_path / "a.parquet", table, row_group_size=1200)
    found = records(kind="parquet", path=str(tmp_path), text_field="content", metadata=["id", "other"])
    assert [record.text for record in found] == [f"t{i}" for i in range(2500)]
    assert (found[-1].where, found[-1].metadata) == (f"{tmp_path}/a.parquet:2500", {"id": "2499"})


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
)
def test_every_type_of_string_is_text(tmp_path, kind):
    write(tmp_path / "a.parquet", {"text": pyarrow.array(["é", "b"], pyarrow.string()).cast(kind)})
    assert texts(kind="parquet", path=str(tmp_path)) == ["é", "b"]


def test_a_bad_row_is_located_and_passed_over(tmp_path):
    values = [b"one", b"\xff", None, b"x" * 101, b"two"]
    buffers = pyarrow.array(values, pyarrow.binary())
    # Strings that are no UTF-8, as a careless writer leaves them.
    strings = pyarrow.StringArray.from_buffers(5, buffers.buffers()[1], buffers.buffers()[2], buffers.buffers()[0])
    write(tmp_path / "a.parquet", {"text": strings})
    fields = {"kind": "parquet", "path": str(tmp_path), "max_unreadable": 0.6, "max_document_bytes": 100}
    assert texts(**fields) == ["one", "two"]
    expected = [("a.parquet:2", "not_utf8"), ("a.parquet:3", "text_is_no_string"), ("a.parquet:4", "too_long")]
    assert reasons(**fields) == expected


def test_a_column_that_is_missing_or_holds_no_strings_is_refused_at_once(tmp_path):
    write(tmp_path / "a.parquet", {"id": [1, 2], "content": ["a", "b"]})
    for fields, message in [
        ({}, r"a.parquet: text: no such column; columns are id, content; mend text_field of source it"),
        (
            {"text_field": "id"},
            r"a.parquet: id: a column of int64; must be one of strings; mend text_field of source it",
        ),
        ({"text_field": "content", "metadata": ["url"]}, r"a.parquet: url: no such column; .* mend metadata of source"),
    ]:
        with pytest.raises(DataError, match=message):
            records(kind="parquet", path=str(tmp_path), max_unreadable=1, **fields)


def test_a_file_that_was_cut_off_or_damaged_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"text": [f"{i} " * 50 for i in range(5000)]}, row_group_size=1000, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a.parquet: damaged after row 0 \(.*\); fetch the file again$"):
        records(kind="parquet", path=str(tmp_path))
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff" * 100 + content[middle + 100 :])
    with pytest.raises(DataError, match=r"a.parquet: damaged after row [12]000 \(.*\); fetch the file again$"):
        records(kind="parquet", path=str(tmp_path))


def test_batches_are_cut_to_the_size_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 10_000)
    # Rows of 1,000 bytes and a few more each: 9 of them.
    write(
        tmp_path / "a.parquet", {"text": [f"{i:01000d}" for i in range(50)]}, use_dictionary=False, compression="none"
    )
    with pyarrow.parquet.ParquetFile(tmp_path / "a.parquet") as file:
        sizes = [batch.num_rows for batch in parquet._batches(file, ["text"])]
    assert sum(sizes) == 50
    assert max(sizes) == 9
