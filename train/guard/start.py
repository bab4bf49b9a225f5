"""What is looked at before the first step, when nothing is lost yet: do the ranks read the same text, does every group of the mesh
answer, and is one of the devices slow.

Recipe and versions have been compared by then (`train.guard.roll_call`): on them depends which groups there are.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist

from data.store import Store
from train.guard.alike import UnlikeError, difference
from train.guard.members import Member
from train.guard.patience import START
from train.guard.watch import Watch
from train.ranks import Ranks

SLOW = 1.5  # times the median of all ranks' seconds for one product
SIDES = {"cuda": (8192, torch.bfloat16), "cpu": (384, torch.float32)}  # of the product's matrices: about 2 ms each
REPEATS = 5  # the best counts: a neighbour on the core is no slow device


def check_content(ranks: Ranks, stores: Iterable[Store]) -> None:
    """Every rank reads the same tokens, whatever its file system has under the path.

    Raises:
        UnlikeError: it does not.
    """
    found = ranks.gather((me(ranks), {f"data {store.path}": f"content {store.content[:12]}" for store in stores}))
    members, facts = zip(*found)
    if line := difference(members, facts, "copy one store to all nodes, or read it from a file system that they share"):
        raise UnlikeError(line)


def check_groups_and_devices(
    ranks: Ranks, groups: Mapping[str, dist.ProcessGroup], device: torch.device, watch: Watch
) -> list[str]:
    """A small sum over every group, twice, and a product on every device. Collective.

    Returns:
        Lines for a person: the slowest of both, and a warning for each device that is much slower than the others.
    """
    if ranks.size == 1:
        return []
    sums: dict[str, tuple[float, float]] = {}
    for number, (name, group) in enumerate({"all": dist.group.WORLD, **groups}.items(), 1):
        watch.at(f"first sum over the ranks of {name}", meeting=number)
        add = partial(dist.all_reduce, torch.ones(1, device=device), group=group)
        sums[name] = _seconds(add), _seconds(add)
    watch.at("product on every device", meeting=len(sums) + 1)
    found = ranks.gather((me(ranks), sums, _product_seconds(device)))
    watch.at("starting", patience=START)
    return _lines(found)


def me(ranks: Ranks) -> Member:
    """This process, as others know it."""
    return Member(ranks.rank, socket.gethostname(), os.getpid())


def _lines(found: list[tuple[Member, dict[str, tuple[float, float]], float]]) -> list[str]:
    members, sums, products = zip(*found)
    parts = []
    for name in dict.fromkeys(name for own in sums for name in own):
        first, again = (max(own[name][turn] for own in sums if name in own) for turn in (0, 1))
        parts.append(f"{name} {1e3 * first:.1f} and {1e3 * again:.1f} ms")
    median = statistics.median(products)
    slowest = max(range(len(products)), key=products.__getitem__)
    lines = [
        f"start: {len(members)} ranks alike; first and second sum over {', '.join(parts)}; "
        f"slowest product {products[slowest] / median:.2f} of the median, on rank {members[slowest].rank}"
    ]
    for member, seconds in zip(members, products):
        if seconds > SLOW * median:
            lines.append(
                f"warning: {member} takes {seconds / median:.1f} times as long for a product as the median rank "
                f"({1e3 * seconds:.2f} ms): every step waits for it; look at its clocks, its temperature and its neighbours"
            )
    return lines


def _product_seconds(device: torch.device) -> float:
    """The best of a few products of two square matrices."""
    side, dtype = SIDES[device.type]
    a, b = torch.ones(2, side, side, dtype=dtype, device=device)
    return min(_seconds(lambda: a @ b) for _ in range(REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    """Of work on the current device, to its end."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
