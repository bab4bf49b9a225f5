"""The bytes that a forward pass leaves against those that really live."""

import gc

import pytest
import torch

from model.activations import ForwardPass, activation_bytes
from model.config import ModelConfig, load_preset
from model.flops import parameter_counts
from model.init import initialize
from model.ops.fp8.kernels import Reference
from model.transformer import Transformer
from parallel.recompute import apply_recompute


def preset(name, **changes):
    return ModelConfig.from_hf(load_preset(name)).override(changes)


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


def bytes_counted(config, *size, **how):
    return sum(activation_bytes(config, ForwardPass(*size, **how)).values())


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
    counted = bytes_counted(config, rows, length, dtype.itemsize, recompute)
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
    counted = bytes_counted(config, rows, length, dtype.itemsize, recompute, fp8=True)
    assert counted == pytest.approx(measured, rel=2e-3)


def test_v3_in_fp8_keeps_a_byte_for_each_factor_of_its_products():
    """And four bytes of a scale for 128 of them; beside them the input of the gate, which is not FP8. But FP8 keeps the input rows
    of the experts, where bf16 takes rows by an index.

    At 4,096 tokens, in 3 dense and 59 MoE layers.
    """
    config, sizes = preset("v3"), {"device": "cuda", "casts_weights": False}
    bf16, fp8 = (bytes_counted(config, 1, 4096, 2, fp8=on, **sizes) for on in (False, True))
    attention = 7168 + 1536 + 512 + 7168  # inputs of q_a and kv_a, q_b, kv_b and of the feed-forward part
    one, inner = 1 - 4 / 128, 2 * 2 - 2 * (1 + 4 / 128)  # saved of an input; of gate and up
    experts = 9 * 2048 * inner - 2 * 7168 - 8 * 7168 * (1 + 4 / 128) + 8 * 8  # the index, eight bytes
    assert bf16 - fp8 == 4096 * (62 * attention * one + 3 * 18432 * inner + 59 * experts)


def test_a_gpu_keeps_no_padding():
    """V3's layer in bf16, by its own arithmetic: values are 128 wide."""
    config = preset("v3")
    cpu, cuda = (bytes_counted(config, 1, 4096, 2, "none", device) for device in ("cpu", "cuda"))
    padded = (
        62 * 128 * 2 * ((192 - 256) + (192 - 128) + 128)
    )  # values, output, what is cut out of it; unpadded these are views
    assert cpu - cuda == 4096 * padded


def test_weights_that_come_in_the_compute_dtype_are_not_kept_a_second_time():
    """All matrices of layers and of the MTP module but the gates, which are read in fp32."""
    config = preset("v3")
    without = bytes_counted(config, 1, 4096, 2, "none", "cuda", casts_weights=False)
    counts, vectors = parameter_counts(config), 62 * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
    matrices = counts.trainable - 2 * 129280 * 7168 - vectors - 59 * 256 * 7168
    assert bytes_counted(config, 1, 4096, 2, "none", "cuda") - without == 2 * matrices
    full = [bytes_counted(config, 1, 4096, 2, "full", casts_weights=casts) for casts in (True, False)]
    assert full[0] == full[1]


def test_rows_that_arrive_at_the_fullest_experts_cost_what_experts_keep():
    """Twice as many as leave: once more the rows, weights, orders there and back, and gate and up, in each of 59 MoE layers."""
    config = preset("v3")
    even, uneven = (bytes_counted(config, 1, 4096, 2, spreads_experts=True, imbalance=by) for by in (1.0, 2.0))
    assert uneven - even == 4096 * 8 * 59 * (2 * 7168 + 4 + 16 + 2 * 2 * 2048)


def test_in_fp8_selective_keeps_less_of_v3s_feed_forward_networks_than_none():
    """Of a MoE layer's token: logits, choices, 9 gates and ups in E4M3 with scales, 8 rows as they arrived with their weights."""
    config, one = preset("v3"), 1 + 4 / 128
    size = {"device": "cuda", "casts_weights": False, "fp8": True, "spreads_experts": True, "fp8_dispatch": True}
    none, selective = (
        activation_bytes(config, ForwardPass(1, 4096, 2, mode, **size))["feed-forward"]
        for mode in ("none", "selective")
    )
    of_moe = 4 * 256 + 12 * 8 + 9 * 2 * 2048 * one + 8 * (7168 + 7168 / 128 + 4)
    assert selective == 4096 * (59 * of_moe + 3 * 2 * 18432 * one) < none
