"""Code that differs between nodes is seen, whatever version it calls itself."""

from pathlib import Path

from train.guard.alike import PACKAGES, facts_of, source_hash


def test_the_source_is_a_fact_and_a_changed_byte_or_name_is_another_source(tmp_path: Path) -> None:
    def hash_now() -> str:
        return source_hash.__wrapped__(tmp_path)

    for package in PACKAGES:
        (tmp_path / package / "deep").mkdir(parents=True)
        (tmp_path / package / "deep" / "code.py").write_text("x = 1\n")
    first = hash_now()
    (tmp_path / "train" / "deep" / "code.cpython-311.pyc").write_bytes(b"compiled")
    assert hash_now() == first
    code = tmp_path / "parallel" / "deep" / "code.py"
    code.write_text("x = 2\n")
    changed = hash_now()
    code.write_text("x = 1\n")
    assert hash_now() == first != changed
    code.rename(code.with_name("kode.py"))
    assert hash_now() not in (first, changed)
    assert facts_of({}, uses_cuda=False)["source of rorqual"].startswith("sha256 ")
