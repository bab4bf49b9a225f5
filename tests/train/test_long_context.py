"""A run whose sequences grow beyond the original context of its YaRN: plain RoPE before, YaRN from there on."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.store import Store
from model.config import ConfigError, ModelConfig, YarnScaling
from model.transformer import Transformer
from tests.small_model import small_config, small_model
from tests.small_run import Run, assert_same_bits
from train.config import RecipeError, load_recipe
from train.evaluate import evaluate_source
from train.export import export
from train.first_weights import began_extended, check_start
from train.generate import generate, load_model
from train.weights import open_weights

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
CHANGES = (
    "model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 32, mscale: 1, mscale_all_dim: 1}",
    "model.max_position_embeddings=128",
    "data.stages=[{from_tokens: 1024, sequence_length: 64, micro_batch: 4}]",  # steps of 256 tokens: from the fifth on
    "schedule.tokens=1536",
    "evaluate.every_steps=4",
)


@pytest.fixture(scope="module")
def once(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps in one go, the last two behind the switch."""
    run = Run(tiny_store, tmp_path_factory.mktemp("once") / "run")
    assert run.train(*CHANGES, "checkpoint={every_steps: 1, keep: 9}") == [0], run.said
    return run


def test_a_run_is_plain_up_to_the_original_context_and_has_yarn_beyond_it(once: Run) -> None:
    for step, yarn, context in ((4, None, 32), (5, YARN, 128), (6, YARN, 128)):
        config = open_weights(once.checkpoint(step)).config
        assert (config.yarn, config.max_position_embeddings) == (yarn, context)
    assert [line["sequence_length"] for line in once.metrics()] == [32] * 4 + [64] * 2


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_run_goes_on_before_at_and_behind_the_switch_to_the_bit(
    once: Run, tiny_store: Store, tmp_path: Path, step: int
) -> None:
    again = Run(tiny_store, tmp_path / "run")
    shutil.copytree(once.folder, again.folder)
    for path in (again.folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    assert again.train(*CHANGES) == [0], again.said
    assert_same_bits(again.tensors(6), once.tensors(6))
    assert again.metrics() == once.metrics()
    assert again.record(6)["model"] == once.record(6)["model"]


def test_validation_windows_are_as_long_as_the_sequences_of_the_stage(once: Run, tiny_store: Store) -> None:
    """As `rorqual evaluate` finds them by itself."""
    for step, length in ((4, 32), (6, 64)):
        found = evaluate_source(once.checkpoint(step), tiny_store.path, None, 512).to_dict()["validation"]
        assert found == once.metrics()[step - 1]["validation"]
        assert all(result["tokens"] % length == 0 for result in found.values())


@torch.no_grad()
def test_transformers_reads_an_export_of_either_side_as_we_do(once: Run, tmp_path: Path) -> None:
    """On 64 tokens, where the rotation of the two differs."""
    tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = {}
    for step in (4, 6):
        model, _ = load_model(once.checkpoint(step))
        logits[step] = model.logits(model.decode(tokens, model.new_caches(2, 64)[:2]))
        export(once.checkpoint(step), tmp_path / str(step))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(step))
        assert theirs.config.rope_parameters["rope_type"] == ("default" if step == 4 else "yarn")
        assert theirs.config.max_position_embeddings == (32 if step == 4 else 128)
        assert (theirs(tokens).logits - logits[step]).abs().max() <= 1e-5
    model, _ = load_model(once.checkpoint(4))
    model.set_positions(open_weights(once.checkpoint(6)).config)
    extended = model.logits(model.decode(tokens, model.new_caches(2, 64)[:2]))
    assert (extended - logits[4]).abs().max() > 0.01
    plain, _ = load_model(once.checkpoint(4))
    with pytest.raises(ConfigError, match="outgrows the context, max_position_embeddings = 32"):
        generate(plain, tokens[:1, :32], 1)


def test_extended_weights_stay_extended_on_short_sequences(once: Run, tiny_store: Store, tmp_path: Path) -> None:
    """V3 trained on at 4K after its extension; a run that goes on with it knows."""
    short = Run(tiny_store, tmp_path / "run")
    start = (*CHANGES[:2], f"run.initialize_from={once.folder}")
    assert short.train(*start, "run.stop_at_step=1") == [0], short.said
    record = short.record(1)
    assert ModelConfig.from_hf(record["model"]).yarn == YARN
    assert began_extended(load_recipe(short.folder / "recipe.yaml"), record)


def test_extended_weights_are_refused_by_a_model_without_their_yarn() -> None:
    extended = small_config(rope_scaling=YARN)
    with pytest.raises(RecipeError, match=r"by a factor of 4, and the model has none; .* write model\.rope_scaling='{"):
        check_start(small_config(), extended, "runs/long")
    with pytest.raises(RecipeError, match="the model has another; "):
        check_start(extended.override({"rope_scaling": YarnScaling(2.0, 32)}), extended, "runs/long")
    check_start(extended, small_config(), "runs/short")


@torch.no_grad()
def test_the_model_on_both_sides_of_the_switch_is_a_fresh_one_of_its_config() -> None:
    config = small_config(rope_scaling=YARN)
    model = small_model(rope_scaling=YARN)
    tokens = torch.randint(0, 96, (2, 66), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    seen = []
    for length in (32, 64, 16):
        fresh = Transformer(config.at_length(length))
        fresh.load_state_dict(model.state_dict())
        model.set_positions(config.at_length(length))
        found, expected = model(tokens, documents).losses, fresh(tokens, documents).losses
        assert torch.equal(found.main, expected.main) and torch.equal(found.mtp, expected.mtp)
        assert torch.equal(*(m.decode(tokens, m.new_caches(2, 66)[:3]) for m in (model, fresh)))
        seen.append(float(found.main))
    assert seen[0] == seen[2] != seen[1]
