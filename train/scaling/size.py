"""The size of a model as the laws count it: nothing of the vocabulary is in it.

    N        parameters of the layers and the final norm, all experts counted
    active   the part of N that one token uses
    M        training FLOPs per token of the layers, attention full (DeepSeek LLM Eq. 2)

What a run pays for is more than M·D: the output head, and the MTP modules with their heads. Both are in `paid`.
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.flops import flops_mfu, flops_scaling, parameter_counts


class Size(NamedTuple):
    """N, active and M of a model at one sequence length, and the FLOPs per token that are run."""

    params: int
    active: int
    flops_per_token: int
    paid: int  # FLOPs per token with head and MTP, attention causal (`model.flops.flops_mfu`)


def size_of(config: ModelConfig, sequence_length: int) -> Size:
    """Count a model."""
    counts = parameter_counts(config)
    vocabulary = config.vocab_size * config.hidden_size
    return Size(
        params=counts.total - 2 * vocabulary,
        active=counts.active - vocabulary,
        flops_per_token=flops_scaling(config, sequence_length),
        paid=flops_mfu(config, sequence_length),
    )
