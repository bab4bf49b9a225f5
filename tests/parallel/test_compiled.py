"""A model whose blocks are compiled has the losses and the gradients of one whose blocks are not."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from model.init import initialize
from model.transformer import Transformer
from parallel.compiled import compile_blocks
from tests.small_model import small_config


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(backend: str | None) -> tuple[float, dict[str, Tensor]]:
    """Of a small model with a dense layer, three MoE layers and an MTP module."""
    config = small_config(num_hidden_layers=4, num_nextn_predict_layers=1)
    model = Transformer(config)
    initialize(model, seed=0)
    if backend:
        compile_blocks(model, True, backend)
    tokens = torch.randint(config.vocab_size, (2, 18), generator=torch.Generator().manual_seed(0))
    output = model(tokens, torch.zeros_like(tokens, dtype=torch.int32))
    loss = output.losses.main + output.losses.mtp.sum() + output.losses.balance
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_blocks_have_the_bits_of_eager_ones_and_one_graph_for_each_kind():
    eager, compiled = gradients(None), gradients("aot_eager")
    assert eager[0] == compiled[0]
    assert eager[1].keys() == compiled[1].keys()
    assert all(torch.equal(a, compiled[1][name]) for name, a in eager[1].items())
    assert counters["stats"]["unique_graphs"] == 3  # dense, MoE, MTP
    assert not counters["graph_break"]


@pytest.mark.slow
def test_what_inductor_makes_of_a_block_is_the_block():
    eager, compiled = gradients(None), gradients("inductor")
    assert eager[0] == pytest.approx(compiled[0], rel=1e-6)
    for name, a in eager[1].items():
        torch.testing.assert_close(compiled[1][name], a, rtol=1e-4, atol=1e-6 * float(a.abs().max()), msg=name)


@pytest.mark.parametrize("compile", ["auto", False])
def test_nothing_is_compiled_where_it_was_not_measured_to_gain(compile):
    model = Transformer(small_config())
    compile_blocks(model, compile)
    assert all(block._compiled_call_impl is None for block in model.model.layers)
