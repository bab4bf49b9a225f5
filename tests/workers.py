"""Persistent gloo workers: processes that are started once a session and run one function after another as ranks of a fresh group.

Starting a process and importing torch costs seconds; making a process group costs milliseconds.
"""

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import PROCESSES

# Groups of earlier functions linger, DeepSpeed's for good, and gloo's threads look for work a hundred times a second.
MOST_THREADS = 60


class Workers:
    """`workers.run(2, function, *args)` runs `function(*args)` as both ranks of a group of 2; returns what each returned.

    The function and its arguments must be importable and picklable. An exception in a rank is raised here with its traceback.
    """

    def __init__(self, most: int):
        started = [_start() for _ in range(most)]
        self.pipes, self.processes = [pipe for pipe, _ in started], [process for _, process in started]

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:world_size]):
                pipe.send((function, args, rank, world_size, os.path.join(folder, "store")))
            answers = [pipe.recv() for pipe in self.pipes[:world_size]]
        for rank, (*_, threads) in enumerate(answers):
            if threads > MOST_THREADS:
                self._renew(rank)
        for rank, (_, failure, _) in enumerate(answers):
            if failure:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
        return [value for value, *_ in answers]

    def _renew(self, rank: int) -> None:
        self.pipes[rank].close()
        self.processes[rank].join(timeout=5)
        self.processes[rank].kill()
        self.pipes[rank], self.processes[rank] = _start()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()


def _start() -> tuple[Connection, Any]:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        try:
            value, failure = function(*args), None
        except Exception:
            value, failure = None, traceback.format_exc()
        finally:
            dist.destroy_process_group()
        if _threads() > MOST_THREADS:
            _forget_groups()
        pipe.send((value, failure, _threads()))


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _forget_groups() -> None:
    """Earlier functions' groups, with their threads, are kept by engines, which are cycles, and by DTensor's cache of shardings."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()
    gc.collect()
