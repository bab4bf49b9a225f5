"""JSON lines, whatever is wrong with one of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.sources.reading import lines, reasons, records, texts


def test_another_field_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "content": "x"}\n')
    assert texts(kind="jsonl", path=str(tmp_path), text_field="content") == ["x"]


def test_lines_may_end_as_on_windows_or_not_at_all_and_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert texts(kind="jsonl", path=str(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "x"', "not_json", r"no JSON (Expecting ',' delimiter at column 13); a line must be a JSON object"),
        (b"\x00\x00", "not_json", "no JSON (Expecting value at column 1)"),
        (b"[" * 100_000, "not_json", "JSON that cannot be read (maximum recursion depth"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not_json", "JSON that cannot be read (Exceeds the limit"),
        (b'["x"]', "no_object", "a JSON list; a line must be a JSON object with a field 'text'"),
        (b'{"txt": "x"}', "no_text_field", "text: missing; fields here are txt; set text_field"),
        (b'{"text": 5}', "text_is_no_string", "text = '5': must be a string; set text_field"),
        (b'{"text": null}', "text_is_no_string", "text = 'None': must be a string"),
        (b'{"text": "\xff"}', "not_utf8", "byte 10 of the line is not UTF-8; convert the file to UTF-8"),
        (
            b'{"text": "' + b"x" * 200_000 + b'"}',
            "too_long",
            "200,012 bytes; max_document_bytes of source it is 150,000",
        ),
    ],
)
def test_a_bad_line_is_located_and_passed_over(tmp_path, line, reason, detail):
    (tmp_path / "a.jsonl").write_bytes(lines("one") + line + b"\n" + lines("two"))
    one, bad, two = records(kind="jsonl", path=str(tmp_path), max_unreadable=0.5, max_document_bytes=150_000)
    assert (one.text, two.text, two.where) == ("one", "two", f"{tmp_path}/a.jsonl:3")
    assert (bad.where, bad.reason) == (f"{tmp_path}/a.jsonl:2", reason)
    assert bad.detail.startswith(detail)
    assert "\n" not in bad.detail


def test_a_line_over_many_chunks_is_passed_over_to_its_end(tmp_path):
    long = b'{"text": "' + b"\\n{}" * 1_000_000 + b'"}\n'  # 4 MB, in chunks of 1 MiB
    (tmp_path / "a.jsonl").write_bytes(lines("one") + long + lines("two") + long[:-1])
    fields = {"kind": "jsonl", "path": str(tmp_path), "max_unreadable": 0.5}
    assert texts(**fields, max_document_bytes=1000) == ["one", "two"]
    assert reasons(**fields, max_document_bytes=1000) == [("a.jsonl:2", "too_long"), ("a.jsonl:4", "too_long")]
    assert [len(text) for text in texts(**fields)] == [3, 3_000_000, 3, 3_000_000]


def test_the_bound_counts_the_bytes_of_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xc3\xa9"}\n')  # 14 bytes
    fields = {"kind": "jsonl", "path": str(tmp_path), "max_unreadable": 1}
    assert texts(**fields, max_document_bytes=14) == ["é"]
    assert reasons(**fields, max_document_bytes=13) == [("a.jsonl:1", "too_long")]


def test_a_lone_surrogate_becomes_something_with_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b", "url": "\\udfff"}\n')
    (document,) = records(kind="jsonl", path=str(tmp_path), metadata=["url"])
    assert (document.text, document.metadata) == ("a?b", {"url": "?"})


def test_one_file_may_hold_several_sources(tmp_path):
    found = [{"text": f"{lang}{n}", "lang": lang} for n in range(3) for lang in ("en", "zh", "c")] + [{"text": "none"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    only = {"lang": ["en", "c"]}
    assert texts(kind="jsonl", path=str(tmp_path), only=only) == ["en0", "c0", "en1", "c1", "en2", "c2"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "a.parquet")
    assert texts(kind="parquet", path=str(tmp_path), only=only) == ["en0", "c0", "en1", "c1", "en2", "c2"]
