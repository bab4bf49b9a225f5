"""Sources: what they read, in which order, and how they say what is wrong."""

import gzip
import json
import lzma
import zipfile

import pytest
from pydantic import TypeAdapter

from data.errors import DataError
from data.sources import Source, markdown, read_documents


def read(cache=None, **fields):
    source = TypeAdapter(Source).validate_python({"name": "it", **fields})
    return list(read_documents(source, cache))


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_json_lines_are_read_in_the_order_of_names_whatever_their_compression(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("three")))
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two") + b"\n")
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines("four", " ")))
    expected = ["one", "two", "three", "four"]
    assert read(kind="jsonl", path=str(tmp_path / "*.jsonl*")) == expected
    assert read(kind="jsonl", path=str(tmp_path)) == expected
    listed = [str(tmp_path / "c.jsonl.xz"), str(tmp_path / "a.jsonl")]
    assert read(kind="jsonl", path=listed) == ["four", "one", "two"]


def test_another_field_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "content": "x"}\n')
    assert read(kind="jsonl", path=str(tmp_path), text_field="content") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a.jsonl:3: no JSON \(.*\); a line must be a JSON object; 1 of 3 records"),
        (b'["x"]', r"a.jsonl:3: a JSON list; a line must be a JSON object with a field 'text'"),
        (b'{"txt": "x"}', r"a.jsonl:3: text: missing; fields here are txt; set text_field; 1 of 3"),
        (b'{"text": 5}', r"a.jsonl:3: text = '5': must be a string"),
        (b'{"text": "\xff"}', r"a.jsonl:3: byte 10 of the line is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two") + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(kind="jsonl", path=str(tmp_path))


def test_a_truncated_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one" * 100))[:-10])
    with pytest.raises(DataError, match=r"a.jsonl.gz: damaged after line \d .*fetch the file again"):
        read(kind="jsonl", path=str(tmp_path))


def test_a_lone_surrogate_becomes_something_with_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert read(kind="jsonl", path=str(tmp_path)) == ["a?b"]


def test_text_files_keep_every_byte_and_may_be_cut(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\n\t\n")
    (tmp_path / "deep" / "b.txt").write_bytes("deux é===trois===\n".encode())
    assert read(kind="text", path=str(tmp_path)) == ["one\r\n\t\n", "deux é===trois===\n"]
    assert read(kind="text", path=str(tmp_path / "**" / "b.txt"), separator="===") == ["deux é", "trois"]


def test_text_that_is_no_utf8_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a.txt: byte 2 is not UTF-8; convert the file to UTF-8"):
        read(kind="text", path=str(tmp_path))
    with pytest.raises(
        DataError, match=r"source it: path = '.*none\*': no such file, folder or pattern; mend the path"
    ):
        read(kind="text", path=str(tmp_path / "none*"))


def test_sections_carry_the_headings_they_stand_under():
    play = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter GHOST_\n\n**HAMLET**  \nWords, *words*,  \nwords.\n\n"
        "#### [Aside]\n\nmore\n\n## ACT II\n\nEnd \\[of it\\] some_name_here.\n"
    )
    assert list(markdown.sections(play, 3)) == [
        "Hamlet\nACT I\nSCENE I. Elsinore.\n\nEnter GHOST\n\nHAMLET\nWords, words,\nwords.\n\n[Aside]\n\nmore\n",
        "Hamlet\nACT II\n\nEnd [of it] some_name_here.\n",
    ]
    assert list(markdown.sections("no headings", 2)) == ["no headings\n"]


def test_a_wheel_in_the_cache_needs_no_network(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_plays-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("plays/b.md", "# B\n\n## One\n\ntwo\n")
        archive.writestr("plays/a/a.md", "# A\n\ntext\n")
        archive.writestr("code.py", "pass")
    fields = {"kind": "wheel", "package": "some-plays", "version": "1.0"}
    assert read(tmp_path, **fields, files="plays/*.md", markdown_sections=2) == ["A\n\ntext\n", "B\nOne\n\ntwo\n"]
    with pytest.raises(DataError, match=r"source it: files = 'none': nothing in some_plays-1.0-.* mend the pattern"):
        read(tmp_path, **fields, files="none")


def test_a_wheel_that_cannot_be_fetched_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DataError, match=r"source it: no-such-plays==1.0 cannot be fetched .* put the wheel into .*wheels"
    ) as error:
        read(tmp_path, kind="wheel", package="no-such-plays", version="1.0", files="*")
    assert "\n" not in str(error.value)


def test_the_standard_library_is_bounded_and_always_the_same():
    limit = 300_000
    documents = read(kind="stdlib", max_bytes=limit)
    total = sum(len(document.encode()) for document in documents)
    assert limit / 2 < total <= limit
    assert documents == read(kind="stdlib", max_bytes=limit)
