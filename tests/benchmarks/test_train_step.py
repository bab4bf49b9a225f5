"""The comparison with `transformers` runs on a shape of a few thousand parameters and says what it promises."""

import json
import sys

import pytest

from model.flops import flops_mfu
from tests.benchmarks.commands import ROOT, command, run

BENCHMARKS = ROOT / "benchmarks"

MICRO = {
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "initializer_range": 0.1,
    },
    "batch": 2,
    "sequence_length": 16,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the program writes for the micro shape."""
    folder = tmp_path_factory.mktemp("train_step")
    (folder / "micro.json").write_text(json.dumps(MICRO))
    values = {"--shape": folder / "micro.json", "--json": folder / "out.json", "--profile": folder / "profile.png"}
    words = command(
        "train_step.py", {name: str(path) for name, path in values.items()}, "--pairs", "2", "--warmup", "1"
    )
    said = run(words, CUDA_VISIBLE_DEVICES="")
    assert (folder / "profile.png").exists()
    return json.loads((folder / "out.json").read_text()) | {"said": said}


def test_both_sides_start_from_the_same_loss(result):
    assert result["first_loss"]["ours"] == pytest.approx(result["first_loss"]["theirs"], abs=1e-4)


def test_the_ratios_are_those_of_the_figures_beside_them(result):
    peak, rate = result["peak_bytes"], result["tokens_per_second"]
    assert result["memory_ratio"] == pytest.approx(peak["ours"]["everything"] / peak["theirs"]["everything"])
    assert result["memory_ratio_without_state"] == pytest.approx(
        peak["ours"]["without_state"] / peak["theirs"]["without_state"]
    )
    low, high = result["speed_ratio_spread"]
    assert 0 < low <= result["speed_ratio"] <= high
    for side in ("ours", "theirs"):
        assert result["mfu"][side] == pytest.approx(rate[side] * result["flops_per_token"] / result["peak_flops"])


def test_mtp_is_timed_beside_the_plain_step_with_its_flops(result):
    """One module: its entry of 2·16² numbers, a MoE block, and the head again, over two blocks and the head."""
    mtp = result["mtp"]
    low, high = mtp["time_ratio_spread"]
    assert mtp["modules"] == 1 and 0 < low <= mtp["time_ratio"] <= high
    flops = mtp["flops_ratio"] * result["flops_per_token"]
    assert mtp["mfu"] == pytest.approx(mtp["tokens_per_second"] * flops / result["peak_flops"])


def test_every_operation_of_the_profile_belongs_to_one_class_of_work(result):
    classes = result["profile"]["classes"]
    assert sum(row["share"] for row in classes.values()) == pytest.approx(1)
    named = {
        "linear maps",
        "experts",
        "head",
        "attention",
        "norms",
        "gate and permutation",
        "swiglu",
        "clipping and optimizer",
        "rest",
    }
    assert named <= classes.keys()
    rate = result["peak_flops"] * classes["experts"]["of_the_peak"] * classes["experts"]["seconds"]
    assert rate == pytest.approx(6 * 3 * 16 * 8 * 2 * 32)  # 2 of 4 experts, [16 × 8] three times, 32 tokens


def test_the_last_lines_are_a_table_with_a_row_for_each(result):
    rows = [line for line in result["said"].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[-5:-1]] == [
        "| ours, recompute none",
        f"| transformers, {result['theirs_fastest']}",
        "| ours with 1 MTP",
        "| ours / transformers",
    ]


def test_every_implementation_of_transformers_was_tried(result):
    assert len(result["theirs_trials_seconds"]) == 6
    assert result["theirs_trials_seconds"][result["theirs_fastest"]] > 0


def test_every_shape_is_a_model_with_its_batch():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from contestants import Shape
    finally:
        sys.path.remove(str(BENCHMARKS))
    shapes = {path.stem: Shape.read(path) for path in (BENCHMARKS / "shapes").glob("*.json")}
    assert shapes.keys() >= {"reference", "wide", "narrow", "tiny", "small", "h100"}
    cost = {name: flops_mfu(shapes[name].config, 512) for name in ("reference", "wide", "narrow")}
    assert max(cost.values()) < 1.2 * min(cost.values())
    assert shapes["reference"].tokens == 2048
    assert all(shape.config.num_nextn_predict_layers == 0 for shape in shapes.values())
