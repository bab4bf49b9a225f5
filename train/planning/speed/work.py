"""What a device does for one micro-batch: FLOPs of products by kind, and bytes that all else reads and writes.

A pass goes through a layer three times: forward, for the gradients of inputs, for those of weights. Products cost the same in each
(attention has no weights: twice as much in its one backward pass). What is no product is bound by memory: its time is the bytes
that it reads and writes, each operation of `model.ops` counted by itself, as nothing fuses them. FLOPs are those of `model.flops`,
which its tests hold to the real module; bytes follow from the operations.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Self

from model.config import ModelConfig
from model.flops import Recompute, layer_matrices
from model.ops.fp8 import TILE


@dataclass(frozen=True)
class Pass:
    """Of one micro-batch, or of one token: FLOPs of products, bytes of what is none."""

    linear: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Pass":
        return Pass(*(getattr(self, f.name) * times for f in fields(self)))


NOTHING = Pass()


@dataclass(frozen=True)
class Work:
    """Of a layer, a stage or a model."""

    forward: Pass = NOTHING
    inputs: Pass = NOTHING  # gradients of inputs
    weights: Pass = NOTHING  # gradients of weights
    again: Pass = NOTHING  # of the forward pass, before gradients are made
    shared_experts: Pass = NOTHING  # of the forward pass, while tokens travel
    moe_layers: int = 0  # through which tokens travel
    layers: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def backward(self) -> Pass:
        return self.inputs + self.weights


@dataclass(frozen=True)
class How:
    """What decides, beside the model, what a layer does.

    Attributes:
        tokens: of a micro-batch that this device computes, N.
        length: of their sequences, T.
        element: bytes of the compute dtype, 4 or 2.
        gathered: bytes of a weight as it reaches the layer: 4, or those of the compute dtype.
        expert, context: ranks that share experts, and sequences.
        skew: rows that arrive at the experts here over the mean.
        accumulates: whether gradients of several micro-batches are summed.
        puts_together: whether queries and keys are put together in memory, before attention reads them.
    """

    tokens: int
    length: int
    element: int
    gathered: int
    recompute: Recompute
    fp8: bool
    expert: int
    context: int
    skew: float
    accumulates: bool
    puts_together: bool

    @classmethod
    def simple(cls, tokens: int, length: int, element: int = 4) -> Self:
        """One device that keeps everything, and whose attention reads its operands as they lie."""
        return cls(tokens, length, element, element, "none", False, 1, 1, 1.0, False, False)


@cache
def work_of_layer(c: ModelConfig, layer: int, how: How) -> Work:
    """Of a block; `layer` may be that of an MTP module, of which the block alone is counted."""
    n, a = how.tokens, how.element
    dim, rank, q_rank, heads = c.hidden_size, c.kv_lora_rank, c.q_lora_rank or 0, c.num_attention_heads
    queries, values = heads * c.qk_head_dim, heads * c.v_head_dim
    up_projected = heads * (c.qk_nope_head_dim + c.v_head_dim)
    is_moe = c.is_moe(layer)
    k = c.num_experts_per_tok if is_moe else 0
    expert = 3 * dim * c.moe_intermediate_size
    rows = k * how.skew  # of experts here, a token
    active = layer_matrices(c, layer).active - k * expert
    of_others = (how.context - 1) * rank * up_projected  # keys and values of tokens of other ranks
    linear = 2 * n * (active + of_others)
    of_attention = n * how.length * (queries + values)  # causal: half of the keys, a multiply and an add
    products = Pass(linear=linear, experts=2 * n * rows * expert, attention=of_attention)

    norms = dim + q_rank + rank + dim
    width = c.n_shared_experts * c.moe_intermediate_size if is_moe else c.intermediate_size
    hidden = width + rows * c.moe_intermediate_size  # of SwiGLUs
    assembled = 0
    if how.puts_together:
        assembled = queries + up_projected * how.context + 2 * queries * how.context + values * how.context
    light = 2 * norms + assembled  # what `selective` makes again, beside SwiGLUs
    routed = _routing(c, how) if is_moe else 0.0
    forward = a * (light + 6 * dim + 3 * hidden) + routed
    backward = a * (3 * norms + assembled + 6 * dim + 6 * hidden) + routed
    quantised, quantised_again, quantised_back = _quantisation(c, how, rows, width) if how.fp8 else (0.0, 0.0, 0.0)

    matrices = active + (c.n_routed_experts // how.expert * expert if is_moe else 0)
    of_weights, of_gradients = _weights(how)
    again = NOTHING
    if how.recompute == "full":
        again = products + Pass(moved=n * (forward + quantised) + matrices * of_weights)
    elif how.recompute == "selective":
        up = 2 * n * (q_rank * queries + rank * up_projected * how.context)
        # In FP8 both halves of a SwiGLU were kept as the backward pass reads them.
        rest = quantised_again if how.fp8 else 3 * a * hidden
        again = Pass(linear=up, moved=n * (a * light + rest) + matrices * of_weights)
    return Work(
        forward=products + Pass(moved=n * (forward + quantised) + matrices * of_weights),
        inputs=Pass(linear, products.experts, 2 * of_attention, 0, n * (backward + quantised_back)),
        weights=Pass(linear, products.experts, 0, 0, matrices * of_gradients),
        again=again,
        shared_experts=Pass(linear=2 * n * c.n_shared_experts * expert) if is_moe else NOTHING,
        moe_layers=int(is_moe),
        layers=1,
    )


@cache
def work_of_head(c: ModelConfig, how: How) -> Work:
    """Of the output head with the MTP modules but for their blocks. All of the head's products are in its forward pass, which makes
    the gradients too, and so are its logits: written in the compute dtype, read, overwritten with their gradient, read twice."""
    n, a, depths = how.tokens, how.element, c.num_nextn_predict_layers
    heads = 1 + depths
    logits = 5 * a * c.vocab_size
    norms = 2 * c.hidden_size * (1 + 3 * depths)  # the last one; of a module both inputs and its own
    entry = 2 * n * depths * 2 * c.hidden_size**2
    weight = c.vocab_size * c.hidden_size * (4 + a + 8 * how.accumulates)  # read and cast; gradients are added
    return Work(
        forward=Pass(
            entry, 0, 0, 6 * n * heads * c.vocab_size * c.hidden_size, n * (heads * logits + a * norms) + weight
        ),
        inputs=Pass(linear=entry, moved=n * a * 1.5 * norms),
        weights=Pass(linear=entry),
    )


def _routing(c: ModelConfig, how: How) -> float:
    """Bytes a token of gate and permutations, in one direction: the gate's input cast to fp32 and read, some passes over its
    logits, and the sum over a token's experts. Where rows travel, they are spread, put in order as they arrive and as they leave,
    and summed at home."""
    k, dim, a = c.num_experts_per_tok, c.hidden_size, how.element
    gate = (a + 8) * dim + 6 * 4 * c.n_routed_experts
    if how.expert == 1:
        spread = a * (1 + k) * dim if how.fp8 else 0
        return gate + a * (1 + k) * dim + spread
    return gate + 2 * a * (1 + k) * dim + 2 * a * 2 * k * how.skew * dim


def _quantisation(c: ModelConfig, how: How, rows: float, width: int) -> tuple[float, float, float]:
    """Bytes a token forward, forward again and backward (`model.ops.fp8.arithmetic`): inputs of products to E4M3 in rows, and from
    there to columns; gradients of outputs to both; gate and up of a SwiGLU, which are kept. A scale of 4 bytes for each tile."""
    one = 1 + 4 / TILE
    dim, q_rank, heads = c.hidden_size, c.q_lora_rank or 0, c.num_attention_heads
    up_projected = heads * (c.qk_nope_head_dim + c.v_head_dim)
    inputs = 2 * dim + q_rank + c.kv_lora_rank * how.context + heads * c.v_head_dim + rows * dim
    outputs = (
        q_rank
        + heads * c.qk_head_dim
        + c.kv_lora_rank
        + c.qk_rope_head_dim
        + up_projected * how.context
        + 2 * dim
        + rows * dim
    )
    hidden = width + rows * c.moe_intermediate_size
    again = (how.element + one) * inputs
    # The product of both halves is quantised where it is made.
    forward = again + (how.element + one) * 2 * hidden + one * hidden
    backward = 2 * one * inputs + one * 3 * hidden + (how.element + 2 * one) * (outputs + 2 * hidden)
    return forward, again, backward


def _weights(how: How) -> tuple[float, float]:
    """Bytes an element of a matrix: to cast or quantise it in a pass, and of its gradient: to cast it back, and to add it to those
    before."""
    is_cast = how.gathered != how.element and not how.fp8
    both = how.gathered + how.element
    forward = how.gathered + 1.0 if how.fp8 else both * is_cast
    return forward, both * is_cast + (min(how.gathered, how.element) + 8.0) * how.accumulates
