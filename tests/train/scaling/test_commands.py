"""The arguments of `rorqual scaling …` and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.prepare import prepare
from data.store import Store
from tests.conftest import write_tiny_recipe
from tests.train.scaling.small_ladder import MODEL, write_ladder
from train.cli import main
from train.scaling.commands import _print_fit
from train.scaling.fits.held_out import HoldOut


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
    ("changes", "said"),
    [
        ({"dir": "FOLDER/file"}, "dir = 'FOLDER/file': FOLDER/file is a file; give another folder"),
        ({"dir": "FOLDER/file/below"}, "dir = 'FOLDER/file/below': FOLDER/file is a file; give another folder"),
        ({"dir": "/proc/ladder"}, "dir = '/proc/ladder': nothing can be written in /proc ("),
        ({"sections": {"model": MODEL | {"vocab_size": 384}}}, "recipe.model.vocab_size = 384: the tokenizer of "),
        (
            {"sections": {"run": {"device": "cuda"}}},
            "recipe.run.device = 'cuda': this machine shows no CUDA device; write auto",
        ),
        ({"sections": {"schedule": {"law": "no"}}}, "recipe.schedule.law = 'no': must be a file or one of"),
        ({"sections": {"data": {"train": "FOLDER/none", "sequence_length": 32}}}, "recipe.data: FOLDER/none"),
        (
            {"store": "FOLDER/store"},
            "recipe.data.validation: no source of FOLDER/store has the 33 tokens of one window",
        ),
        (
            {"data": {"train": "", "sequence_length": 32, "stages": [{"from_tokens": 10**9, "sequence_length": 64}]}},
            "recipe.data.stages.0.from_tokens = 1000000000: begins",
        ),
        (
            {"processes": "3"},
            "hyperparameters.batch_tokens: a global batch of 8 sequences does not divide over 3 processes",
        ),
    ],
)
def test_what_only_a_run_would_show_is_found_by_a_dry_run(
    changes: dict[str, Any],
    said: str,
    tiny_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    changes = json.loads(json.dumps(changes).replace("FOLDER", str(tmp_path)))
    store, processes = Path(changes.pop("store", tiny_store.path)), changes.pop("processes", "1")
    if store != tiny_store.path:
        prepare(write_tiny_recipe(tmp_path, documents=30).model_copy(update={"validation": 0.0}), store)
    ladder = write_ladder(tmp_path, store, **changes)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()  # what the preparation said
    assert main(["scaling", "run", str(ladder), "--dry-run", "--processes", processes]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rorqual: {ladder}: {said.replace('FOLDER', str(tmp_path))}") and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


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
