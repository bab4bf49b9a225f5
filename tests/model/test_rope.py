"""Rotary embedding and YaRN: the rotation itself, and its frequencies against transformers'."""

import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig, YarnScaling, load_preset
from model.rope import frequencies, rotate, rotation, softmax_scale


def test_a_pair_turns_by_position_times_frequency(make_config):
    config = make_config(qk_rope_head_dim=4, rope_theta=100.0)  # θ = 1, 100^(−2/4) = 0.1
    torch.testing.assert_close(frequencies(config), torch.tensor([1.0, 0.1]))
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), rotation(config, torch.tensor([3])))
    # (x0, x1) = (1, 0) turns by 3 rad; (x2, x3) = (0, 1) by 0.3 rad: neighbours are a pair
    expected = [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor([expected]))


def test_scores_depend_on_distance_alone_and_lengths_are_kept(make_config):
    config = make_config()
    q, k = torch.randn(2, 8)
    r = rotation(config, torch.arange(50))
    turned_q, turned_k = rotate(q.expand(50, 8), r), rotate(k.expand(50, 8), r)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(50))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores.diagonal(-7), scores[7, 0].expand(43), atol=1e-5, rtol=1e-5)


def test_rotation_computes_in_fp32_and_keeps_the_dtype(make_config):
    r = rotation(make_config(), torch.arange(4000, 4010))
    x = torch.randn(10, 8).bfloat16()
    assert r.cos.dtype == torch.float32 and rotate(x, r).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, r), rotate(x.float(), r).bfloat16())


YARNS = {
    "v3": ({}, YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)),
    "v2-lite": ({}, YarnScaling(40.0, 4096, 32.0, 1.0, 0.707, 0.707)),
    "unequal mscale": ({}, YarnScaling(16.0, 2048, 24.0, 2.0, 0.7, 1.2)),
    "no mscale_all_dim": ({}, YarnScaling(8.0, 1024)),
    "small base": ({"rope_theta": 50.0, "qk_rope_head_dim": 32}, YarnScaling(4.0, 64, 2.0, 0.5, 1.0, 1.0)),
    "ramp of one pair": ({"qk_rope_head_dim": 4}, YarnScaling(4.0, 4096, 32.0, 31.9, 1.0, 1.0)),
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn_equals_transformers(make_config, name):
    changes, yarn = YARNS[name]
    config = make_config(**{"qk_rope_head_dim": 64, "max_position_embeddings": 163840, "rope_scaling": yarn, **changes})
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**config.to_hf()), "cpu")
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)
    at_zero = rotation(config, torch.tensor([0]))
    torch.testing.assert_close(at_zero.cos, torch.full_like(at_zero.cos, scale))


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    config = ModelConfig.from_hf(load_preset("v3"))
    plain = frequencies(config.override({"rope_scaling": None}))
    ratio = frequencies(config) / plain
    assert (ratio[:10] == 1).all()  # more than 32 turns in 4096 tokens
    torch.testing.assert_close(ratio[-8:], torch.full((8,), 1 / 40))  # fewer than one
    assert (ratio.diff() <= 1e-6).all()


@pytest.mark.parametrize("context", [2048, 4096])
def test_yarn_does_not_act_within_the_original_context(context):
    config = ModelConfig.from_hf(load_preset("v3")).override({"max_position_embeddings": context})
    plain = config.override({"rope_scaling": None})
    assert config.yarn is None and config.to_hf()["rope_scaling"] is None
    torch.testing.assert_close(frequencies(config), frequencies(plain))
    assert softmax_scale(config) == softmax_scale(plain) == pytest.approx(192**-0.5)  # 0.072169


def test_the_length_of_sequences_decides_where_yarn_acts():
    v3 = ModelConfig.from_hf(load_preset("v3"))
    for length in (512, 4096):
        short = v3.at_length(length)
        assert short.yarn is None and short.max_position_embeddings == 4096
        assert short.at_length(length) == short
    for length in (4097, 32_768, 131_072):
        assert v3.at_length(length) is v3 and v3.yarn.factor == 40
    shorter = v3.override({"max_position_embeddings": 2048})
    assert shorter.at_length(2048) == shorter
    plain = v3.override({"rope_scaling": None})
    assert plain.at_length(512) is plain


def test_the_softmax_scale_of_v3_and_v2_lite():
    # (0.1 · ln 40 + 1)² / √192 = 1.36889² · 0.072169
    assert softmax_scale(ModelConfig.from_hf(load_preset("v3"))) == pytest.approx(0.135234, abs=5e-7)
    # (0.0707 · ln 40 + 1)² / √192
    expected = (0.0707 * math.log(40) + 1) ** 2 / math.sqrt(192)
    assert softmax_scale(ModelConfig.from_hf(load_preset("v2-lite"))) == pytest.approx(expected)
