"""Exact counts: parameters, training FLOPs per token, bytes kept for the backward pass. Each is tested against the real module.

FLOPs are those of matrix products, 2 for a multiply-add, and a training step is three times its forward pass. Conventions have
names: `flops_scaling` is the M of the scaling laws, `flops_training` what a budget pays for, `flops_mfu` what model FLOPs
utilisation divides.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.ops.fp8 import TILE

TRAINING = 3 * 2  # forward, gradient of the input, gradient of the weight; a multiply and an add

Recompute = Literal["none", "selective", "full"]
Device = Literal["cpu", "cuda"]

CHUNK_BYTES = 16 << 20  # of logits, or those of so many tokens if they are more: as `model.ops.cross_entropy`
CHUNK_ROWS = {"cpu": 128, "cuda": 1024}


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
    layers = [_layer_matrices(c, layer) for layer in range(c.num_hidden_layers)]
    norms = _norms(c) * c.num_hidden_layers + c.hidden_size
    biases = c.n_routed_experts * (c.num_hidden_layers - c.first_k_dense_replace)
    total = 2 * vocabulary + sum(m.all for m in layers) + norms + biases
    idle = sum(m.all - m.active for m in layers)
    one_mtp = _mtp_matrices(c).all + _norms(c) + 3 * c.hidden_size + c.n_routed_experts
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
    per_layer = sum(_layer_matrices(config, layer).active for layer in layers)
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
    matrices = sum(_layer_matrices(c, layer).active for layer in range(c.num_hidden_layers))
    matrices += depths * _mtp_matrices(c).active
    experts = c.n_moe_layers * c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size
    attention = (c.num_hidden_layers + depths) * _attention_products(c, sequence_length)
    return {
        "linear maps": TRAINING * (matrices - experts),
        "experts": TRAINING * experts,
        "head": TRAINING * (1 + depths) * c.vocab_size * c.hidden_size,
        "attention": TRAINING * attention // 2,
    }


class _Matrices(NamedTuple):
    all: int
    active: int  # used by one token


def _layer_matrices(c: ModelConfig, layer: int) -> _Matrices:
    attention = _attention_matrices(c)
    if not c.is_moe(layer):
        dense = 3 * c.hidden_size * c.intermediate_size
        return _Matrices(attention + dense, attention + dense)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    always = attention + c.n_shared_experts * expert + c.n_routed_experts * c.hidden_size  # the gate sees every token
    return _Matrices(always + c.n_routed_experts * expert, always + c.num_experts_per_tok * expert)


def _mtp_matrices(c: ModelConfig) -> _Matrices:
    block = _layer_matrices(c, c.num_hidden_layers)
    entry = 2 * c.hidden_size**2
    return _Matrices(block.all + entry, block.active + entry)


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


# Activations ----------------------------------------------------------------------------------------------------------


def activation_bytes(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    element_size: int,
    recompute: Recompute = "none",
    device: Device = "cpu",
    casts_weights: bool = True,
    spreads_experts: bool = False,
    fp8: bool = False,
    fp8_dispatch: bool = False,
) -> dict[str, int]:
    """Bytes that live after the forward pass of one micro-batch because its backward pass needs them.

    Copies of the weights in a compute dtype other than their own are among them: without recomputation each lives until its
    gradient is taken. The batch, the parameters, a mask of packed documents and vectors of a few kilobytes are not.

    Args:
        micro_batch: sequences, B.
        sequence_length: T.
        element_size: bytes of the compute dtype: 4 (fp32) or 2.
        recompute: as in `parallel.recompute`.
        device: on a CPU attention in fp32 keeps queries, keys and values as the linear maps hand them out; elsewhere it keeps
            them put together, and on a CPU values padded to the width of the keys. The CPU's count is tested by measurement,
            the GPU's follows from what its kernels save.
        casts_weights: false where the weights of blocks reach them in the compute dtype.
        spreads_experts: whether rows travel to experts on other ranks and back; counted for as many rows to arrive as leave.
        fp8: whether the products of blocks are FP8, which keeps E4M3 and scales; weights are then not kept in another dtype.
        fp8_dispatch: whether those rows travel in E4M3.

    Returns:
        {part of the model that keeps them: bytes}. Norms and residual stream of a block are attention's.
    """
    c, a = config, element_size
    sizes = _Sizes(a, device, fp8, spreads_experts)
    depths = c.num_nextn_predict_layers
    layers = [*range(c.num_hidden_layers), *depths * [c.num_hidden_layers]]

    def kept(rows: list[_Row]) -> int:
        return sum(row.bytes for row in rows if recompute in row.kept)

    attention = sum(kept(_attention(c, sizes)) for _ in layers)
    feed_forward = sum(kept(_feed_forward(c, layer, sizes)) for layer in layers)
    if spreads_experts:
        arrived = c.hidden_size + -(-c.hidden_size // TILE) if fp8_dispatch else a * c.hidden_size
        feed_forward += c.n_moe_layers * kept(_travel(c, sizes, arrived))
    per_token = depths * kept([*_mtp_entry(c, a), *_mtp_exit(c, sizes)])
    per_token += _norm(c.hidden_size, a)  # the final norm
    per_token += (1 + depths) * a * c.hidden_size  # gradient of each head's input, taken in the forward pass

    once = 4 * c.vocab_size * c.hidden_size  # gradient of the output head, one for all losses
    once += sequence_length * c.qk_rope_head_dim * 4  # cosines and sines
    if depths:
        once += micro_batch * depths * a * c.hidden_size  # embeddings of the tokens beyond T
    casts = 0
    if recompute == "none" and a != 4 and casts_weights:
        matrices = [_layer_matrices(c, layer) for layer in range(c.num_hidden_layers)] + depths * [_mtp_matrices(c)]
        gates = c.n_moe_layers * c.n_routed_experts * c.hidden_size  # computed in fp32, from the weights themselves
        entries = depths * 2 * c.hidden_size**2  # of MTP modules, which FP8 leaves alone
        casts = a * (entries if fp8 else sum(layer.all for layer in matrices) - gates)
    tokens = micro_batch * sequence_length
    return {
        "attention": tokens * attention,
        "feed-forward": tokens * feed_forward,
        "embedding and head": tokens * per_token + once,  # and what MTP modules add to a block
        "weights in the compute dtype": casts,
    }


def working_bytes(
    config: ModelConfig,
    micro_batch: int,
    sequence_length: int,
    element_size: int,
    recompute: Recompute = "none",
    device: Device = "cpu",
    casts_weights: bool = True,
    fp8: bool = False,
) -> int:
    """Bytes that live beside `activation_bytes` for a while: an estimate of the most, while one block goes backward or a loss is
    made. Arguments as there.

    Those of a block are what it computes again, its weights in the compute dtype with their gradients, and gradients on their way
    through it: of its input, output and residual stream, and of the rows, outputs, gate and up of its experts. Those of a loss are
    the logits of a chunk of tokens, on a CPU in fp32 beside them, and the head in the compute dtype.
    """
    c, a = config, element_size
    sizes, tokens = _Sizes(a, device, fp8), micro_batch * sequence_length
    chunk = min(tokens, max(CHUNK_BYTES // (4 * c.vocab_size), CHUNK_ROWS[device]))
    most = a * c.vocab_size * chunk
    if a != 4:
        most += a * c.vocab_size * c.hidden_size + (4 * c.vocab_size * chunk if device == "cpu" else 0)
    for layer in {0, c.num_hidden_layers - 1}:
        rows = [*_attention(c, sizes), *_feed_forward(c, layer, sizes)]
        # What is kept as the output of a product is, computed again, the same memory: only the difference comes anew.
        everything, kept = (sum(row.bytes for row in rows if mode in row.kept) for mode in ("none", recompute))
        again = max(0, everything - kept)
        k, width = (c.num_experts_per_tok, c.moe_intermediate_size) if c.is_moe(layer) else (1, c.intermediate_size)
        gradients = a * (3 * c.hidden_size + k * (c.hidden_size + 3 * width))
        weights = 0
        if a != 4 and casts_weights and not fp8:
            matrices = _layer_matrices(c, layer).all
            weights = a * (matrices if recompute != "none" else 0) + a * matrices
        most = max(most, tokens * (again + gradients) + weights)
    return most


class _Sizes(NamedTuple):
    """What decides how much an operation keeps."""

    element: int  # bytes of the compute dtype
    device: Device
    fp8: bool
    travel: bool = False  # whether rows travel to experts on other ranks

    def factor(self, width: int) -> int:
        """Bytes of a row that is kept as a factor of products: in the compute dtype, or in E4M3 with a scale for every tile."""
        return width + 4 * -(-width // TILE) if self.fp8 else self.element * width


class _Row(NamedTuple):
    """One line of the table of what an operation leaves for the backward pass."""

    what: str
    bytes: int  # per token
    kept: tuple[Recompute, ...]


NONE: tuple[Recompute, ...] = ("none",)
SELECTIVE: tuple[Recompute, ...] = ("selective",)
RECOMPUTED: tuple[Recompute, ...] = ("selective", "full")
PRODUCT: tuple[Recompute, ...] = ("none", "selective")
ALWAYS: tuple[Recompute, ...] = ("none", "selective", "full")


def _feed_forward(c: ModelConfig, layer: int, sizes: _Sizes) -> list[_Row]:
    return _experts(c, sizes) if c.is_moe(layer) else _dense(c, sizes)


def _attention(c: ModelConfig, sizes: _Sizes) -> list[_Row]:
    a = sizes.element
    dim, rank, q_rank, heads = c.hidden_size, c.kv_lora_rank, c.q_lora_rank or 0, c.num_attention_heads
    queries, values = heads * c.qk_head_dim, heads * c.v_head_dim
    up_projected = heads * (c.qk_nope_head_dim + c.v_head_dim)
    fused = sizes.device == "cpu" and a == 4
    padded = sizes.device == "cpu" and not fused and c.v_head_dim < c.qk_head_dim
    attended = [
        _Row("queries and keys", 2 * a * queries, NONE),
        _Row("values", a * (queries if padded else up_projected), NONE),  # unpadded: a view of kv_b's output
    ]
    if fused:  # what the linear maps handed out; the rotary key is counted beside the latent's norm
        attended = [_Row("queries", a * queries, NONE), _Row("keys and values", a * up_projected, NONE)]
    latent = rank + c.qk_rope_head_dim
    return [
        _Row("block input", a * dim, RECOMPUTED),
        _Row("input norm", _norm(dim, a), NONE),
        _Row("its output, input of q and kv", sizes.factor(dim), NONE),
        _Row("query latent, or queries where there is none", a * (q_rank or queries), SELECTIVE),
        _Row("its norm", _norm(q_rank, a), NONE),
        _Row("its norm's output, input of q_b", sizes.factor(q_rank), NONE),
        _Row("key-value latent and rotary key", a * latent, SELECTIVE),
        _Row("its norm", _norm(latent, a), NONE),  # a view of both
        _Row("its norm's output, input of kv_b", sizes.factor(rank), NONE),
        *attended,
        _Row("output", a * (queries if padded else values), PRODUCT),
        _Row("log-sum-exp", 4 * heads, PRODUCT),
        _Row("without what was padded, input of o", a * values if padded else 0, NONE),  # unpadded: the output itself
        _Row("output of o", a * dim, SELECTIVE),
        _Row("post-attention norm", _norm(dim, a), NONE),
        _Row("its output, input of the feed-forward part", sizes.factor(dim), NONE),
    ]


def _dense(c: ModelConfig, sizes: _Sizes) -> list[_Row]:
    return _swiglu(c.intermediate_size, sizes)


def _experts(c: ModelConfig, sizes: _Sizes) -> list[_Row]:
    a, dim, k = sizes.element, c.hidden_size, c.num_experts_per_tok
    return [
        _Row("input of the gate", a * dim if sizes.fp8 else 0, NONE),  # 0: that of the others
        _Row("logits", 4 * c.n_routed_experts, PRODUCT),
        _Row("chosen experts and their weights", 12 * k, ALWAYS),
        _Row("weights in the order of the experts", 4 * k, NONE),
        _Row("places of the pairs in that order", 8 * k, NONE),
        _Row("rows of the pairs in that order", 0 if sizes.fp8 or sizes.travel else 8 * k, NONE),
        _Row("input rows of the experts", k * sizes.factor(dim) if sizes.fp8 else 0, NONE),  # 0: the input of the gate
        *_swiglu(c.moe_intermediate_size, sizes, rows=k),
        _Row("outputs of the experts, to be weighed", a * k * dim if sizes.fp8 or sizes.travel else 0, PRODUCT),
        *_swiglu(c.n_shared_experts * c.moe_intermediate_size, sizes),
    ]


def _travel(c: ModelConfig, sizes: _Sizes, arrived: int) -> list[_Row]:
    """Beside the rows of `_experts`, whose outputs are kept where they come home. A row arrives in so many bytes."""
    k = c.num_experts_per_tok
    return [
        _Row("orders of the rows that arrived, there and back", 16 * k, NONE),
        _Row("rows that arrived, by the rank they came from", k * arrived, SELECTIVE if sizes.fp8 else PRODUCT),
    ]


def _swiglu(width: int, sizes: _Sizes, rows: int = 1) -> list[_Row]:
    return [
        _Row("gate and up", 2 * rows * sizes.factor(width), NONE),
        _Row("gate and up as the products gave them out", 2 * rows * sizes.element * width, SELECTIVE),
    ]


def _mtp_entry(c: ModelConfig, a: int) -> list[_Row]:
    dim = c.hidden_size
    shared = a * dim  # the embedding is the first block's input, which is counted there
    return [
        _Row("states of the depth before", a * dim, SELECTIVE),  # `full` keeps them for the block's input
        _Row("norms of embedding and state", 2 * _norm(dim, a) - shared, NONE),
        _Row("both outputs, input of eh_proj", 2 * a * dim, NONE),
    ]


def _mtp_exit(c: ModelConfig, sizes: _Sizes) -> list[_Row]:
    output = sizes.element * c.hidden_size
    return [
        _Row("final norm of the depth", _norm(c.hidden_size, sizes.element), NONE),
        _Row("for it: output of the shared experts", output, SELECTIVE),
        _Row("sums of the experts' outputs", 0 if sizes.fp8 or sizes.travel else output, SELECTIVE),
    ]


def _norm(width: int, a: int) -> int:
    """RMSNorm keeps its input, and 1/rms in fp32."""
    return a * width + 4 if width else 0
