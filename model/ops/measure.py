"""How long a call takes on a device, for choices that are made by measurement at start-up."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

ROUNDS = 5  # timed groups of each; their median counts
CALLS = 5  # of a group
QUEUED = 5_000_000  # cycles, about 3 ms, in which a group is queued


def times(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of each, the median of several."""
    return {name: median(values) for name, values in in_turns(runs, device, ROUNDS).items()}


def in_turns(runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, once a round; they take turns, so that what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call. On a GPU by its own clock, of several, which are queued while it waits: none waits for the host."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUED)
    run()
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def reason(error: Exception) -> str:
    """The first line of what a library finds wrong with a shape, a device or itself."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}" if str(error) else repr(error)
