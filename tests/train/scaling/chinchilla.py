"""The points of Hoffmann et al. Fig. 4 as digitised by Epoch AI, where the folder of public runs is there."""

import csv
from pathlib import Path

import numpy as np
import pytest

from train.scaling.fits.loss_law import drop_highest
from train.scaling.fits.runs import Runs

POINTS = Path(__file__).parents[4] / "shared/scaling_data/chinchilla_epoch/points.csv"


def chinchilla(without: int = 5) -> Runs:
    """Its runs but those of the highest losses; skips the test where the points are absent."""
    if not POINTS.exists():
        pytest.skip("needs ../shared/scaling_data, which is not part of the repository")
    with POINTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}
    runs = Runs.of(**{name: np.array([float(row[column]) for row in rows]) for name, column in columns.items()})
    return runs.take(drop_highest(runs.loss, without))
