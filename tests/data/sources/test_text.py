"""Text files and their parts."""

import gzip

import pytest

from data.errors import DataError
from data.sources import markdown
from tests.data.sources.reading import reasons, records, texts


def test_text_files_keep_every_byte_and_may_be_cut(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\n\t\n")
    (tmp_path / "deep" / "b.txt").write_bytes("deux é===trois===\n".encode())
    assert texts(kind="text", path=str(tmp_path)) == ["one\r\n\t\n", "deux é===trois===\n"]
    cut = records(kind="text", path=str(tmp_path / "**" / "b.txt"), separator="===")
    assert [record.text for record in cut] == ["deux é", "trois"]
    assert [record.where for record in cut] == [f"{tmp_path}/deep/b.txt#1", f"{tmp_path}/deep/b.txt#2"]
    (tmp_path / "a.txt").write_bytes(b"one=== ===\n===two")
    assert reasons(kind="text", path=str(tmp_path / "a.txt"), separator="===") == [
        ("a.txt#2", "no_text"),
        ("a.txt#3", "no_text"),
    ]


@pytest.mark.parametrize("more", [{}, {"markdown_sections": 2}])
def test_a_text_file_without_text_is_counted(tmp_path, more):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n")
    fields = {"kind": "text", "path": str(tmp_path), **more}
    assert reasons(**fields) == [("a.txt", "no_text"), ("b.txt", "no_text")]


def test_a_compressed_text_is_read_as_its_content(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    assert texts(kind="text", path=str(tmp_path)) == ["one"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\f" * 1000)[:-4])
    with pytest.raises(DataError, match=r"a.txt.gz: damaged after .*a.txt.gz#1000 \(.*\); fetch the file again$"):
        records(kind="text", path=str(tmp_path), separator="\f")


def test_text_that_is_no_utf8_is_located_by_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(
        DataError, match=r"a.txt: byte 2 is not UTF-8; convert the file to UTF-8 or leave it out; 1 of 1"
    ):
        records(kind="text", path=str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"good--x\xffx--" + b"long" * 10 + b"--\xfe--good")
    fields = {"kind": "text", "path": str(tmp_path), "separator": "--", "max_unreadable": 1}
    fields["max_document_bytes"] = 20
    assert texts(**fields) == ["good", "good"]
    assert reasons(**fields) == [("a.txt#2", "not_utf8"), ("a.txt#3", "too_long"), ("a.txt#4", "not_utf8")]
    # 4 + 2 + 1 bytes stand before the first, 4 + 2 + 3 + 2 + 40 + 2 before the second.
    details = [record.detail for record in records(**fields) if not hasattr(record, "text")]
    assert details[0].startswith("byte 7 is not UTF-8")
    assert details[2].startswith("byte 53 is not UTF-8")


@pytest.mark.parametrize("more", [{}, {"markdown_sections": 2}])
def test_a_file_that_is_too_long_is_passed_over(tmp_path, more):
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b.txt").write_bytes(b"x")
    fields = {"kind": "text", "path": str(tmp_path), "max_document_bytes": 2_999_999, "max_unreadable": 0.5, **more}
    assert reasons(**fields) == [("a.txt", "too_long")]
    assert len(texts(**fields)) == 1


def test_sections_are_numbered(tmp_path):
    (tmp_path / "a.md").write_text("# A\none\n# B\ntwo\n")
    found = records(kind="text", path=str(tmp_path), markdown_sections=1)
    assert [(record.text, record.where[-2:]) for record in found] == [("A\n\none\n", "#1"), ("B\n\ntwo\n", "#2")]


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
