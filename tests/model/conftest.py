"""Small models for the tests of this folder. Dimensions differ from one another, so that no two can be mixed up unnoticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """make_config(**changes): 3 layers, the first dense; 12 experts in 3 groups of 4, of which a token sees 2 groups."""

    def make(**changes: Any) -> ModelConfig:
        base = ModelConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=64,
            moe_intermediate_size=24,
            num_hidden_layers=3,
            num_nextn_predict_layers=0,
            num_attention_heads=4,
            n_shared_experts=2,
            n_routed_experts=12,
            routed_scaling_factor=2.5,
            kv_lora_rank=20,
            q_lora_rank=28,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            n_group=3,
            topk_group=2,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
        return base.override(changes)

    return make


@pytest.fixture(scope="session")
def randomize() -> Callable[[torch.nn.Module, float], None]:
    """randomize(module, std): matrices of that deviation, norms around 1, and expert biases of both signs.

    Fresh weights leave norms at 1 and biases at 0, which would hide a norm or a bias that is not applied.
    """

    @torch.no_grad()
    def draw(module: torch.nn.Module, std: float) -> None:
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, std)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)

    return draw


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ModelConfig], randomize: Any) -> Callable[..., Transformer]:
    """make_model(options={…}, **changes of the configuration): a model with random weights, norms and biases."""

    def make(options: dict[str, Any] | None = None, **changes: Any) -> Transformer:
        config = make_config(**changes)
        model = Transformer(config, **(options or {}))
        randomize(model, config.initializer_range)
        return model

    return make
