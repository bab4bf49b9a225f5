"""Fresh weights: the distribution, and that each matrix depends on the seed and its own name alone."""

import pytest
import torch

from model.init import initialize
from model.transformer import Transformer


def fresh(config, seed=0):
    model = Transformer(config)
    initialize(model, seed)
    return model.state_dict()


@pytest.fixture(scope="module")
def wide(make_config):
    return make_config(
        hidden_size=64, vocab_size=512, moe_intermediate_size=64, initializer_range=0.006, num_nextn_predict_layers=1
    )


def test_matrices_have_the_configured_deviation_norms_are_one_and_biases_zero(wide):
    for name, value in fresh(wide).items():
        if name.endswith("e_score_correction_bias"):
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1).all(), name
        else:
            slack = 4 / value.numel() ** 0.5  # four standard errors
            assert abs(value.std() / 0.006 - 1) < slack, name
            assert abs(value.mean()) < 0.006 * slack, name


def test_every_expert_is_drawn_for_itself(wide):
    experts = fresh(wide)["model.layers.1.mlp.experts.gate_up_proj"]
    assert len({expert.sum().item() for expert in experts}) == wide.n_routed_experts
    assert abs(experts.std(dim=(1, 2)) / 0.006 - 1).max() < 4 / experts[0].numel() ** 0.5


def test_the_seed_decides_and_the_global_generator_does_not(wide):
    torch.manual_seed(1)
    first = fresh(wide, seed=5)
    torch.manual_seed(2)
    again, other = fresh(wide, seed=5), fresh(wide, seed=6)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert value.dim() == 1 or not torch.equal(value, other[name]), name


def test_no_two_matrices_are_equal(wide):
    matrices = [value for value in fresh(wide).values() if value.dim() > 1]
    assert len({value.flatten()[0].item() for value in matrices}) == len(matrices)


def test_more_layers_and_experts_leave_the_others_as_they_are(wide):
    small = fresh(wide)
    deeper = fresh(wide.override({"num_hidden_layers": 4, "num_nextn_predict_layers": 0}))
    for name in deeper:
        if name in small and ".layers.3." not in name:  # layer 3 is the MTP module of the shallow model
            assert torch.equal(small[name], deeper[name]), name
    more = fresh(wide.override({"n_routed_experts": 15}))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(more[name][:12], small[name])


def test_a_model_from_the_meta_device_gets_the_same_weights(wide):
    with torch.device("meta"):
        model = Transformer(wide)
    model.to_empty(device="cpu")
    initialize(model, 0)
    for name, value in fresh(wide).items():
        assert torch.equal(model.state_dict()[name], value), name
