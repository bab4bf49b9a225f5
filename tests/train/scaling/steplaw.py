"""Step Law's released runs (`../shared/scaling_data/steplaw`), for tests."""

import csv
from pathlib import Path

import numpy as np
import pytest

from train.scaling.fits.runs import Runs

FOLDER = Path(__file__).parents[3] / ".." / "shared" / "scaling_data" / "steplaw"

needs_steplaw = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/scaling_data/steplaw is absent")


def steplaw(kind: str) -> Runs:
    """The runs of "dense" or "moe". Their loss is the smoothed one; M = 6·N + 12·layers·width·2,048 of the active parameters."""
    with (FOLDER / f"{kind}_lr_bs_loss.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column = {
        name: np.array([float(row[name]) for row in rows])
        for name in ("N", "D", "h", "numl", "lr", "bs", "smooth loss")
    }
    active = np.array([float(row["Na"]) for row in rows]) if kind == "moe" else column["N"]
    return Runs.of(
        params=column["N"],
        active=active,
        tokens=column["D"],
        flops=(6 * active + 12 * column["numl"] * column["h"] * 2048) * column["D"],
        lr=column["lr"],
        batch=column["bs"] * 2048,
        loss=column["smooth loss"],
    )
