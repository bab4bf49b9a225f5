"""The processes of a run: what a launcher says about them, their device, and their process group.

`torchrun`, `deepspeed` and `accelerate launch` all describe a process by RANK, WORLD_SIZE and LOCAL_RANK. Started without a
launcher a run is a group of one, so that nothing later has to ask whether there is a group. Several processes are called by name
before they wait for each other, and watched from then on (`train.guard`).
"""

import ctypes
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.layout import LayoutError
from train.guard.alike import facts_of
from train.guard.lost import BUG, LOST, first_line, is_ambiguous, is_of_a_lost_peer
from train.guard.patience import LONG, START, Patience
from train.guard.roll_call import Seat, open_store, roll_call
from train.guard.watch import First, Other, Watch, connect, open_server


@dataclass(frozen=True)
class Process:
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    watch: Watch = field(default_factory=Watch)

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(
    device: Literal["auto", "cpu", "cuda"],
    recipe: Mapping[str, Any] | None = None,
    hang_seconds: float | None = None,
    watch: Watch | None = None,
    code_of: Callable[[BaseException], int] = lambda error: LOST,
) -> Iterator[Process]:
    """Join the group of the run, gloo for host tensors and nccl for a GPU's, and leave it at the end.

    Args:
        recipe: must be the same on all ranks.
        hang_seconds: the run ends when a rank does not answer, or none moves, for so long; None waits for ever.
        watch: the run's, not yet begun.
        code_of: the exit code of an error; 1 is that of a bug, which ends one of several processes here, with its traceback.

    Raises:
        LayoutError: the device that the recipe asks for is not there.
        Lost: not all ranks have come.
        UnlikeError: they come with other recipes or versions.
    """
    seat, watch, patience = Seat.from_environment(), watch or Watch(), Patience.of(hang_seconds)
    where = _device(device, seat.local_rank)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if seat.world_size > 1:
        store = _gather(seat, watch, patience, facts_of(recipe or {}, where.type == "cuda"))
        _wait_longer_than(patience)
    try:
        watch.at("making of the group of all ranks", patience=START, meeting=1)
        # Without a device_id: NCCL would then send a pipeline's messages through the communicator of its collectives, in turn.
        dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.world_size)
        if where.type == "cuda":  # a group's first operation needs all of its ranks, which point to point does not ask
            dist.all_reduce(torch.zeros(1, device=where))
        watch.at("starting", patience=START)
        yield Process(seat.rank, seat.world_size, seat.local_rank, where, watch)
    except BaseException as error:
        code, several = code_of(error), seat.world_size > 1
        if several and is_of_a_lost_peer(error):
            if is_ambiguous(error):
                traceback.print_exception(error)
            watch.lost(error)
        is_bug = several and code == BUG and isinstance(error, Exception)
        if is_bug:  # now: the others may end this process while it leaves its groups
            traceback.print_exception(error)
        watch.leave(code, first_line(error))
        if is_bug:
            raise SystemExit(BUG) from None
        raise
    else:
        watch.close()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Where this process computes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise LayoutError(
            "run.device: cuda: this process sees no CUDA device; use auto or cpu, or a CUDA build of torch"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if processes > torch.cuda.device_count():
        raise LayoutError(
            f"run.device: {processes} processes on this node share {torch.cuda.device_count()} GPUs; each needs one of its own; "
            "start as many processes as GPUs, or use run.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _gather(seat: Seat, watch: Watch, patience: Patience, facts: dict[str, str]) -> dist.Store:
    """Call the roll of a run's ranks and begin to watch over them; the store in which they find each other."""
    store = open_store(seat, patience)
    if seat.rank == 0:
        server, news = open_server(seat.world_size)
        members, _ = roll_call(store, seat, facts, patience, news)
        watch.begin(First(watch, members, patience, server, news["token"]))
    else:
        (first, me), news = roll_call(store, seat, facts, patience, {})
        watch.begin(Other(watch, first, me, patience, seat, connect(seat.address[0], news, me, patience)))
    return dist.PrefixStore("group", store)


def _wait_longer_than(patience: Patience) -> None:
    """Let collectives wait until the watch has had its say. PyTorch has no other way to tell the groups of a DeviceMesh."""
    limit = timedelta(seconds=max(LONG, 2 * patience.hang)) if patience.hang < float("inf") else timedelta(days=1)
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit


def keep_freed_memory() -> None:
    """Let the C library hand the memory of freed tensors to the next ones, where it is glibc.

    By itself it gives most of it back to the system and gets it anew, cleared page by page: 3 to 7 % of a step on a CPU, and more
    in some steps than in others. A process then stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        never, most = 2**30, 2**25  # bytes; older versions take no more than the second
        mallopt(MMAP_THRESHOLD, never) or mallopt(MMAP_THRESHOLD, most)
        mallopt(TRIM_THRESHOLD, never)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h
