"""One training step of Rorqual against the same step of `transformers`' DeepseekV3: time and memory.

    python benchmarks/train_step.py --shape benchmarks/shapes/reference.json --json FILE

Each side lives in a process of its own. On a CPU both are pinned to the same core with one thread each, and one is idle while the
other steps, A B A B …: a neighbour's noise then hits both, and the ratio is taken pair by pair. On a GPU (bf16, CUDA events) they
alternate as well. `transformers` runs with the fastest of its experts and attention implementations, found by trial in the run.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import Batch, Contestant, Ours, Shape, Theirs
from live_bytes import LiveBytes

from data.files import replace_file
from model.flops import flops_mfu
from train.planning.devices import peak_flops

ATTENTION = ("eager", "sdpa")
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest difference of the first losses, in nats
FEW = 16  # tokens of a cheap trial
HOPELESS = 8.0  # a candidate that takes this many times the best one's time per token gets no full trial
LATE = 600  # seconds after which a silent process is given up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, required=True, help="a file of benchmarks/shapes")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--pairs", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each side before the timed ones")
    parser.add_argument("--core", type=int, help="the CPU core both are pinned to; default: the last one")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    core = (arguments.core if arguments.core is not None else max(os.sched_getaffinity(0))) if device == "cpu" else None
    result = compare(Shape.read(arguments.shape), device, core, arguments.pairs, arguments.warmup)
    text = json.dumps(result, indent=2)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(text + "\n")
    print(text)


def compare(shape: Shape, device: str, core: int | None, pairs: int, warmup: int) -> dict[str, Any]:
    """Run both sides and put their figures beside each other. Ratios are ours / theirs."""
    ours, theirs = Side("ours", shape, device, core), Side("theirs", shape, device, core)
    try:
        implementation = theirs.ask("choose")
        peak = ours.ask("peak_flops")
        first = {"ours": ours.ask("start"), "theirs": theirs.ask("start")}
        difference = abs(first["ours"] - first["theirs"])
        allowed = SAME_LOSS[compute_dtype(device)]
        assert difference <= allowed, (
            f"first losses differ by {difference:.1e}: the two sides do different work ({first})"
        )
        for _ in range(warmup - 1):  # the first step was one
            ours.ask("step"), theirs.ask("step")
        steps: list[tuple[Seconds, Seconds]] = [(ours.ask("step"), theirs.ask("step")) for _ in range(pairs)]
        memory = {"ours": ours.ask("memory"), "theirs": theirs.ask("memory")}
    finally:
        ours.close()
        theirs.close()
    seconds = [(a.wall, b.wall) for a, b in steps]
    ratios = sorted(b / a for a, b in seconds)
    flops = flops_mfu(shape.config, shape.sequence_length)
    speed = {name: shape.tokens / statistics.median(times) for name, times in zip(("ours", "theirs"), zip(*seconds))}
    return {
        "shape": shape.name,
        "tokens_per_step": shape.tokens,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, one core, one thread",
        "compute_dtype": str(compute_dtype(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "theirs_fastest": implementation["fastest"],
        "theirs_trials_seconds": implementation["seconds"],
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_spread": [ratios[0], ratios[-1]],
        "speed_ratio_of_cpu_time": statistics.median(b.cpu / a.cpu for a, b in steps) if device == "cpu" else None,
        "tokens_per_second": speed,
        "peak_flops": peak,
        "flops_per_token": flops,
        "mfu": {name: rate * flops / peak for name, rate in speed.items()},
        "memory_ratio": memory["ours"]["everything"] / memory["theirs"]["everything"],
        "memory_ratio_without_state": memory["ours"]["without_state"] / memory["theirs"]["without_state"],
        "peak_bytes": memory,
        "first_loss": first,
        "step_seconds": {"ours": [a for a, _ in seconds], "theirs": [b for _, b in seconds]},
    }


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


class Seconds(NamedTuple):
    """The time of one step."""

    wall: float
    cpu: float  # what the process itself ran, without the neighbours' turns; not a number on a GPU


class Side:
    """One contestant in a process of its own, which does what it is asked and is idle in between."""

    def __init__(self, name: str, shape: Shape, device: str, core: int | None):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, shape, device, core), daemon=True)
        self.process.start()
        other.close()

    def ask(self, question: str) -> Any:
        self.pipe.send(question)
        if not self.pipe.poll(LATE):
            raise TimeoutError(f"{self.name}: no answer to {question!r} after {LATE} s")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=10)
        self.process.kill()


def serve(pipe: Connection, name: str, shape: Shape, device_name: str, core: int | None) -> None:
    """The life of a side's process: answer until the other end is closed."""
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    worker = Worker(name, shape, torch.device(device_name))
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(worker, question)())


class Worker:
    """Answers the questions put to a side."""

    def __init__(self, name: str, shape: Shape, device: torch.device):
        self.name, self.shape, self.device = name, shape, device
        self.dtype = compute_dtype(device.type)
        self.batch = shape.draw().to(device)
        self.implementation = ("grouped_mm", "sdpa")  # of transformers: experts, attention
        self.contestant: Contestant

    def choose(self) -> dict[str, Any]:
        """Try every implementation on the whole batch and keep the fastest.

        `batched_mm` copies the weights of every token's experts, 16 GB for the reference shape; a few tokens tell whether it is
        worth that.
        """
        seconds = {(e, a): self._try((e, a), self.batch) for e in ("grouped_mm", "eager") for a in ATTENTION}
        rate = min(seconds.values()) / self.shape.tokens
        few = Batch(*(part[:1, : FEW + 1].contiguous() for part in self.batch))
        for attention in ATTENTION:
            candidate = ("batched_mm", attention)
            hopeless = self._try(candidate, few) / FEW > HOPELESS * rate
            seconds[candidate] = float("inf") if hopeless else self._try(candidate, self.batch)
        self.implementation = min(seconds, key=seconds.__getitem__)
        return {
            "fastest": label(self.implementation),
            "seconds": {label(c): s if math.isfinite(s) else None for c, s in seconds.items()},
        }

    def start(self) -> float:
        """A fresh model's first loss."""
        self.contestant = self._build(self.implementation)
        return self.contestant.step(self.batch)

    def peak_flops(self) -> float:
        return peak_flops(self.device, self.dtype)

    def step(self) -> Seconds:
        return timed(lambda: self.contestant.step(self.batch), self.device)

    def memory(self) -> dict[str, int]:
        """The peak of live tensor bytes in a step; beside it, on a GPU, that of the allocator."""
        model, optimizer = self.contestant.model, self.contestant.optimizer
        state = [*model.parameters(), *(v for values in optimizer.state.values() for v in values.values())]
        live, gradients = LiveBytes(), set[int]()
        numbers = live.note(state)
        live.note([*model.buffers(), *self.batch])
        hook = optimizer.register_step_pre_hook(
            lambda *_: gradients.update(live.note(p.grad for p in model.parameters()))
        )
        with live:
            self.contestant.step(self.batch)  # finds what lasts from step to step and is no parameter, such as buckets
            live.start()
            self.contestant.step(self.batch)
        hook.remove()
        peak = live.peak(numbers | gradients)._asdict()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.contestant.step(self.batch)
            peak["allocator"] = torch.cuda.max_memory_allocated()
        return peak

    def _build(self, implementation: tuple[str, str]) -> Contestant:
        if self.name == "ours":
            return Ours(self.shape, self.device, self.dtype)
        return Theirs(self.shape, self.device, self.dtype, *implementation)

    def _try(self, implementation: tuple[str, str], batch: Batch) -> float:
        """Seconds of the best of three steps after a first; infinite where the implementation fails on this device.

        On a CPU these are seconds of CPU time: the candidates do not alternate, and a neighbour must not choose among them.
        """
        try:
            contestant = self._build(implementation)
            contestant.step(batch)
            times = [timed(lambda: contestant.step(batch), self.device) for _ in range(3)]
        except (RuntimeError, NotImplementedError, ImportError, ValueError):
            return float("inf")
        return min(time.cpu if self.device.type == "cpu" else time.wall for time in times)


def label(implementation: tuple[str, str]) -> str:
    return "{} experts, {} attention".format(*implementation)


def timed(step: Callable[[], Any], device: torch.device) -> Seconds:
    """How long one call takes."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return Seconds(begin.elapsed_time(end) / 1e3, float("nan"))
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
