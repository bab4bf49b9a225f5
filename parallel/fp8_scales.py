"""What FP8's scales say of a step. They are taken from the numbers at hand, so that a tensor that explodes shows in them first.

    an input, a weight, gate and up of a SwiGLU:  scale ≤ limit (512)        a gradient:  scale finite

Otherwise the step is skipped, like one whose gradient is not finite. The smallest positive number of E4M3 is 2⁻⁹: a tile with a
scale above 512 has none left between 0 and 1, while what follows a norm, and the weights that it meets, are of order 1 or smaller.
Gradients have no such measure, since their size is that of the batch and of the loss scale.

The largest scale of every tensor, of all ranks, travels in one reduction and reaches the host at once.
"""

import math
from collections.abc import Iterator, Mapping

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


def read_scales(arithmetic: Mapping[str, Fp8], limit: float) -> FP8Scales | None:
    """What the scales of all ranks say of the step that has just gone forward and backward. Collective; None without FP8.

    Args:
        arithmetic: of each module in the order of the forward pass, by its name.
        limit: the largest scale of an input or a weight.
    """
    forward = list(_named((name, fp8.scales) for name, fp8 in arithmetic.items()))
    backward = list(_named((name, fp8.gradient_scales) for name, fp8 in reversed(list(arithmetic.items()))))
    if not forward:
        return None
    names = [name for group, _ in forward + backward for name in group]
    found = torch.cat([scales for _, scales in forward + backward]).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    largest = dict(zip(names, found.tolist(), strict=True))
    watched = {name: largest[name] for group, _ in forward for name in group}
    at = max(watched, key=watched.__getitem__)  # of equal ones the first
    limits = dict.fromkeys(names, math.inf) | dict.fromkeys(watched, limit)
    exploded = tuple(
        _told(name, scale, limits[name]) for name, scale in largest.items() if not _fits(scale, limits[name])
    )
    return FP8Scales(watched[at], at, exploded)


def _named(scales: Iterator[tuple[str, Scales]]) -> Iterator[tuple[list[str], Tensor]]:
    """Whole names, and the scales that bear them."""
    for module, noted in scales:
        for names, values in noted.items():
            yield [module + name for name in names], values


def _fits(scale: float, limit: float) -> bool:
    return math.isfinite(scale) and scale <= limit


def _told(name: str, scale: float, limit: float) -> str:
    return f"{name}: scale {scale:.3g} above {limit:g}" if math.isfinite(scale) else f"{name}: scale not finite"
