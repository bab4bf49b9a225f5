"""When a rank holds most in a step: a micro-batch goes through moment by moment, and every moment says what lies there.

Parameters and the moments of Adam lie there always (`parallel.footprint`); the rest comes and goes. With

    K_i      what layer i keeps from its forward pass to its backward pass, A_i what it needs beside that in the backward pass
             (`model.activations.layer_bytes`)
    E_i      elements of its parameters, of experts those of one expert rank; N_i those of its feed-forward network
    e        bytes of the compute dtype
    s        ranks to a copy of the model

these are the moments of a step without a pipeline:

| moment              | activations      | of weights and gradients, beside gradients that are there already                      |
|---------------------|------------------|----------------------------------------------------------------------------------------|
| first layers        |                  | fsdp: head and embedding whole, the embedding a second time as it arrived (flat)       |
| forward in layer i  | Σ_{j≤i} K_j      | fsdp: head, layer i as it arrived and as it was copied out of that                     |
| loss                | Σ K, logits      | the gradient of the head as it grows; fsdp: head, the last layer as it arrived         |
| backward in layer i | Σ_{j≤i} K_j, A_i | e·N_i of gradients that are yet to be added; fsdp: head and its gradient, layer i,     |
|                     |                  | layer i−1 as it arrived, 4·E_{i+1} of gradients as they were sent                      |
| layer i is reduced  | Σ_{j<i} K_j      | fsdp: e·E_i of gradients, 4·E_i as they are sent, 4·E_i/s as they arrive; layer i−1    |
|                     |                  | as it arrived; head and its gradient                                                   |
| end                 |                  | fsdp: gradients of head and embedding, and one of them as it is sent, or the head      |
| update              |                  | on a CPU with moments in bf16: 12 bytes for fp32 copies of each of 2²⁶ weights at most |

Gradients are there already under ddp, in buckets that stay, and with several micro-batches. A single process with one micro-batch,
and fsdp, have those of the layers behind i. With `reshard_after_forward: false` what has been gathered stays until it has gone
backward for the last time, and gradients of several micro-batches are summed whole, in fp32, before they are sent. So in a
pipeline, whose order of chunks (`parallel.timeline`) is played through: the K of a micro-batch lie on a rank from its forward to
its backward chunk, and then factors that were put aside until gradients of weights are made of them; gradients of a stage from its
first backward chunk on.

With experts on several ranks, layer i+1 arrives while i goes forward. Experts are gathered and reduced apart from the rest of their
layer. Ranks that share sequences hold what ranks without context parallelism do.

Not counted: what libraries of communication keep for themselves, the allocator's slack, kernels' own scratch memory.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from model.activations import Device, ForwardPass, LayerBytes, end_bytes, layer_bytes, layers_of, loss_bytes
from model.config import ModelConfig
from model.transformer import Part
from parallel.footprint import Footprint, Unit, footprint, shapes_on, units_of
from parallel.layout import Layout
from parallel.parts import parts_of
from parallel.timeline import order_of

BUCKET_ELEMENTS = 2**26  # that `train.optimizer` updates at once, where moments are in bf16
EMBEDDING, ROOT = "embedding", "root"

_order = cache(order_of)  # takes PyTorch longer than all else here


class Moment(NamedTuple):
    """Bytes of a rank beside parameters and moments of Adam, by what they are for."""

    when: str
    gradients: int
    gathered: int = 0  # parameters of other ranks, as they arrive and as they are used
    communication: int = 0  # messages: gradients that are reduced, rows of tokens, states
    activations: int = 0  # kept for backward passes
    working: int = 0

    @property
    def all(self) -> int:
        return self.gradients + self.gathered + self.communication + self.activations + self.working


def fullest(moments: Iterator[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.all)


def moments_of(
    layout: Layout,
    config: ModelConfig,
    forward: ForwardPass,
    moment_size: int = 4,
    micro_batches: int = 1,
    pipeline_rank: int = 0,
) -> Iterator[Moment]:
    """Of a rank, in order.

    Args:
        forward: of its micro-batches, as `forward_pass` makes it.
        moment_size: bytes of an element of each of Adam's two moments.
        micro_batches: of a rank in a step.
    """
    c = layout.config
    held = footprint(layout, config, moment_size, micro_batches, pipeline_rank)
    rank = _Rank(layout, config, forward, micro_batches, pipeline_rank, held)
    if c.pipeline > 1:
        yield from _in_pipeline(rank)
    elif c.engine == "fsdp":
        yield from _of_fsdp(rank)
    else:
        yield from _of_whole(rank)
    in_fp32 = 12 * min(held.moments // 4, BUCKET_ELEMENTS) if moment_size == 2 and forward.device == "cpu" else 0
    yield Moment("update", held.gradients, 0, held.communication, 0, in_fp32)


class _Rank:
    """What the moments are made of."""

    def __init__(
        self,
        layout: Layout,
        config: ModelConfig,
        forward: ForwardPass,
        micro_batches: int,
        pipeline_rank: int,
        held: Footprint,
    ):
        self.layout, self.config, self.forward = layout, config, forward
        self.micro_batches, self.pipeline_rank = micro_batches, pipeline_rank
        self.shapes = shapes_on(layout, config, pipeline_rank)
        self.held = held
        self.units: Mapping[str, Unit] = units_of(layout, self.shapes, forward.element_size)
        self.root, self.embedding = (self.units.get(key, Unit()) for key in (ROOT, EMBEDDING))
        self.state = forward.tokens * config.hidden_size * forward.element_size

    def of(self, layer: int) -> LayerBytes:
        return layer_bytes(self.config, self.forward, layer)

    def unit(self, layer: int) -> Unit:
        return self.units[str(layer)]

    def arrived(self, unit: Unit) -> int:
        """Of a unit that is at work, as it arrived: until the next one arrives. Norms and gates, which travel apart where they are
        not in the compute dtype, let go of the others' memory."""
        if self.layout.config.expert > 1:
            return unit.apart * self.forward.element_size if self.layout.expert_shard > 1 else 0
        return unit.bytes if self.forward.element_size == 4 else 0

    def new_gradients(self, layer: int) -> int:
        """Of a feed-forward network, in the dtype of the weights that reach it, before they are added to others."""
        sharded = self.layout.config.engine == "fsdp"
        return self.unit(layer).feed_forward * (self.forward.element_size if sharded else 4)

    def rows(self, layer: int) -> int:
        """Gradients of rows that travel to experts and back, as they leave and as they arrive."""
        c, f = self.config, self.forward
        if not f.spreads_experts or not c.is_moe(layer):
            return 0
        return round(f.tokens * c.num_experts_per_tok * f.element_size * c.hidden_size)


def _of_whole(rank: _Rank) -> Iterator[Moment]:
    """Engines that have all parameters whole, and zero3, of whose parameters at most so many are whole as DeepSpeed is set to."""
    layers, end = layers_of(rank.config, None), end_bytes(rank.config, rank.forward)
    all_gradients, gathered, messages = rank.held.gradients, rank.held.gathered, rank.held.communication
    appear = rank.layout.config.engine == "ddp" and rank.layout.world_size == 1 and rank.micro_batches == 1
    there = 0 if appear else all_gradients
    kept = end.kept + sum(rank.of(layer).kept for layer in layers)
    of_loss = loss_bytes(rank.config, rank.forward)
    yield Moment("loss", there + end.head_gradient, gathered, messages, kept, of_loss)
    behind = end.head_gradient if appear else there
    for layer in reversed(layers):
        yield Moment(
            f"backward in layer {layer}", behind + rank.new_gradients(layer), gathered, messages + rank.rows(layer), kept,
            rank.of(layer).working,
        )  # fmt: skip
        kept -= rank.of(layer).kept
        behind += 4 * rank.unit(layer).elements if appear else 0


def _of_fsdp(rank: _Rank) -> Iterator[Moment]:
    c, s, root, embedding = rank.layout.config, rank.layout.shard, rank.root, rank.embedding
    layers, end = layers_of(rank.config, None), end_bytes(rank.config, rank.forward)
    units = {layer: rank.unit(layer) for layer in layers}
    stays, sums = not c.reshards, not c.reshards and rank.micro_batches > 1
    ahead = c.expert > 1
    shards = 0 if rank.micro_batches == 1 or sums else rank.held.gradients
    grows = 0 if shards else 4  # bytes that an element of a shard adds when it is reduced
    kept = end.kept
    begin = root.bytes + 2 * embedding.bytes
    yield Moment("first layers", shards, begin)
    there = root.bytes + (embedding.bytes if stays else 0)
    for layer, after in zip(layers, [*layers[1:], None]):
        arriving = units[after].bytes if ahead and after is not None else 0
        kept += rank.of(layer).kept
        whole = there + units[layer].bytes + rank.arrived(units[layer]) + arriving
        yield Moment(f"forward in layer {layer}", shards, whole, 0, kept)
        there += units[layer].bytes if stays else 0
    of_loss = loss_bytes(rank.config, rank.forward)
    yield Moment("loss", shards + end.head_gradient, there + rank.arrived(units[layers[-1]]), 0, kept, of_loss)

    summed = sum(4 * unit.elements for unit in rank.units.values()) if sums else end.head_gradient
    sent = 0  # gradients of the layer behind, as they left
    for before, layer in reversed(list(zip([None, *layers[:-1]], layers))):
        unit, of_layer = units[layer], rank.of(layer)
        there -= unit.bytes if stays else 0
        arriving = units[before].bytes if before is not None and not stays else 0
        again = rank.arrived(unit) if ahead and c.recompute != "none" and not stays else 0
        yield Moment(
            f"backward in layer {layer}",
            shards + summed + rank.new_gradients(layer),
            there + unit.bytes + arriving + again,
            sent + rank.rows(layer),
            kept,
            of_layer.working,
        )
        kept -= of_layer.kept
        summed -= 4 * unit.elements if sums else 0
        gradients = unit.elements * (4 if sums else rank.forward.element_size)
        sent = 4 * unit.reduced_last
        yield Moment(
            f"layer {layer} is reduced",
            shards + summed + gradients,
            there + arriving,
            4 * unit.reduced_first + 4 * unit.reduced_first // s,
            kept,
            rank.state,
        )
        shards += grows * unit.part
    ends = 4 * (root.elements + embedding.elements)
    yield Moment("end", shards + ends, root.bytes, sent, 0, rank.state)
    yield Moment("end, as they are sent", shards + ends, 0, 4 * max(root.elements, embedding.elements), 0, rank.state)


class _Held(NamedTuple):
    """Bytes of one micro-batch in one stage."""

    forward: int  # from its forward pass to its backward pass
    aside: int  # between the two parts of its backward pass
    in_forward: int  # most beside the above in its forward chunk
    in_backward: int  # and in its backward chunk, over what it began with, in one part
    in_two_parts: int  # the same where gradients of weights are put aside


def _in_pipeline(rank: _Rank) -> Iterator[Moment]:
    layout, c = rank.layout, rank.layout.config
    parts, mine = parts_of(layout), layout.placement.stages_of(rank.pipeline_rank)
    stages = {stage: _stage(rank, parts[stage], comes_from_here=stage - 1 in mine) for stage in mine}
    elements = {
        stage: sum(rank.unit(layer).elements for layer in layers_of(rank.config, parts[stage])) for stage in mine
    }
    ends = rank.root.elements + rank.embedding.elements
    gathered = sum(unit.bytes for unit in rank.units.values()) if c.engine == "fsdp" else 0
    enough = min(rank.micro_batches, 2 * c.stages)  # more fill no pipeline further
    order = _order(c.schedule, c.pipeline, c.stages // c.pipeline, enough)[rank.pipeline_rank]
    now, gradients, begun = 0, 0, set[int]()
    messages = 2 * rank.state
    for action in order:
        of_input, of_weights = ({work.stage for work in action if work.kind == kind} for kind in ("B", "W"))
        beside = 0
        for kind, stage, _ in action:
            held = stages[stage]
            if kind == "F":
                now += held.forward
                beside = max(beside, held.in_forward)
            elif kind == "B":
                beside = max(beside, held.in_backward if stage in of_weights else held.in_two_parts)
        if action:
            name = "+".join(f"{work.kind} of stage {work.stage}" for work in action)
            yield Moment(name, gradients, gathered, messages, now, beside)
        for kind, stage, _ in action:
            held = stages[stage]
            if kind == "B":
                now += (0 if stage in of_weights else held.aside) - held.forward
                if stage not in begun:
                    begun.add(stage)
                    gradients += 4 * (elements[stage] + (ends if len(begun) == len(mine) else 0))
            elif kind == "W" and stage not in of_input:
                now -= held.aside
    largest = max(unit.elements for unit in rank.units.values())
    if c.engine == "fsdp":
        yield Moment("gradients are reduced", gradients, gathered, 4 * largest)


def _stage(rank: _Rank, part: Part, comes_from_here: bool) -> _Held:
    layers, end = layers_of(rank.config, part), end_bytes(rank.config, rank.forward, part)
    kept = end.kept + sum(rank.of(layer).kept for layer in layers) - (rank.state if comes_from_here else 0)
    aside, over, in_backward, in_two_parts = 0, 0, 0, 0
    for layer in reversed(layers):
        of_layer = rank.of(layer)
        beside = of_layer.working + rank.new_gradients(layer) + rank.rows(layer)
        in_backward = max(in_backward, over + beside)
        in_two_parts = max(in_two_parts, over + aside + of_layer.working + rank.rows(layer))
        over -= of_layer.kept
        aside += of_layer.aside
    in_forward = loss_bytes(rank.config, rank.forward) if part.last else 0
    return _Held(kept + end.head_gradient, aside, in_forward, in_backward, in_two_parts)


def forward_pass(
    layout: Layout,
    *,
    sequence_length: int,
    micro_batch: int,
    element_size: int,
    device: Device = "cpu",
    imbalance: float = 1.0,
) -> ForwardPass:
    """Of a rank.

    Args:
        micro_batch: sequences.
        element_size: bytes of the compute dtype.
        imbalance: rows that arrive at its experts over those that leave it.
    """
    c = layout.config
    return ForwardPass(
        micro_batch,
        sequence_length,
        element_size,
        c.recompute,
        device,
        casts_weights=c.engine != "fsdp",  # which gathers them in the compute dtype
        spreads_experts=c.expert > 1,
        imbalance=imbalance,
        fp8=c.fp8,
        fp8_dispatch=c.fp8_dispatch,
        context=c.context,
    )
