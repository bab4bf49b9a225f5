"""Bytes that one rank holds of parameters, gradients and moments under a layout, from the shapes of the model alone.

With P elements in all, of 4 bytes as parameters and gradients and m as a moment, on W processes, s = `layout.shard` to a copy:

| engine  | parameters | gradients | moments | whole for a while                                                          |
|---------|------------|-----------|---------|----------------------------------------------------------------------------|
| `ddp`   | 4P         | 4P        | 2mP     |                                                                            |
| `zero1` | 4P         | 4P        | 2mP/W   |                                                                            |
| `zero2` | 4P         | 4P/W      | 2mP/W   |                                                                            |
| `zero3` | 4P/W       | 4P/W      | 2mP/W   | parameters: 10⁹ elements¹, or the largest module                           |
| `fsdp`  | 4P/s       | 4P/s      | 2mP/s   | parameters of the head and of two units², gradients of one; or all of both³ |

¹ `stage3_max_live_parameters` as it is if nobody sets it.
² A block, or the embedding, which is at work, and the next, which is on its way. In the compute dtype, but norms, gates, embedding
  and head in fp32.
³ `reshard_after_forward: false`; all gradients only where a step has several micro-batches, which are summed before they travel.

fsdp cuts a parameter along its first dimension, ⌈n/s⌉ rows to a rank. With expert parallelism an expert's matrices lie on one of
`expert` ranks and are cut over `expert_shard`, which is 1/s again, but a block is gathered with 1/expert of its experts; so is what
zero1 and zero2 keep whole. Offloading moves what is cut to the host. DeepSpeed has it there with a copy, of the weights under
stages 1 and 2, of the gradients under 3; under 2 of the gradients too where a step has several micro-batches.

FP8 changes nothing of this: weights are quantised where they are used, and forgotten.

In a pipeline P is what lies on one pipeline rank, the copy of the embedding included, W and s are ranks of one stage, and fsdp has
everything whole throughout the step. The activations of several micro-batches lie there at once: `under_way` plays the order of the
schedule through. Ranks that share sequences hold what ranks without context parallelism do.

Counted is the fullest rank, of a pipeline rank. Buffers of the communication are not: DeepSpeed's have 5·10⁸ elements each.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch

from model.activations import Device, ForwardPass, activation_bytes, put_aside_bytes, working_bytes
from model.config import ModelConfig
from model.hf import state_shapes
from model.transformer import Part
from parallel.layout import Layout, cut_of
from parallel.parts import EMBEDDING, parts_of
from parallel.timeline import order_of

Shapes = Mapping[str, torch.Size]

BIAS = "e_score_correction_bias"  # of the routers: a buffer, whole on the device of every rank
MAX_LIVE = 10**9  # elements

_order = cache(order_of)  # takes PyTorch longer than all else here


class Footprint(NamedTuple):
    """Bytes of the fullest rank: on its device, and what is offloaded to its host."""

    parameters: int  # and buffers
    gradients: int
    moments: int
    gathered: int  # at most, while the model computes
    host: int

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.moments + self.gathered


class Activations(NamedTuple):
    """Bytes of a rank's activations."""

    kept: int  # most at once of what forward passes leave for their backward passes
    working: int  # beside them for a while


def footprint(
    layout: Layout,
    config: ModelConfig,
    element_size: int = 4,
    moment_size: int = 4,
    micro_batches: int = 1,
    pipeline_rank: int = 0,
) -> Footprint:
    """What one rank holds.

    Args:
        element_size: bytes of the compute dtype, in which fsdp gathers.
        moment_size: bytes of an element of each of the two moments.
        micro_batches: of a rank in a step.
    """
    tensors = _on(layout, _tensors(config), pipeline_rank)
    biases = sum(4 * shape.numel() for name, shape in tensors.items() if name.endswith(BIAS))
    shapes = {name: shape for name, shape in tensors.items() if not name.endswith(BIAS)}
    count = {"ddp": _ddp, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp": _fsdp}[layout.config.engine]
    held = count(layout, shapes, _Sizes(element_size, moment_size, micro_batches))
    return held._replace(parameters=held.parameters + biases)


def peak_bytes(
    layout: Layout, config: ModelConfig, held: Footprint, activations: int, working: int, micro_batches: int = 1
) -> int:
    """Most bytes that live on the device of the fullest rank at once.

    Args:
        held: what it holds throughout.
        activations, working: of one micro-batch (`model.activations.activation_bytes`, `working_bytes`), or of those under way.

    A single process whose step is one micro-batch has no gradients while it goes forward, and in the backward pass they take
    the place of activations: then the peak is where the backward pass begins, with the gradient of the head, which is among the
    activations, and those of one block, or where it ends, with all of them. Otherwise gradients lie there throughout.
    """
    if layout.config.engine != "ddp" or layout.world_size > 1 or micro_batches > 1:
        return held.device + activations + working
    units = gathered_units(layout, parameter_shapes(config), 4)
    first = 4 * max(unit.elements for key, unit in units.items() if key.isdigit())
    return held.device - held.gradients + max(activations + first, held.gradients) + working


def under_way(
    layout: Layout,
    config: ModelConfig,
    pipeline_rank: int = 0,
    *,
    sequence_length: int,
    micro_batch: int,
    micro_batches: int,
    element_size: int,
    device: Device = "cpu",
    imbalance: float = 1.0,
) -> Activations:
    """Activations of a rank.

    Args:
        micro_batch: sequences.
        micro_batches: of a rank in a step.
        element_size: bytes of the compute dtype.
        imbalance: rows that arrive at its experts over those that leave it.
    """
    c = layout.config
    forward = ForwardPass(
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

    def kept(part: Part | None) -> int:
        return sum(activation_bytes(config, forward, part).values())

    if c.pipeline == 1:
        return Activations(kept(None), working_bytes(config, forward))
    parts, placement = parts_of(layout), layout.placement
    mine = placement.stages_of(pipeline_rank)
    state = forward.tokens * config.hidden_size * element_size
    stages = {}
    for stage in mine:
        from_here = stage > 0 and stage - 1 in mine
        stages[stage] = _Held(
            kept(parts[stage]) - (state if from_here else 0),  # what that stage hands on is counted there
            put_aside_bytes(config, forward, parts[stage]),
        )
    working = max(working_bytes(config, forward, parts[stage]) for stage in mine)
    return Activations(_most_at_once(layout, pipeline_rank, micro_batches, stages), working)


class _Held(NamedTuple):
    """Bytes of one micro-batch in one stage."""

    forward: int  # from its forward pass to its backward pass
    aside: int  # between the two parts of its backward pass


def _most_at_once(layout: Layout, pipeline_rank: int, micro_batches: int, stages: Mapping[int, _Held]) -> int:
    """The largest sum, in the order of the schedule, of what micro-batches leave in the stages of a rank."""
    c = layout.config
    enough = min(micro_batches, 2 * c.stages)  # more fill no pipeline further
    order = _order(c.schedule, c.pipeline, c.stages // c.pipeline, enough)[pipeline_rank]
    now = most = 0
    for action in order:
        of_input, of_weights = ({work.stage for work in action if work.kind == kind} for kind in ("B", "W"))
        for kind, stage, _ in action:
            held = stages[stage]
            if kind == "F":
                now += held.forward
            elif kind == "B":
                now += (0 if stage in of_weights else held.aside) - held.forward
            elif stage not in of_input:
                now -= held.aside
            most = max(most, now)
    return most


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of the parameters, without the buffers."""
    return {name: shape for name, shape in _tensors(config).items() if not name.endswith(BIAS)}


def shapes_on(layout: Layout, config: ModelConfig, pipeline_rank: int) -> dict[str, torch.Size]:
    """Those that lie on a pipeline rank."""
    return _on(layout, parameter_shapes(config), pipeline_rank)


@cache
def _tensors(config: ModelConfig) -> Shapes:
    return {name: tensor.shape for name, tensor in state_shapes(config).items()}


def _on(layout: Layout, shapes: Shapes, pipeline_rank: int) -> dict[str, torch.Size]:
    """As `parallel.parts.keep_parts` leaves them."""
    if layout.config.pipeline == 1:
        return dict(shapes)
    assert layout.model is not None
    model, parts = layout.model, parts_of(layout)
    mine = [parts[stage] for stage in layout.placement.stages_of(pipeline_rank)]
    has_first, has_last = any(part.first for part in mine), any(part.last for part in mine)
    layers = {layer for part in mine for layer in part.layers}

    def is_here(name: str) -> bool:
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            return has_last if layer >= model.num_hidden_layers else layer in layers
        if name == EMBEDDING:
            return has_first or (has_last and model.num_nextn_predict_layers > 0)
        return has_last

    return {name: shape for name, shape in shapes.items() if is_here(name)}


def gathered_units(layout: Layout, shapes: Shapes, element_size: int) -> dict[str, "Unit"]:
    """What fsdp gathers together: "root" (head and final norm), "embedding", and every block by its number."""
    units: dict[str, Unit] = defaultdict(Unit)
    for name, shape in shapes.items():
        parts = name.split(".")
        key = parts[2] if parts[1] == "layers" else "embedding" if parts[1] == "embed_tokens" else "root"
        elements = _apart(layout, name, shape)
        is_exact = "norm" in name or name.endswith(".gate.weight") or not key.isdigit()
        unit = units[key]
        units[key] = Unit(unit.elements + elements, unit.bytes + elements * (4 if is_exact else element_size))
    return units


def _apart(layout: Layout, name: str, shape: torch.Size) -> int:
    """Elements of a parameter that its expert rank has."""
    return shape.numel() // (layout.config.expert if ".experts." in name else 1)


class Unit(NamedTuple):
    elements: int = 0
    bytes: int = 0  # as they are gathered


class _Sizes(NamedTuple):
    element: int
    moment: int
    micro_batches: int


def _ddp(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    whole = sum(shape.numel() for shape in shapes.values())
    return Footprint(4 * whole, 4 * whole, 2 * sizes.moment * whole, gathered=0, host=0)


def _zero12(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = ceil(sum(shape.numel() for shape in shapes.values()) / layout.world_size)
    whole = sum(_apart(layout, name, shape) for name, shape in shapes.items())
    moments = 2 * sizes.moment * part
    if layout.config.offload == "none":
        gradients = whole if layout.config.engine == "zero1" else part
        return Footprint(4 * whole, 4 * gradients, moments, gathered=0, host=0)
    gradients = whole if layout.config.engine == "zero1" else 0
    copies = 4 if layout.config.engine == "zero2" and sizes.micro_batches > 1 else 3
    return Footprint(4 * whole, 4 * gradients, 0, gathered=0, host=4 * copies * part + moments)


def _zero3(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = sum(ceil(shape.numel() / layout.world_size) for shape in shapes.values())
    modules: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        modules[name.rpartition(".")[0]] += shape.numel()
    gathered = 4 * min(sum(modules.values()), max(MAX_LIVE, *modules.values()))
    parameters, gradients, moments = 4 * part, 4 * part, 2 * sizes.moment * part
    if layout.config.offload == "none":
        return Footprint(parameters, gradients, moments, gathered, host=0)
    host = parameters + 2 * gradients + moments
    if layout.config.offload == "optimizer":
        return Footprint(parameters, 0, 0, gathered, host)
    return Footprint(0, 0, 0, gathered, parameters + host)


def _fsdp(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = sum(_elements(layout, name, shape) for name, shape in shapes.items())
    units = gathered_units(layout, shapes, sizes.element)
    sums = sizes.micro_batches > 1 or layout.config.pipeline > 1
    gathered = _at_work(units) if layout.config.reshards else _all_at_once(units, sums)
    parameters, gradients, moments = 4 * part, 4 * part, 2 * sizes.moment * part
    if layout.config.offload == "none":
        return Footprint(parameters, gradients, moments, gathered, host=0)
    return Footprint(0, 0, 0, gathered, host=parameters + gradients + moments)


def _at_work(units: Mapping[str, Unit]) -> int:
    """The root, and the most that is whole beside it where the forward pass begins, in the backward pass between two blocks, and at
    its end: parameters of what is at work and of what is next, gradients (fp32) of what is at work."""
    embedding, blocks = units["embedding"], [unit for key, unit in units.items() if key.isdigit()]
    begin = embedding.bytes + blocks[0].bytes
    between = [earlier.bytes + later.bytes + 4 * later.elements for earlier, later in pairwise(blocks)]
    end = blocks[0].bytes + 4 * max(blocks[0].elements, embedding.elements)
    return units["root"].bytes + max(begin, *between, end)


def _all_at_once(units: Mapping[str, Unit], sums: bool) -> int:
    """All parameters, and the gradients of one unit, or of all where they are summed over micro-batches first."""
    elements = [unit.elements for unit in units.values()]
    return sum(unit.bytes for unit in units.values()) + 4 * (sum(elements) if sums else max(elements))


def _elements(layout: Layout, name: str, shape: torch.Size) -> int:
    """Of a parameter on the fullest rank."""
    if layout.config.expert > 1 and ".experts." in name:
        return shape.numel() // layout.shard
    cut = cut_of(shape, layout.shard)
    return ceil(shape[cut] / layout.shard) * shape.numel() // shape[cut]
