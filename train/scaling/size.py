"""The size of a model as the laws count it: nothing of the vocabulary is in it.

    N        parameters of the layers and the final norm, all experts counted
    active   the part of N that one token uses
    M        training FLOPs per token of the layers, attention full (DeepSeek LLM Eq. 2)

What a run pays for is more than M·D: the output head, and the MTP modules with their heads. Both are in `all_flops_per_token`.
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.flops import flops_scaling, flops_training, parameter_counts


class Size(NamedTuple):
    """N, active and M of a model at one sequence length, and the FLOPs per token of all that is trained."""

    params: int
    active: int
    flops_per_token: int
    all_flops_per_token: int


def size_of(config: ModelConfig, sequence_length: int) -> Size:
    """Count a model."""
    counts = parameter_counts(config)
    vocabulary = config.vocab_size * config.hidden_size
    return Size(
        params=counts.total - 2 * vocabulary,
        active=counts.active - vocabulary,
        flops_per_token=flops_scaling(config, sequence_length),
        all_flops_per_token=flops_training(config, sequence_length),
    )
