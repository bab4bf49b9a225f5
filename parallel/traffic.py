"""What one rank sends in an optimizer step: a formula for each engine; `tests/parallel/test_traffic.py` holds it to a count.

A collective over n ranks with a whole tensor of S bytes, as a ring does it:

    all-reduce                              a rank sends 2·(n−1)/n·S
    all-gather, reduce-scatter, reduce                     (n−1)/n·S
    all-to-all of rows                                     (n−1)/n·S      in expectation: the routing decides
    from one rank to another                                       S

The S of a step, with P parameters: X of experts, V·D of the embedding, H of the head and the final norm, G of the other norms
and the gates, M of all other matrices. m micro-batches; a bytes to an element of the compute dtype; s ranks share a model, e of
them its experts; r replicas:

    engine                    all-gather                                  reduce-scatter    all-reduce
    ddp                                                                                     4P
    fsdp                      m·(2·(a·(M + X) + 4G) + 4VD + 4H)           m·4P              4P/s over r ranks
    fsdp, kept gathered       a·(M + X) + 4·(G + VD + H)                  4P                4P/s over r ranks
    zero1                     4P                                                            4P
    zero2                     4P                                                            m·4P
    zero3                     m·2·4P; recomputing, about m·3·4P           m·4P

    with expert parallelism   X becomes X/e, gathered, scattered and reduced over s/e ranks (s: all under zero1 and zero2), and
                              tokens travel over e ranks:
                              all-to-all  layers with experts · tokens · K · (trips · D · a + trips/2 · 4)
                              trips: there and back, forward and backward: 4; 6 where `full` recomputation sends again
                              The weights of rows travel with them, and the gradients of both.
                              With FP8 dispatch the way to the experts, forward and recomputed, and the way there of the gradients
                              of what they hand out have D + ⌈D/128⌉ bytes a row in place of D · a

    with context parallelism  latents and rotary keys, R + rope numbers a token and layer, over C ranks:
                              all-gather      layers · C · tokens · (R + rope) · a; twice where `full` recomputation gathers again
                              reduce-scatter  the same, once: their gradients
                              Keys and values would be H · (nope + rope + v) numbers in place of R + rope: 71 times more in V3.

    in a pipeline             P and all else is what lies on the pipeline rank, `fsdp` is kept gathered, and ranks are those of its
                              stages. Where the next stage lies on another rank, states go there, where the one before does, their
                              gradients: tokens · D · a each. An embedding that lies on two ranks: all-reduce of 4VD/s over both.

`tokens` are those that one rank computes: with context parallelism pieces of sequences.

Gradients travel in fp32, weights under FSDP in the dtype that computes with them, under DeepSpeed in fp32. FSDP pads each
parameter to a multiple of s rows and ZeRO-3 to a multiple of s elements, which is counted here; ZeRO-1 and 2 pad their flat
weights by fewer than 2s elements an optimizer group, which is not.

What of it leaves a node of g devices (`Flow.by_link`) follows from where ranks lie (`parallel.layout`): members of a group are
`stride` ranks apart, so that k of n are in a node, the most that divide the group. A ring goes through each node once, in at one
device and out at another, and a library lays k rings, one for each network card: of what a device sends a k-th goes over the
network, the rest over the link, in a group of one node all. Of an all-to-all (k−1)/n of the rows stay in the node, and (n−k)/n
leave it: each row travels by itself, where DeepEP sends a token to a node once and lets the node pass it on. States go over the
network where the neighbour in the pipeline is on another node.

    V3 on nodes of 8: experts     64 neighbours, k = 8    7/64 of the rows over the link, 56/64 over the network
                      shards     128 neighbours, k = 8    of 127/128 of the bytes 7/8 and 1/8
                      pipeline   stages 128 ranks apart   all over the network

Left out is what has a few kilobytes: targets, losses with the expert counts, the norm, and FP8's largest scales (`GlobalStep`), the
counts of each layer's rows before they travel (int64), how often the balance loss sees each expert in sequences that ranks share,
DDP's buckets after its first backward pass, and DeepSpeed's own norm.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch

from model.config import ModelConfig
from model.ops.fp8.quantize import TILE
from parallel.footprint import Shapes, shapes_on
from parallel.layout import Layout, cut_of
from parallel.parts import EMBEDDING

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all", "send"]
GRADIENT = 4  # bytes of an element of a gradient, and of a master weight
WEIGHT = 4  # of how much a row counts, on the way to its expert, and of the gradient of that, on the way back

# DeepSpeed's defaults, in elements.
PERSISTENT, REUSED, PREFETCHED = 100_000, 1_000_000_000, 50_000_000


class Links(NamedTuple):
    """Bytes that one device sends, by what carries them."""

    node: float  # the link between the devices of a node
    network: float  # between nodes


class Flow(NamedTuple):
    """All collectives of one kind in a step."""

    what: str
    collective: Collective
    ranks: int
    whole: int  # bytes of the whole tensors, summed over the calls
    stride: int = 1  # from a member of the group to the next
    first: int = 0  # a member: of "send", who sends to first + stride

    @property
    def sent(self) -> float:
        """Bytes that one rank sends."""
        return sent(self.collective, self.ranks, self.whole)

    def by_link(self, node: int) -> Links:
        """The same, by what carries them, on nodes of so many devices."""
        if self.collective == "send":
            stays = self.first // node == (self.first + self.stride) // node
            return Links(self.sent, 0) if stays else Links(0, self.sent)
        n, together = self.ranks, members_in_node(self.ranks, self.stride, node)
        if together == n:
            return Links(self.sent, 0)
        if self.collective == "all_to_all":
            return Links((together - 1) / n * self.whole, (n - together) / n * self.whole)
        return Links(self.sent * (together - 1) / together, self.sent / together)


@cache
def members_in_node(ranks: int, stride: int, node: int) -> int:
    """Of a group of so many ranks, `stride` apart, those in one node of so many devices: the most that divide the group."""
    return max(k for k in range(1, ranks + 1) if ranks % k == 0 and (k == 1 or k * stride <= node))


def sent(collective: Collective, ranks: int, whole: float) -> float:
    """Bytes that a rank sends for tensors of `whole` bytes, on a ring; mean over the ranks."""
    if collective == "send":
        return whole
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks * whole


def step_traffic(
    layout: Layout, config: ModelConfig, *, tokens: int, micro_batches: int, element_size: int, pipeline_rank: int = 0
) -> list[Flow]:
    """What travels in one optimizer step.

    Args:
        tokens: predicted tokens that one rank computes in the step, all its micro-batches together.
        micro_batches: of one rank in the step.
        element_size: bytes of the compute dtype: 4 (fp32) or 2.
        pipeline_rank: whose flows they are.
    """
    shapes = shapes_on(layout, config, pipeline_rank)
    flows: Iterable[Flow]
    if layout.config.engine == "ddp":
        flows = _ddp(layout, shapes)
    elif layout.config.engine == "fsdp":
        flows = _fsdp(layout, shapes, micro_batches, element_size)
    elif layout.config.engine == "zero3":
        flows = _zero3(layout, config, shapes, micro_batches)
    else:
        flows = _zero(layout, shapes, micro_batches)
    whole: Counter[tuple[str, Collective, int, int, int]] = Counter()
    if layout.config.pipeline > 1:
        flows = chain(
            flows, _states(layout, config, pipeline_rank, tokens * element_size), _copies(layout, shapes, pipeline_rank)
        )
    if layout.config.context > 1:
        flows = chain(flows, _latents(layout, config, shapes, tokens * element_size))
    for flow in chain(flows, _tokens(layout, config, shapes, tokens, element_size)):
        whole[flow.what, flow.collective, flow.ranks, flow.stride, flow.first] += flow.whole
    return [Flow(*key[:3], size, *key[3:]) for key, size in whole.items() if key[2] > 1]


def _ddp(layout: Layout, shapes: Shapes) -> Iterator[Flow]:
    for shape in shapes.values():
        yield Flow("gradients", "all_reduce", layout.stage_ranks, GRADIENT * shape.numel())


def _fsdp(layout: Layout, shapes: Shapes, micro_batches: int, element_size: int) -> Iterator[Flow]:
    reshards, expert = layout.config.reshards, layout.config.expert
    times = micro_batches if reshards else 1
    for name, shape in shapes.items():
        what = _what(name, shape)
        stride = 1
        if what == "experts" and expert > 1:
            ranks, stride, elements = layout.expert_shard, expert, shape.numel() // expert
        else:
            ranks = layout.shard
            cut = cut_of(shape, ranks)
            elements = _ceil(shape[cut], ranks) * shape.numel() // shape[cut]
        size = element_size if what in ("blocks", "experts") else GRADIENT
        in_backward = reshards and what not in ("embedding", "head")
        yield Flow(what, "all_gather", ranks, (1 + in_backward) * times * size * elements, stride)
        yield Flow("gradients", "reduce_scatter", ranks, times * GRADIENT * elements, stride)
        yield Flow("gradients", "all_reduce", layout.config.replicate, GRADIENT * (elements // ranks), layout.shard)


def _what(name: str, shape: torch.Size) -> str:
    """The unit of `parallel.fsdp` that a parameter belongs to, as far as it makes a difference."""
    if name in ("lm_head.weight", "model.norm.weight"):
        return "head"
    if name == "model.embed_tokens.weight":
        return "embedding"
    if len(shape) == 1 or name.endswith(".gate.weight"):
        return "norms and gates"
    return "experts" if ".experts." in name else "blocks"


def _zero(layout: Layout, shapes: Shapes, micro_batches: int) -> Iterator[Flow]:
    """Stages 1 and 2. DeepSpeed sums gradients whole, on every rank, and then keeps a part of them; told not to use all-reduce, it
    reduces each part to its owner with half the traffic."""
    to_owners = not _zero_option(layout, "use_multi_rank_bucket_allreduce", True)
    times = micro_batches if layout.config.engine == "zero2" else 1
    for name, shape in shapes.items():
        is_expert = _what(name, shape) == "experts"
        ranks, apart = (layout.expert_shard, layout.config.expert) if is_expert else (layout.world_size, 1)
        size = GRADIENT * shape.numel() // apart
        yield Flow("gradients", "reduce" if to_owners else "all_reduce", ranks, times * size, apart)
        yield Flow("weights", "all_gather", ranks, size, apart)


def _zero3(layout: Layout, config: ModelConfig, shapes: Shapes, micro_batches: int) -> Iterator[Flow]:
    """Small parameters stay whole until the optimizer's step, and are gathered after it. The others are gathered for the forward
    pass and for the backward pass and, since DeepSpeed frees a module's parameters when it has run, for recomputation too.

    What is needed again within `stage3_max_reuse_distance` elements is not freed in between: of a model smaller than half of
    that, nothing. The same holds for what the prefetch looks ahead to. A larger model saves less than that many elements.
    """
    kept = max(
        _zero_option(layout, "stage3_max_reuse_distance", REUSED),
        _zero_option(layout, "stage3_prefetch_bucket_size", PREFETCHED),
    )
    persistent = _zero_option(layout, "stage3_param_persistence_threshold", PERSISTENT)
    near_the_turn = sum(shape.numel() for shape in shapes.values()) <= kept / 2
    for name, shape in shapes.items():
        elements = _ceil(shape.numel(), layout.world_size)
        times = micro_batches * (1 if near_the_turn else 2 + _runs_again(layout, config, name))
        yield Flow("weights", "all_gather", layout.world_size,
                   GRADIENT * elements * (1 if shape.numel() <= persistent else times))  # fmt: skip
        yield Flow("gradients", "reduce_scatter", layout.world_size, micro_batches * GRADIENT * elements)


def _runs_again(layout: Layout, config: ModelConfig, name: str) -> bool:
    """A block runs again when the backward pass of its last module asks for what was not kept: that one's weights are there."""
    if layout.config.recompute == "none" or not name.startswith("model.layers."):
        return False
    if int(name.split(".")[2]) >= config.num_hidden_layers:  # of an MTP module
        return not name.endswith(".shared_head.norm.weight")
    # What experts on other ranks hand out is summed behind them.
    ends_with_experts = layout.config.expert == 1 and ".mlp.experts." in name
    return not (ends_with_experts or name.endswith(".mlp.down_proj.weight"))


def _states(layout: Layout, config: ModelConfig, rank: int, size: int) -> Iterator[Flow]:
    """States for the next stage, their gradients for the one before, where these lie on other ranks. size: of a number a token."""
    placement, apart = layout.placement, layout.stage_ranks
    whole, first = size * config.hidden_size, rank * apart
    for stage in placement.stages_of(rank):
        if stage + 1 < layout.config.stages and (there := placement.rank_of(stage + 1)) != rank:
            yield Flow("states", "send", 2, whole, (there - rank) * apart, first)
        if stage > 0 and (there := placement.rank_of(stage - 1)) != rank:
            yield Flow("gradients of states", "send", 2, whole, (there - rank) * apart, first)


def _copies(layout: Layout, shapes: Shapes, rank: int) -> Iterator[Flow]:
    """The gradient of an embedding that the first stage's rank and the last one's have."""
    ends = {layout.placement.rank_of(stage) for stage in (0, layout.config.stages - 1)}
    if len(ends) > 1 and rank in ends and layout.model and layout.model.num_nextn_predict_layers:
        rows, width = shapes[EMBEDDING]
        part = GRADIENT * (_ceil(rows, layout.shard) // layout.shard) * width
        yield Flow("gradients", "all_reduce", 2, part, (max(ends) - min(ends)) * layout.stage_ranks)


def _latents(layout: Layout, config: ModelConfig, shapes: Shapes, size: int) -> Iterator[Flow]:
    """Latents and rotary keys, between ranks that share sequences. size: of a number a token here."""
    layers = sum(name.endswith(".kv_b_proj.weight") for name in shapes)
    ranks = layout.config.context
    whole = layers * ranks * size * (config.kv_lora_rank + config.qk_rope_head_dim)
    yield Flow("latents", "all_gather", ranks, whole * (2 if layout.config.recompute == "full" else 1))
    yield Flow("gradients of latents", "reduce_scatter", ranks, whole)


def _tokens(layout: Layout, config: ModelConfig, shapes: Shapes, tokens: int, element_size: int) -> Iterator[Flow]:
    layers = sum(name.endswith(".mlp.gate.weight") for name in shapes)
    rows = layers * tokens * config.num_experts_per_tok
    size = bytes_of_row(layout, config.hidden_size, element_size)
    yield Flow("tokens", "all_to_all", layout.config.expert, rows * size)


def bytes_of_row(layout: Layout, width: int, element_size: int) -> int:
    """Bytes of one token's row to one expert, and of its weight, in all their trips through a layer."""
    forward = 2 if layout.config.recompute == "full" else 1
    return (forward + 1) * sum(bytes_of_trips(layout, width, element_size))


def bytes_of_trips(layout: Layout, width: int, element_size: int) -> tuple[int, int]:
    """Bytes of it to an expert, and of what the expert hands out; or of the gradient of the latter, and of that of the row.

    The row's weight is counted with the former; its gradient travels with that of the row.
    """
    plain = width * element_size
    return WEIGHT + (width + _ceil(width, TILE) // TILE if layout.config.fp8_dispatch else plain), plain


def _zero_option(layout: Layout, name: str, default: Any) -> Any:
    return layout.config.deepspeed.get("zero_optimization", {}).get(name, default)


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit) * unit
