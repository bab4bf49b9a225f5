"""What a benchmark cannot do is said before it begins: one line with option, value and rule, and exit code 2."""

import sys
from pathlib import Path

import pytest

from tests.benchmarks.commands import ROOT

SHAPE = str(ROOT / "benchmarks/shapes/tiny.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "missing.json"], "missing.json: No such file or directory; give a file of benchmarks/shapes"),
        (["--shape", str(ROOT / "README.md")], "README.md is no shape"),
        (["--shape", SHAPE, "--mtp", "-1"], "-1: must be an integer of at least 0"),
        (["--shape", SHAPE, "--json", "nowhere/x.json"], "nowhere/x.json: there is no folder nowhere; make it first"),
        (["--shape", SHAPE, "--profile", "x.foo"], "x.foo: must end in one of"),
        (["--shape", SHAPE, "--warm", "2", "--store", "nowhere"], "nowhere"),
        (["--shape", SHAPE, "--warm", "2"], "give both or neither"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_step

    monkeypatch.setattr(sys, "argv", ["train_step.py", *options])
    with pytest.raises(SystemExit) as end:
        train_step.main()
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train_step.py: error:") and said in line
