"""A run that is asked to stop saves first, on all ranks, and goes on as if nothing had been."""

import signal
from itertools import count

import pytest

from tests.small_run import STEPS, Run, assert_same_bits
from train.config import load_recipe
from train.launch import process_group
from train.trainer import Trainer


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


@pytest.mark.parametrize("looks", [1, 2], ids=["before-tensors-are-read", "before-the-first-step"])
def test_a_signal_that_came_during_the_start_ends_the_run_before_its_first_step(run: Run, looks: int) -> None:
    roll_back = "spikes.action=roll_back"  # which saves before its first step
    assert run.start(roll_back, processes=2, work=train_asked_to_stop, extra=(looks,)).wait() == [0, 0], run.said
    assert (
        run.said.count("stopped before the first step: nothing was trained; start the same command again to begin") == 1
    )
    assert run.checkpoints() == []


def train_asked_to_stop(arguments: list[str], looks: int) -> int:
    """Train; the last rank has got a signal when it looks for the n-th time."""
    with process_group("cpu") as process:
        looked = count(1)
        is_last = process.rank == process.world_size - 1
        return Trainer(
            load_recipe(arguments[0], arguments[1:]), process, lambda: next(looked) >= looks and is_last
        ).run()


def lines(run: Run) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
