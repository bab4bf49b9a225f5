"""Runs from anyone's CSV file."""

from pathlib import Path

import pytest

from train.scaling.errors import ScalingError
from train.scaling.points import read_points

FILE = """# a comment
size,steps,bs,peak lr,final
1e8,1000,64,0.001,3.0
2e8,1000,64,0.001,nan
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "points.csv"
    path.write_text(FILE)
    return path


def test_columns_are_named_and_brought_to_our_units(file: Path) -> None:
    runs = read_points(file, "params=size, tokens=steps*131072, batch=bs*2048, lr=peak lr, loss=final")
    assert runs.batch is not None and runs.batch.tolist() == [131072, 131072]
    assert runs.flops is not None and runs.flops[0] == 6 * 1e8 * 1000 * 131072  # C = 6·N·D where no C is given
    assert runs.loss.tolist() == [3.0, float("inf")]  # a run that diverged


def test_tokens_follow_from_size_and_compute(file: Path) -> None:
    runs = read_points(file, "params=size,flops=steps*1e15,loss=final")
    assert runs.tokens is not None and runs.tokens[0] == pytest.approx(1e18 / (6 * 1e8))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("params=size", "names no loss"),
        ("loss=final,params=width", "no such column; its columns are size, steps, bs, peak lr, final"),
        ("loss=final,width=size", "NAME one of loss, params"),
        ("loss=final,batch=bs*many", "'many' is no number"),
        ("loss", "must be NAME=COLUMN"),
    ],
)
def test_a_wrong_column_is_named(file: Path, columns: str, message: str) -> None:
    with pytest.raises(ScalingError, match="columns = ") as error:
        read_points(file, columns)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no runs"),
        ("size,final\n", "has no runs"),
        ("size,final\n1e8,low\n", "line 2: final = 'low': must be a number"),
        ("size,final\n-1,3\n", "line 2: size = '-1': must be more than 0"),
        ("size,final\n1e8\n", "line 2: final = None: must be a number"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(content)
    with pytest.raises(ScalingError) as error:
        read_points(path, "params=size,loss=final")
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="No such file"):
        read_points(tmp_path / "none.csv", "loss=final")
