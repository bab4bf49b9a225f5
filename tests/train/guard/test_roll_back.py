"""Noise in a store makes a loss stand out: it is told from which document it came, and the step is skipped, or undone for good."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.foreign import ForeignSource, import_store
from data.indexed import write_indexed
from data.store import Store
from data.tokenizer import eos_token_id
from tests.small_run import LENGTH, SEQUENCES, Run, assert_same_bits
from train.cli import main
from train.config import load_recipe
from train.guard import judge
from train.guard.incidents import Incident, read_incidents, write_incident
from train.launch import process_group
from train.trainer import DIVERGED, Trainer

STEPS = 40
NOISE = (37, 92)  # documents of the store
GIVEN = (
    f"schedule.tokens={STEPS * SEQUENCES * LENGTH}",
    "parallel.micro_batch=4",
    "spikes.window=8",
    "spikes.threshold=6",
    "checkpoint.every_steps=8",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="session")
def planted(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose documents count up from some number, but for two, which are noise."""
    folder = tmp_path_factory.mktemp("planted")
    chance, end = np.random.default_rng(0), eos_token_id(tiny_store.tokenizer_folder)
    documents = [np.append((np.arange(63) + number) % 64 + 100, end) for number in range(200)]
    for number in NOISE:
        documents[number][:-1] = chance.integers(300, 500, 63)
    write_indexed(folder / "text", documents, np.dtype(np.uint16))
    source = ForeignSource("text", [folder / "text.bin"])
    return import_store([source], tiny_store.tokenizer_folder, folder / "store", validation=0.1).path


@pytest.fixture(scope="session")
def rolled_back(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two processes that has rolled back from the noise, twice. It is not to be changed."""
    run = Run(planted, tmp_path_factory.mktemp("rolled_back") / "run")
    assert run.train(*GIVEN, "spikes.action=roll_back", processes=2) == [0, 0], run.said
    return run


def noise_in(run: Run) -> list[int]:
    """Documents that the run's incidents blame."""
    return [
        document["number"]
        for incident in read_incidents(run.folder)
        for document in (incident.located or {})["documents"]
    ]


def kill_after_incident(arguments: list[str], number: int) -> int:
    """Train, and die when the record of the run's n-th incident has just been written."""

    def write_and_die(run: Path, incident: Incident) -> None:
        write_incident(run, incident)
        if len(read_incidents(run)) == number and incident.passed_over:
            os.kill(os.getpid(), signal.SIGKILL)

    judge.write_incident = write_and_die
    return main(["train", *arguments])


def train_with_nan(arguments: list[str], first: int, last: int) -> int:
    """Train with a NaN in what `o_proj` of layer 1 reads, in the steps numbered from `first` to `last`."""
    with process_group("cpu") as process:
        trainer = Trainer(load_recipe(arguments[0], arguments[1:]), process)

        def poison(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            # While a step is launched it is not counted yet; in a replay it is.
            is_step = first <= trainer.step + torch.is_grad_enabled() <= last
            return (inputs[0] * math.nan,) if is_step else None

        for block in trainer.engine.model.main_layers:
            if "layers.1" in str(getattr(block, "name", "")) or block is trainer.engine.model.main_layers[-1]:
                block.self_attn.o_proj.register_forward_pre_hook(poison)
        return trainer.run()


def test_told_noise_changes_nothing_but_the_log(planted: Path, tmp_path: Path) -> None:
    run = Run(planted, tmp_path / "run")
    assert run.train(*GIVEN) == [0], run.said
    assert noise_in(run) == list(NOISE)
    for number in NOISE:
        assert f"its document {number} has " in run.said
        assert f": rorqual data inspect {planted} --document {number}" in run.said
    assert run.metrics()[-1]["skipped"] == 0
    assert math.isfinite(run.metrics()[-1]["loss_limit"])


def test_a_skipped_step_of_noise_updates_nothing(planted: Path, tmp_path: Path) -> None:
    run = Run(planted, tmp_path / "run")
    changes = (*GIVEN, "spikes.action=skip", "checkpoint.every_steps=1", "checkpoint.keep=99")
    assert run.train(*changes, processes=2) == [0, 0], run.said
    assert noise_in(run) == list(NOISE)
    for incident in read_incidents(run.folder):
        assert f"step {incident.step} {incident.reason} and is skipped: 1 of 8 sequences" in run.said
        assert_same_bits(run.tensors(incident.step), run.tensors(incident.step - 1))
        assert run.record(incident.step)["samples"] == incident.step * SEQUENCES
    assert run.metrics()[-1]["skipped"] == len(NOISE)


def test_a_run_that_rolled_back_passes_over_the_noise(rolled_back: Run) -> None:
    incidents = read_incidents(rolled_back.folder)
    assert [incident.passed_over is not None for incident in incidents] == [True, True]
    assert noise_in(rolled_back) == list(NOISE)
    for incident in incidents:
        assert incident.passed_over == (incident.first_sample, incident.first_sample + SEQUENCES - 1)
        assert f"rolling back from step {incident.step}; samples {incident.first_sample} to " in rolled_back.said
    metrics = rolled_back.metrics()
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1)) and metrics[-1]["skipped"] == 0
    record = rolled_back.record(STEPS)
    assert record["recipe"]["data"]["passed_over"] == [list(incident.passed_over or ()) for incident in incidents]
    assert record["samples"] == (STEPS + len(NOISE)) * SEQUENCES, "read, though not trained on"
    assert record["tokens"] == STEPS * SEQUENCES * LENGTH


def test_the_recipe_of_a_run_that_rolled_back_gives_the_same_run(rolled_back: Run, tmp_path: Path) -> None:
    fresh = Run(rolled_back.store, tmp_path / "fresh")
    recipe = str(rolled_back.folder / "recipe.yaml")
    fresh.arguments = lambda *changes: [recipe, f"run.dir={fresh.folder}", *changes]  # type: ignore[method-assign]
    assert fresh.train(processes=2) == [0, 0], fresh.said
    assert "rolling back" not in fresh.said
    assert fresh.metrics() == rolled_back.metrics()
    assert_same_bits(fresh.tensors(STEPS), rolled_back.tensors(STEPS))


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_is_killed_while_it_rolls_back_ends_the_same(rolled_back: Run, tmp_path: Path, number: int) -> None:
    killed = Run(rolled_back.store, tmp_path / "killed")
    changes = (*GIVEN, "spikes.action=roll_back")
    started = killed.start(*changes, processes=2, work=kill_after_incident, extra=(number,))
    started.until(lambda: not started.ranks[0].is_alive())
    started.send(signal.SIGKILL)
    started.wait()
    assert len(read_incidents(killed.folder)) == number
    assert killed.train(*changes, processes=2) == [0, 0], killed.said
    assert killed.metrics() == rolled_back.metrics()
    assert_same_bits(killed.tensors(STEPS), rolled_back.tensors(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "fsdp",
        "fsdp parallel.expert=2",
        "zero2",
        "ddp parallel.context=2",
        "ddp parallel.pipeline=2 parallel.schedule=zbv parallel.micro_batch=2",
        "ddp parallel.pipeline=2 parallel.micro_batch=2",
    ],
)
def test_under_every_layout_the_same_noise_is_passed_over(rolled_back: Run, tmp_path: Path, layout: str) -> None:
    run = Run(rolled_back.store, tmp_path / "run")
    changes = (*GIVEN, "spikes.action=roll_back", *f"parallel.engine={layout}".split())
    assert run.train(*changes, processes=2) == [0, 0], run.said
    assert noise_in(run) == list(NOISE)
    passed_over = [[one.passed_over for one in read_incidents(each.folder)] for each in (run, rolled_back)]
    assert passed_over[0] == passed_over[1]
    for found, expected in zip(run.metrics(), rolled_back.metrics(), strict=True):
        assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-3), found["step"]


def test_what_is_not_finite_is_located_and_after_some_roll_backs_the_run_ends(planted: Path, tmp_path: Path) -> None:
    """No text is to blame here: the run rolls back as often as it may, to the checkpoint of step 0, and then gives up."""
    run = Run(planted, tmp_path / "run")
    changes = (*GIVEN, "spikes.action=roll_back", "run.max_skipped=2", "spikes.most_roll_backs=2")
    assert run.start(*changes, processes=2, work=train_with_nan, extra=(4, 99)).wait() == [DIVERGED] * 2, run.said
    assert run.said.count("step 4 had no finite gradient") == 3
    assert "8 of 8 sequences (samples 24, 25, 26, 27, …" in run.said
    assert "; first not finite: output of model.layers.1.self_attn.o_proj" in run.said
    assert [one.passed_over for one in read_incidents(run.folder) if one.passed_over] == [(24, 39), (40, 55)]
    last = run.said.splitlines()[-1]
    assert last.startswith("2 steps in a row had no finite gradient (first in ")
    assert "and the run has rolled back here 2 times (spikes.most_roll_backs); batches and settings are in" in last
    assert "step-00000000" in run.checkpoints()


def test_a_run_whose_data_has_no_more_to_give_skips_instead_of_rolling_back(planted: Path, tmp_path: Path) -> None:
    """A roll back that was put down and cannot be gone on from would end every start that follows."""
    run, text = Run(planted, tmp_path / "run"), Store.open(planted)
    steps = text.manifest.splits["train"].tokens // (LENGTH * SEQUENCES) - 1
    changes = (
        *GIVEN, "spikes.action=roll_back", f"schedule.tokens={steps * SEQUENCES * LENGTH}",
        f"data.train=[{{path: {planted}, max_epochs: 1}}]",
    )  # fmt: skip
    assert run.train(*changes) == [0], run.said
    assert "is skipped and nothing is passed over: data.train: " in run.said and "raise max_epochs" in run.said
    assert run.metrics()[-1]["step"] == steps and run.metrics()[-1]["skipped"] > 0
    assert run.record(steps)["recipe"]["data"]["passed_over"] == []


def test_a_step_is_replayed_once_in_a_window(planted: Path, tmp_path: Path) -> None:
    run = Run(planted, tmp_path / "run")
    changes = ("spikes.window=12", "spikes.threshold=3")
    assert run.train(*GIVEN, *changes) == [0], run.said
    first, second = read_incidents(run.folder)
    assert first.located is not None and second.located is None
    assert f"step {second.step} {second.reason}; not replayed, so soon after step {first.step}\n" in run.said


def test_what_has_been_consumed_cannot_be_passed_over(rolled_back: Run) -> None:
    assert rolled_back.train(*GIVEN, "data.passed_over=[[0, 7]]") == [2]
    assert rolled_back.said.startswith("rorqual: data.passed_over = [[0, 7], [")
    assert f"has consumed {(STEPS + len(NOISE)) * SEQUENCES:,} samples without [[" in rolled_back.said
    assert "what has been consumed stays" in rolled_back.said
