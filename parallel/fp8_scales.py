"""What FP8's scales say of a step. They are taken from the numbers at hand, so that a tensor that explodes shows in them first.

    an input, a weight, gate and up of a SwiGLU:  scale ≤ limit (512)        a gradient:  scale finite

Otherwise the step is skipped, like one whose gradient is not finite. The smallest positive number of E4M3 is 2⁻⁹: a tile with a
scale above 512 has none left between 0 and 1, while what follows a norm, and the weights that it meets, are of order 1 or smaller.
Gradients have no such measure, since their size is that of the batch and of the loss scale.

The largest scale of every tensor, of all ranks, travels in one reduction. The device decides by it; the host may read it later.
"""

import math
from collections.abc import Iterator, Mapping
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


def scales_of_step(arithmetic: Mapping[str, Fp8], limit: float) -> StepScales | None:
    """Collective; None without FP8.

    Args:
        arithmetic: of each module in the order of the forward pass, by its name.
        limit: the largest scale of an input or a weight.
    """
    forward = list(_named((name, fp8.scales) for name, fp8 in arithmetic.items()))
    backward = list(_named((name, fp8.gradient_scales) for name, fp8 in reversed(list(arithmetic.items()))))
    if not forward:
        return None
    largest = torch.cat([scales for _, scales in forward + backward]).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    watched = sum(len(names) for names, _ in forward)
    limit = float(
        torch.tensor(limit, dtype=torch.float32)
    )  # the device compares in fp32, and the host shall find the same
    exploded = ~largest.isfinite().all() | (largest[:watched] > limit).any()
    return StepScales([n for names, _ in forward + backward for n in names], watched, limit, largest, exploded)


def _named(scales: Iterator[tuple[str, Scales]]) -> Iterator[tuple[list[str], Tensor]]:
    """Whole names, and the scales that bear them."""
    for module, noted in scales:
        for names, values in noted.items():
            yield [module + name for name in names], values


def _fits(scale: float, limit: float) -> bool:
    return math.isfinite(scale) and scale <= limit


def _told(name: str, scale: float, limit: float) -> str:
    return f"{name}: scale {scale:.3g} above {limit:g}" if math.isfinite(scale) else f"{name}: scale not finite"
