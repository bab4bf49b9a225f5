"""A family of models: one template at any width.

Depth grows with the square root of the width (the preset `small` has 12 layers at 512, V2-Lite 27 at 2,048, V3 61 at 7,168); widths
of the feed-forward parts, heads and latent ranks grow in proportion, head dimensions and the number of experts stay. The standard
deviation of the first weights falls with the square root of the width, so that a product keeps its scale.
"""

from dataclasses import fields
from typing import Any

from model.config import ModelConfig
from model.flops import flops_scaling
from train.scaling.errors import ScalingError

STEP = 8  # widths of matrices are multiples of it


def at_width(template: ModelConfig, hidden_size: int) -> ModelConfig:
    """The template at another width.

    Raises:
        ScalingError: the width is no positive multiple of 8.
    """
    if hidden_size < STEP or hidden_size % STEP:
        raise ScalingError(f"width = {hidden_size}: must be a positive multiple of {STEP}; give for example 64")
    t, ratio = template, hidden_size / template.hidden_size

    def scaled(width: int) -> int:
        return max(STEP, round(width * ratio / STEP) * STEP)

    return t.override(
        {
            "hidden_size": hidden_size,
            "num_hidden_layers": max(t.first_k_dense_replace + 1, round(t.num_hidden_layers * ratio**0.5)),
            "num_attention_heads": max(1, round(t.num_attention_heads * ratio)),
            "intermediate_size": scaled(t.intermediate_size),
            "moe_intermediate_size": scaled(t.moe_intermediate_size),
            "kv_lora_rank": scaled(t.kv_lora_rank),
            "q_lora_rank": None if t.q_lora_rank is None else scaled(t.q_lora_rank),
            "initializer_range": float(f"{t.initializer_range * ratio**-0.5:.3g}"),
        }
    )


def with_flops(template: ModelConfig, flops_per_token: float, sequence_length: int) -> ModelConfig:
    """The member of the template's family whose M is nearest, in ratio, to so many FLOPs per token."""
    step = STEP if flops_per_token < 1e9 else 64
    width = step
    while flops_scaling(at_width(template, width), sequence_length) < flops_per_token:
        width += step
    candidates = [at_width(template, w) for w in (width - step, width) if w > 0]
    return min(candidates, key=lambda c: _ratio(flops_scaling(c, sequence_length), flops_per_token))


def differences(base: ModelConfig, other: ModelConfig) -> dict[str, Any]:
    """The fields of a model that are not those of another: what a recipe writes beside the preset."""
    names = [field.name for field in fields(base)]
    return {name: getattr(other, name) for name in names if getattr(other, name) != getattr(base, name)}


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)
