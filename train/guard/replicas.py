"""Bits that several ranks must hold alike, compared: a bit that flips in a memory is found before a checkpoint can hold it.

The weights of DDP's ranks, the shards of HSDP's replicas, an expert's copies and the biases of routers are the same numbers,
computed by the same operations, and stay the same to the bit as long as every machine works. Nothing in training compares them:
behind a flipped bit a rank trains another model, without a word.

A tensor is compared by the sum s of its bits read as 64-bit integers, modulo 2⁶⁴. One flipped bit changes it by ±2ᵏ, which is never
0. Ranks hold the same sum if and only if

    max s = min s,      where min s = ~max(~s), since ~s = -s - 1 turns the order round

so that one reduction of two integers a tensor answers. Only where they differ do ranks tell each other what they have.

What a rank holds alone (shards of FSDP and of ZeRO, the average of the weights) has nothing to be compared with.
"""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import Alike
from train.ranks import Ranks

NAMED = 8  # ranks of one side that the line names


class ReplicasDiffer(RuntimeError):
    """Ranks hold different bits of a tensor. The message is one line, the same on all of them."""


class Held(NamedTuple):
    """A tensor that differs among its holders, as a rank has it."""

    name: str
    holders: tuple[int, ...]
    sum: int
    who: str  # the rank and its host


def compare_replicas(alike: Sequence[Alike], ranks: Ranks, device: torch.device, step: int) -> None:
    """Compare what ranks hold alike. Collective over all ranks.

    Args:
        alike: what this rank holds as others do (`Engine.alike`).
        ranks: all of the run.
        device: from which the groups can reduce.
        step: after which this is asked.

    Raises:
        ReplicasDiffer: on all ranks, wherever it was found.
    """
    differing = [held for one in alike if one.group.size() > 1 for held in _differing(one, ranks.rank, device)]
    if ranks.union([bool(differing)])[0]:
        raise ReplicasDiffer(
            f"step {step}: {_explain([held for of_rank in ranks.gather(differing) for held in of_rank])}"
        )


def bits(tensor: Tensor) -> Tensor:
    """[] int64, where the tensor is: the sum of its bits as 64-bit integers, of what is left at the end as bytes."""
    flat = tensor.detach().flatten()
    if flat.stride(0) != 1 or flat.data_ptr() % 8:  # memory that cannot be read as wider integers
        flat = flat.clone(memory_format=torch.contiguous_format)
    flat = flat.view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def _differing(alike: Alike, rank: int, device: torch.device) -> list[Held]:
    sums = torch.stack([bits(tensor).to(device) for tensor in alike.tensors.values()])
    extremes = torch.stack([sums, ~sums])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, alike.group)
    most, least = extremes[0], ~extremes[1]
    if torch.equal(most, least):
        return []
    holders, who = tuple(dist.get_process_group_ranks(alike.group)), f"{rank} ({socket.gethostname()})"
    of_tensors = zip(alike.tensors, sums.tolist(), (most != least).tolist())
    return [Held(name, holders, own, who) for name, own, differs in of_tensors if differs]


def _explain(differing: Sequence[Held]) -> str:
    """One line: a tensor, who of its holders is against whom, and how many tensors more."""
    name, holders = differing[0].name, differing[0].holders
    sides: dict[int, list[str]] = {}  # by what they hold
    for held in differing:
        if (held.name, held.holders) == (name, holders):
            sides.setdefault(held.sum, []).append(held.who)
    *few, most = sorted(sides.values(), key=len)
    others = len({(held.name, held.holders) for held in differing}) - 1
    more = f" (and {others} more)" if others else ""
    told = " and ".join(_ranks(side) for side in few)
    doubt = "" if 2 * len(most) > len(holders) else ", and so few cannot tell which of them is wrong"
    return (
        f"{name}{more} must have the same bits on all ranks that hold it: {told} against {_ranks(most)}{doubt}; a memory or "
        "a processor there is at fault; nothing was saved; start the same command again to continue from the newest checkpoint"
    )


def _ranks(who: Sequence[str]) -> str:
    more = f" and {len(who) - NAMED} more" if len(who) > NAMED else ""
    return f"rank{'s' * (len(who) > 1)} {', '.join(who[:NAMED])}{more}"
