"""The table of a ladder's runs: one SQLite file that anyone can query, made from the cells' results."""

import csv
import math
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.scaling.cells import Result
from train.scaling.errors import ScalingError
from train.scaling.runs import Runs

TABLE = "runs.sqlite"

# Column, its SQL type, and where it comes from.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("cell", "TEXT PRIMARY KEY"),
    ("budget", "REAL"),  # C asked for, FLOPs
    ("flops", "REAL"),  # C = M·D
    ("all_flops", "REAL"),  # with the output head and MTP
    ("flops_per_token", "INTEGER"),  # M
    ("width", "INTEGER"),
    ("params", "INTEGER"),  # N, without embedding and head
    ("active", "INTEGER"),
    ("tokens", "INTEGER"),  # D
    ("steps", "INTEGER"),
    ("lr", "REAL"),
    ("batch", "INTEGER"),  # tokens
    ("seed", "INTEGER"),
    ("loss", "REAL"),  # nats per token; NULL: diverged
    ("bits_per_byte", "REAL"),
    ("reused_tokens", "INTEGER"),
    ("seconds", "REAL"),
    ("recipe_hash", "TEXT"),
    ("code_version", "TEXT"),
)


def write_table(path: Path, results: Iterable[Result]) -> None:
    """Replace the table by one of these runs."""
    names = [name for name, _ in COLUMNS]
    with replace_file(path) as temporary:
        database = sqlite3.connect(temporary)
        database.execute(f"CREATE TABLE runs ({', '.join(f'{name} {kind}' for name, kind in COLUMNS)})")
        rows = [[_row(result)[name] for name in names] for result in results]
        database.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(names))})", rows)
        database.commit()
        database.close()


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """The same table as text, for a repository."""
    with replace_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [name for name, _ in COLUMNS], lineterminator="\n")
        table.writeheader()
        table.writerows(_row(result) for result in results)


def read_table(path: Path) -> Runs:
    """The runs of a ladder's folder, or of its table as SQLite or CSV. Diverged runs have an infinite loss.

    Raises:
        ScalingError: there is no table, or it lacks a column.
    """
    path = path / TABLE if path.is_dir() else path
    if not path.is_file():
        raise ScalingError(f"runs = {path}: is no ladder's folder and no table of runs; give one, or --points FILE.csv")
    try:
        rows = _read_csv(path) if path.suffix == ".csv" else _read_sqlite(path)
    except sqlite3.DatabaseError as error:
        raise ScalingError(f"{path}: is not a table of runs ({error}); give a ladder's folder") from None
    wanted = ("loss", "params", "active", "flops", "tokens", "lr", "batch", "seed")
    if rows and (missing := [name for name in wanted if name not in rows[0]]):
        raise ScalingError(f"{path}: has no column {missing[0]}; give a ladder's table, or --points with --columns")
    return Runs.of(**{name: [_number(row[name]) for row in rows] for name in wanted})


def _row(result: Result) -> dict[str, Any]:
    cell = result.cell
    return {
        "cell": cell.name,
        "budget": cell.budget,
        "flops": result.flops,
        "all_flops": result.all_flops_per_token * result.tokens,
        "flops_per_token": result.flops_per_token,
        "width": cell.width,
        "params": result.params,
        "active": result.active,
        "tokens": result.tokens,
        "steps": result.steps,
        "lr": cell.lr,
        "batch": cell.batch_tokens,
        "seed": cell.seed,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "bits_per_byte": result.bits_per_byte if math.isfinite(result.loss) else None,
        "reused_tokens": result.reused_tokens,
        "seconds": round(result.seconds, 1),
        "recipe_hash": result.recipe_hash,
        "code_version": result.code_version,
    }


def _read_sqlite(path: Path) -> Sequence[dict[str, Any]]:
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM runs")]
    finally:
        database.close()


def _read_csv(path: Path) -> Sequence[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(value: Any) -> float:
    return math.inf if value in (None, "") else float(value)
