"""FP8 training as mathematics: what is left when rounding is taken out is the plain model, and with it the error is E4M3's."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import initialize, write_whole
from model.ops.fp8 import quantize
from model.ops.fp8.kernels import Kernels, Reference
from model.transformer import Transformer

# No width is a multiple of 128; most have a whole tile and a part of one.
CONFIG = ModelConfig(
    vocab_size=96, hidden_size=144, intermediate_size=200, moe_intermediate_size=136, num_hidden_layers=2,
    num_nextn_predict_layers=1, num_attention_heads=4, n_shared_experts=1, n_routed_experts=4, routed_scaling_factor=2.5,
    kv_lora_rank=48, q_lora_rank=140, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=40, n_group=1, topk_group=1,
    num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=96, initializer_range=0.05,
)  # fmt: skip


@pytest.fixture
def without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales, tiles, padding and transposes as they are, but numbers in fp32 where E4M3 would be."""
    monkeypatch.setattr(quantize, "E4M3", torch.float32)
    monkeypatch.setattr(quantize, "_to_float", Tensor.clone)


def gradients(config: ModelConfig, kernels: Kernels | None) -> dict[str, Tensor]:
    """The loss and the gradients of one batch of 2 · 80 tokens, by name."""
    model = Transformer(config, fp8=kernels)
    initialize(model, 0, "cpu", write_whole)
    tokens = torch.randint(config.vocab_size, (2, 82), generator=torch.Generator().manual_seed(0))
    losses = model(tokens, torch.zeros_like(tokens)).losses
    loss = losses.objective(losses.counts, 2, 0.3, 1e-2)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("q_lora_rank", [140, None])
def test_without_rounding_it_is_the_plain_model(without_rounding: None, q_lora_rank: int | None) -> None:
    config = CONFIG.override({"q_lora_rank": q_lora_rank})
    expected, found = gradients(config, None), gradients(config, Reference())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=name)
