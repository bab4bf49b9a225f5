"""Configurations: the round trip through transformers, and that every broken rule names field, value and rule."""

import dataclasses
import json

import pytest
from transformers import DeepseekV3Config

from model.config import FP8_STORAGE, PRESETS, ConfigError, ModelConfig, YarnScaling, load_preset

NAMES = ["tiny", "small", "v2-lite", "v3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_the_round_trip_through_transformers(name):
    config = ModelConfig.from_hf(load_preset(name))
    theirs = DeepseekV3Config(**config.to_hf())
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_every_field_with_its_meaning(name):
    config = ModelConfig.from_hf(load_preset(name))
    theirs = DeepseekV3Config(**config.to_hf())
    for field in dataclasses.fields(config):
        if field.name not in ("rope_theta", "rope_scaling"):
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if config.yarn else "default")
    if config.yarn:
        for field in dataclasses.fields(config.yarn):
            assert theirs.rope_parameters[field.name] == getattr(config.yarn, field.name), field.name
    assert theirs.num_mtp_layers == config.num_nextn_predict_layers
    assert theirs.num_key_value_heads == config.num_attention_heads
    assert theirs.rope_interleave is True and theirs.tie_word_embeddings is False


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_what_to_hf_writes(name):
    """A preset file is a config.json, with no key that is lost on the way through."""
    preset = load_preset(name)
    assert ModelConfig.from_hf(preset).to_hf() == preset


def test_every_preset_is_known_here():
    assert sorted(path.stem for path in PRESETS.glob("*.json")) == sorted(NAMES)


def test_the_v3_preset_is_the_released_shape():
    c = ModelConfig.from_hf(load_preset("v3"))
    assert (c.num_hidden_layers, c.hidden_size, c.vocab_size, c.num_attention_heads) == (61, 7168, 129280, 128)
    assert (c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group, c.n_shared_experts) == (256, 8, 8, 4, 1)
    assert (c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim) == (
        1536,
        512,
        128,
        64,
        128,
    )
    assert (c.intermediate_size, c.moe_intermediate_size, c.first_k_dense_replace) == (18432, 2048, 3)
    assert (c.initializer_range, c.routed_scaling_factor, c.num_nextn_predict_layers) == (0.006, 2.5, 1)
    assert c.yarn == YarnScaling(40, 4096, 32, 1, 1.0, 1.0)


def test_the_defaults_of_transformers_are_a_v3_shape():
    config = ModelConfig.from_hf(DeepseekV3Config().to_dict())
    v3 = ModelConfig.from_hf(load_preset("v3"))
    changes = {"max_position_embeddings": 4096, "rope_scaling": None, "initializer_range": 0.02}
    assert config == v3.override(changes)


def test_mtp_depth_is_read_under_both_names():
    released = {**load_preset("tiny"), "num_nextn_predict_layers": 2}
    assert ModelConfig.from_hf(released).num_nextn_predict_layers == 2
    newer = {**load_preset("tiny"), "num_mtp_layers": 3}
    del newer["num_nextn_predict_layers"]
    assert ModelConfig.from_hf(newer).num_nextn_predict_layers == 3


# (changes, field that the message names, words of the rule)
BROKEN = [
    ({"hidden_size": 0}, "hidden_size", "at least 1"),
    ({"hidden_size": 48.0}, "hidden_size", "whole number"),
    ({"hidden_size": None}, "hidden_size", "whole number"),
    ({"vocab_size": "96"}, "vocab_size", "whole number"),
    ({"num_attention_heads": True}, "num_attention_heads", "whole number"),
    ({"q_lora_rank": 0}, "q_lora_rank", "at least 1"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "at least 0"),
    ({"rope_theta": 0.0}, "rope_theta", "positive number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps", "positive number"),
    ({"initializer_range": "0.02"}, "initializer_range", "positive number"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor", "positive number"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor", "positive number"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob", "true or false"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim", "pairs"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace", "num_hidden_layers = 3"),
    ({"n_group": 5}, "n_group", "does not divide n_routed_experts = 12"),
    ({"n_group": 12}, "n_group", "two best experts"),
    ({"topk_group": 4}, "topk_group", "n_group = 3"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok", "8 experts in topk_group = 2"),
    ({"bos_token_id": 96}, "bos_token_id", "vocab_size = 96"),
    ({"eos_token_id": 1000}, "eos_token_id", "vocab_size = 96"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type", "'yarn' or none"),
    ({"rope_scaling": "yarn"}, "rope_scaling", "map"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor", "needs one"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.original_max_position_embeddings", "needs one"),
    ({"rope_scaling": YarnScaling(0.5, 16)}, "rope_scaling.factor", "at least 1"),
    ({"rope_scaling": YarnScaling(4.0, 0)}, "rope_scaling.original_max_position_embeddings", "at least 1"),
    ({"rope_scaling": YarnScaling(4.0, 16, beta_fast=1.0, beta_slow=2.0)}, "rope_scaling.beta_fast", "beta_slow = 2.0"),
]


@pytest.mark.parametrize(("changes", "field", "rule"), BROKEN, ids=[f"{f}: {r}" for _, f, r in BROKEN])
def test_a_broken_rule_names_the_field_the_value_and_the_rule(make_config, changes, field, rule):
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    message = str(caught.value)
    assert message.startswith(f"model.{field}: ") and rule in message and "\n" not in message
    value = next(iter(changes.values()))
    if isinstance(value, (int, float, str)):
        assert repr(value) in message


def test_an_unknown_field_names_the_known_ones(make_config):
    with pytest.raises(ConfigError, match=r"model\.hidden_dim: .*hidden_size"):
        make_config(hidden_dim=3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("rope_interleave", False),
        ("num_key_value_heads", 1),
        ("quantization_config", "fp8"),
    ],
)
def test_a_model_of_another_kind_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"^model.{key}: "):
        ModelConfig.from_hf({**load_preset("tiny"), key: value})


@pytest.mark.parametrize("more", [{}, {"scale_fmt": "ue8m0"}, {"modules_to_not_convert": None}])
def test_fp8_is_storage_and_no_part_of_the_model(more):
    config = ModelConfig.from_hf(load_preset("tiny") | {"quantization_config": FP8_STORAGE | more})
    assert config == ModelConfig.from_hf(load_preset("tiny"))
    assert "quantization_config" not in config.override({"num_hidden_layers": 2}).to_hf()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "gptq"),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("weight_block_size", [1, 32]),
        ("weight_block_size", None),
    ],
)
def test_weights_that_are_quantized_otherwise_are_refused(key, value):
    config = load_preset("tiny") | {"quantization_config": FP8_STORAGE | {key: value}}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(config)
    expected = f"model.quantization_config.{key}: {value!r} is not supported; DeepSeek-V3 has {FP8_STORAGE[key]!r}; "
    assert str(caught.value) == expected + "convert the folder to bf16 first"


def test_a_missing_field_is_named():
    preset = load_preset("tiny")
    del preset["kv_lora_rank"]
    with pytest.raises(ConfigError, match=r"^model\.kv_lora_rank: missing"):
        ModelConfig.from_hf(preset)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="'huge' is not a preset; choose one of small, tiny, v2-lite, v3"):
        load_preset("huge")
