"""What needs no files of one's own: wheels of PyPI and the standard library."""

import subprocess
import zipfile

import pytest

from data.errors import DataError
from data.sources import inputs
from tests.data.sources.reading import reasons, records, source, texts

PLAYS = {"kind": "wheel", "package": "some-plays", "version": "1.0"}


@pytest.fixture
def wheel(tmp_path):
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "some_plays-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plays/b.md", "# B\n\n## One\n\ntwo\n")
        archive.writestr("plays/a/a.md", "# A\n\ntext\n")
        archive.writestr("code.py", b"caf\xe9")
    return path


def test_a_wheel_in_the_cache_needs_no_network(tmp_path, wheel):
    found = records(tmp_path, **PLAYS, files="plays/*.md", markdown_sections=2)
    assert [record.text for record in found] == ["A\n\ntext\n", "B\nOne\n\ntwo\n"]
    assert found[0].where == f"{wheel.name}!plays/a/a.md#1"
    assert reasons(tmp_path, **PLAYS, files="*", max_unreadable=0.5) == [(f"{wheel.name}!code.py", "not_utf8")]
    with pytest.raises(DataError, match=r"source it: files = 'none': nothing in some_plays-1.0-.* mend the pattern"):
        records(tmp_path, **PLAYS, files="none")


def test_a_damaged_wheel_is_refused(tmp_path, wheel):
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"any.whl: damaged after the start \(.*\); fetch the file again"):
        records(tmp_path, **PLAYS, files="*")


def test_a_wheel_that_cannot_be_fetched_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DataError, match=r"source it: no-such-plays==1.0 cannot be fetched .* put the wheel into .*wheels"
    ) as error:
        inputs(source(kind="wheel", package="no-such-plays", version="1.0", files="*"), tmp_path)
    assert "\n" not in str(error.value)


def test_a_wheel_that_another_process_fetched_meanwhile_stays(tmp_path, monkeypatch):
    """pip finds it in a folder; before it is put in its place, another process has put it there."""
    offered, place = tmp_path / "offered", tmp_path / "wheels" / "some_plays-1.0-py3-none-any.whl"
    offered.mkdir()
    with zipfile.ZipFile(offered / place.name, "w") as archive:
        archive.writestr("some_plays-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-plays\nVersion: 1.0\n")
        archive.writestr("some_plays-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_plays-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(offered))
    run = subprocess.run

    def slow(*arguments, **more):
        done = run(*arguments, **more)
        place.write_bytes(b"theirs")
        return done

    fields = PLAYS | {"files": "*"}
    assert [item.files for item in inputs(source(**fields), tmp_path)] == [(str(place),)]
    place.unlink()
    monkeypatch.setattr(subprocess, "run", slow)
    assert [item.files for item in inputs(source(**fields), tmp_path)] == [(str(place),)]
    assert place.read_bytes() == b"theirs" and list(place.parent.iterdir()) == [place]


def test_the_standard_library_is_bounded_and_always_the_same():
    limit = 300_000
    documents = texts(kind="stdlib", max_bytes=limit)
    total = sum(len(document.encode()) for document in documents)
    assert limit / 2 < total <= limit
    assert documents == texts(kind="stdlib", max_bytes=limit)


def test_a_file_of_the_standard_library_that_is_no_utf8_is_counted(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes(b"caf\xe9")
    (tmp_path / "utf8.py").write_text("good")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert texts(kind="stdlib", max_unreadable=0.5) == ["good"]
    assert reasons(kind="stdlib", max_unreadable=0.5) == [("stdlib:latin.py", "not_utf8")]
