"""What holds for every kind: which inputs there are, in which order, and how much of one may be unreadable."""

import json
import pickle

import pytest
from pydantic import ValidationError

from data.documents import Document, Unreadable
from data.errors import DataError
from data.sources import base, inputs, read_input
from tests.data.sources.reading import lines, reasons, records, source, texts


def names(**fields):
    return [item.name.rpartition("/")[2] for item in inputs(source(**fields))]


def test_inputs_come_in_the_order_of_names_and_each_file_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.json", "deep/README.md", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert names(kind="jsonl", path=str(tmp_path)) == ["a.jsonl.gz", "b.jsonl", "c.json"]
    assert names(kind="jsonl", path=str(tmp_path / "*.jsonl")) == ["b.jsonl"]
    assert names(kind="jsonl", path=[str(tmp_path / "b.jsonl"), str(tmp_path)]) == ["b.jsonl", "a.jsonl.gz", "c.json"]


def test_many_small_files_make_few_inputs_and_large_ones_many(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MAX_FILES", 3)
    monkeypatch.setattr(base, "MAX_FILES_BYTES", 100)
    for index in range(7):
        (tmp_path / f"{index}.txt").write_text("large" * 30 if index == 1 else "small")
    found = inputs(source(kind="text", path=str(tmp_path)))
    assert [len(item.files) for item in found] == [2, 3, 2]  # 0 and the large 1 | 2 3 4 | 5 6
    assert len({item.name for item in found}) == 3


def test_an_input_can_be_sent_to_another_process(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    it = source(kind="jsonl", path=str(tmp_path))
    (item,) = inputs(it)
    assert list(read_input(*pickle.loads(pickle.dumps((it, item))))) == list(read_input(it, item))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "tree", "wikipedia"])
def test_a_path_that_matches_nothing_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match=r"^source it: path = '.*none\*': no such .*folder.*; mend the path"):
        inputs(source(kind=kind, path=str(tmp_path / "none*")))


def test_a_folder_without_files_of_the_kind_says_which_endings_count(tmp_path):
    with pytest.raises(DataError, match=r"path = '.*': a folder that has no file; mend the path"):
        inputs(source(kind="text", path=str(tmp_path)))
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(DataError, match=r"path = '.*': a folder that has no file that ends in \.parquet"):
        inputs(source(kind="parquet", path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.zst"])
def test_an_empty_file_holds_no_documents(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert records(kind="jsonl", path=str(tmp_path)) == []


@pytest.mark.parametrize(("kind", "name"), [("parquet", "a.parquet"), ("wikipedia", "a.xml.bz2")])
def test_an_empty_file_of_another_kind_holds_none_either(tmp_path, kind, name):
    (tmp_path / name).write_bytes(b"")
    assert records(kind=kind, path=str(tmp_path)) == []


def test_documents_say_where_they_are_from_in_which_language_and_what_was_kept_of_them(tmp_path):
    record = {"text": "x", "url": "u", "score": 0.5, "tags": ["ä"], "none": None, "other": 1}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
    kept = ["url", "score", "tags", "none", "missing"]
    (document,) = records(kind="jsonl", path=str(tmp_path), language="de", metadata=kept)
    metadata = {"url": "u", "score": "0.5", "tags": '["ä"]'}
    assert document == Document("x", f"{tmp_path}/a.jsonl:2", "de", metadata)


def test_white_space_alone_is_no_document_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one", " \n\t", "", "two"))
    fields = {"kind": "jsonl", "path": str(tmp_path), "max_unreadable": 0}
    assert texts(**fields) == ["one", "two"]
    assert reasons(**fields) == [("a.jsonl:2", "no_text"), ("a.jsonl:3", "no_text")]


def test_an_input_with_too_much_that_is_unreadable_is_refused_with_the_first_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one") + b"[]\n" + lines("two") + b"{}\n")
    fields = {"kind": "jsonl", "path": str(tmp_path)}
    with pytest.raises(DataError) as error:
        records(**fields, max_unreadable=0.49)
    path = f"{tmp_path}/a.jsonl"
    assert str(error.value) == (
        f"{path}:2: a JSON list; a line must be a JSON object with a field 'text'; 2 of 4 records of {path} unreadable, "
        "more than max_unreadable = 0.49 of source it; mend or remove them, or raise max_unreadable"
    )
    assert texts(**fields, max_unreadable=0.5) == ["one", "two"]


def test_a_wrong_field_is_noticed_after_a_thousand_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("x") * 3000)
    it = source(kind="jsonl", path=str(tmp_path), text_field="content")
    seen = []
    with pytest.raises(DataError, match=r"a.jsonl:1: content: missing; fields here are text; set text_field; 1,000 of"):
        seen.extend(read_input(it, inputs(it)[0]))
    # 11 of the first 1,000 are too many, 10 of them are not, however many follow.
    (tmp_path / "a.jsonl").write_bytes(lines("x") * 500 + b"{}\n" * 10 + lines("x") * 490)
    assert sum(isinstance(record, Unreadable) for record in records(kind="jsonl", path=str(tmp_path))) == 10
    (tmp_path / "a.jsonl").write_bytes(lines("x") * 500 + b"{}\n" * 11 + lines("x") * 2000)
    with pytest.raises(DataError, match="11 of 1,000 records"):
        records(kind="jsonl", path=str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_unreadable": 1.1},
        {"max_document_bytes": 0},
        {"priority": "high"},
        {"zzz": 1},
        {"weight": 0},
        {"name": ".."},
    ],
)
def test_a_source_refuses_what_it_cannot_mean(wrong):
    with pytest.raises(ValidationError):
        source(**{"kind": "jsonl", "path": "a", **wrong})
