"""A real ladder of runs that take a second each: reused stages, interruptions, several tasks, failures.

Its processes are forked, but for the ladder that is interrupted: that is the command as a shell starts it, with its trainer.
"""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from data.locks import try_lock
from data.store import Store
from tests.train.scaling.forked import Command
from tests.train.scaling.small_ladder import write_ladder
from train.cli import main
from train.scaling.ladder.cells import RESULT, Cells, diverged, mixture_loss, seconds_of_steps
from train.scaling.ladder.code_version import imported
from train.scaling.ladder.execute import Execution, _hang_up_as_interrupt
from train.scaling.ladder.ladder import Ladder, load_ladder
from train.scaling.ladder.table import keep, read_rows, read_runs
from train.scaling.ladder.wanted import Cell

Said = list[str]


def execution(ladder: Ladder, said: Said, jobs: int = 2) -> Execution:
    return Execution(ladder, jobs, 1, said.append)


def ends(said: Said) -> Said:
    """The lines of cells that have ended."""
    return [line for line in said if line.startswith("[")]


@pytest.fixture(scope="module")
def finished(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ladder, Said]:
    """Two budgets, two rates, one row; the longer runs go on from the shorter ones."""
    folder = tmp_path_factory.mktemp("ladder")
    path = write_ladder(folder, tiny_store.path, max_cells=2, seeds=2, row=[16, 24], sizes=2)
    code, out, err = Command(str(path), "--jobs", "2").wait()
    assert code == 0, err
    return load_ladder(path), out.splitlines()


def test_every_wanted_cell_has_a_row_in_the_table(finished: tuple[Ladder, Said]) -> None:
    ladder, said = finished
    rows = read_rows(Path(ladder.dir))
    assert len(rows) == 2 * (2 + 1 + 1) == len(ends(said))  # grid, row, seed
    assert len({line for line in said if "raise hyperparameters.max_cells = 2" in line}) == 2
    for row in rows:
        assert (
            row["flops"] == row["flops_per_token"] * row["tokens"] == pytest.approx(row["budget"], rel=0.05)
        )  # whole batches
        assert row["all_flops"] > row["flops"] and row["active"] < row["params"]
        assert 0 < row["bits_per_byte"] < 8 and row["recipe_hash"] and row["code_version"]
    runs = read_runs(Path(ladder.dir))
    assert runs.loss.tolist() == [row["loss"] for row in rows]


def test_a_run_that_goes_on_from_a_shorter_one_ends_as_one_of_its_own(
    finished: tuple[Ladder, Said], tmp_path: Path
) -> None:
    ladder, said = finished
    assert any("tokens reused" in line for line in said)
    cells = Cells(ladder)
    cell = Cell(8e8, 16, 4e-3, 256)
    result = cells.results().get(cell)
    assert result is not None and result.reused_tokens > 0.8 * cells.tokens(Cell(4e8, 16, 4e-3, 256))
    recipe = cells.recipe(cell)
    own = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(tmp_path / "own")})})
    (tmp_path / "recipe.yaml").write_text(own.to_yaml())
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    last = json.loads((tmp_path / "own" / "metrics.jsonl").read_text().splitlines()[-1])
    assert mixture_loss(last["validation"], last["tokens_by_source"]) == (result.loss, result.bits_per_byte)


def test_a_finished_ladder_runs_nothing_again(finished: tuple[Ladder, Said]) -> None:
    ladder, _ = finished
    said: Said = []
    again = execution(ladder, said)
    again.run()
    assert ends(said) == [] and not list(Path(ladder.dir).glob("cells/*/run/checkpoints"))


def test_a_finished_ladder_says_so_and_what_to_do_next(finished: tuple[Ladder, Said]) -> None:
    ladder, said = finished
    folder = ladder.dir
    last = f"all 8 cells are finished; table: {folder}/runs.sqlite; next: rorqual scaling fit {folder}"
    assert said[-1] == last == execution(ladder, []).describe()[-1]
    fewer = ladder.model_copy(update={"seeds": 1, "budgets": (4e8,)})
    lines = execution(fewer, []).describe()
    assert lines[-1].startswith("all 3 cells are finished (5 more are no longer wanted); table: "), lines


def test_the_first_estimate_says_what_it_leaves_open(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(
        tmp_path, tiny_store.path, budgets=[4e8], lr=[4e-3], max_cells=4, seeds=2, row=[16, 24], sizes=2
    )
    lines = execution(load_ladder(path), []).describe()
    assert lines[0].startswith("1 cell of 1 budget is known to be wanted, 0 of them finished: C = "), lines
    assert lines[1] == "2 more follow from their results (IsoFLOP rows, seeds), and up to 3 where a grid must grow"
    assert "up to" in lines[2] and "where the noise, once seeds tell it, moves a best cell" in lines[2]


def test_an_edited_ladder_runs_what_the_edit_has_changed(finished: tuple[Ladder, Said]) -> None:
    ladder, _ = finished
    more = ladder.model_copy(update={"seeds": 3})
    work = execution(more, [])
    left = [cell for cell in work.wanted if cell not in work.results]
    assert [cell.seed for cell in left] == [2, 2]
    recipe = json.loads(json.dumps(ladder.recipe)) | {"optimizer": {"weight_decay": 0.2}}
    other = execution(ladder.model_copy(update={"recipe": recipe}), [])
    assert other.results == {}
    difference = "8 finished cells of .* belong to another recipe .first difference: optimizer.weight_decay 0.1 0.2."
    assert re.search(difference, other.describe()[-1])


def test_a_result_counts_for_later_code_and_for_no_other_recipe(finished: tuple[Ladder, Said], tmp_path: Path) -> None:
    """Older code did not know `clip` and `data.packing`, and named folders in another way."""
    ladder, _ = finished
    folder = tmp_path / "cells" / "a-name"
    folder.mkdir(parents=True)
    cell, result = next(iter(Cells(ladder).results().items()))
    result.write(folder)
    record = json.loads((folder / RESULT).read_text())
    del record["identity"]["values"]["optimizer"]["clip"], record["identity"]["values"]["data"]["packing"]
    (folder / RESULT).write_text(json.dumps(record))
    here = ladder.model_copy(update={"dir": str(tmp_path)})
    assert list(Cells(here).results()) == [cell] and Cells(here).results()[cell].loss == result.loss
    later = Cells(here)
    later.results()
    assert later.place(cell) == folder
    recipe = json.loads(json.dumps(ladder.recipe)) | {"optimizer": {"clip": 0.5}}
    other = Cells(here.model_copy(update={"recipe": recipe}))
    assert other.results() == {} and list(other.others.values()) == ["optimizer.clip null 0.5"]
    assert other.place(cell) != folder


def test_a_fresh_process_and_a_continuing_one_write_the_same_table(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tiny_store.path, budgets=[4e8, 8e8, 1.6e9], lr=[1e-3, 2e-3], row=[16], sizes=1)
    ladder = load_ladder(path)
    draw = random.Random(0)
    going = execution(ladder, [])
    while left := [cell for cell in going.wanted if cell not in going.results]:
        for cell in left[:3]:
            basin = 1 + 0.01 * math.log2(cell.lr / 4e-3) ** 2 + 0.01 * math.log2(cell.batch_tokens / 256) ** 2
            loss = 3 * basin * (1 + draw.gauss(0, 0.02 if cell.budget == 4e8 else 0.001))
            place = going.cells.place(cell)
            place.mkdir(parents=True)
            replace(diverged(going.cells, cell, "", 1.0), loss=loss, bits_per_byte=loss).write(place)
        going.look()
    assert set(going.results) > set(going.wanted)  # the noise that had asked for the others was less in the end
    going.run()
    rows = read_rows(Path(ladder.dir))
    fresh = execution(ladder, [])
    fresh.run()
    assert fresh.wanted == going.wanted and read_rows(Path(ladder.dir)) == rows and len(rows) == len(going.results)


def test_the_version_of_the_code_is_that_of_what_a_run_imports() -> None:
    modules = imported()
    assert {"train.trainer", "model.moe", "data.store", "parallel.ddp"} <= set(modules)
    assert not [name for name in modules if name.startswith(("train.scaling", "data.report", "data.prepare"))]


def test_the_text_form_of_a_table_reads_as_the_table(finished: tuple[Ladder, Said], tmp_path: Path) -> None:
    folder = Path(finished[0].dir)
    keep(folder, tmp_path / "kept")
    assert read_runs(tmp_path / "kept").loss.tolist() == read_runs(folder).loss.tolist()


@pytest.mark.parametrize(("place", "reason"), [("file", "a file is there"), ("file/below", "Not a directory")])
def test_a_table_that_cannot_be_kept_is_one_line(
    finished: tuple[Ladder, Said], place: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["scaling", "table", finished[0].dir, "--out", str(tmp_path / place)]) == 2
    assert (
        f"out = '{tmp_path / place}': is no folder to write in ({reason}); give another one" in capsys.readouterr().err
    )


def test_schedules_without_a_common_part_are_said_to_have_none(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tiny_store.path, schedule={"shape": "cosine"})
    lines = execution(load_ladder(path), []).describe()
    assert any("cannot go on from" in line and "then lr differs" in line for line in lines), lines


@pytest.fixture
def hang_up_ends() -> Iterator[None]:
    """SIGHUP as it is without `nohup`, under which these tests may have been started."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_an_interrupted_ladder_goes_on_where_it_was(tiny_store: Store, tmp_path: Path, hang_up_ends: None) -> None:
    path = write_ladder(tmp_path, tiny_store.path, budgets=[1.5e9], lr=[4e-3], max_cells=1, seeds=1, row=[16], sizes=1)
    command = [sys.executable, "-m", "train.cli", "scaling", "run", str(path)]
    ladder = load_ladder(path)
    cells = Cells(ladder)
    metrics = cells.place(Cell(1.5e9, 16, 4e-3, 256)) / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "start the same command again" in err, (out, err)
    before = len(metrics.read_text().splitlines())
    assert cells.results() == {}
    code, out, err = Command(str(path)).wait()
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > before and len(ends(out.splitlines())) == 1
    (row,) = read_rows(Path(ladder.dir))
    assert row["seconds"] > seconds_of_steps(metrics.parent)  # both sessions'


def test_a_cell_that_a_killed_ladder_left_running_keeps_its_place_and_is_named(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one cell at once, none is started beside it."""
    said: Said = []
    work = execution(load_ladder(write_ladder(tmp_path, tiny_store.path)), said, jobs=1)
    monkeypatch.setattr("train.scaling.ladder.execute.POLL_OTHERS", 0)
    locks = work.cells.folder / "locks"
    locks.mkdir(parents=True)
    ladder = subprocess.Popen(["true"])
    ladder.wait()
    cell = work.wanted[0]
    with ExitStack() as stack:
        lock = try_lock(locks / work.cells.place(cell).name, stack)
        assert lock is not None
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
        owner = {"host": socket.gethostname(), "ladder": ladder.pid, "cell": orphan.pid, "slot": 0}
        lock.write(json.dumps(owner) + "\n")
    try:
        work._start(work.wanted)
        assert work._running == []
        for _ in range(2):
            work._wait_for_others(work.wanted)
        assert len(said) == 1 and cell.name in said[0] and work.wanted[1].name not in said[0]
    finally:
        orphan.kill()
        orphan.wait()
    assert work._orphans(work.wanted) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_an_interrupt_unless_nohup_has_it_ignored(
    number: signal.Signals, hang_up_ends: None
) -> None:
    with pytest.raises(KeyboardInterrupt), _hang_up_as_interrupt():
        signal.raise_signal(number)
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with _hang_up_as_interrupt():
            signal.raise_signal(number)
    finally:
        signal.signal(number, previous)


def test_two_tasks_share_a_ladder(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(
        tmp_path, tiny_store.path, budgets=[2e8], lr=[4e-3, 8e-3], max_cells=2, seeds=1, row=[16], sizes=1
    )
    tasks = [Command(str(path), "--jobs", "1") for _ in range(2)]
    ended = [task.wait() for task in tasks]
    said = [line for task in ended for line in task.out.splitlines()]
    assert [task.code for task in ended] == [0, 0] and len(ends(said)) == 2, ended
    assert len(read_rows(tmp_path / "ladder")) == 2


def test_a_cell_that_fails_is_named_and_the_others_run(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tiny_store.path, budgets=[2e8], max_cells=2, seeds=1, row=[16], sizes=1)
    cells = Cells(load_ladder(path))
    place = cells.place(Cell(2e8, 16, 8e-3, 256))
    place.mkdir(parents=True)
    (place / "run").write_text("in the way")
    code, _, err = Command(str(path)).wait()
    assert code == 2
    assert "cell c2e+08-d16-lr0.008-b256-s0: failed" in err and "log.txt" in err and err.count("\n") == 1
    assert len(read_rows(tmp_path / "ladder")) == 1
    os.remove(place / "run")
    assert Command(str(path)).wait().code == 0
    assert len(read_rows(tmp_path / "ladder")) == 2


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
