"""Source trees: which files count."""

import pytest

from data.documents import Document
from data.errors import DataError
from data.sources import inputs
from tests.data.sources.reading import reasons, records, source, texts


@pytest.fixture
def tree(tmp_path):
    files = {
        "main.py": b"main",
        "lib/util.py": b"util",
        "lib/util.c": b"c",
        "lib/empty.py": b"",
        "logo.py": b"\x89PNG\0" + b"\xff" * 10,
        "late.py": b"x" * 10_000 + b"\0",
        ".hidden.py": b"hidden",
        ".git/config.py": b"vcs",
        "node_modules/left/pad.py": b"package",
        "lib/third_party/other.py": b"vendored",
        "__pycache__/main.py": b"built",
    }
    for name, content in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "project" / "link.py").symlink_to("main.py")
    (tmp_path / "project" / "loop").symlink_to(".", target_is_directory=True)
    return tmp_path / "project"


def test_what_people_wrote_is_read_and_nothing_that_tools_put_there(tree):
    found = records(kind="tree", path=str(tree), language="code")
    assert [(record.where, record.text) for record in found if isinstance(record, Document)] == [
        (f"{tree}/lib/util.c", "c"),
        (f"{tree}/lib/util.py", "util"),
        (f"{tree}/main.py", "main"),
    ]
    assert len(inputs(source(kind="tree", path=str(tree)))) == 1


def test_binary_and_empty_files_are_counted_and_speak_against_no_tree(tree):
    fields = {"kind": "tree", "path": str(tree), "max_unreadable": 0}
    assert reasons(**fields) == [("late.py", "binary"), ("empty.py", "no_text"), ("logo.py", "binary")]
    assert reasons(**fields, exclude=["late.py", "logo.py"]) == [("empty.py", "no_text")]


def test_patterns_choose_files_by_their_name_or_path(tree):
    assert texts(kind="tree", path=str(tree), include=["*.py"]) == ["util", "main"]
    assert texts(kind="tree", path=str(tree), include=["lib/*"], exclude=["*.c"]) == ["util"]
    assert texts(kind="tree", path=[str(tree / "li*"), str(tree)], include=["*.py"]) == ["util", "main"]
    with pytest.raises(
        DataError,
        match=r"source it: path = '.*': has no file that `include` .* leave; .* \(include: \['\*.rs'\], exclude",
    ):
        inputs(source(kind="tree", path=str(tree), include=["*.rs"]))


def test_a_file_that_is_too_long_or_no_utf8_is_located(tree):
    (tree / "latin.py").write_bytes(b"caf\xe9")
    (tree / "long.py").write_bytes(b"x" * 101)
    fields = {
        "kind": "tree",
        "path": str(tree),
        "include": ["la*.py", "long.py"],
        "max_unreadable": 1,
        "max_document_bytes": 100,
    }
    assert reasons(**fields) == [("late.py", "too_long"), ("latin.py", "not_utf8"), ("long.py", "too_long")]
