"""The backward pass in two parts gives what it gives in one, and keeps for the second what the second needs."""

import weakref

import pytest
import torch
from torch import Tensor

from model.flops import Recompute
from model.layers import Linear, split_backward
from model.ops.fp8.kernels import Reference
from model.ops.weight_gradient import leaf_of, put_aside, weight_gradient
from model.transformer import Transformer
from parallel.recompute import apply_recompute
from tests.small_model import small_config

OTHERS = ("lm_head.weight", "embed_tokens.weight", "gate.weight")  # made at once, beside norms
TOKENS = torch.randint(0, 96, (2, 3, 12), generator=torch.Generator().manual_seed(0))  # two micro-batches


def model_of(recompute: Recompute, numbers: torch.dtype | str) -> Transformer:
    """With parameters in the compute dtype, so that products read them as they are; a dense layer, a MoE layer, two MTP modules."""
    config = small_config(num_hidden_layers=2, num_nextn_predict_layers=2)
    dtype = torch.bfloat16 if isinstance(numbers, str) else numbers
    model = Transformer(config, compute_dtype=dtype, fp8=Reference() if numbers == "fp8" else None).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    apply_recompute(model, recompute)
    return model


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    losses = model(tokens, torch.zeros_like(tokens)).losses
    return losses.objective(losses.counts, 2, 0.3, 1e-4)


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("numbers", [torch.float32, torch.bfloat16, "fp8"], ids=str)
def test_a_backward_pass_in_two_parts_has_the_bits_of_one(recompute: Recompute, numbers: torch.dtype | str) -> None:
    """Two micro-batches, each one's second part after the first part of both."""
    whole, split = (model_of(recompute, numbers) for _ in range(2))
    split_backward(split)
    late = []
    for tokens in TOKENS:
        expected = loss_of(whole, tokens)
        expected.backward()
        found = loss_of(split, tokens)
        assert torch.equal(found, expected)
        with put_aside() as later:
            found.backward()
        late.append(later)
    big = {name for name, p in split.named_parameters() if p.dim() > 1 and not name.endswith(OTHERS)}
    assert gradients(split).keys() == gradients(whole).keys() - big
    for later in late:
        later.run()
        later.run()
    assert gradients(split).keys() == gradients(whole).keys()
    for name, gradient in gradients(whole).items():
        assert torch.equal(gradients(split)[name], gradient), name


def test_the_gradient_of_a_weight_that_was_cast_is_made_at_once() -> None:
    layer = Linear(4, 3)
    split_backward(layer)
    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    with put_aside() as later:
        layer(x).sum().backward()
    before = layer.weight.grad.clone()
    later.run()
    assert torch.equal(layer.weight.grad, before)


def test_a_backward_pass_outside_puts_nothing_aside() -> None:
    layer = Linear(4, 3)
    split_backward(layer)
    with pytest.raises(KeyError), put_aside() as later:
        raise KeyError
    layer(torch.randn(2, 5, 4)).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    later.run()
    assert torch.equal(layer.weight.grad, before)


def test_the_graph_does_not_live_on_in_what_was_put_aside() -> None:
    class Trace:
        """Lives as long as the graph."""

    trace, weight = Trace(), torch.zeros(3, 3, requires_grad=True)
    graph_lives = weakref.ref(trace)
    x = torch.randn(5, 3, requires_grad=True).sin()
    x.grad_fn.metadata["trace"] = trace
    with put_aside() as later:
        assert weight_gradient(leaf_of(weight), lambda dy, x: dy.T @ x, x.detach().cos(), x) is None
    del trace, x
    assert graph_lives() is None
    later.run()
    assert weight.grad is not None


def test_what_was_put_aside_is_free_after_it_ran() -> None:
    model = model_of("none", torch.float32)
    split_backward(model)
    with put_aside() as later:
        loss_of(model, TOKENS[0]).backward()
    operands = [weakref.ref(o) for *_, those in later._products for o in those if isinstance(o, Tensor)]
    assert len(operands) > 50 and all(operand() is not None for operand in operands)
    later.run()
    assert not any(operand() is not None for operand in operands)
