"""The table of a ladder's runs: one SQLite file that anyone can query, made from the cells' results.

`rorqual scaling table FOLDER --out SMALL` keeps it as text beside what the runs had in common, small enough for a repository; a fit
reads one as the other.
"""

import csv
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.files import replace_file
from train.scaling.errors import ScalingError
from train.scaling.fits.runs import Runs
from train.scaling.ladder.cells import Result
from train.scaling.ladder.common import read_common

TABLE, CSV = "runs.sqlite", "runs.csv"

# Column, its SQL type, and where it comes from.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("cell", "TEXT"),  # its name, which rounds
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
KEY = "PRIMARY KEY (budget, width, lr, batch, seed)"


def write_table(path: Path, results: Iterable[Result]) -> None:
    """Replace the table by one of these runs."""
    names = [name for name, _ in COLUMNS]
    with replace_file(path) as temporary:
        database = sqlite3.connect(temporary)
        database.execute(f"CREATE TABLE runs ({', '.join(f'{name} {kind}' for name, kind in COLUMNS)}, {KEY})")
        rows = [[_row(result)[name] for name in names] for result in results]
        database.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(names))})", rows)
        database.commit()
        database.close()


def keep(folder: Path, out: Path) -> None:
    """Write the table and what the runs have in common as text.

    Raises:
        ScalingError: there is no table, or nothing can be written in `out`.
    """
    rows, common = read_rows(folder), read_common(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replace_file(out / CSV) as path, path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]) if rows else [name for name, _ in COLUMNS], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        common.write(out)
    except OSError as error:
        reason = "a file is there" if isinstance(error, FileExistsError) else error.strerror
        raise ScalingError(f"out = {str(out)!r}: is no folder to write in ({reason}); give another one") from None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The runs of a folder, a dictionary each; values are text where the table is.

    Raises:
        ScalingError: there is no table, or it is damaged.
    """
    if (path := folder / TABLE).is_file():
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute("SELECT * FROM runs")]
        except sqlite3.DatabaseError as error:
            raise ScalingError(
                f"{path}: is not a table of runs ({error}); start the ladder again, which writes it"
            ) from None
        finally:
            database.close()
    if (path := folder / CSV).is_file():
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    raise ScalingError(
        f"runs = {str(folder)!r}: has no {TABLE} and no {CSV}; give a ladder's folder, or --points FILE.csv"
    )


def read_runs(folder: Path) -> Runs:
    """The runs of a folder as columns. A run that diverged has an infinite loss.

    Raises:
        ScalingError: there is no table, or it lacks a column.
    """
    rows = read_rows(folder)
    wanted = ("loss", "params", "active", "flops", "tokens", "lr", "batch", "seed")
    if missing := [name for name in wanted if rows and name not in rows[0]]:
        raise ScalingError(f"{folder}: its table has no column {missing[0]}; give a table of this version")
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
        "recipe_hash": result.identity.hash(),
        "code_version": result.code_version,
    }


def _number(value: Any) -> float:
    return math.inf if value in (None, "") else float(value)
