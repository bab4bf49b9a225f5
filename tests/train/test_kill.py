"""A run that is killed, or asked to stop, at any moment goes on from a complete checkpoint and ends as if nothing had been."""

import random
import signal
import time
from pathlib import Path

import pytest

from data.store import Store
from tests.small_run import STEPS, Run, assert_same_bits
from train.checkpoint import latest

KILLS = 10
OFTEN = ("checkpoint.every_steps=2", "checkpoint.keep=2")


def test_a_run_killed_at_ten_moments_ends_with_the_bits_of_one_that_was_not(tiny_store: Store, tmp_path: Path) -> None:
    """Every other kill waits for the temporary folder of a save, so that it hits the writing, the renaming or the marker."""
    changes = ("schedule.tokens=16384", "checkpoint.every_steps=3", "checkpoint.keep=2")  # 64 steps
    once, killed = Run(tiny_store, tmp_path / "once"), Run(tiny_store, tmp_path / "killed")
    assert once.train(*changes) == [0], once.said
    pick = random.Random(0)
    reached, hits = 0, 0
    for kill in range(KILLS):
        folder = killed.folder / "checkpoints"
        process, started = killed.start(*changes), time.time()
        if kill % 2:
            process.until(is_saving, folder, started)
            time.sleep(pick.uniform(0, 0.03))
        else:
            process.until(has_saved, folder, reached)
            time.sleep(pick.uniform(0, 0.05))
        process.send(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL], "the kills were meant to come before the end"
        hits += is_saving(folder, started)
        assert newest_step(folder) >= reached, "a complete checkpoint was lost"
        reached = newest_step(folder)
    assert reached >= KILLS
    assert hits >= 3, f"the kills were meant to hit saves, {hits} did"
    assert killed.train(*changes) == [0], killed.said
    assert f"continuing after step {reached} of 64" in killed.said
    assert_same_bits(killed.tensors(64), once.tensors(64))
    assert killed.metrics() == once.metrics()
    assert killed.checkpoints() == once.checkpoints() == ["step-00000063", "step-00000064"]


def test_when_one_of_two_ranks_is_killed_the_other_ends_and_both_continue(
    run: Run, tiny_store: Store, tmp_path: Path
) -> None:
    once = Run(tiny_store, tmp_path / "once")
    assert once.train(*OFTEN, processes=2) == [0, 0], once.said
    processes = run.start(*OFTEN, processes=2)
    processes.until(lambda: "step-00000004" in run.checkpoints())
    processes.send(signal.SIGKILL, rank=1)
    assert processes.wait() == [4, -signal.SIGKILL]
    assert run.train(*OFTEN, processes=2) == [0, 0], run.said
    assert_same_bits(run.tensors(), once.tensors())
    assert run.metrics() == once.metrics()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_where_to_continue(run: Run, whole: Run, number: signal.Signals) -> None:
    process = run.start()
    process.until(lambda: lines(run) >= 3)
    process.send(number)
    assert process.wait() == [0], run.said
    step = len(run.metrics())
    assert 3 <= step < STEPS
    assert run.checkpoints() == [f"step-{step:08d}"]
    where = run.folder / "checkpoints" / f"step-{step:08d}"
    last = run.said.splitlines()[-1]
    assert last == f"stopped at step {step} of {STEPS}; start the same command again to continue from {where}"
    assert run.train() == [0], run.said
    assert_same_bits(run.tensors(), whole.tensors())
    assert run.metrics() == whole.metrics()


@pytest.mark.parametrize("engine", ["ddp", "fsdp parallel.pipeline=2 parallel.micro_batch=4", "zero3"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(run: Run, engine: str) -> None:
    processes = run.start(*f"parallel.engine={engine}".split(), processes=2)
    processes.until(lambda: lines(run) >= 3)
    processes.send(signal.SIGUSR1, rank=1)
    assert processes.wait() == [0, 0], run.said
    step = len(run.metrics())
    assert 3 <= step < STEPS
    assert run.record(step)["step"] == step and run.record(step)["world_size"] == 2


def is_saving(folder: Path, since: float) -> bool:
    """Whether a save began after this time, which is not complete."""
    return any(path.stat().st_mtime > since for path in folder.glob(".step-*.tmp") if path.exists())


def has_saved(folder: Path, step: int) -> bool:
    return newest_step(folder) > step


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    newest = latest(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


def lines(run: Run) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
