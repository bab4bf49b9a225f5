"""The processes of a run: what a launcher says about them, their device, and their process group.

`torchrun`, `deepspeed` and `accelerate launch` all describe a process by RANK, WORLD_SIZE and LOCAL_RANK. Started without a
launcher a run is a group of one, so that nothing later has to ask whether there is a group.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from parallel.layout import LayoutError


@dataclass(frozen=True)
class Process:
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Process]:
    """Join the group of the run, gloo for host tensors and nccl for a GPU's, and leave it at the end.

    Raises:
        LayoutError: the device that the recipe asks for is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise LayoutError(
            "run.device: cuda: this process sees no CUDA device; use auto or cpu, or a CUDA build of torch"
        )
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if use_cuda and processes > torch.cuda.device_count():
        raise LayoutError(
            f"run.device: {processes} processes on this node share {torch.cuda.device_count()} GPUs; each needs one of its own; "
            "start as many processes as GPUs, or use run.device=cpu"
        )
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        # Without a device_id: NCCL would then send a pipeline's messages through the communicator of its collectives, in turn.
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if use_cuda:  # a group's first operation needs all of its ranks, which point to point does not ask; and a broken one shows now
        dist.all_reduce(torch.zeros(1, device=where))
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), local_rank, where)
    finally:
        dist.destroy_process_group()


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
