"""What is computed again in the backward pass must not decide again: a token goes backward through the experts it went forward."""

import pytest
import torch

from model.flops import Recompute
from model.init import initialize
from model.router import Router
from model.transformer import Transformer
from parallel.recompute import apply_recompute
from tests.small_model import small_config


def gradients(mode: Recompute, biases_after: float) -> dict[str, torch.Tensor]:
    """Of a step whose biases are moved, at random and far, after the forward pass: any choice made then is another one."""
    model = Transformer(small_config())
    apply_recompute(model, mode)
    initialize(model, seed=0)
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 18))
    losses = model(tokens, torch.zeros_like(tokens)).losses
    for module in model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.normal_(0.0, biases_after)
    losses.objective(losses.counts, 2, 0.3, 1e-4).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_routing_is_kept_and_not_computed_again(mode: Recompute) -> None:
    expected, found = gradients("none", 0.0), gradients(mode, 9.0)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)
