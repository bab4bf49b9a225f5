"""The model computes what `transformers`' DeepseekV3ForCausalLM computes: logits and every gradient, with the same weights."""

import functools

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model.config import YarnScaling
from model.transformer import Transformer

LENGTH = 40
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)

SHAPES = {
    "three groups of four": {},
    "queries without a latent": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "every group kept": {"topk_group": 3},
    "ten experts in five groups": {"n_routed_experts": 10, "n_group": 5, "topk_group": 2, "num_experts_per_tok": 4},
    "one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": False},  # normalised, its gate has no gradient
    "YaRN": {"rope_scaling": YARN},
    "YaRN with unequal mscale": {
        "rope_scaling": YarnScaling(8.0, 16, beta_fast=8.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2),
        "q_lora_rank": None,
        "rope_theta": 500.0,
    },
    "three dense layers of five": {"num_hidden_layers": 5, "first_k_dense_replace": 3},
    "no dense layer": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "values wider than queries": {"v_head_dim": 28},
    "coarse epsilon": {"rms_norm_eps": 1e-2},
}


@pytest.fixture(scope="module")
def reference(make_config, randomize):
    """reference(name of a shape) → (config, transformers' model with gradients, tokens, its logits)."""

    @functools.cache
    def build(shape):
        torch.manual_seed(1)
        config = make_config(**SHAPES[shape])
        hf_config = DeepseekV3Config(**config.to_hf())
        hf_config._experts_implementation = "eager"
        hf_config._attn_implementation = "eager"
        hf = DeepseekV3ForCausalLM(hf_config).eval()
        randomize(hf, config.initializer_range)
        tokens = torch.randint(0, config.vocab_size, (2, LENGTH + 1))
        logits = hf(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return config, hf, tokens, logits.detach()

    return build


@pytest.mark.parametrize("experts", ["grouped_mm", "reference"])
@pytest.mark.parametrize("attention", ["fused", "sdpa", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_every_gradient_equal_those_of_transformers(reference, shape, attention, experts):
    config, hf, tokens, expected = reference(shape)
    model = Transformer(config, attention=attention, experts=experts)
    model.load_state_dict(hf.state_dict(), strict=True)
    documents = torch.zeros_like(tokens)

    logits = model.lm_head(model.hidden_states(tokens, documents)[0][0])
    assert 0.3 < expected.std() < 3  # of order 1, so that an absolute bound says something
    assert (logits - expected).abs().max() < 1e-5

    losses = model(tokens, documents).losses
    (losses.main / losses.counts[0]).backward()
    theirs = dict(hf.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        reference_grad = theirs[name].grad
        assert reference_grad.abs().max() > 0, f"{name} has no gradient to compare"
        worst = (parameter.grad - reference_grad).abs().max() / reference_grad.abs().max()
        assert worst < 1e-4, f"{name}: gradient differs by {worst:.1e} of its largest"


def test_negative_biases_cannot_bring_back_a_dropped_group(reference):
    """With biases far below zero a group masked by 0 instead of −inf would win; both must mask by −inf."""
    config, hf, tokens, _ = reference("three groups of four")
    model = Transformer(config)
    state = {name: value.clone() for name, value in hf.state_dict().items()}
    for name, value in state.items():
        if name.endswith("e_score_correction_bias"):
            value.sub_(3.0)
    twin = DeepseekV3ForCausalLM(hf.config).eval()
    twin.load_state_dict(state)
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model.lm_head(model.hidden_states(tokens, torch.zeros_like(tokens))[0][0])
        torch.testing.assert_close(logits, twin(tokens[:, :-1], use_cache=False).logits, atol=1e-5, rtol=0)
