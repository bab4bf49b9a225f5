"""What a run leaves behind says what it did: metrics, validation, samples, checkpoints to start others from."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.store import Store
from data.validation import validation_batches
from model.transformer import Transformer
from tests.small_model import small_config
from tests.small_run import LENGTH, SEQUENCES, STEPS, Run, assert_same_bits
from tests.workers import Workers
from train.config import RecipeError
from train.evaluate import Evaluation, evaluate
from train.export import export, import_folder
from train.first_weights import check_start
from train.generate import load_model

EVERY_STEP = {
    "step", "tokens", "tokens_by_source", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "gamma", "alpha", "lambda",
    "batch_tokens", "sequence_length", "tokens_per_second", "data_seconds", "mfu", "memory_bytes", "skipped", "max_vio",
    "max_vio_mean", "max_vio_worst", "max_vio_worst_layer", "bias_min", "bias_max",
}  # fmt: skip


def test_metrics_have_an_object_a_step_with_every_key(whole: Run) -> None:
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [step * SEQUENCES * LENGTH for step in range(1, STEPS + 1)]
    assert all(line.keys() == EVERY_STEP for line in lines[:-1])
    assert lines[-1].keys() == EVERY_STEP | {"validation", "validation_max_vio"}
    for source in ("verse", "code"):
        assert {"nats_per_token", "bits_per_byte"} <= lines[-1]["validation"][source].keys()
    first, last = lines[0], lines[-1]
    assert abs(first["loss"] - math.log(512)) < 0.5 and last["loss"] < first["loss"] - 2, "it learns"
    assert len(first["mtp_loss"]) == 1 and len(first["max_vio"]) == 2
    assert first["lr"] == pytest.approx(1e-2 / 4) and lines[3]["lr"] == pytest.approx(1e-2)
    assert 0 <= first["data_seconds"] < first["batch_tokens"] / first["tokens_per_second"]
    assert all(sum(line["tokens_by_source"].values()) == line["tokens"] for line in lines)
    assert first["tokens_per_second"] > 0 and 0 < first["mfu"] < 1 and first["memory_bytes"] > 1e8


def test_validation_is_the_models_cross_entropy_on_the_validation_text(whole: Run, tiny_store: Store) -> None:
    """Recomputed from the checkpoint with F.cross_entropy over full logits, the text decoded for its bytes."""
    model, tokenizer = load_model(whole.checkpoint())
    found = whole.metrics()[-1]["validation"]
    for source in ("verse", "code"):
        nats, hits, targets, size = 0.0, 0, 0, 0
        for name, batch in validation_batches(tiny_store, LENGTH, 1, 8, 512):
            if name != source:
                continue
            logits = logits_of(model, batch.tokens, batch.documents)
            labels = batch.tokens[:, 1 : LENGTH + 1]
            nats += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            hits += int((logits.argmax(-1) == labels).sum())
            targets += labels.numel()
            size += sum(len(tokenizer.decode(row, skip_special_tokens=True).encode("utf-8")) for row in labels)
        assert found[source]["tokens"] == targets == 256
        assert found[source]["nats_per_token"] == pytest.approx(nats / targets, rel=1e-5)
        assert found[source]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found[source]["accuracy"][0] == pytest.approx(hits / targets, abs=1e-9)


@torch.no_grad()
def logits_of(model: Transformer, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    hidden, _ = model.hidden_states(tokens, documents)
    return model.lm_head(hidden[0]).float()


def evaluate_ranks(checkpoint: Path, store: Path, batch: int) -> Evaluation:
    """`evaluate` as a rank of the current group."""
    model, _ = load_model(checkpoint)
    opened = Store.open(store)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = validation_batches(opened, LENGTH, 1, batch, 512, rank, size)
    return evaluate(model, batches, torch.from_numpy(opened.token_bytes()))


def test_evaluation_is_the_same_on_one_and_two_processes(workers: Workers, whole: Run, tiny_store: Store) -> None:
    expected = whole.metrics()[-1]
    for size, batch in ((1, 8), (2, 3)):  # 8 windows a source: 2 ranks get 4 each, in batches of 3 and 1
        for evaluation in workers.run(size, evaluate_ranks, whole.checkpoint(), tiny_store.path, batch):
            found = evaluation.to_dict()
            assert found["validation_max_vio"] == expected["validation_max_vio"]
            for source, result in expected["validation"].items():
                for key, value in result.items():
                    assert found["validation"][source][key] == pytest.approx(value, rel=1e-6), (size, source, key)


def test_samples_and_tensorboard_files_appear_when_asked_for(run: Run) -> None:
    asked = ("evaluate.every_steps=3", 'evaluate.sample_prompts=["The whale", "def "]', "logging.tensorboard=true")
    assert run.train(*asked, "run.stop_at_step=5") == [0], run.said
    sample = (run.folder / "samples" / "step-00000003.txt").read_text("utf-8")
    assert sample.startswith("The whale") and "\ndef " in sample
    assert [line["step"] for line in run.metrics() if "validation" in line] == [3]
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"loss", "mtp_loss/0", "validation/verse/bits_per_byte"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_run_keeps_its_recipe_and_asks_for_nothing_else(whole: Run) -> None:
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        ".lock", "checkpoints", "metrics.jsonl", "recipe.yaml", "tokenizer",
    ]  # fmt: skip
    from train.config import load_recipe

    assert load_recipe(whole.folder / "recipe.yaml") == load_recipe(whole.arguments()[0], whole.arguments()[1:])


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "imported"])
def test_a_run_starts_from_the_weights_it_is_given(whole: Run, run: Run, tmp_path: Path, kind: str) -> None:
    """A first step at a learning rate of almost nothing leaves them as they are."""
    source = {"run": whole.folder, "checkpoint": whole.checkpoint()}.get(kind, tmp_path / "exported")
    if kind in ("exported", "imported"):
        export(whole.checkpoint(), tmp_path / "exported", dtype="fp32", mtp=True)
    if kind == "imported":
        source = tmp_path / "imported"
        import_folder(tmp_path / "exported", source)
    still = ("schedule.lr=1e-30", "schedule.gamma=0", "run.stop_at_step=1", f"run.initialize_from={source}")
    assert run.train(*still) == [0], run.said
    found, expected = run.tensors(1), whole.tensors()
    for section in ("parameters.", "buffers."):
        assert_same_bits(
            {name: tensor for name, tensor in found.items() if name.startswith(section)},
            {name: tensor for name, tensor in expected.items() if name.startswith(section)},
        )
    assert run.metrics()[0]["loss"] < whole.metrics()[0]["loss"] - 2


def test_weights_of_another_shape_are_refused_by_name(whole: Run, run: Run) -> None:
    assert run.train("model.kv_lora_rank=24", f"run.initialize_from={whole.folder}") == [2]
    assert "kv_a_proj_with_mqa.weight [32, 32] is [24, 32] there" in run.said and run.said.count("\n") == 1


@pytest.mark.parametrize(
    ("depths", "fix"),
    [
        (0, "export with --mtp, or set model.num_nextn_predict_layers=0"),
        (1, "set model.num_nextn_predict_layers=1"),
    ],
)
def test_weights_without_the_models_mtp_layers_say_how_to_have_them(depths: int, fix: str) -> None:
    config = small_config(num_nextn_predict_layers=depths + 1)
    with pytest.raises(RecipeError, match=rf"model\.layers\.{3 + depths}\.\S+ \[.*\] is not there; .*; {fix}$"):
        check_start(config, small_config(num_nextn_predict_layers=depths), "hf")


def test_a_run_in_progress_needs_its_first_weights_no_more(whole: Run, run: Run, tmp_path: Path) -> None:
    assert run.train(f"run.initialize_from={whole.folder}", "run.stop_at_step=1") == [0]
    assert run.train(f"run.initialize_from={tmp_path / 'gone'}", "run.stop_at_step=2") == [0], run.said
