"""Runs from anyone's CSV file."""

import sqlite3
from pathlib import Path

import pytest

from train.scaling.errors import ScalingError
from train.scaling.fits.points import read_points
from train.scaling.ladder.common import Common
from train.scaling.ladder.table import COLUMNS, TABLE, keep

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
        ("loss=final,batch=bs*inf", "'inf' is no number above 0"),
        ("loss=final,batch=bs,batch=size", "batch is bs already; name it once"),
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


def test_a_loss_that_is_empty_or_infinite_is_that_of_a_run_that_diverged(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("size,final\n1e8,\n1e8,inf\n1e8,nan\n1e8,3\n")
    assert read_points(path, "params=size,loss=final").loss.tolist() == [float("inf")] * 3 + [3.0]


@pytest.mark.parametrize("value", ["", "nan", "inf", "-inf"])
def test_only_a_loss_may_be_no_number(tmp_path: Path, value: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"# made\n# by hand\nsize,final\n1e8,3\n# a comment\n{value},3\n")
    with pytest.raises(ScalingError, match=rf"points.csv: line 6: size = '{value}': must be [^\n]*$"):
        read_points(path, "params=size,loss=final")


def test_a_kept_table_with_a_run_that_diverged_is_read_as_points(tmp_path: Path) -> None:
    names = [name for name, _ in COLUMNS]
    with sqlite3.connect(tmp_path / TABLE) as database:
        database.execute(f"CREATE TABLE runs ({', '.join(f'{name} {kind}' for name, kind in COLUMNS)})")
        for cell, loss in (("a", 5.1), ("b", None)):
            values = [{"cell": cell, "loss": loss, "bits_per_byte": loss, "seed": 0}.get(name, 8) for name in names]
            database.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(names))})", values)
    Common(recipe={"model": {}, "data": {"sequence_length": 8}}, data=[], tokenizer="none").write(tmp_path)
    keep(tmp_path, tmp_path / "kept")
    columns = ",".join(
        f"{name}={name}" for name in ("loss", "params", "active", "flops", "tokens", "lr", "batch", "seed")
    )
    runs = read_points(tmp_path / "kept" / "runs.csv", columns)
    assert runs.loss.tolist() == [5.1, float("inf")] and runs.compute == "M*D"


def test_the_compute_of_an_moe_counts_the_parameters_that_a_token_uses(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("N,Na,D,C,loss\n1e9,1e8,1e10,6e18,3\n")
    columns = {"params": "params=N", "active": "active=Na", "tokens": "tokens=D", "flops": "flops=C"}
    for derived in ("flops", "tokens"):
        given = ",".join(column for name, column in columns.items() if name != derived)
        runs = read_points(path, f"{given},loss=loss")
        assert runs.flops.tolist() == [6e18] and runs.tokens.tolist() == [1e10] and runs.compute == "6*N*D"  # type: ignore[union-attr]
    assert read_points(path, "active=Na,tokens=D,flops=C,loss=loss").params is None
    assert read_points(path, "params=N,active=Na,tokens=D,flops=C,loss=loss").compute == "M*D"
