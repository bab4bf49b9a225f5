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

Counted is the fullest rank. Activations are not, nor buffers of the communication: DeepSpeed's have 5·10⁸ elements each.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.hf import state_shapes
from parallel.layout import Layout, cut_of

Shapes = Mapping[str, torch.Size]

BIAS = "e_score_correction_bias"  # of the routers: a buffer, whole on the device of every rank
MAX_LIVE = 10**9  # elements


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


def footprint(
    layout: Layout, config: ModelConfig, element_size: int = 4, moment_size: int = 4, micro_batches: int = 1
) -> Footprint:
    """What one rank holds.

    Args:
        element_size: bytes of the compute dtype, in which fsdp gathers.
        moment_size: bytes of an element of each of the two moments.
        micro_batches: of a rank in a step.
    """
    tensors = state_shapes(config)
    biases = sum(4 * tensor.numel() for name, tensor in tensors.items() if name.endswith(BIAS))
    shapes = parameter_shapes(config)
    count = {"ddp": _ddp, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp": _fsdp}[layout.config.engine]
    held = count(layout, shapes, _Sizes(element_size, moment_size, micro_batches))
    return held._replace(parameters=held.parameters + biases)


def peak_bytes(
    layout: Layout, config: ModelConfig, held: Footprint, activations: int, working: int, micro_batches: int = 1
) -> int:
    """Most bytes that live on the device of the fullest rank at once.

    Args:
        held: what it holds throughout.
        activations, working: of one micro-batch (`model.flops.activation_bytes`, `working_bytes`).

    A single process whose step is one micro-batch has no gradients while it goes forward, and in the backward pass they take
    the place of activations: then the peak is where the backward pass begins, with the gradient of the head, which is among the
    activations, and those of one block, or where it ends, with all of them. Otherwise gradients lie there throughout.
    """
    if layout.config.engine != "ddp" or layout.world_size > 1 or micro_batches > 1:
        return held.device + activations + working
    units = gathered_units(layout, parameter_shapes(config), 4)
    first = 4 * max(unit.elements for key, unit in units.items() if key.isdigit())
    return held.device - held.gradients + max(activations + first, held.gradients) + working


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of the parameters, without the buffers."""
    return {name: tensor.shape for name, tensor in state_shapes(config).items() if not name.endswith(BIAS)}


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
    gathered = _at_work(units) if layout.config.reshards else _all_at_once(units, sizes.micro_batches)
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


def _all_at_once(units: Mapping[str, Unit], micro_batches: int) -> int:
    """All parameters, and the gradients of one unit, or of all where they are summed over micro-batches first."""
    elements = [unit.elements for unit in units.values()]
    return sum(unit.bytes for unit in units.values()) + 4 * (sum(elements) if micro_batches > 1 else max(elements))


def _elements(layout: Layout, name: str, shape: torch.Size) -> int:
    """Of a parameter on the fullest rank."""
    if layout.config.expert > 1 and ".experts." in name:
        return shape.numel() // layout.shard
    cut = cut_of(shape, layout.shard)
    return ceil(shape[cut] / layout.shard) * shape.numel() // shape[cut]
