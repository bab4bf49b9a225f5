"""A real ladder of runs that take a second each: reused stages, interruptions, several tasks, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.store import Store
from tests.train.scaling.small_ladder import write_ladder
from train.cli import main
from train.scaling.cells import Cells, mixture_loss
from train.scaling.execute import Execution
from train.scaling.ladder import Cell, Ladder, load_ladder
from train.scaling.table import keep, read_rows, read_runs

Said = list[str]


def execution(ladder: Ladder, said: Said, jobs: int = 2) -> Execution:
    return Execution(ladder, jobs, 1, said.append)


@pytest.fixture(scope="module")
def finished(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ladder, Said]:
    """Two budgets, two rates, one row; the longer runs go on from the shorter ones."""
    folder = tmp_path_factory.mktemp("ladder")
    path = write_ladder(folder, tiny_store.path, max_cells=2, seeds=2, row=[16, 24], sizes=2)
    said: Said = []
    ladder = load_ladder(path)
    execution(ladder, said).run()
    return ladder, said


def test_every_wanted_cell_has_a_row_in_the_table(finished: tuple[Ladder, Said]) -> None:
    ladder, said = finished
    rows = read_rows(Path(ladder.dir))
    assert len(rows) == 2 * (2 + 1 + 1) == len(said)  # grid, row, seed
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
    result = cells.result(cell)
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
    assert said == [] and not list(Path(ladder.dir).glob("cells/*/run/checkpoints"))


def test_an_edited_ladder_runs_what_the_edit_has_changed(finished: tuple[Ladder, Said]) -> None:
    ladder, _ = finished
    more = ladder.model_copy(update={"seeds": 3})
    work = execution(more, [])
    work.look()
    left = [cell for cell in work.wanted() if cell not in work.results]
    assert [cell.seed for cell in left] == [2, 2]
    recipe = json.loads(json.dumps(ladder.recipe)) | {"optimizer": {"weight_decay": 0.2}}
    other = execution(ladder.model_copy(update={"recipe": recipe}), [])
    other.look()
    assert other.results == {}


def test_the_text_form_of_a_table_reads_as_the_table(finished: tuple[Ladder, Said], tmp_path: Path) -> None:
    folder = Path(finished[0].dir)
    keep(folder, tmp_path / "kept")
    assert read_runs(tmp_path / "kept").loss.tolist() == read_runs(folder).loss.tolist()


def test_schedules_without_a_common_part_are_said_to_have_none(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tiny_store.path, schedule={"shape": "cosine"})
    lines = execution(load_ladder(path), []).describe()
    assert any("cannot go on from" in line and "then lr differs" in line for line in lines), lines


def test_an_interrupted_ladder_goes_on_where_it_was(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tiny_store.path, budgets=[3e9], lr=[4e-3], max_cells=1, seeds=1, row=[16], sizes=1)
    command = [sys.executable, "-m", "train.cli", "scaling", "run", str(path)]
    ladder = load_ladder(path)
    cells = Cells(ladder)
    metrics = cells.place(Cell(3e9, 16, 4e-3, 256)) / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "start the same command again" in err, (out, err)
    before = len(metrics.read_text().splitlines())
    assert cells.result(Cell(3e9, 16, 4e-3, 256)) is None
    said: Said = []
    execution(ladder, said).run()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > before and len(said) == 1


def test_two_tasks_share_a_ladder(tiny_store: Store, tmp_path: Path) -> None:
    path = write_ladder(
        tmp_path, tiny_store.path, budgets=[2e8], lr=[4e-3, 8e-3], max_cells=2, seeds=1, row=[16], sizes=1
    )
    command = [sys.executable, "-m", "train.cli", "scaling", "run", str(path), "--jobs", "1"]
    tasks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [line for task in tasks for line in task.communicate(timeout=120)[0].splitlines() if line.startswith("[")]
    assert [task.returncode for task in tasks] == [0, 0] and len(ends) == 2, ends
    assert len(read_rows(tmp_path / "ladder")) == 2


def test_a_cell_that_fails_is_named_and_the_others_run(
    tiny_store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_ladder(tmp_path, tiny_store.path, budgets=[2e8], max_cells=2, seeds=1, row=[16], sizes=1)
    cells = Cells(load_ladder(path))
    place = cells.place(Cell(2e8, 16, 8e-3, 256))
    place.mkdir(parents=True)
    (place / "run").write_text("in the way")
    assert main(["scaling", "run", str(path)]) == 2
    err = capfd.readouterr().err
    assert "cell c2e+08-d16-lr0.008-b256-s0: failed" in err and "log.txt" in err and err.count("\n") == 1
    assert len(read_rows(tmp_path / "ladder")) == 1
    os.remove(place / "run")
    assert main(["scaling", "run", str(path)]) == 0
    assert len(read_rows(tmp_path / "ladder")) == 2


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
