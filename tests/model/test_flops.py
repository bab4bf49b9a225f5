"""The exact counts against the real module: parameters on the meta device, FLOPs as PyTorch counts them, bytes that really live."""

import csv
import gc
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, load_preset
from model.flops import (
    TRAINING,
    activation_bytes,
    flops_mfu,
    flops_scaling,
    flops_training,
    parameter_counts,
)
from model.init import initialize
from model.ops.fp8.kernels import Reference
from model.transformer import Transformer
from parallel.recompute import apply_recompute


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


# activations ----------------------------------------------------------------------------------------------------------


def bytes_that_live_after_forward(config, dtype, rows, length, recompute, fp8=None):
    """What the CPU allocator handed out during a forward pass and did not get back while its output is held."""
    model = Transformer(config, compute_dtype=dtype, fp8=fp8)
    apply_recompute(model, recompute)
    initialize(model, seed=0)
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1 + config.num_nextn_predict_layers))
    documents = torch.zeros_like(tokens)
    coefficients = torch.ones(1 + config.num_nextn_predict_layers)
    model(tokens, documents, coefficients)  # one-time allocations
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(tokens, documents, coefficients)
    events = profiler.profiler.kineto_results.events()
    del output
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"num_nextn_predict_layers": 2}, torch.float32),
        ({"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}, torch.float32),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, torch.bfloat16),
        ({"v_head_dim": 48}, torch.float32),
    ],
    ids=["two MTP modules", "plain queries, one group, weights not normalised", "bf16", "equal head sizes"],
)
def test_activation_bytes_are_those_that_live(changes, dtype, recompute):
    config = preset("tiny", **{"num_nextn_predict_layers": 0, "vocab_size": 512, "num_hidden_layers": 3, **changes})
    rows, length = 2, 32
    measured = bytes_that_live_after_forward(config, dtype, rows, length, recompute)
    counted = sum(activation_bytes(config, rows, length, dtype.itemsize, recompute).values())
    assert counted == pytest.approx(measured, rel=2e-3)  # vectors over the experts are not counted


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"num_nextn_predict_layers": 1, "num_hidden_layers": 2}, torch.bfloat16),
        ({"q_lora_rank": None, "num_hidden_layers": 2, "moe_intermediate_size": 136}, torch.float32),
    ],
    ids=["bf16, an MTP module", "plain queries, rows of a tile and a part"],
)
def test_in_fp8_activation_bytes_are_those_that_live(changes, dtype, recompute):
    config = preset("tiny", **{"num_nextn_predict_layers": 0, "vocab_size": 512, **changes})
    rows, length = 2, 32
    measured = bytes_that_live_after_forward(config, dtype, rows, length, recompute, Reference())
    counted = sum(activation_bytes(config, rows, length, dtype.itemsize, recompute, fp8=True).values())
    assert counted == pytest.approx(measured, rel=2e-3)


def test_v3_in_fp8_keeps_a_byte_for_each_factor_of_its_products():
    """And four bytes of a scale for 128 of them; beside them the input of the gate, which is not FP8. But FP8 keeps the input rows
    of the experts, and what they hand out, where bf16 takes rows by an index and weighs before the last product.

    At 4,096 tokens, in 3 dense and 59 MoE layers.
    """
    config, sizes = preset("v3"), {"device": "cuda", "casts_weights": False}
    bf16, fp8 = (sum(activation_bytes(config, 1, 4096, 2, fp8=on, **sizes).values()) for on in (False, True))
    attention = 7168 + 1536 + 512 + 7168  # inputs of q_a and kv_a, q_b, kv_b and of the feed-forward part
    one, inner = 1 - 4 / 128, 2 * 2 - 2 * (1 + 4 / 128)  # saved of an input; of gate and up
    experts = 9 * 2048 * inner - 2 * 7168 - 8 * 7168 * (1 + 4 / 128 + 2) + 8 * 8  # the index, eight bytes
    assert bf16 - fp8 == 4096 * (62 * attention * one + 3 * 18432 * inner + 59 * experts)


def test_a_gpu_keeps_no_padding():
    """V3's layer in bf16, by its own arithmetic: values are 128 wide."""
    config = preset("v3")
    cpu, cuda = (sum(activation_bytes(config, 1, 4096, 2, "none", device).values()) for device in ("cpu", "cuda"))
    padded = (
        62 * 128 * 2 * ((192 - 256) + (192 - 128) + 128)
    )  # values, output, what is cut out of it; unpadded these are views
    assert cpu - cuda == 4096 * padded


def test_weights_that_come_in_the_compute_dtype_are_not_kept_a_second_time():
    """All matrices of layers and of the MTP module but the gates, which are read in fp32."""
    config = preset("v3")
    without = sum(activation_bytes(config, 1, 4096, 2, "none", "cuda", casts_weights=False).values())
    counts, vectors = parameter_counts(config), 62 * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
    matrices = counts.trainable - 2 * 129280 * 7168 - vectors - 59 * 256 * 7168
    assert sum(activation_bytes(config, 1, 4096, 2, "none", "cuda").values()) - without == 2 * matrices
    assert sum(activation_bytes(config, 1, 4096, 2, "full").values()) == sum(
        activation_bytes(config, 1, 4096, 2, "full", casts_weights=False).values()
    )
