"""What a forward pass leaves for its backward pass, in bytes: what each operation keeps under each mode of recomputation.

Each count is tested against the real module.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.flops import Recompute, layer_matrices
from model.ops.fp8 import TILE
from model.transformer import Part

Device = Literal["cpu", "cuda"]

CHUNK_BYTES = 16 << 20  # of logits, or those of so many tokens if they are more: as `model.ops.cross_entropy`
CHUNK_ROWS = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch on its way through a model, or through a stage of it, and how it is computed there.

    Attributes:
        micro_batch: sequences, B.
        sequence_length: T.
        element_size: bytes of the compute dtype: 4 (fp32) or 2.
        recompute: as in `parallel.recompute`.
        device: on a CPU attention in fp32 keeps queries, keys and values as the linear maps hand them out; elsewhere it keeps
            them put together, and on a CPU values padded to the width of the keys. The CPU's count is tested by measurement,
            the GPU's follows from what its kernels save.
        casts_weights: false where the weights of blocks reach them in the compute dtype.
        spreads_experts: whether rows travel to experts on other ranks and back.
        imbalance: of those rows, as many as arrive here over as many as leave; 1: as many.
        fp8: whether the products of blocks are FP8, which keeps E4M3 and scales; weights are then not kept in another dtype.
        fp8_dispatch: whether those rows travel in E4M3.
        context: ranks that share the sequences, each with its pieces of all of them; each has the latents, keys and values of
            whole sequences, though (`parallel.context`).
    """

    micro_batch: int
    sequence_length: int
    element_size: int
    recompute: Recompute = "none"
    device: Device = "cpu"
    casts_weights: bool = True
    spreads_experts: bool = False
    imbalance: float = 1.0
    fp8: bool = False
    fp8_dispatch: bool = False
    context: int = 1

    @property
    def tokens(self) -> int:
        """Of this rank, N."""
        return self.micro_batch * self.sequence_length // self.context

    def expert_rows(self, config: ModelConfig) -> float:
        """Rows that the experts here have to do with, for each token here."""
        return config.num_experts_per_tok * (self.imbalance if self.spreads_experts else 1)

    def factor(self, width: int) -> int:
        """Bytes of a row that is kept as a factor of products: in the compute dtype, or in E4M3 with a scale for every tile."""
        return width + 4 * -(-width // TILE) if self.fp8 else self.element_size * width

    def of_whole(self, size: int) -> int:
        """Bytes, for each token here, of so many for each token of the whole sequences."""
        return self.context * size

    def of_seen(self, size: int) -> int:
        """The same, for each token that a piece's queries see: p + 1 pieces by piece p, 2C + 1 by both of a rank."""
        return size if self.context == 1 else (2 * self.context + 1) * size // 2


def activation_bytes(config: ModelConfig, forward: ForwardPass, part: Part | None = None) -> dict[str, int]:
    """Bytes that live after the forward pass of one micro-batch because its backward pass needs them.

    Copies of the weights in a compute dtype other than their own are among them: without recomputation each lives until its
    gradient is taken. The batch, the parameters, a mask of packed documents and vectors of a few kilobytes are not.

    Args:
        part: of the model, a stage of a pipeline; None: all of it. What comes in from the stage before and what goes out to the
            next are counted.

    Returns:
        {part of the model that keeps them: bytes}. Norms and residual stream of a block are attention's.
    """
    c = config
    layers = layers_of(c, part)
    casts = sum(_cast_weights(c, forward, layer) for layer in layers)
    attention = sum(_kept(_attention(c, forward), forward) for _ in layers)
    feed_forward = sum(_kept(_feed_forward(c, layer, forward), forward) for layer in layers)
    of_blocks = sum(layer_bytes(c, forward, layer).kept for layer in layers)
    return {
        "attention": attention,
        "feed-forward": feed_forward,
        # And what MTP modules add to a block.
        "embedding and head": of_blocks - attention - feed_forward - casts + sum(end_bytes(c, forward, part)),
        "weights in the compute dtype": casts,
    }


def working_bytes(config: ModelConfig, forward: ForwardPass, part: Part | None = None) -> int:
    """Bytes that live beside `activation_bytes` for a while: an estimate of the most, while one block goes backward or a loss is
    made. Arguments as there."""
    layers = layers_of(config, part)
    of_loss = loss_bytes(config, forward) if part is None or part.last else 0
    return max([of_loss, *(layer_bytes(config, forward, layer).working for layer in {*layers[:1], *layers[-2:]})])


def layers_of(config: ModelConfig, part: Part | None) -> list[int]:
    """Of a part, in the order of the forward pass, those of MTP modules last."""
    main = config.num_hidden_layers
    if part is None:
        return list(range(main + config.num_nextn_predict_layers))
    return [*part.layers, *range(main, main + config.num_nextn_predict_layers * part.last)]


class LayerBytes(NamedTuple):
    """Of one layer and micro-batch.

    kept: from its forward pass to its backward pass.

    working: beside them, while it goes backward: what it computes again, its weights in the compute dtype with their gradients,
    and gradients on their way through it: of its input, output and residual stream, and of the rows, outputs, gate and up of its
    experts. Where ranks share sequences, the gradients of the keys and values of whole ones, of one piece and the sum, may be more
    than those of a feed-forward network.

    aside: between the two parts of its backward pass, factors of the products that make gradients of weights
    (`model.ops.weight_gradient`), each once. Nothing is put aside of gates and heads, nor where weights are cast first.
    """

    kept: int
    working: int
    aside: int


@cache
def layer_bytes(config: ModelConfig, forward: ForwardPass, layer: int) -> LayerBytes:
    c = config
    rows = [*_attention(c, forward), *_feed_forward(c, layer, forward)]
    is_mtp = layer >= c.num_hidden_layers
    of_mtp = [*_mtp_entry(c, forward.element_size), *_mtp_exit(c, forward)] if is_mtp else []
    kept = _kept(rows, forward) + _kept(of_mtp, forward) + _cast_weights(c, forward, layer)
    return LayerBytes(kept, _working(c, forward, layer, rows), _aside(c, forward, layer))


class EndBytes(NamedTuple):
    """Of one micro-batch: what neither a layer nor its neighbours keep."""

    kept: int  # what goes out, or the final norm and the gradients of the heads' inputs, taken in the forward pass; rotations
    head_gradient: int  # fp32, one for all losses


def end_bytes(config: ModelConfig, forward: ForwardPass, part: Part | None = None) -> EndBytes:
    """Arguments as of `activation_bytes`."""
    c, a = config, forward.element_size
    part = part or Part(range(c.num_hidden_layers))
    depths = c.num_nextn_predict_layers if part.last else 0
    per_token = _norm(c.hidden_size, a) + (1 + depths) * a * c.hidden_size if part.last else a * c.hidden_size
    if depths and not part.first:
        per_token += a * c.hidden_size  # embeddings for MTP modules, which are else the first block's input
    once = forward.sequence_length * c.qk_rope_head_dim * 4  # cosines and sines
    if part.first or depths:
        pieces = forward.micro_batch * (2 if forward.context > 1 else 1)
        once += pieces * c.num_nextn_predict_layers * a * c.hidden_size  # embeddings of the tokens beyond T
    return EndBytes(forward.tokens * per_token + once, 4 * c.vocab_size * c.hidden_size if part.last else 0)


def loss_bytes(config: ModelConfig, forward: ForwardPass) -> int:
    """Bytes that live beside all that is kept while a loss is made: the logits of a chunk of tokens, on a CPU in fp32 beside them,
    and the head in the compute dtype."""
    c, a = config, forward.element_size
    chunk = min(forward.tokens, max(CHUNK_BYTES // (4 * c.vocab_size), CHUNK_ROWS[forward.device]))
    if a == 4:
        return a * c.vocab_size * chunk
    in_fp32 = 4 * c.vocab_size * chunk if forward.device == "cpu" else 0
    return a * c.vocab_size * (chunk + c.hidden_size) + in_fp32


def _kept(rows: list["_Row"], forward: ForwardPass) -> int:
    return round(forward.tokens * sum(row.bytes for row in rows if forward.recompute in row.kept))


def _cast_weights(c: ModelConfig, forward: ForwardPass, layer: int) -> int:
    if forward.recompute != "none" or forward.element_size == 4 or not forward.casts_weights:
        return 0
    is_mtp = layer >= c.num_hidden_layers
    entry = 2 * c.hidden_size**2 if is_mtp else 0  # which FP8 leaves alone
    if forward.fp8:
        return forward.element_size * entry
    gate = c.n_routed_experts * c.hidden_size if c.is_moe(layer) else 0  # computed in fp32, from the weights themselves
    return forward.element_size * (layer_matrices(c, layer).all + entry - gate)


def _working(c: ModelConfig, forward: ForwardPass, layer: int, rows: list["_Row"]) -> int:
    a = forward.element_size
    # What is kept as the output of a product is, computed again, the same memory: only the difference comes anew.
    everything, kept = (sum(row.bytes for row in rows if mode in row.kept) for mode in ("none", forward.recompute))
    again = max(0, everything - kept)
    k, width = (forward.expert_rows(c), c.moe_intermediate_size) if c.is_moe(layer) else (1, c.intermediate_size)
    gradients = a * (3 * c.hidden_size + k * (c.hidden_size + 3 * width))
    if forward.context > 1:
        of_keys_and_values = forward.of_whole(2 * a * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim))
        queries = a * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        gradients = max(gradients, 3 * a * c.hidden_size + queries + of_keys_and_values)
    weights = 0
    if a != 4 and forward.casts_weights and not forward.fp8:
        matrices = layer_matrices(c, layer).all
        weights = a * (matrices if forward.recompute != "none" else 0) + a * matrices
    return round(forward.tokens * (again + gradients)) + weights


def _aside(c: ModelConfig, forward: ForwardPass, layer: int) -> int:
    if forward.element_size != 4 and forward.casts_weights and not forward.fp8:
        return 0
    per_token = sum(map(forward.factor, _factors(c, layer))) + _factors_apart(c, layer, forward)
    if layer >= c.num_hidden_layers:
        per_token += 3 * forward.element_size * c.hidden_size  # of eh_proj, which is not FP8
    return round(forward.tokens * per_token)


def _factors(c: ModelConfig, layer: int) -> list[int]:
    """Widths of the inputs of a block's linear maps and of the gradients of their outputs, without kv_b's and the experts'."""
    dim, q_rank, heads = c.hidden_size, c.q_lora_rank or 0, c.num_attention_heads
    width = c.n_shared_experts * c.moe_intermediate_size if c.is_moe(layer) else c.intermediate_size
    of_queries = [q_rank, q_rank, heads * c.qk_head_dim]  # gradient of q_a, input and gradient of q_b; or gradient of q
    of_attention = [dim, *of_queries, c.kv_lora_rank + c.qk_rope_head_dim, heads * c.v_head_dim, dim]
    return [*of_attention, dim, 2 * width, width, dim]


def _factors_apart(c: ModelConfig, layer: int, forward: ForwardPass) -> float:
    """Bytes a token of those that whole sequences have, and of rows of experts."""
    rank, up_projected = c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    shared = forward.context > 1 and not forward.fp8  # then the input is a view of latent and rotary key
    of_kv_b = forward.of_whole(
        forward.factor(rank + c.qk_rope_head_dim if shared else rank) + forward.factor(up_projected)
    )
    if not c.is_moe(layer):
        return of_kv_b
    rows = 2 * forward.factor(c.hidden_size) if forward.spreads_experts or forward.fp8 else 0  # else by an index
    index = 0 if forward.fp8 else 8
    return of_kv_b + forward.expert_rows(c) * (rows + index + forward.factor(3 * c.moe_intermediate_size))


class _Row(NamedTuple):
    """One line of the table of what an operation leaves for the backward pass."""

    what: str
    bytes: float  # per token
    kept: tuple[Recompute, ...]


NONE: tuple[Recompute, ...] = ("none",)
SELECTIVE: tuple[Recompute, ...] = ("selective",)
RECOMPUTED: tuple[Recompute, ...] = ("selective", "full")
PRODUCT: tuple[Recompute, ...] = ("none", "selective")
ALWAYS: tuple[Recompute, ...] = ("none", "selective", "full")


def _feed_forward(c: ModelConfig, layer: int, forward: ForwardPass) -> list[_Row]:
    if not c.is_moe(layer):
        return _swiglu(c.intermediate_size, forward)
    return [*_experts(c, forward), *(_travel(c, forward) if forward.spreads_experts else [])]


def _attention(c: ModelConfig, forward: ForwardPass) -> list[_Row]:
    a = forward.element_size
    dim, rank, q_rank, heads = c.hidden_size, c.kv_lora_rank, c.q_lora_rank or 0, c.num_attention_heads
    queries, values = heads * c.qk_head_dim, heads * c.v_head_dim
    up_projected = heads * (c.qk_nope_head_dim + c.v_head_dim)
    fused, shared = forward.device == "cpu" and a == 4, forward.context > 1
    padded = forward.device == "cpu" and not fused and c.v_head_dim < c.qk_head_dim
    attended = [
        _Row("queries", a * queries, NONE),
        _Row("keys", forward.of_seen(a * queries), NONE),
        # Unpadded: a view of kv_b's output.
        _Row("values", forward.of_seen(a * queries) if padded else forward.of_whole(a * up_projected), NONE),
    ]
    if fused:  # what the linear maps handed out; the rotary key is counted beside the latent's norm
        attended = [
            _Row("queries", a * queries, NONE),
            _Row("keys and values", forward.of_whole(a * up_projected), NONE),
        ]
    latent = rank + c.qk_rope_head_dim
    gathered = forward.of_whole(a * latent)  # of which kv_b and attention read views
    normed = [_Row("its norm's output, input of kv_b", forward.factor(rank), NONE)]
    if shared:
        normed = [
            _Row("latents and rotary keys of whole sequences, as they arrived", gathered, SELECTIVE),
            _Row("the same in order", gathered if fused or not forward.fp8 else 0, NONE),
            _Row("in FP8, input of kv_b", forward.of_whole(forward.factor(rank)) if forward.fp8 else 0, NONE),
        ]
    return [
        _Row("block input", a * dim, RECOMPUTED),
        _Row("input norm", _norm(dim, a), NONE),
        _Row("its output, input of q and kv", forward.factor(dim), NONE),
        _Row("query latent, or queries where there is none", a * (q_rank or queries), SELECTIVE),
        _Row("its norm", _norm(q_rank, a), NONE),
        _Row("its norm's output, input of q_b", forward.factor(q_rank), NONE),
        _Row("key-value latent and rotary key", a * latent, SELECTIVE),
        _Row("its norm", _norm(latent, a), NONE),  # a view of both
        *normed,
        *attended,
        _Row("output", a * (queries if padded else values), PRODUCT),
        _Row("log-sum-exp", 4 * heads, PRODUCT),
        # Unpadded, the output itself.
        _Row("without what was padded, or of both pieces, input of o", a * values if padded or shared else 0, NONE),
        _Row("output of o", a * dim, SELECTIVE),
        _Row("post-attention norm", _norm(dim, a), NONE),
        _Row("its output, input of the feed-forward part", forward.factor(dim), NONE),
    ]


def _experts(c: ModelConfig, forward: ForwardPass) -> list[_Row]:
    a, dim, k = forward.element_size, c.hidden_size, c.num_experts_per_tok
    fp8, arrived = forward.fp8, forward.expert_rows(c)
    apart = fp8 or forward.spreads_experts
    return [
        _Row("input of the gate", a * dim if fp8 else 0, NONE),  # 0: that of the others
        _Row("logits", 4 * c.n_routed_experts, PRODUCT),
        _Row("shares of affinities, for the balance loss of pieces", _shares(c, forward), NONE),
        _Row("chosen experts and their weights", 12 * k, ALWAYS),
        _Row("weights in the order of the experts", 4 * arrived, NONE),
        _Row("places of the pairs in that order", 8 * k, NONE),
        _Row("rows of the pairs in that order", 0 if apart else 8 * k, NONE),
        _Row(
            "input rows of the experts", arrived * forward.factor(dim) if fp8 else 0, NONE
        ),  # 0: the input of the gate
        *_swiglu(c.moe_intermediate_size, forward, rows=arrived),
        *_swiglu(c.n_shared_experts * c.moe_intermediate_size, forward),
    ]


def _shares(c: ModelConfig, forward: ForwardPass) -> int:
    """Where a device has whole sequences, one operation makes the loss and keeps the logits alone."""
    if forward.context == 1:
        return 0
    return 4 * c.n_routed_experts * (2 if forward.device == "cpu" else 1)  # on a CPU the logarithm keeps a buffer


def _travel(c: ModelConfig, forward: ForwardPass) -> list[_Row]:
    """Beside the rows of `_experts`."""
    rows = forward.expert_rows(c)
    row = c.hidden_size + -(-c.hidden_size // TILE) if forward.fp8_dispatch else forward.element_size * c.hidden_size
    return [
        _Row("orders of the rows that arrived, there and back", 16 * rows, NONE),
        _Row("rows that arrived, by the rank they came from", rows * row, SELECTIVE if forward.fp8 else PRODUCT),
        _Row("their weights", 4 * rows, SELECTIVE),
    ]


def _swiglu(width: int, forward: ForwardPass, rows: float = 1) -> list[_Row]:
    return [
        _Row("gate and up", 2 * rows * forward.factor(width), PRODUCT),
    ]


def _mtp_entry(c: ModelConfig, a: int) -> list[_Row]:
    dim = c.hidden_size
    shared = a * dim  # the embedding is the first block's input, which is counted there
    return [
        _Row("states of the depth before", a * dim, SELECTIVE),  # `full` keeps them for the block's input
        _Row("norms of embedding and state", 2 * _norm(dim, a) - shared, NONE),
        _Row("both outputs, input of eh_proj", 2 * a * dim, NONE),
    ]


def _mtp_exit(c: ModelConfig, forward: ForwardPass) -> list[_Row]:
    output = forward.element_size * c.hidden_size
    return [
        _Row("final norm of the depth", _norm(c.hidden_size, forward.element_size), NONE),
        _Row("for it: output of the shared experts", output, SELECTIVE),
        _Row("sums of the experts' outputs", output, SELECTIVE),
    ]


def _norm(width: int, a: int) -> int:
    """RMSNorm keeps its input, and 1/rms in fp32."""
    return a * width + 4 if width else 0
