"""What the library `datasets` loads, from folders and without a network."""

import datasets
import pytest

from data.errors import DataError
from data.sources import inputs
from tests.data.sources.reading import lines, reasons, records, source, texts


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(lines(f"{name}1", f"{name}2"))
    return str(tmp_path / "set")


ALL = ["a1", "a2", "b1", "b2", "c1", "c2"]


def test_a_folder_of_json_lines_has_an_input_for_each_file(folder):
    assert texts(kind="dataset", path=folder) == ALL
    names = [item.name for item in inputs(source(kind="dataset", path=folder))]
    assert names == [f"{folder}:train-0000{index}-of-00003" for index in range(3)]
    assert texts(kind="dataset", path=folder, streaming=False) == ALL


def test_a_folder_of_parquet_is_read_with_its_metadata(tmp_path):
    table = datasets.Dataset.from_dict({"body": ["one", "two"], "id": [7, 8]})
    table.to_parquet(tmp_path / "set" / "a.parquet")
    found = records(kind="dataset", path=str(tmp_path / "set"), text_field="body", metadata=["id"])
    assert [(record.text, record.metadata) for record in found] == [("one", {"id": "7"}), ("two", {"id": "8"})]
    assert found[1].where == f"{tmp_path}/set:train:2"


def test_what_save_to_disk_left_is_read_in_its_order(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"t{index}" for index in range(10)]})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    assert len(inputs(source(kind="dataset", path=str(tmp_path / "one")))) == 3
    assert texts(kind="dataset", path=str(tmp_path / "one")) == rows["text"][:]
    datasets.DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "several")
    assert texts(kind="dataset", path=str(tmp_path / "several"), split="test") == ["t4"]
    with pytest.raises(
        DataError, match=r"source it: split = 'dev': not in .*several; splits are train, test; mend split"
    ):
        inputs(source(kind="dataset", path=str(tmp_path / "several"), split="dev"))


def test_a_row_without_text_is_located(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", None, "x" * 101]}).save_to_disk(tmp_path / "set")
    fields = {"kind": "dataset", "path": str(tmp_path / "set"), "max_unreadable": 1, "max_document_bytes": 100}
    assert reasons(**fields) == [("set:train:2", "text_is_no_string"), ("set:train:3", "too_long")]


def test_what_cannot_be_loaded_is_refused_in_one_line(folder, tmp_path):
    for fields, message in [
        (
            {"path": folder, "text_field": "body"},
            r"text_field = 'body': no such column in .*; columns are text; mend text_",
        ),
        ({"path": folder, "split": "dev"}, r".*split = 'dev': `datasets` cannot load it \(.*\); mend these"),
        ({"path": folder, "config": "de"}, r".*config = 'de', split = 'train': `datasets` cannot load it"),
        (
            {"path": "nobody/has-it"},
            r"path = 'nobody/has-it', .* cannot load it \(.*\); mend these, connect to the Hub",
        ),
    ]:
        with pytest.raises(DataError, match=r"^source it: " + message) as error:
            inputs(source(kind="dataset", **fields))
        assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused_with_its_shard(folder, tmp_path):
    (tmp_path / "set" / "b.jsonl").write_text('{"text": "x"}\n{"te')
    with pytest.raises(
        DataError, match=r"set:train-00001-of-00003: `datasets` cannot read on after row 0 \(.*\); mend"
    ):
        records(kind="dataset", path=folder)
