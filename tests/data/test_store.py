"""The token store: its bytes, its round trips, and what it refuses."""

import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from data.checked import BLOCK, file_record, seal
from data.errors import DataError
from data.files import replace_file
from data.indexed import REMEDY, Indexed, read_sizes, token_dtype, write_index, write_indexed
from data.manifest import FileRecord, Manifest, SourceSpan
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
    assert Indexed(tmp_path / "train", is_sealed=False).document(0).tolist() == [vocab_size - 1, 0]


def test_an_empty_split_can_be_written_and_read(tmp_path):
    write_indexed(tmp_path / "validation", [], np.dtype(np.uint16))
    assert len(Indexed(tmp_path / "validation", is_sealed=False).read(0, 0)) == 0


def test_a_prefix_may_have_dots(tmp_path):
    for name in ("web.v1.2", "web.v1.3"):
        write_indexed(tmp_path / name, [np.array([7, 8, 1])], np.dtype(np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "web.v1.2.bin",
        "web.v1.2.idx",
        "web.v1.3.bin",
        "web.v1.3.idx",
    ]
    assert Indexed(tmp_path / "web.v1.2", is_sealed=False).document(0).tolist() == [7, 8, 1]


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
    opened = Indexed(tmp_path / "train", is_sealed=False)
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
    piece = Indexed(tmp_path / "train", is_sealed=False)
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


def cut_sums(store):
    path = store / "train.crc"
    path.write_bytes(path.read_bytes()[:-4])
    sign(store, files={"train.crc": file_record(path)})


def old_version(store):
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 2'))


def sign(store, files=None, **changes):
    """Change a manifest as its writer would."""
    manifest = Manifest.read(store)
    manifest.model_copy(update={"files": manifest.files | (files or {}), **changes}).write(store)


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
    "no sums": (lambda store: (store / "train.crc").unlink(), r"train.crc: missing; "),
    "cut sums": (cut_sums, r"train.crc: does not hold the sums of the two files beside it; "),
    "old manifest": (old_version, r"version = 2: its tokens have no checksums.*; make one with .*rorqual data import"),
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
        Indexed(tmp_path / "train", is_sealed=False)


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
    Store.open(copy)  # opening looks at sizes and headers only
    with pytest.raises(DataError, match=r"train.bin: sha256 .* the manifest says"):
        verify_store(copy)


def test_verify_finds_an_id_outside_the_vocabulary(copy):
    sign(copy, vocab_size=100)
    with pytest.raises(DataError, match=r"train.bin: token id \d+; ids are 0 to 99"):
        verify_store(copy)


def test_inspecting_a_document_that_is_not_there_says_which_are(tiny_store):
    last = tiny_store.manifest.splits["validation"].documents - 1
    with pytest.raises(DataError, match=rf"document = 9999: .*choose 0 to {last}"):
        inspect_document(tiny_store, "validation", 9999)
    with pytest.raises(DataError, match="split = 'test'"):
        inspect_document(tiny_store, "test", 0)


def flip(path, byte, bit=0):
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def everything(store):
    """All that a run may ask of a store: its streams, where their documents lie, how long these are, and their texts."""
    found = []
    for split in ("train", "validation"):
        for source in store.sources(split):
            for start in range(0, len(source), 500):
                stop = min(start + 500, len(source))
                found += [source.read(start, stop).tobytes(), source.documents_of(start, stop).tobytes()]
            found.append(source.lengths().tobytes())
        documents = store.split(split)
        found += [documents.document(number).tobytes() for number in range(documents.document_count)]
    return found


def test_a_flipped_bit_never_becomes_a_token(tiny_store, copy):
    expected, draw = everything(tiny_store), random.Random(0)
    for name in ("train.bin", "train.idx", "train.crc", "validation.bin", "validation.idx", "validation.crc"):
        path, stopped = copy / name, 0
        for byte in draw.sample(range(path.stat().st_size), 12):
            bit = draw.randrange(8)
            flip(path, byte, bit)
            try:
                assert everything(Store.open(copy)) == expected  # e.g. the part of the index that only Megatron reads
            except DataError as error:
                stopped += 1
                assert f"{copy / name}"[:-3] in str(error) and "\n" not in str(error)
                assert "rorqual data verify" in str(error) or REMEDY in str(error)
            with pytest.raises(DataError):
                verify_store(copy)
            flip(path, byte, bit)
        assert stopped >= 6, name
    assert everything(Store.open(copy)) == expected


def test_damage_is_told_with_its_source_and_bytes_and_leaves_the_rest_readable(copy):
    store = Store.open(copy)
    verse, code = store.sources("train")
    byte = 2 * code.first_token + 6_000
    flip(copy / "train.bin", byte)
    first = byte // BLOCK * BLOCK
    with pytest.raises(DataError) as error:
        code.read(2_990, 3_010)
    assert str(error.value) == (
        f"source code: {copy}/train.bin: bytes {first:,} to {first + BLOCK:,} are not what was written (their CRC-32 differs); "
        f"`rorqual data verify {copy}` reads all of the store; prepare the store again, or copy the file again"
    )
    assert len(verse.read(0, 100)) == len(code.read(2_990 + BLOCK, 3_010 + BLOCK)) + 80


def test_a_search_that_a_damaged_pointer_misleads_is_noticed(tmp_path):
    write_indexed(tmp_path / "train", [np.array([number % 7]) for number in range(4096)], np.dtype(np.uint16))
    seal(tmp_path / "train")
    middle = 34 + 4 * 4096 + 8 * 2048  # where a binary search begins; its block is not that of the first documents
    for bit in range(8):
        flip(tmp_path / "train.idx", middle + 7, bit)  # the highest byte of the pointer
        indexed = Indexed(tmp_path / "train")
        for start in (0, 10, 4000):
            try:
                assert indexed.documents_of(start, start + 20).tolist() == list(range(start, start + 20))
            except DataError as error:
                assert "train.idx: bytes" in str(error)
        flip(tmp_path / "train.idx", middle + 7, bit)


def test_a_manifest_is_what_was_written_or_refused(copy):
    path = copy / "manifest.json"
    written = path.read_bytes()
    draw = random.Random(0)
    for byte in draw.sample(range(len(written)), 60):
        flip(path, byte, draw.randrange(7))
        try:
            assert Manifest.read(copy) == Manifest.model_validate_json(written)  # blanks between values
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(written)
    Manifest.read(copy).write(copy)
    assert path.read_bytes() == written


@pytest.mark.parametrize("name", ["../other/train", "/etc/passwd", "a/../../b", ""])
def test_no_name_in_a_manifest_leaves_the_folder(copy, name):
    manifest = Manifest.read(copy)
    train = manifest.splits["train"].model_copy(update={"pieces": [name]})
    sign(copy, splits=manifest.splits | {"train": train})
    with pytest.raises(
        DataError, match=r"splits.train.pieces.0: Value error, .* must be the name of a file in the store"
    ):
        Store.open(copy)
    manifest.model_copy(update={"files": manifest.files | {name: manifest.files["train.bin"]}}).write(copy)
    with pytest.raises(DataError, match=r"files.*: must be the name of a file in the store"):
        Store.open(copy)


def test_equal_tokens_have_equal_content_whatever_lies_beside_them(copy):
    content = Store.open(copy).content
    sign(copy, files={"report.json": FileRecord(bytes=(copy / "report.json").stat().st_size, sha256="0" * 64)})
    assert Store.open(copy).content == content
