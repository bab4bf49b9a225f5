"""A run that is asked to stop saves first, on all ranks, and goes on as if nothing had been."""

import signal

import pytest

from tests.small_run import STEPS, Run, assert_same_bits


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


def lines(run: Run) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
