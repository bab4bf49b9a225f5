"""The keys of an export are those of transformers and of the released checkpoint, and lead back to the same tensors."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model.config import ConfigError, ModelConfig, load_preset
from model.hf import IN_FP8, from_hf, quantized, state_shapes, to_hf
from tests.small_model import small_config


@pytest.fixture
def exported(make_model):
    """exported(**changes) → (config, the model's state, the checkpoint's tensors)."""

    def build(**changes):
        model = make_model(**changes)
        state = model.state_dict()
        return model.config, state, dict(to_hf(state.items(), model.config, mtp=True))

    return build


def read_back(config, tensors):
    return dict(from_hf(config, tensors.keys(), tensors.__getitem__))


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "first_k_dense_replace": 0}])
def test_keys_and_tensors_are_those_that_transformers_saves(make_model, tmp_path, changes):
    model = make_model(**changes)
    hf = DeepseekV3ForCausalLM(DeepseekV3Config(**model.config.to_hf()))
    hf.load_state_dict(model.state_dict())
    hf.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = dict(to_hf(model.state_dict().items(), model.config, mtp=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_what_leaves_comes_back_bit_for_bit(exported, depths):
    config, state, tensors = exported(num_nextn_predict_layers=depths)
    back = read_back(config, tensors)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


def test_the_v3_preset_has_the_tensors_of_the_released_checkpoint():
    config = ModelConfig.from_hf(load_preset("v3"))
    tensors = dict(to_hf(state_shapes(config).items(), config, mtp=True))
    kept = re.compile(r"embed_tokens|head|norm|mlp\.gate\.|eh_proj|e_score")  # every other one is FP8, with its scales
    in_fp8 = {key for key in tensors if IN_FP8.fullmatch(key)}
    assert in_fp8 == {key for key in tensors if not kept.search(key)}
    assert len(tensors) + len(in_fp8) == 91_991
    key = "model.layers.60.self_attn.kv_a_proj_with_mqa.weight"
    stored = dict(quantized(key, tensors[key]))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        key: ((576, 7168), torch.float8_e4m3fn),
        f"{key}_scale_inv": ((5, 56), torch.float32),
    }
    assert tensors["model.layers.60.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
    assert tensors["model.layers.61.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert tensors["model.layers.61.eh_proj.weight"].shape == (7168, 14336)


def test_mtp_layers_carry_copies_of_embedding_and_head(exported):
    _, state, tensors = exported(num_nextn_predict_layers=2)
    for layer in (3, 4):
        assert tensors[f"model.layers.{layer}.embed_tokens.weight"] is state["model.embed_tokens.weight"]
        assert tensors[f"model.layers.{layer}.shared_head.head.weight"] is state["lm_head.weight"]


def test_without_mtp_nothing_of_it_is_left(make_model):
    model = make_model(num_nextn_predict_layers=2)
    tensors = dict(to_hf(model.state_dict().items(), model.config, mtp=False))
    assert not [key for key in tensors if re.match(r"model\.layers\.[3-9]", key)]
    assert tensors.keys() == dict(to_hf(make_model().state_dict().items(), model.config, mtp=True)).keys() - {
        f"model.layers.{layer}.{copy}"
        for layer in (3, 4)
        for copy in ("embed_tokens.weight", "shared_head.head.weight")
    }


def test_experts_leave_as_views(exported):
    _, state, tensors = exported()
    stacked = state["model.layers.1.mlp.experts.gate_up_proj"]  # [E, 2F, D]
    up = tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert up.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert torch.equal(up, stacked[5, 24:])


def test_the_copies_of_mtp_layers_are_not_needed_on_the_way_in(exported):
    config, state, tensors = exported(num_nextn_predict_layers=1)
    del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]
    assert torch.equal(read_back(config, tensors)["lm_head.weight"], state["lm_head.weight"])


def test_a_missing_key_is_named_before_anything_is_read(exported):
    config, _, tensors = exported()
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"no model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight; .*\[24, 48\]"):
        next(from_hf(config, tensors.keys(), lambda key: pytest.fail(f"{key} was read")))


def test_weights_without_their_mtp_layers_say_how_to_load_them(exported):
    """transformers drops MTP layers when it saves a model again, and keeps their number in config.json."""
    config, _, tensors = exported(num_nextn_predict_layers=1)
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith("model.layers.3.")}
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        read_back(config, without)
    assert len(read_back(config.override({"num_nextn_predict_layers": 0}), without))


def test_an_unknown_key_is_named(exported):
    config, _, tensors = exported()
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"q_proj\.bias is not in the model"):
        read_back(config, tensors)


def test_mtp_layers_that_the_configuration_does_not_have_are_named(exported):
    config, _, tensors = exported(num_nextn_predict_layers=1)
    with pytest.raises(ConfigError, match=r"model\.layers\.3.*correct num_hidden_layers or num_nextn_predict_layers"):
        read_back(config.override({"num_nextn_predict_layers": 0}), tensors)


def test_a_wrong_shape_names_both(exported):
    config, _, tensors = exported()
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"] = torch.zeros(48, 23)
    with pytest.raises(ConfigError, match=r"experts\.3\.down_proj\.weight has shape \[48, 23\], .* \[48, 24\]"):
        read_back(config, tensors)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"  # [152, 48]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"  # [24, 152]


@pytest.fixture
def in_fp8(make_model):
    """(config, state, the checkpoint's tensors in FP8) of a model with ragged blocks."""
    model = make_model(hidden_size=152, num_nextn_predict_layers=1)
    tensors = {}
    for key, tensor in to_hf(model.state_dict().items(), model.config, mtp=True):
        tensors |= dict(quantized(key, tensor)) if IN_FP8.fullmatch(key) else {key: tensor}
    return model.config, model.state_dict(), tensors


def test_fp8_is_read_as_numbers_times_the_scale_of_their_block(in_fp8):
    config, state, tensors = in_fp8
    back = dict(from_hf(config, tensors.keys(), tensors.__getitem__, fp8=True))
    assert list(back) == list(state)
    for key, tensor in to_hf(back.items(), config, mtp=True):
        expected = tensors[key].float()
        if IN_FP8.fullmatch(key):
            rows, columns = expected.shape
            expected *= torch.kron(tensors[f"{key}_scale_inv"], torch.ones(128, 128))[:rows, :columns]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), key
    assert (back["lm_head.weight"] == state["lm_head.weight"]).all()
    name = "model.layers.3.mlp.experts.gate_up_proj"
    error = (back[name] - state[name]).abs()  # of a number, or half of the smallest one; a block's scale is max / 448
    assert (error <= (state[name].abs() / 16).clamp_min(state[name].abs().amax() / 448 * 2**-10)).all()
    assert error.max() > 0


def test_fp8_that_is_read_and_written_again_has_the_same_bits():
    """For any scale of ours: max / 448 is found again from data · scale, rounded though both are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 2048, generator=generator)
    weight *= torch.exp(torch.randn(8, 16, generator=generator)).kron(torch.ones(128, 128))
    weight[:128, :128] = 0
    stored = dict(quantized("w", weight))
    values = stored["w"].float() * stored["w_scale_inv"].kron(torch.ones(128, 128))
    again = dict(quantized("w", values))
    assert torch.equal(again["w_scale_inv"], stored["w_scale_inv"])
    assert torch.equal(again["w"].view(torch.uint8), stored["w"].view(torch.uint8))


def test_scales_may_be_powers_of_two_in_a_byte(in_fp8):
    config, _, tensors = in_fp8
    scale = torch.tensor([[0.5, 4.0]])
    tensors[f"{UP}_scale_inv"] = scale.to(torch.float8_e8m0fnu)
    up = dict(from_hf(config, tensors.keys(), tensors.__getitem__, fp8=True))["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(up[2, 24:], tensors[UP].float() * scale.kron(torch.ones(1, 128))[:, :152])


@pytest.mark.parametrize(
    ("changes", "fp8", "message"),
    [
        ({f"{O_PROJ}_scale_inv": None}, True, rf"no {O_PROJ}_scale_inv; config.json makes it \[2, 1\] .*complete"),
        (
            {f"{UP}_scale_inv": torch.ones(2, 1)},
            True,
            r"_scale_inv has shape \[2, 1\], config.json makes it \[1, 2\]; ",
        ),
        (
            {UP: torch.zeros(24, 152)},
            True,
            r"up_proj\.weight \[24, 152\] is torch.float32; .*makes it torch.float8_e4m3fn; ",
        ),
        (
            {f"{UP}_scale_inv": torch.ones(1, 2).byte()},
            True,
            r"_scale_inv \[1, 2\] is torch.uint8; .*float8_e8m0fnu; take",
        ),
        (
            {},
            False,
            r"_scale_inv \(and \d+ more\) belongs to weights in FP8, and config.json has no quantization_config",
        ),
        ({"lm_head.weight_scale_inv": torch.ones(1, 1)}, True, r"lm_head.weight_scale_inv is not in the model"),
    ],
)
def test_what_is_wrong_with_fp8_is_named(in_fp8, changes, fp8, message):
    config, _, tensors = in_fp8
    tensors = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message) as caught:
        list(from_hf(config, tensors.keys(), tensors.__getitem__, fp8=fp8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        ("nan", torch.float32),
        ("nan", torch.float8_e8m0fnu),
        ("inf", torch.bfloat16),
        ("-0.5", torch.float32),
        ("0", torch.float32),
    ],
)
def test_a_scale_that_is_none_is_named_with_its_place(in_fp8, scale, dtype):
    config, _, tensors = in_fp8
    tensors[f"{UP}_scale_inv"] = torch.tensor([[1.0, float(scale)]]).to(dtype)
    with pytest.raises(ConfigError) as caught:
        list(from_hf(config, tensors.keys(), tensors.__getitem__, fp8=True))
    rule = "a scale must be finite and above 0; fetch the weights again"
    assert str(caught.value) == f"weights: {UP}_scale_inv [0, 1] is {scale}; {rule}"


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_in_e4m3_is_named_with_its_place(in_fp8, byte):
    config, _, tensors = in_fp8
    tensors[UP].view(torch.uint8)[3, 7] = byte
    with pytest.raises(ConfigError, match=rf"^weights: {UP} \[3, 7\] holds NaN; .*; fetch the weights again$"):
        list(from_hf(config, tensors.keys(), tensors.__getitem__, fp8=True))


def test_fp8_of_zeros_has_scales_that_are_read():
    """So has whatever else we write: a scale is never below 2⁻¹⁰⁰ / 448."""
    config = small_config()
    tensors = {}
    for key, meta in to_hf(state_shapes(config).items(), config, mtp=True):
        zeros = torch.zeros(meta.shape)
        tensors |= dict(quantized(key, zeros)) if IN_FP8.fullmatch(key) else {key: zeros}
    assert not any(tensor.any() for _, tensor in from_hf(config, tensors.keys(), tensors.__getitem__, fp8=True))


def test_fp8_without_its_scales_is_refused(exported):
    config, _, tensors = exported()
    with pytest.raises(ConfigError, match=r"o_proj\.weight \[48, 48\] is torch.float8_e4m3fn; .*for want of one"):
        read_back(config, tensors | {O_PROJ: tensors[O_PROJ].to(torch.float8_e4m3fn)})
