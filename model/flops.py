"""Exact counts: parameters, training FLOPs per token. Each is tested against the real module.

FLOPs are those of matrix products, 2 for a multiply-add, and a training step is three times its forward pass. Conventions have
names: `flops_scaling` is the M of the scaling laws, `flops_training` what a budget pays for, `flops_mfu` what model FLOPs
utilisation divides.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.config import ModelConfig

TRAINING = 3 * 2  # forward, gradient of the input, gradient of the weight; a multiply and an add

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a model.

    The released count of DeepSeek-V3, 671,026,419,200, is `total`: it has the expert biases in it and leaves MTP out.
    """

    total: int  # main model: embedding, layers, head, expert biases
    active: int  # the part of `total` that one token uses: K of E experts, and no input embedding (a look-up)
    mtp: int  # the MTP modules with their expert biases, without the embedding and head that they share
    expert_biases: int  # of total + mtp; buffers, moved by `balance.update`

    @property
    def trainable(self) -> int:
        """What the optimizer sees."""
        return self.total + self.mtp - self.expert_biases


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count the numbers of a model from its dimensions."""
    c = config
    vocabulary = c.vocab_size * c.hidden_size  # embedding, and the head again
    layers = [layer_matrices(c, layer) for layer in range(c.num_hidden_layers)]
    norms = _norms(c) * c.num_hidden_layers + c.hidden_size
    biases = c.n_routed_experts * (c.num_hidden_layers - c.first_k_dense_replace)
    total = 2 * vocabulary + sum(m.all for m in layers) + norms + biases
    idle = sum(m.all - m.active for m in layers)
    one_mtp = mtp_matrices(c).all + _norms(c) + 3 * c.hidden_size + c.n_routed_experts
    return ParameterCounts(
        total=total,
        active=total - vocabulary - idle,
        mtp=c.num_nextn_predict_layers * one_mtp,
        expert_biases=c.n_routed_experts * c.n_moe_layers,
    )


def flops_scaling(config: ModelConfig, sequence_length: int) -> int:
    """M: non-embedding training FLOPs per token (DeepSeek LLM Eq. 2, with MLA's and the active experts' matrices).

    Attention is counted full, T keys a query; output head and MTP are left out.
    """
    layers = range(config.num_hidden_layers)
    per_layer = sum(layer_matrices(config, layer).active for layer in layers)
    return TRAINING * (per_layer + config.num_hidden_layers * _attention_products(config, sequence_length))


def flops_training(config: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token of everything that is trained, attention counted full: M, the output head, MTP with its heads.

    A budget pays for this; the laws count M alone.
    """
    return flops_mfu(config, 2 * sequence_length)  # causal attention over 2T tokens has T keys a query


def flops_mfu(config: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token as they are run: causal attention (T/2 keys a query), output head, MTP with its heads.

    What is computed a second time under activation checkpointing is not counted.
    """
    return sum(flops_by_part(config, sequence_length).values())


def flops_by_part(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """`flops_mfu`, by what computes it."""
    c = config
    depths = c.num_nextn_predict_layers
    matrices = sum(layer_matrices(c, layer).active for layer in range(c.num_hidden_layers))
    matrices += depths * mtp_matrices(c).active
    experts = c.n_moe_layers * c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size
    attention = (c.num_hidden_layers + depths) * _attention_products(c, sequence_length)
    return {
        "linear maps": TRAINING * (matrices - experts),
        "experts": TRAINING * experts,
        "head": TRAINING * (1 + depths) * c.vocab_size * c.hidden_size,
        "attention": TRAINING * attention // 2,
    }


class Matrices(NamedTuple):
    """Elements of matrices."""

    all: int
    active: int  # used by one token


def layer_matrices(c: ModelConfig, layer: int) -> Matrices:
    """Of a block."""
    attention = _attention_matrices(c)
    if not c.is_moe(layer):
        dense = 3 * c.hidden_size * c.intermediate_size
        return Matrices(attention + dense, attention + dense)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    always = attention + c.n_shared_experts * expert + c.n_routed_experts * c.hidden_size  # the gate sees every token
    return Matrices(always + c.n_routed_experts * expert, always + c.num_experts_per_tok * expert)


def mtp_matrices(c: ModelConfig) -> Matrices:
    """Of an MTP module."""
    block = layer_matrices(c, c.num_hidden_layers)
    entry = 2 * c.hidden_size**2
    return Matrices(block.all + entry, block.active + entry)


def _attention_matrices(c: ModelConfig) -> int:
    heads, dim = c.num_attention_heads, c.hidden_size
    query = heads * c.qk_head_dim
    return (
        (dim * query if c.q_lora_rank is None else c.q_lora_rank * (dim + query))
        + dim * (c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * dim
    )


def _attention_products(c: ModelConfig, keys: int) -> int:
    """Multiply-adds per token of q kᵀ and of p v."""
    return keys * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)


def _norms(c: ModelConfig) -> int:
    """Norm weights of one block."""
    return 2 * c.hidden_size + (c.q_lora_rank or 0) + c.kv_lora_rank
