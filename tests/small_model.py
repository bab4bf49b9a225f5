"""A model of about 0.1M parameters whose logits are of order 1. Dimensions differ, so that no two can be mixed up unnoticed."""

from typing import Any

import torch

from model.config import ModelConfig
from model.transformer import Transformer


def small_config(**changes: Any) -> ModelConfig:
    """3 layers, the first dense; 12 experts in 3 groups of 4, of which a token sees 2; one MTP module."""
    base = ModelConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
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


@torch.no_grad()
def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """Random matrices, norms around 1 and expert biases of both signs, so that none of them can go missing unnoticed."""
    config = small_config(**changes)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, config.initializer_range, generator=generator)
    for buffer in model.buffers():
        buffer.normal_(0.0, 0.2, generator=generator)
    return model
