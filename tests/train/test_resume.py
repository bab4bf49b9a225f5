"""A run that ended early continues as if it had not: the same bits on the same processes, the same losses on others."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from data.store import Store
from tests.small_run import LENGTH, SEQUENCES, STEPS, Run, assert_same_bits

ACCUMULATED = ("parallel.micro_batch=3", "precision.moments=bf16", "checkpoint.asynchronous=false")
SCALED = ("precision.compute=fp16", "parallel.recompute=selective", "schedule.tokens=2048")  # 8 steps: slow on a CPU


@pytest.mark.parametrize(
    ("changes", "steps"),
    [((), 20), (ACCUMULATED, 20), (SCALED, 8)],
    ids=["fp32", "accumulated-bf16-moments-sync", "fp16"],
)
def test_half_the_steps_and_half_in_a_new_process_are_all_in_one_to_the_bit(
    tiny_store: Store, tmp_path: Path, whole: Run, changes: tuple[str, ...], steps: int
) -> None:
    """Parameters, moments, expert biases, average of the weights, step count, loss scale, every number of the metrics."""
    once, twice = Run(tiny_store, tmp_path / "once") if changes else whole, Run(tiny_store, tmp_path / "twice")
    if changes:
        assert once.train(*changes) == [0], once.said
    assert twice.train(*changes, f"run.stop_at_step={steps // 2}") == [0], twice.said
    assert f"stopped at step {steps // 2} of {steps}; raise run.stop_at_step to continue" in twice.said
    assert twice.train(*changes) == [0], twice.said
    assert f"continuing after step {steps // 2} of {steps}" in twice.said
    assert_same_bits(twice.tensors(steps), once.tensors(steps))
    assert twice.metrics() == once.metrics()
    for key in (
        "step",
        "tokens",
        "samples",
        "samples_by_source",
        "tokens_by_source",
        "data_sections",
        "read",
        "skipped",
    ):
        assert twice.record(steps)[key] == once.record(steps)[key], key


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (4, ("parallel.engine=ddp",)),
        (4, ("parallel.engine=fsdp", "parallel.expert=2", "precision.moments=bf16")),
        (2, ("parallel.engine=zero1", "precision.moments=bf16")),
        pytest.param(
            *(4, ("parallel.engine=zero2", "parallel.expert=2", "precision.moments=bf16")), marks=pytest.mark.slow
        ),
        (2, ("parallel.engine=zero3", "parallel.offload=all")),
    ],
    ids=[
        "ddp@4",
        "fsdp+expert@4-bf16-moments",
        "zero1@2-bf16-moments",
        "zero2+expert@4-bf16-moments",
        "zero3+offload@2",
    ],
)
def test_several_processes_continue_to_the_bit_too(
    tiny_store: Store, tmp_path: Path, processes: int, layout: tuple[str, ...]
) -> None:
    """From the checkpoint half-way, as if the run had ended there.

    From three ranks on, a sum over ranks depends on its order, which must not depend on when the process started.
    """
    half = ("checkpoint.every_steps=2", "evaluate.tokens=64")
    changes = ("parallel.micro_batch=1", "schedule.tokens=1024", *half, *layout)  # 4 steps
    once, twice = Run(tiny_store, tmp_path / "once"), Run(tiny_store, tmp_path / "twice")
    assert once.train(*changes, processes=processes) == [0] * processes, once.said
    shutil.copytree(once.folder, twice.folder)
    shutil.rmtree(twice.checkpoint(4))
    assert twice.train(*changes, processes=processes) == [0] * processes, twice.said
    assert "continuing after step 2 of 4" in twice.said
    assert_same_bits(twice.tensors(4), once.tensors(4))
    assert twice.metrics() == once.metrics()


def test_what_two_processes_wrote_one_and_four_continue(tiny_store: Store, tmp_path: Path, whole: Run) -> None:
    """Losses within 1e-5 of the run that never stopped: each batch has another loss, so these are the same samples too."""
    expected, two = whole.metrics(), Run(tiny_store, tmp_path / "two")
    assert two.train("run.stop_at_step=6", processes=2) == [0, 0], two.said
    for processes in (1, 4):
        moved = Run(tiny_store, tmp_path / f"moved-{processes}")
        shutil.copytree(two.folder, moved.folder)
        assert moved.train("run.stop_at_step=12", processes=processes) == [0] * processes, moved.said
        found = moved.metrics()
        assert [line["step"] for line in found] == list(range(1, 13))
        for line, same in zip(found, expected):
            for loss, reference in zip([line["loss"], *line["mtp_loss"]], [same["loss"], *same["mtp_loss"]]):
                assert math.isclose(loss, reference, rel_tol=1e-5), (processes, line["step"], loss, reference)
        record = moved.record(12)
        assert record["samples"] == 12 * SEQUENCES == record["tokens"] // LENGTH
        assert sum(record["samples_by_source"].values()) == record["samples"]
        assert record["world_size"] == processes


def test_a_run_in_stages_goes_on_wherever_it_stopped(tiny_store: Store, tmp_path: Path) -> None:
    """Windows of 32, then packed rows of 64 and other weights: stopped before and behind the change, on one process and on two."""
    train = f"[{{path: {tiny_store.path}, weight: 2}}]"
    stage = f"{{from_tokens: 1000, train: {train}, sequence_length: 64, packing: best_fit, micro_batch: 1}}"
    changes = ("schedule.tokens=2048", f"data.stages=[{stage}]", "parallel.micro_batch=2", "data.workers=2")
    once, moved = Run(tiny_store, tmp_path / "once"), Run(tiny_store, tmp_path / "moved")
    assert once.train(*changes) == [0], once.said
    for stop, processes in ((3, 2), (6, 1), (8, 2)):
        assert moved.train(*changes, f"run.stop_at_step={stop}", processes=processes) == [0] * processes, moved.said
    lines = list(zip(moved.metrics(), once.metrics(), strict=True))
    assert [line["sequence_length"] for line, _ in lines] == [32] * 4 + [
        64
    ] * 4  # steps of 256 tokens: from the fifth on
    for line, same in lines:
        assert math.isclose(line["loss"], same["loss"], rel_tol=1e-5), line["step"]
        for key in ("tokens", "tokens_by_source", "batch_tokens"):
            assert line[key] == same[key]
        assert sum(line["tokens_by_source"].values()) == line["tokens"]
    for key in ("tokens", "samples", "samples_by_source", "tokens_by_source", "data_sections", "read"):
        assert moved.record(8)[key] == once.record(8)[key], key
    assert [section["from_sample"] for section in once.record(8)["data_sections"]] == [0, 32]
    assert once.record(8)["samples"] == 4 * 8 + 4 * 4


def test_a_finished_run_is_left_as_it_is(tiny_store: Store, tmp_path: Path) -> None:
    run = Run(tiny_store, tmp_path / "run")
    assert run.train("run.stop_at_step=4") == [0]
    before = run.tensors(4), run.metrics()
    for stop in (4, 2):  # there, and beyond it
        assert run.train(f"run.stop_at_step={stop}") == [0]
        assert run.checkpoints() == ["step-00000004"]
        assert_same_bits(run.tensors(4), before[0])
        assert run.metrics() == before[1]


def test_a_run_grows_with_its_recipe(tiny_store: Store, tmp_path: Path) -> None:
    """Half the batch for four steps, then the whole one: the end is where the tokens are, not where a step count was."""
    run = Run(tiny_store, tmp_path / "run")
    tokens = 10 * SEQUENCES * LENGTH
    half = SEQUENCES * LENGTH // 2
    assert run.train(f"schedule.tokens={tokens}", f"schedule.batch_tokens={half}", "run.stop_at_step=4") == [0]
    assert run.train(f"schedule.tokens={tokens}") == [0], run.said
    assert run.record(12)["tokens"] == tokens  # 4 · half + 8 · whole = 10 · whole
    assert "finished at step 12" in run.said


def test_the_average_of_the_weights_is_in_the_checkpoint(whole: Run) -> None:
    state = whole.tensors()
    names = {name.removeprefix("ema.") for name in state if name.startswith("ema.")}
    assert names == {name.removeprefix("parameters.") for name in state if name.startswith("parameters.")}
    ratio = [
        float((state[f"ema.{name}"] - state[f"parameters.{name}"]).norm() / state[f"parameters.{name}"].norm())
        for name in names
    ]
    assert 0 < max(ratio) < 1  # the average lags behind weights that move
    assert int(state["steps"]) == STEPS and state["loss_scale.scale"] == torch.tensor(1.0)
