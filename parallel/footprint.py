"""Bytes that one rank holds of parameters, gradients and moments under a layout, from the shapes of the model alone.

With P elements in all, of 4 bytes as parameters and gradients and m as a moment, on W processes, s = `layout.shard` to a copy:

| engine  | parameters | gradients | moments | beside them                                                |
|---------|------------|-----------|---------|------------------------------------------------------------|
| `ddp`   | 4P         | 4P        | 2mP     |                                                            |
| `zero1` | 4P         | 4P        | 2mP/W   | a bucket of gradients, 4 · 5·10⁸ bytes¹                    |
| `zero2` | 4P         | 4P/W      | 2mP/W   | the same                                                   |
| `zero3` | 4P/W       | 4P/W      | 2mP/W   | the same; parameters: 10⁹ elements², or the largest module |
| `fsdp`  | 4P/s       | 4P/s      | 2mP/s   |                                                            |

¹ `reduce_bucket_size` as it is if nobody sets it, allocated whole.
² `stage3_max_live_parameters` as it is if nobody sets it.

So it is when a step ends. What comes and goes in a step, and when that is most, says `parallel.peak`: gradients before they are
sent, parameters that fsdp gathers, messages, activations.

fsdp cuts a parameter along its first dimension, ⌈n/s⌉ rows to a rank. With expert parallelism an expert's matrices lie on one of
`expert` ranks and are cut over `expert_shard`, which is 1/s again; what zero1 and zero2 keep whole is then 1/expert of the experts.
Offloading moves what is cut to the host. DeepSpeed has it there with a copy, of the weights under stages 1 and 2, of the gradients
under 3; under 2 of the gradients too where a step has several micro-batches.

FP8 changes nothing of this: weights are quantised where they are used, and forgotten.

In a pipeline P is what lies on one pipeline rank, the copy of the embedding included, W and s are ranks of one stage. Counted is
the fullest rank, of a pipeline rank.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from math import ceil
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.hf import state_shapes
from parallel.layout import Layout, cut_of
from parallel.parts import EMBEDDING
from parallel.placement import Placement

Shapes = Mapping[str, torch.Size]

BIAS = "e_score_correction_bias"  # of the routers: a buffer, whole on the device of every rank
MAX_LIVE = 10**9  # elements
BUCKET = 5 * 10**8  # elements


class Footprint(NamedTuple):
    """Bytes of the fullest rank: on its device, and what is offloaded to its host."""

    parameters: int  # and buffers
    gradients: int
    moments: int
    gathered: int  # zero3: at most, while the model computes
    communication: int  # zero1, zero2, zero3: DeepSpeed's buckets
    host: int


def footprint(
    layout: Layout,
    config: ModelConfig,
    moment_size: int = 4,
    micro_batches: int = 1,
    pipeline_rank: int = 0,
) -> Footprint:
    """What one rank holds from step to step, or at the end of one.

    Args:
        moment_size: bytes of an element of each of the two moments.
        micro_batches: of a rank in a step.
    """
    tensors = _on(config, _placement(layout), pipeline_rank)
    biases = sum(4 * shape.numel() for name, shape in tensors.items() if name.endswith(BIAS))
    shapes = {name: shape for name, shape in tensors.items() if not name.endswith(BIAS)}
    count = {"ddp": _ddp, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp": _fsdp}[layout.config.engine]
    held = count(layout, shapes, _Sizes(moment_size, micro_batches))
    return held._replace(parameters=held.parameters + biases)


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Shapes of the parameters, without the buffers."""
    return _parameters_on(config, None, 0)


def shapes_on(layout: Layout, config: ModelConfig, pipeline_rank: int) -> Shapes:
    """Those that lie on a pipeline rank."""
    return _parameters_on(config, _placement(layout), pipeline_rank)


def _placement(layout: Layout) -> Placement | None:
    return layout.placement if layout.config.pipeline > 1 else None


@cache
def _parameters_on(config: ModelConfig, placement: Placement | None, pipeline_rank: int) -> Shapes:
    tensors = _on(config, placement, pipeline_rank)
    return {name: shape for name, shape in tensors.items() if not name.endswith(BIAS)}


@cache
def _tensors(config: ModelConfig) -> Shapes:
    return {name: tensor.shape for name, tensor in state_shapes(config).items()}


@cache
def _on(config: ModelConfig, placement: Placement | None, pipeline_rank: int) -> Shapes:
    """As `parallel.parts.keep_parts` leaves them."""
    if placement is None:
        return _tensors(config)
    stages = placement.stages_of(pipeline_rank)
    has_first, has_last = 0 in stages, len(placement.layers) - 1 in stages
    layers = {layer for stage in stages for layer in placement.layers[stage]}

    def is_here(name: str) -> bool:
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            return has_last if layer >= config.num_hidden_layers else layer in layers
        if name == EMBEDDING:
            return has_first or (has_last and config.num_nextn_predict_layers > 0)
        return has_last

    return {name: shape for name, shape in _tensors(config).items() if is_here(name)}


class Unit(NamedTuple):
    """What fsdp gathers and reduces together: a block, the embedding, or the root: head and final norm. Elements of its expert
    rank's matrices, with the rows that make parts equal."""

    elements: int = 0
    apart: int = (
        0  # of experts that lie on several ranks, which are gathered and reduced apart from the rest of their block
    )
    feed_forward: int = 0  # of the routed experts, or of a dense network
    part: int = 0  # on the fullest rank
    bytes: int = 0  # as they are gathered: norms, gates, embedding and head in fp32, all else in the compute dtype

    def __add__(self, other: tuple[int, ...]) -> "Unit":  # type: ignore[override]
        return Unit(*(mine + theirs for mine, theirs in zip(self, other)))

    @property
    def reduced_first(self) -> int:
        return self.apart or self.elements

    @property
    def reduced_last(self) -> int:
        return self.elements - self.apart


def units_of(layout: Layout, shapes: Shapes, element_size: int) -> dict[str, Unit]:
    """By the number of the block, and "root" and "embedding"."""
    units: dict[str, Unit] = defaultdict(Unit)
    for name, shape in shapes.items():
        parts = name.split(".")
        key = parts[2] if parts[1] == "layers" else "embedding" if parts[1] == "embed_tokens" else "root"
        part = _elements(layout, name, shape)
        is_expert = ".experts." in name
        spread = is_expert and layout.config.expert > 1
        elements = part * (layout.expert_shard if spread else layout.shard)
        is_exact = "norm" in name or name.endswith(".gate.weight") or not key.isdigit()
        in_network = is_expert or (
            ".mlp." in name and ".shared_experts." not in name and not name.endswith(".gate.weight")
        )
        units[key] += Unit(
            elements,
            elements if spread else 0,
            elements if in_network else 0,
            part,
            elements * (4 if is_exact else element_size),
        )
    return dict(units)


def _apart(layout: Layout, name: str, shape: torch.Size) -> int:
    """Elements of a parameter that its expert rank has."""
    return shape.numel() // (layout.config.expert if ".experts." in name else 1)


class _Sizes(NamedTuple):
    moment: int
    micro_batches: int


def _ddp(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    whole = sum(shape.numel() for shape in shapes.values())
    return Footprint(4 * whole, 4 * whole, 2 * sizes.moment * whole, gathered=0, communication=0, host=0)


def _zero12(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = ceil(sum(shape.numel() for shape in shapes.values()) / layout.world_size)
    whole = sum(_apart(layout, name, shape) for name, shape in shapes.items())
    moments, bucket = 2 * sizes.moment * part, _bucket(layout)
    if layout.config.offload == "none":
        gradients = whole if layout.config.engine == "zero1" else part
        return Footprint(4 * whole, 4 * gradients, moments, gathered=0, communication=bucket, host=0)
    gradients = whole if layout.config.engine == "zero1" else 0
    copies = 4 if layout.config.engine == "zero2" and sizes.micro_batches > 1 else 3
    return Footprint(4 * whole, 4 * gradients, 0, gathered=0, communication=bucket, host=4 * copies * part + moments)


def _zero3(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = sum(ceil(shape.numel() / layout.world_size) for shape in shapes.values())
    modules: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        modules[name.rpartition(".")[0]] += shape.numel()
    gathered = 4 * min(sum(modules.values()), max(MAX_LIVE, *modules.values()))
    parameters, gradients, moments = 4 * part, 4 * part, 2 * sizes.moment * part
    bucket = _bucket(layout)
    if layout.config.offload == "none":
        return Footprint(parameters, gradients, moments, gathered, bucket, host=0)
    host = parameters + 2 * gradients + moments
    if layout.config.offload == "optimizer":
        return Footprint(parameters, 0, 0, gathered, bucket, host)
    return Footprint(0, 0, 0, gathered, bucket, parameters + host)


def _bucket(layout: Layout) -> int:
    """Bytes of DeepSpeed's bucket of gradients."""
    return 4 * int(layout.config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET))


def _fsdp(layout: Layout, shapes: Shapes, sizes: _Sizes) -> Footprint:
    part = sum(_elements(layout, name, shape) for name, shape in shapes.items())
    parameters, gradients, moments = 4 * part, 4 * part, 2 * sizes.moment * part
    if layout.config.offload == "none":
        return Footprint(parameters, gradients, moments, gathered=0, communication=0, host=0)
    return Footprint(0, 0, 0, gathered=0, communication=0, host=parameters + gradients + moments)


def _elements(layout: Layout, name: str, shape: torch.Size) -> int:
    """Of a parameter on the fullest rank."""
    if layout.config.expert > 1 and ".experts." in name:
        return shape.numel() // layout.shard
    cut = cut_of(shape, layout.shard)
    return ceil(shape[cut] / layout.shard) * shape.numel() // shape[cut]
