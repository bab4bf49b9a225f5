"""Anyone's runs: a CSV file, and which of its columns are what.

    --columns "params=N, tokens=D, lr=lr, batch=bs*2048, loss=smooth loss"

A column may be multiplied by a number, which brings it to this project's units (`train.scaling.runs`): tokens, FLOPs, nats.
"""

import csv
import math
from dataclasses import fields
from pathlib import Path

from train.scaling.errors import ScalingError
from train.scaling.runs import Runs

KNOWN = tuple(field.name for field in fields(Runs))


def read_points(path: Path, columns: str) -> Runs:
    """Read runs from a CSV file with a header.

    Args:
        columns: NAME=COLUMN or NAME=COLUMN*NUMBER, with commas between them; NAME is one of `Runs`' columns.

    Raises:
        ScalingError: the file, a column or a value cannot be read; the line says which.
    """
    chosen = _parse(columns)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScalingError(
            f"points = {str(path)!r}: cannot be read ({reason}); give a CSV file with a header"
        ) from None
    if not rows:
        raise ScalingError(f"points = {str(path)!r}: has no runs; give a CSV file with a header and a run a line")
    for name, (column, _) in chosen.items():
        if column not in rows[0]:
            there = ", ".join(str(key) for key in rows[0])
            raise ScalingError(f"columns = {name}={column}: {path} has no such column; its columns are {there}")
    return Runs.of(
        **{
            name: [_number(path, line, name, column, row[column]) * factor for line, row in enumerate(rows, 2)]
            for name, (column, factor) in chosen.items()
        }
    )


def _parse(columns: str) -> dict[str, tuple[str, float]]:
    chosen = {}
    for entry in columns.split(","):
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not equals or not column or name not in KNOWN:
            raise ScalingError(f"columns = {entry.strip()!r}: must be NAME=COLUMN, NAME one of {', '.join(KNOWN)}")
        column, times, factor = (part.strip() for part in column.partition("*"))
        try:
            chosen[name] = column, float(factor) if times else 1.0
        except ValueError:
            raise ScalingError(
                f"columns = {entry.strip()!r}: {factor!r} is no number; write NAME=COLUMN*2048"
            ) from None
    if "loss" not in chosen:
        raise ScalingError(f"columns = {columns!r}: names no loss; add loss=COLUMN")
    return chosen


def _number(path: Path, line: int, name: str, column: str, text: str | None) -> float:
    """A positive number; nan, as a run that diverged may have it, becomes infinity."""
    try:
        value = float(text or "")
    except ValueError:
        raise ScalingError(
            f"{path}: line {line}: {column} = {text!r}: must be a number; mend or remove the line"
        ) from None
    if math.isnan(value):
        return math.inf
    if value <= 0 and name != "seed":
        raise ScalingError(f"{path}: line {line}: {column} = {text!r}: must be more than 0; mend or remove the line")
    return value
