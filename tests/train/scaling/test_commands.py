"""The arguments of `rorqual scaling …` and what it prints."""

import json
from pathlib import Path

import pytest

from train.cli import main
from train.scaling.commands import _print_fit
from train.scaling.held_out import HoldOut


def test_a_law_says_what_the_losses_of_its_points_are_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = tmp_path / "points.csv"
    rows = [(n, d, 0.5 + 40 / n**0.35 + 80 / d**0.35) for n in (1e5, 1e6, 1e7) for d in (1e7, 1e8, 1e9)]
    points.write_text("N,D,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    command = ["scaling", "fit", "--points", str(points), "--columns", "params=N,tokens=D,loss=loss", "--draws", "0"]
    units = []
    for arguments in ([], ["--loss-unit", "bits"]):
        assert main([*command, *arguments, "--json"]) == 0
        units.append(json.loads(capsys.readouterr().out)["law"]["loss_unit"])
    assert units == ["nats per token", "bits per byte"]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (HoldOut(1e12, 1e5, 1e7, None, 3.0, inside=True, regret=0.001), "cost 0.10% of the loss"),
        (HoldOut(1e12, 1e5, 1e7, None, 3.0, inside=False), "outside of the grid"),
    ],
)
def test_what_a_forecast_costs_is_told_or_that_it_lies_outside_of_the_grid(
    held: HoldOut, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_fit({"warnings": [], "noise": None, "runs": 9, "dropped": [], "fits": [], "held_out": [held.__dict__]})
    out = capsys.readouterr().out
    assert said in out and ("outside" in out) == (held.inside is False)
