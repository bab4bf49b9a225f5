"""The exact counts against the real module: parameters on the meta device, FLOPs as PyTorch counts them."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, load_preset
from model.flops import (
    TRAINING,
    flops_mfu,
    flops_scaling,
    flops_training,
    parameter_counts,
)
from model.transformer import Transformer


def preset(name, **changes):
    return ModelConfig.from_hf(load_preset(name)).override(changes)


def module_on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


# parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "small", "v2-lite", "v3"])
def test_the_counts_are_those_of_the_real_module(name):
    config = preset(name)
    counts = parameter_counts(config)
    module = module_on_meta(config)
    assert sum(p.numel() for p in module.parameters()) == counts.trainable
    assert sum(b.numel() for b in module.buffers()) == counts.expert_biases
    mtp = [t for layer in module.mtp_layers for t in (*layer.parameters(), *layer.buffers())]
    assert sum(t.numel() for t in mtp) == counts.mtp
    without = module_on_meta(preset(name, num_nextn_predict_layers=0))
    assert sum(t.numel() for t in (*without.parameters(), *without.buffers())) == counts.total


@pytest.mark.parametrize(
    "changes", [{"q_lora_rank": None}, {"first_k_dense_replace": 3}, {"num_nextn_predict_layers": 3}]
)
def test_the_counts_hold_for_other_shapes(make_config, changes):
    config = make_config(**changes)
    assert sum(p.numel() for p in module_on_meta(config).parameters()) == parameter_counts(config).trainable


def test_v3_has_the_published_counts():
    counts = parameter_counts(preset("v3"))
    assert counts.total == 671_026_419_200  # with the 58 · 256 expert biases, without MTP
    assert counts.total - 58 * 256 == 671_026_404_352
    assert counts.active == pytest.approx(36.63e9, abs=0.005e9)
    assert counts.mtp == pytest.approx(11.61e9, abs=0.005e9)


def test_v2_lite_has_the_published_counts_and_the_biases_of_v3_gating():
    counts = parameter_counts(preset("v2-lite"))
    assert counts.total == 15_706_484_224 + 26 * 64
    assert counts.active == pytest.approx(2.45e9, abs=0.005e9)


def test_small_is_a_hundred_to_two_hundred_million():
    assert 100e6 < parameter_counts(preset("small")).trainable < 200e6


# FLOPs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [0, 2])
@pytest.mark.parametrize("q_lora_rank", [28, None])
def test_the_flops_are_those_that_pytorch_counts(make_model, depths, q_lora_rank):
    model = make_model(
        {"attention": "reference", "experts": "reference"}, num_nextn_predict_layers=depths, q_lora_rank=q_lora_rank
    )
    rows, length = 2, 16
    tokens = torch.randint(0, 96, (rows, length + 1 + depths))
    # the head's gradient is added in place, by operations that the counter does not know
    in_place = {
        torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: 2 * a[0] * a[1] * b[1],
        torch.ops.rorqual.head_with_loss: lambda h, w, *_, out_shape=None, **__: TRAINING * h[0] * w[0] * w[1],
    }
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        losses = model(tokens, torch.zeros_like(tokens)).losses
        losses.objective(losses.counts, rows, 0.3, 1e-4).backward()
    # the reference computes all T keys of a query; causal attention at twice the length has as many
    assert counter.get_total_flops() == rows * length * flops_mfu(model.config, 2 * length)


def test_scaling_flops_are_those_of_mfu_without_head_and_mtp_and_with_full_attention(make_config):
    config = make_config(num_nextn_predict_layers=0)
    head = TRAINING * config.vocab_size * config.hidden_size
    assert flops_scaling(config, 100) == flops_mfu(config, 200) - head
    assert flops_training(config, 100) == flops_scaling(config, 100) + head
    assert flops_scaling(make_config(num_nextn_predict_layers=2), 100) == flops_scaling(config, 100)


def test_v3_at_4096_tokens():
    config, gate = preset("v3"), TRAINING * 256 * 7168
    # the published figures leave out the gates
    assert flops_mfu(config, 4096) - 59 * gate == pytest.approx(260.0e9, abs=0.05e9)
    without = preset("v3", num_nextn_predict_layers=0)
    assert flops_mfu(without, 4096) - 58 * gate == pytest.approx(249.8e9, abs=0.05e9)


def published_scales():
    table = Path(__file__).parents[3] / "shared" / "scaling_data" / "published_tables" / "deepseek_llm_table3_flops.csv"
    if not table.is_file():
        pytest.skip("the published table is not on this machine")
    lines = (line for line in table.read_text().splitlines() if not line.startswith("#"))
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]


def test_a_dense_model_has_the_flops_of_deepseek_llm_table_3():
    """M = 72·L·d² + 12·L·d·T at T = 4096, with the 4·d² of MHA and the 8·d² of its FFN in the place of our matrices."""
    for row in published_scales():
        layers, d = int(row["n_layer"]), int(row["d_model"])
        rank, length = 64, 4096
        config = preset(
            "tiny",
            num_hidden_layers=layers,
            first_k_dense_replace=layers,
            hidden_size=d,
            num_attention_heads=d // 64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
            q_lora_rank=None,
            kv_lora_rank=rank,
            intermediate_size=3 * d,
            max_position_embeddings=length,
        )
        mla = d * d + d * (rank + 32) + rank * (d // 2 + d) + d * d
        ffn = 3 * d * (3 * d)
        as_mha = flops_scaling(config, length) + 6 * layers * (4 * d * d - mla + 8 * d * d - ffn)
        assert as_mha == 72 * layers * d**2 + 12 * layers * d * length
        assert as_mha == pytest.approx(row["M"], rel=0.006)  # printed with three digits
