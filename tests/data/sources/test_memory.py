"""Reading holds one record and a piece of the file, however large both are."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.sources.test_wikipedia import export, page

MIB = 1 << 20
DOCUMENT = MIB  # max_document_bytes
ALLOWED = 16 * MIB  # 10 documents, a chunk and what the allocator keeps

VOCABULARY = ("whale", "ship", "captain", "sea", "net", "island", "tide", "1,024", "été", "鯨")
WORDS = " ".join(random.Random(0).choices(VOCABULARY, k=100_000))
ROOT = Path(__file__).parents[3]


def measure(**fields) -> dict[str, int]:
    """What reading the source counts, and by how much it raises the peak memory of a process of its own."""
    path = Path(fields["path"])
    small = {**fields, "path": str(path.with_name(f"small-{path.name}"))}
    command = [sys.executable, "-m", "tests.data.sources.memory", json.dumps(fields), json.dumps(small)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found: dict[str, int] = json.loads(result.stdout)
    return found


def write_lines(path: Path, count: int, long_lines: int = 0, long_bytes: int = 0) -> None:
    """`count` documents of about 0.5 MiB, and lines that are far too long."""
    line = json.dumps({"text": WORDS[: MIB // 2]}, ensure_ascii=False).encode() + b"\n"
    for name, lines, longs in ((path.name, count, long_lines), (f"small-{path.name}", 1, 0)):
        with _writer(path.with_name(name)) as file:
            for _ in range(longs):
                for _ in range(long_bytes // MIB):
                    file.write(b"x" * MIB)
                file.write(b"\n")
            for _ in range(lines):
                file.write(line)


def _writer(path: Path):
    if path.suffix == ".zst":
        return pyarrow.output_stream(str(path), compression="zstd")
    return path.open("wb")


@pytest.mark.parametrize("ending", ["", ".zst"])
def test_lines_ten_times_larger_than_the_memory_allowed_are_read_within_it(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    write_lines(path, count=200, long_lines=2, long_bytes=10 * ALLOWED)  # 100 MiB of documents, 2 lines of 160 MiB
    found = measure(kind="jsonl", path=str(path), max_document_bytes=DOCUMENT)
    assert (found["documents"], found["unreadable"]) == (200, 2)
    assert found["growth"] < ALLOWED


def test_parquet_ten_times_larger_than_the_memory_allowed_is_read_within_it(tmp_path):
    draw = random.Random(1)
    texts = [WORDS[start : start + 2000] for start in (draw.randrange(100_000) for _ in range(8_000))]
    once = pyarrow.table({"text": texts})
    for name, table in (("a.parquet", pyarrow.concat_tables([once] * 10)), ("small-a.parquet", once.slice(0, 10))):
        # One row group of 170 MiB.
        settings = {"row_group_size": len(table), "use_dictionary": False, "compression": "zstd"}
        pyarrow.parquet.write_table(table, tmp_path / name, **settings)
    found = measure(kind="parquet", path=str(tmp_path / "a.parquet"), max_document_bytes=DOCUMENT)
    assert found["documents"] == 10 * len(texts)
    assert found["growth"] < ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", ".zst"])
def test_a_line_of_a_gigabyte_is_passed_over(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    write_lines(path, count=3, long_lines=1, long_bytes=1 << 30)
    found = measure(kind="jsonl", path=str(path), max_document_bytes=DOCUMENT)
    assert (found["documents"], found["unreadable"]) == (3, 1)
    assert found["growth"] < ALLOWED


@pytest.mark.slow
def test_a_dump_of_many_pages_leaves_nothing_behind(tmp_path):
    for name, pages in (("a.xml", 100_000), ("small-a.xml", 1)):
        (tmp_path / name).write_bytes(export(page("Talk", "Talk. " * 20, space=1) * pages))
    # A page's empty element, kept, would be 100 bytes.
    assert measure(kind="wikipedia", path=str(tmp_path / "a.xml"))["growth"] < 3 * MIB
