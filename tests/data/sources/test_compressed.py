"""Compressed files: whole, in several parts, cut off, damaged."""

import bz2
import gzip
import io
import lzma
import random
import re
from pathlib import Path

import pyarrow
import pytest

from data.compressed import TooLong, records
from data.errors import DataError
from data.sources import inputs, read_input
from tests.data.sources.reading import lines, source, texts


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
DRAW = random.Random(0)
MANY = lines(*(DRAW.randbytes(30).hex() for _ in range(6_000)))  # 0.4 MB, some 0.2 MB compressed


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_is_read_as_its_content(tmp_path, ending):
    (tmp_path / "a.jsonl").write_bytes(MANY)
    (tmp_path / f"b.jsonl{ending}").write_bytes(COMPRESS[ending](MANY))
    plain = texts(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert len(plain) == 6_000
    assert texts(kind="jsonl", path=str(tmp_path / "b*")) == plain


@pytest.mark.parametrize("ending", COMPRESS)
def test_all_parts_of_a_file_of_several_are_read(tmp_path, ending):
    parts = [COMPRESS[ending](part) for part in (lines("one", "two"), b"", lines("three"))]
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(parts))
    assert texts(kind="jsonl", path=str(tmp_path)) == ["one", "two", "three"]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("missing", [4, 60_000])
def test_a_file_that_was_cut_off_is_refused_after_its_last_record(tmp_path, ending, missing):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](MANY)[:-missing])
    seen = read_until_damage(path)
    assert 0 <= seen <= 6_000
    if ending == ".gz":
        assert seen > 3_000  # what could be unpacked was read


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_with_changed_bytes_is_refused(tmp_path, ending):
    content = bytearray(COMPRESS[ending](MANY))
    middle = len(content) // 2
    # The head of the first block, since zstd without a checksum cannot tell other changes.
    place = 6 if ending == ".zst" else middle
    content[place : place + 64] = b"\xff" * 64
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content)
    read_until_damage(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(lines("one"))
    assert read_until_damage(path) == 0


def read_until_damage(path: Path) -> int:
    """Lines that were read before the refusal; the error must name the last of them."""
    it = source(kind="jsonl", path=str(path), max_unreadable=1)
    seen = 0
    with pytest.raises(DataError) as error:
        for record in read_input(it, inputs(it)[0]):
            seen = int(record.where.rpartition(":")[2])
    message = str(error.value)
    assert re.fullmatch(rf"{path}: damaged after line {seen} \([^\n]+\); fetch the file again", message)
    return seen


def test_a_file_without_rights_or_one_that_left_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one"))
    it = source(kind="jsonl", path=str(path))
    (item,) = inputs(it)
    path.unlink()
    with pytest.raises(DataError, match=r"a.jsonl: cannot be opened \(No such file or directory\)"):
        list(read_input(it, item))


class Dripping(io.BytesIO):
    """Gives a few bytes at a time, so that a chunk ends at every place."""

    def read1(self, size=-1):
        return super().read1(3)


@pytest.mark.parametrize("separator", [b"\n", b"===", b"abab"])
def test_records_are_those_of_split_wherever_the_chunks_end(separator):
    draw = random.Random(1)
    for _ in range(300):
        content = b"".join(draw.choice([separator, separator[:1], b"x", b"ab"]) for _ in range(draw.randint(0, 30)))
        found = list(records(Dripping(content), separator, limit=1000))
        assert found == content.split(separator)
        limited = list(records(Dripping(content), separator, limit=4))
        expected = [TooLong(len(part)) if len(part) > 4 else part for part in content.split(separator)]
        assert limited == expected
