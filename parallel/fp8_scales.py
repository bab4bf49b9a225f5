"""What FP8's scales say of a step. They are taken from the numbers at hand, so that a tensor that explodes shows in them first.

    an input, a weight, gate and up of a SwiGLU:  scale ≤ limit (512)        a gradient:  scale finite

Otherwise the step is skipped, like one whose gradient is not finite. The smallest positive number of E4M3 is 2⁻⁹: a tile with a
scale above 512 has none left between 0 and 1, while what follows a norm, and the weights that it meets, are of order 1 or smaller.
Gradients have no such measure, since their size is that of the batch and of the loss scale.

The largest scale of every tensor, of all ranks, travels in one reduction, in which every module of the model has its place, also on
a rank that has only some of the layers. The device decides by it; the host may read it later.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.ops.fp8.arithmetic import Fp8, Scales
from parallel.engine import FP8Scales


def forget_scales(arithmetic: Mapping[str, Fp8]) -> None:
    """A step begins: what an evaluation, or a step before, has left does not belong to it."""
    for fp8 in arithmetic.values():
        fp8.scales.clear()
        fp8.gradient_scales.clear()


class Places(NamedTuple):
    """What a module quantises in a pass, in groups whose scales are noted together."""

    of_map: tuple[tuple[str, ...], ...]
    of_feed_forward: tuple[tuple[str, ...], ...]


_GATE_AND_UP = (".gate_proj input", ".gate_proj weight", ".up_proj weight", ".gate_proj output", ".up_proj output")
FORWARD = Places(
    of_map=((" input",), (" weight",)),
    of_feed_forward=((*_GATE_AND_UP, ".down_proj input", ".down_proj weight"),),
)
BACKWARD = Places(
    of_map=((" gradient",),),
    of_feed_forward=((".down_proj gradient", ".gate_proj gradient", ".up_proj gradient"),),
)


class StepScales(NamedTuple):
    """The scales of the step that has just gone forward and backward, of all ranks."""

    names: list[str]  # tensors, in the order of the forward and the backward pass
    watched: int  # so many of them, the first ones, are bounded by the limit; the others must be finite
    limit: float
    largest: Tensor  # [names] fp32 on the device, infinite in place of NaN
    exploded: Tensor  # [] bool: whether one of them is too large

    def read(self, largest: Tensor) -> FP8Scales:
        """In words, given `largest` on the host."""
        scales = dict(zip(self.names, largest.tolist(), strict=True))
        at = max(self.names[: self.watched], key=scales.__getitem__)  # of equal ones the first
        limits = dict.fromkeys(self.names, math.inf) | dict.fromkeys(self.names[: self.watched], self.limit)
        exploded = tuple(_told(name, s, limits[name]) for name, s in scales.items() if not _fits(s, limits[name]))
        return FP8Scales(scales[at], at, exploded)


def scales_of_step(
    arithmetic: Mapping[str, Fp8], modules: Sequence[str], limit: float, device: torch.device
) -> StepScales | None:
    """Collective; None without FP8.

    Args:
        arithmetic: of each module that is here, by its name.
        modules: names of all modules of the model in the order of the forward pass, the same on every rank.
        limit: the largest scale of an input or a weight.
        device: where the scales are.
    """
    if not modules:
        return None
    nothing = torch.zeros(1, device=device)
    here = {name: (fp8.scales, fp8.gradient_scales) for name, fp8 in arithmetic.items()}
    of_all: list[tuple[str, tuple[Scales, Scales]]] = [(name, here.get(name, ({}, {}))) for name in modules]
    forward = list(_in_their_places(((name, noted) for name, (noted, _) in of_all), FORWARD, nothing))
    backward = list(_in_their_places(((name, noted) for name, (_, noted) in reversed(of_all)), BACKWARD, nothing))
    largest = torch.cat([scales for _, scales in forward + backward]).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    watched = sum(len(names) for names, _ in forward)
    limit = float(
        torch.tensor(limit, dtype=torch.float32)
    )  # the device compares in fp32, and the host shall find the same
    exploded = ~largest.isfinite().all() | (largest[:watched] > limit).any()
    return StepScales([n for names, _ in forward + backward for n in names], watched, limit, largest, exploded)


def _in_their_places(
    modules: Iterable[tuple[str, Scales]], places: Places, nothing: Tensor
) -> Iterator[tuple[list[str], Tensor]]:
    """Whole names, and the scales that bear them: 0 of what was not quantised, or is not here."""
    for module, noted in modules:
        groups = places.of_map if ".self_attn." in module else places.of_feed_forward
        assert noted.keys() <= set(groups), f"{module} notes {list(noted)}, and {groups} have a place"
        for names in groups:
            yield [module + name for name in names], noted.get(names, nothing.expand(len(names)))


def _fits(scale: float, limit: float) -> bool:
    return math.isfinite(scale) and scale <= limit


def _told(name: str, scale: float, limit: float) -> str:
    return f"{name}: scale {scale:.3g} above {limit:g}" if math.isfinite(scale) else f"{name}: scale not finite"
