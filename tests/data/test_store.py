"""The token store: its bytes, its round trips, and what it refuses."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.files import replace_file
from data.indexed import Indexed, read_sizes, token_dtype, write_index, write_indexed
from data.manifest import SourceSpan
from data.store import SourceTokens, Split, Store, inspect_document, store_stats, verify_store


def test_index_has_megatrons_bytes(tmp_path):
    documents = [np.array([7, 8, 1]), np.array([9, 1])]
    write_indexed(tmp_path / "train", documents, np.dtype(np.uint16))
    assert (tmp_path / "train.bin").read_bytes() == bytes([7, 0, 8, 0, 1, 0, 9, 0, 1, 0])
    assert (tmp_path / "train.idx").read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<Q", 1),  # version
            struct.pack("<B", 8),  # uint16
            struct.pack("<Q", 2),  # sequences
            struct.pack("<Q", 3),  # documents + 1
            struct.pack("<ii", 3, 2),  # tokens of each
            struct.pack("<qq", 0, 6),  # the second starts after 3 tokens of 2 bytes
            struct.pack("<qqq", 0, 1, 2),  # first sequence of each document, and the end
        ]
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "code"), [(65_536, "uint16", 8), (65_537, "int32", 4), (129_280, "int32", 4)]
)
def test_vocabularies_of_which_uint16_does_not_hold_all_ids_take_int32(tmp_path, vocab_size, dtype, code):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    write_indexed(tmp_path / "train", [np.array([vocab_size - 1, 0])], token_dtype(vocab_size))
    assert (tmp_path / "train.idx").read_bytes()[17] == code
    assert Indexed.open(tmp_path / "train").document(0).tolist() == [vocab_size - 1, 0]


def test_an_empty_split_can_be_written_and_read(tmp_path):
    write_indexed(tmp_path / "validation", [], np.dtype(np.uint16))
    assert len(Indexed.open(tmp_path / "validation").tokens) == 0


def test_a_prefix_may_have_dots(tmp_path):
    for name in ("web.v1.2", "web.v1.3"):
        write_indexed(tmp_path / name, [np.array([7, 8, 1])], np.dtype(np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "web.v1.2.bin",
        "web.v1.2.idx",
        "web.v1.3.bin",
        "web.v1.3.idx",
    ]
    assert Indexed.open(tmp_path / "web.v1.2").document(0).tolist() == [7, 8, 1]


def test_sizes_are_read_without_the_tokens(tmp_path):
    write_indexed(tmp_path / "train", [np.arange(3), np.arange(2)], np.dtype(np.uint16))
    (tmp_path / "train.bin").unlink()
    assert read_sizes(tmp_path / "train").tolist() == [3, 2]
    with pytest.raises(DataError, match=r"validation.idx: missing; prepare the store again"):
        read_sizes(tmp_path / "validation")


def test_an_opened_file_is_mapped_without_a_descriptor_until_its_last_array_is_gone(tmp_path):
    write_indexed(tmp_path / "train", [np.array([7, 8, 1])], np.dtype(np.uint16))

    def maps():
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = len(os.listdir("/proc/self/fd"))
    opened = Indexed.open(tmp_path / "train")
    assert (len(os.listdir("/proc/self/fd")), maps()) == (before, 2)
    tokens = opened.document(0)
    del opened
    assert maps() == 1 and tokens.tolist() == [7, 8, 1]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0
    del tokens
    assert maps() == 0


def test_a_document_that_is_too_long_for_an_index_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"train.idx: document 1 has 2,147,483,648 tokens; .* at most 2,147,483,647 of one"
    ):
        write_index(tmp_path / "train", np.array([5, 2**31]), np.dtype(np.uint16))
    write_index(tmp_path / "train", np.array([5, 2**31 - 1, 3]), np.dtype(np.uint16))
    assert read_sizes(tmp_path / "train").tolist() == [5, 2**31 - 1, 3]


def test_documents_keep_their_numbers_behind_two_billion_others(tmp_path):
    write_indexed(tmp_path / "train", [np.arange(3), np.arange(2)], np.dtype(np.uint16))
    piece = Indexed.open(tmp_path / "train")
    split = Split([piece, piece])
    split._first_documents += 2**31  # as if so many lay in front of these
    assert split.documents_of(1, 9).tolist() == [2**31 + n for n in (0, 0, 1, 1, 2, 2, 2, 3)]
    span = SourceSpan(
        name="web", weight=1, first_document=2**31, last_document=2**31 + 3, documents=4, tokens=10, bytes=9
    )
    numbers = SourceTokens(span, split, 0).documents_of(1, 9)
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2, 2, 3] and numbers.dtype == np.int32


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_documents_end_with_the_end_of_sentence_and_decode_to_their_text(tiny_store, tmp_path_factory):
    train = tiny_store.split("train")
    assert train.document(0)[-1] == tiny_store.manifest.eos_token_id == 1
    verse, code = tiny_store.manifest.splits["train"].sources
    texts = [inspect_document(tiny_store, "train", number) for number in (0, code.first_document, code.last_document)]
    assert texts[0].endswith("\n") and texts[0].count(" ") > 5
    assert texts[1].startswith("def ") and texts[2].startswith("def ")
    assert verse.last_document + 1 == code.first_document


def test_manifest_counts_what_is_there(tiny_store):
    for split, record in tiny_store.manifest.splits.items():
        indexed = tiny_store.split(split)
        assert record.documents == indexed.document_count == sum(span.documents for span in record.sources)
        assert record.tokens == indexed.token_count == sum(len(source) for source in tiny_store.sources(split))
        for span in record.sources:
            numbers = range(span.first_document, span.last_document + 1)
            assert span.bytes == sum(len(inspect_document(tiny_store, split, n).encode()) for n in numbers)
            assert span.tokens == sum(len(indexed.document(n)) for n in numbers)


def test_bytes_of_all_tokens_are_the_bytes_of_the_text(tiny_store):
    for split, record in tiny_store.manifest.splits.items():
        lengths = tiny_store.token_bytes()[tiny_store.split(split).read(0, record.tokens)]
        assert lengths.sum() == sum(span.bytes for span in record.sources)


def test_verify_reads_everything(tiny_store):
    checked = verify_store(tiny_store.path)
    assert checked["documents"] == 400
    assert checked["tokens"] == sum(record.tokens for record in tiny_store.manifest.splits.values())


def test_stats_give_shares_and_bytes_per_token(tiny_store):
    sources = store_stats(tiny_store)["train"]["sources"]
    assert sources["verse"]["share"] == 0.75
    assert 1.5 < sources["verse"]["bytes_per_token"] < 20


@pytest.fixture
def copy(tiny_store, tmp_path):
    """A store of one's own, to be damaged."""
    return shutil.copytree(tiny_store.path, tmp_path / "store")


def damage_magic(store):
    with (store / "train.idx").open("r+b") as file:
        file.write(b"FOREIGN")


DAMAGES = {
    "no folder": (lambda store: shutil.rmtree(store), r"no such folder; .*rorqual data prepare"),
    "no manifest": (
        lambda store: (store / "manifest.json").unlink(),
        r"no finished token store; .*rorqual data prepare",
    ),
    "foreign manifest": (
        lambda store: (store / "manifest.json").write_text("{}"),
        r"manifest.json: dtype: Field required",
    ),
    "missing file": (lambda store: (store / "train.idx").unlink(), r"train.idx: missing; "),
    "truncated": (
        lambda store: (store / "train.bin").open("r+b").truncate(100),
        r"train.bin: 100 bytes; the manifest says \d+; ",
    ),
    "magic": (damage_magic, r"train.idx: starts with b'FOREIGN.*a token index starts with b'MMIDIDX"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_opening_a_damaged_store_names_the_file_the_rule_and_the_fix(copy, damage):
    do, message = DAMAGES[damage]
    do(copy)
    with pytest.raises(DataError, match=message) as error:
        Store.open(copy)
    assert "\n" not in str(error.value)


def test_a_binary_shorter_than_its_index_is_refused_without_a_manifest(tmp_path):
    write_indexed(tmp_path / "train", [np.arange(10)], np.dtype(np.uint16))
    with (tmp_path / "train.bin").open("r+b") as file:
        file.truncate(18)
    with pytest.raises(DataError, match=r"train.bin: 18 bytes; its index says 20"):
        Indexed.open(tmp_path / "train")


def test_a_source_of_more_documents_than_batches_can_number_is_refused(copy, monkeypatch):
    monkeypatch.setattr("data.store.MOST_DOCUMENTS", 100)
    with pytest.raises(
        DataError, match=r"store: source verse of train has \d+ documents; batches number at most 100 of a source"
    ):
        Store.open(copy)


def test_verify_finds_a_changed_byte(copy):
    with (copy / "train.bin").open("r+b") as file:
        file.seek(50)
        byte = file.read(1)
        file.seek(50)
        file.write(bytes([byte[0] ^ 1]))
    Store.open(copy)  # opening looks at sizes only
    with pytest.raises(DataError, match=r"train.bin: sha256 .* the manifest says"):
        verify_store(copy)


def test_verify_finds_an_id_outside_the_vocabulary(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vocab_size"] = 100
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train.bin: token id \d+; ids are 0 to 99"):
        verify_store(copy)


def test_inspecting_a_document_that_is_not_there_says_which_are(tiny_store):
    last = tiny_store.manifest.splits["validation"].documents - 1
    with pytest.raises(DataError, match=rf"document = 9999: .*choose 0 to {last}"):
        inspect_document(tiny_store, "validation", 9999)
    with pytest.raises(DataError, match="split = 'test'"):
        inspect_document(tiny_store, "test", 0)
