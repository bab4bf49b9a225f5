"""A gradient that is not finite, or a tensor that explodes in FP8, costs a step, never the run; if that stays so, the run ends with
what is needed to look at it."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.samples import Phase, Samples, StoreEntry
from data.store import Store
from tests.small_run import LENGTH, SEQUENCES, STEPS, Run
from train.config import load_recipe
from train.launch import process_group
from train.loggers import scalars
from train.trainer import DIVERGED, Trainer

PLANTED = "model.layers.1.mlp.gate.weight"
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep=8", "run.stop_at_step=8")


def train_with_nan(arguments: list[str], first: int, last: int) -> int:
    """Train with a NaN in one gradient of the last rank, in the steps numbered from `first` to `last`."""
    with process_group("cpu") as process:
        trainer = Trainer(load_recipe(arguments[0], arguments[1:]), process)
        if process.rank == process.world_size - 1:
            weight = dict(trainer.engine.model.named_parameters())[PLANTED]
            weight.register_hook(lambda g: g * math.nan if first <= trainer.step + 1 <= last else None)
        return trainer.run()


def train_with_nan_losses(arguments: list[str], step: int) -> int:
    """Train with a NaN as the loss of the last rank in one step, under any engine."""
    with process_group("cpu") as process:
        trainer = Trainer(load_recipe(arguments[0], arguments[1:]), process)
        engine: Any = trainer.engine
        backward = engine.backward

        def backward_of_nan(loss: Tensor, is_last: bool) -> None:
            is_poisoned = trainer.step + 1 == step and process.rank == process.world_size - 1
            backward(loss * math.nan if is_poisoned else loss, is_last)

        engine.backward = backward_of_nan
        return trainer.run()


def train_with_nan_activation(arguments: list[str], first: int, last: int) -> int:
    """Train with a NaN in what the last rank's `o_proj` of layer 1 reads, in the steps numbered from `first` to `last`."""
    with process_group("cpu") as process:
        trainer = Trainer(load_recipe(arguments[0], arguments[1:]), process)

        def poison(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            return (inputs[0] * math.nan,) if first <= trainer.step + 1 <= last else None

        if process.rank == process.world_size - 1:
            trainer.engine.model.main_layers[1].self_attn.o_proj.register_forward_pre_hook(poison)
        return trainer.run()


def train_from_large_norms(arguments: list[str]) -> int:
    """Train with the norm before layer 0's feed-forward network at 2,000: gate and up are large, their product explodes."""
    with process_group("cpu") as process:
        trainer = Trainer(load_recipe(arguments[0], arguments[1:]), process)
        with torch.no_grad():
            trainer.engine.model.main_layers[0].post_attention_layernorm.weight.fill_(2e3)
        return trainer.run()


@pytest.mark.parametrize(
    "layout",
    [
        "ddp",
        "fsdp parallel.expert=2",
        "zero2",
        "zero3",
        "ddp parallel.pipeline=2 parallel.schedule=zbv parallel.micro_batch=4",
    ],
)
def test_a_nan_on_one_of_two_ranks_costs_one_step_and_touches_nothing(run: Run, layout: str) -> None:
    changes = (*EVERY_STEP, *f"parallel.engine={layout}".split())
    # Layer 1 lies on the last pipeline rank alone, under a pipeline too.
    is_planted = layout.startswith("ddp")
    work, extra = (train_with_nan, (5, 5)) if is_planted else (train_with_nan_losses, (5,))
    processes = run.start(*changes, processes=2, work=work, extra=extra)
    assert processes.wait() == [0, 0], run.said
    metrics = run.metrics()
    assert [line["skipped"] for line in metrics] == [0] * 4 + [1] * 4
    assert [line["grad_norm"] is None for line in metrics] == [line["step"] == 5 for line in metrics]
    assert all(math.isfinite(line["loss"]) for line in metrics)
    before, after = run.tensors(4), run.tensors(5)
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # parameters, moments, biases, average, step count
        assert torch.equal(after[name], tensor), f"the skipped step changed {name}"
    moved = run.tensors(6)
    assert not torch.equal(moved[f"parameters.{PLANTED}"], after[f"parameters.{PLANTED}"])
    assert int(moved["steps"]) == 5
    assert run.record(5)["tokens"] == 5 * SEQUENCES * LENGTH  # its samples are consumed all the same
    assert run.record(5)["skipped"] == run.record(5)["skipped_in_a_row"] == 1
    assert run.record(8)["skipped"] == 1 and run.record(8)["skipped_in_a_row"] == 0


def test_skipped_steps_are_counted_over_starts(run: Run) -> None:
    assert run.start("run.stop_at_step=6", work=train_with_nan, extra=(5, 6)).wait() == [0], run.said
    assert f"stopped at step 6 of {STEPS} (2 of 6 steps skipped, see metrics.jsonl); raise" in run.said
    assert run.start(work=train_with_nan, extra=(7, 7)).wait() == [0], run.said
    assert f"finished at step {STEPS} (3 of {STEPS} steps skipped, see metrics.jsonl); checkpoint" in run.said
    assert [line["skipped"] for line in run.metrics()] == [0] * 4 + [1, 2, 3] + [3] * (STEPS - 7)


def test_a_nan_for_ever_ends_with_exit_code_3_and_the_evidence(run: Run, tiny_store: Store) -> None:
    changes = ("run.max_skipped=3", "parallel.micro_batch=3")
    processes = run.start(*changes, processes=2, work=train_with_nan, extra=(4, 10**6))
    assert processes.wait() == [DIVERGED] * 2, run.said
    last = run.said.splitlines()[-1]
    assert last.startswith(
        f"3 steps in a row had no finite gradient (first in {PLANTED}); batches and settings are in "
    )
    assert run.checkpoints() == ["step-00000006"]
    run.checkpoint(6)  # complete

    folder = run.folder / "non_finite" / "step-00000006"
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 6
    assert report["parameters_with_non_finite_gradients"] == [PLANTED]
    assert (run.folder / report["weights"]) == run.checkpoint(6)
    assert report["first_sample"] == 5 * SEQUENCES
    assert report["settings"]["batch"] == SEQUENCES
    samples = Samples([Phase(0, [StoreEntry(tiny_store.path)], LENGTH)], mtp_depth=1, seed=0)
    expected = samples.batch(report["first_sample"], SEQUENCES)
    saved = [load_file(folder / f"batches-rank{rank}.safetensors") for rank in range(2)]
    for name, tensor in expected._asdict().items():  # two ranks of 4 sequences, each in micro-batches of 3 and 1
        found = torch.cat([rank[f"{name}.{index}"] for rank in saved for index in range(2)])
        assert torch.equal(found, tensor), name

    again = run.start(*changes, processes=2, work=train_with_nan, extra=(4, 10**6))
    assert again.wait() == [DIVERGED] * 2, "still no finite gradient: the first step says so"
    assert len(run.metrics()) == 7
    assert run.train(*changes, processes=2) == [0, 0], run.said  # without the NaN the run goes on


def test_a_falling_loss_scale_is_no_divergence(run: Run) -> None:
    """fp16 starts at a scale of 65,536, and a gradient times that may overflow for as many steps as it takes."""
    scaled = ("precision.compute=fp16", "run.max_skipped=2", "run.stop_at_step=8")
    processes = run.start(*scaled, work=train_with_nan, extra=(2, 6))
    assert processes.wait() == [0], run.said
    state = run.tensors(8)
    assert float(state["loss_scale.scale"]) == 65536 / 2**5
    assert int(state["steps"]) == 3
    assert [line["skipped"] for line in run.metrics()] == [0, 1, 2, 3, 4, 5, 5, 5]


def test_in_fp8_an_activation_that_is_not_finite_costs_one_step_and_is_named(run: Run) -> None:
    changes = ("precision.fp8=true", "checkpoint.every_steps=1", "run.stop_at_step=3")
    processes = run.start(*changes, processes=2, work=train_with_nan_activation, extra=(2, 2))
    assert processes.wait() == [0, 0], run.said
    assert (
        run.said.count("step 2 exploded (model.layers.1.self_attn.o_proj input: scale not finite) and is skipped") == 1
    )
    metrics = run.metrics()
    assert [line["skipped"] for line in metrics] == [0, 1, 1]
    assert [line["fp8_max_scale"] is None for line in metrics] == [False, True, False]
    assert metrics[1]["fp8_max_scale_at"] == "model.layers.1.self_attn.o_proj input"
    assert set(metrics[0]) - {key.split("/")[0] for key in scalars(metrics[0])} == {"step", "fp8_max_scale_at"}, (
        "no curve"
    )
    before, after, moved = run.tensors(1), run.tensors(2), run.tensors(3)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not torch.equal(moved[f"parameters.{PLANTED}"], after[f"parameters.{PLANTED}"])


def test_in_fp8_a_tensor_that_stays_exploded_ends_with_exit_code_3_and_the_evidence(run: Run) -> None:
    """Every gradient is finite: without FP8 the run would go on."""
    changes = ("precision.fp8=true", "run.max_skipped=2")
    assert run.start(*changes, work=train_from_large_norms).wait() == [DIVERGED], run.said
    assert all(math.isfinite(line["grad_norm"]) for line in run.metrics())
    where = "model.layers.0.mlp.down_proj input"
    assert all(line["fp8_max_scale"] > 512 and line["fp8_max_scale_at"] == where for line in run.metrics())
    assert run.said.splitlines()[-1].startswith(f"2 steps in a row exploded ({where}: scale ")
    assert run.checkpoints() == ["step-00000002"]
    report = json.loads((run.folder / "non_finite" / "step-00000002" / "report.json").read_text())
    assert report["exploded"][0].startswith(f"{where}: scale ") and report["parameters_with_non_finite_gradients"] == []
    assert run.start(*changes, "precision.fp8_max_scale=1e6", "run.stop_at_step=3").wait() == [0], run.said
