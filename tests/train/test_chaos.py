"""Killed at any moment, under any layout, a run loses nothing; and the program that shows it would see what is lost."""

import json
import shutil
from pathlib import Path

import pytest

from data.store import Store
from tests.chaos.__main__ import main
from tests.chaos.checks import check_end, check_kept, check_whole, complete
from tests.small_run import Run

VERDICT = "nothing lost: seed 0, {0} of {0} disturbances, "


def test_runs_that_are_killed_again_and_again_end_as_undisturbed_ones(
    tiny_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--kills", "6", "--layouts", "alone,ddp", "--store", str(tiny_store.path)]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(VERDICT.format(6))
    assert "under 2 layouts; 2 runs ended as undisturbed ones, losses within 0e+00" in verdict


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_under_every_layout_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "108", "--minutes", "110"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(VERDICT.format(108)) and "under 9 layouts" in verdict
    in_saves = int(verdict.split(" of them in a save")[0].split()[-1])
    assert in_saves >= 50, verdict


def test_of_checkpoints_only_those_may_go_that_three_newer_ones_replace() -> None:
    for after in ([3, 6, 9], [6, 9, 12], [9, 12, 15]):
        check_kept([3, 6, 9], after)
    for after in ([], [3, 6], [6, 9], [9, 12], [12]):
        with pytest.raises(AssertionError, match=r"newest checkpoint was of step|is gone, with"):
            check_kept([3, 6, 9], after)


def test_a_wrong_checkpoint_that_looks_whole_is_seen(whole: Run, tmp_path: Path) -> None:
    """The files of one step under the name of another: all of them whole."""
    run = Run(whole.store, tmp_path / "run")
    shutil.copytree(whole.folder, run.folder)
    check_whole(run, whole)
    folder = run.folder / "checkpoints"
    (folder / "step-00000020").rename(folder / "step-00000019")
    assert complete(run) == [19]
    with pytest.raises(AssertionError):
        check_whole(run, None)


def test_a_loss_that_differs_in_its_last_place_is_seen(tiny_store: Store, whole: Run, tmp_path: Path) -> None:
    run = Run(tiny_store, tmp_path / "run")
    shutil.copytree(whole.folder, run.folder)
    assert check_end(run, whole, same_layout=True) == 0
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines[7]["loss"] = lines[7]["loss"] * (1 + 1e-7)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(AssertionError, match=r"metrics differ; losses by \d\.\de-0[78]"):
        check_end(run, whole, same_layout=True)
