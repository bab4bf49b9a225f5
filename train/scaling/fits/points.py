"""Anyone's runs: a CSV file, and which of its columns are what.

    --columns "params=N, tokens=D, lr=lr, batch=bs*2048, loss=smooth loss"

A column may be multiplied by a number, which brings it to this project's units (`train.scaling.fits.runs`): tokens, FLOPs, nats.
A loss that is empty, nan or inf is that of a run that diverged; in every other column each run has a number.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from train.scaling.errors import ScalingError
from train.scaling.fits.runs import COLUMNS, Runs

Rows = list[tuple[int, dict[str, str | None]]]  # each with the number of its line


def read_points(path: Path, columns: str) -> Runs:
    """Read runs from a CSV file with a header.

    Args:
        columns: NAME=COLUMN or NAME=COLUMN*NUMBER, with commas between them; NAME is one of `Runs`' columns.

    Raises:
        ScalingError: the file, a column or a value cannot be read; the line says which.
    """
    chosen = _parse(columns)
    rows = _read(path)
    for name, (column, _) in chosen.items():
        if column not in rows[0][1]:
            there = ", ".join(str(key) for key in rows[0][1])
            raise ScalingError(f"columns = {name}={column}: {path} has no such column; its columns are {there}")
    return Runs.of(
        **{
            name: [_number(path, line, name, column, row[column]) * factor for line, row in rows]
            for name, (column, factor) in chosen.items()
        }
    )


def _read(path: Path) -> Rows:
    """The lines under the header; lines that begin with # are comments."""
    numbers = [0]  # of the lines that the table has been read from

    def lines(file: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            if not line.startswith("#"):
                numbers.append(number)
                yield line

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(numbers[-1], row) for row in csv.DictReader(lines(file))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScalingError(
            f"points = {str(path)!r}: cannot be read ({reason}); give a CSV file with a header"
        ) from None
    if not rows:
        raise ScalingError(f"points = {str(path)!r}: has no runs; give a CSV file with a header and a run a line")
    return rows


def _parse(columns: str) -> dict[str, tuple[str, float]]:
    chosen: dict[str, tuple[str, float]] = {}
    for entry in columns.split(","):
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not equals or not column or name not in COLUMNS:
            raise ScalingError(f"columns = {entry.strip()!r}: must be NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
        if name in chosen:
            raise ScalingError(f"columns = {entry.strip()!r}: {name} is {chosen[name][0]} already; name it once")
        column, times, factor = (part.strip() for part in column.partition("*"))
        chosen[name] = column, _factor(entry, factor) if times else 1.0
    if "loss" not in chosen:
        raise ScalingError(f"columns = {columns!r}: names no loss; add loss=COLUMN")
    return chosen


def _factor(entry: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ScalingError(
            f"columns = {entry.strip()!r}: {text!r} is no number above 0; write for example batch=COLUMN*2048"
        )
    return value


def _number(path: Path, line: int, name: str, column: str, text: str | None) -> float:
    """A positive number; the loss of a run that diverged is infinite."""
    if name == "loss" and text is not None and not text.strip():
        return math.inf
    try:
        value = float(text or "")
    except ValueError:
        raise ScalingError(
            f"{path}: line {line}: {column} = {text!r}: must be a number; mend or remove the line"
        ) from None
    if name == "loss" and (math.isnan(value) or value == math.inf):
        return math.inf
    if not math.isfinite(value):
        raise ScalingError(
            f"{path}: line {line}: {column} = {text!r}: must be finite, only a loss may not be; mend or remove the line"
        )
    if value <= 0 and name != "seed":
        raise ScalingError(f"{path}: line {line}: {column} = {text!r}: must be more than 0; mend or remove the line")
    return value
