"""Contestants of `train_step.py` in processes of their own, which do what they are asked and are idle in between."""

import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import Batch, Contestant, Ours, Shape, Theirs
from step_profile import profile

from model.flops import Recompute
from train.planning.devices import peak_flops
from train.planning.simulation.live_bytes import LiveBytes

ATTENTION = ("eager", "sdpa")
FEW = 16  # tokens of a cheap trial
HOPELESS = 8.0  # a candidate that takes this many times the best one's time per token gets no full trial
LATE = 600  # seconds after which a silent process is given up
IN_A_ROW = 4  # steps between two looks at a GPU's clock: no run waits for each of its steps


class Seconds(NamedTuple):
    """The time of one step."""

    wall: float
    cpu: float  # what the process itself ran, without the neighbours' turns; not a number on a GPU


class Task(NamedTuple):
    """What all contestants of a run have in common."""

    shape: Shape  # without MTP
    device: str
    core: int | None  # of a CPU, to which all are pinned
    recompute: Recompute  # of ours
    weights: Path | None  # what they start from; None: fresh ones
    store: Path | None  # of the tokens; None: random ones
    first_step: int  # of the store's steps, that the tokens are taken from


class Side:
    """One contestant in a process of its own: "ours", "theirs", or "mtp", which is ours with `modules` of MTP."""

    def __init__(self, name: str, task: Task, modules: int = 0):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, task, modules), daemon=True)
        self.process.start()
        other.close()

    def ask(self, question: str, *arguments: Any) -> Any:
        self.pipe.send((question, arguments))
        if not self.pipe.poll(LATE):
            raise TimeoutError(f"{self.name}: no answer to {question!r} after {LATE} s")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=10)
        self.process.kill()


def serve(pipe: Connection, name: str, task: Task, modules: int) -> None:
    """The life of a side's process: answer until the other end is closed."""
    if task.core is not None:
        os.sched_setaffinity(0, {task.core})
        torch.set_num_threads(1)
    worker = Worker(name, task, modules)
    while True:
        try:
            question, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(worker, question)(*arguments))


class Worker:
    """Answers the questions put to a side."""

    def __init__(self, name: str, task: Task, modules: int):
        self.name, self.task, self.shape = name, task, task.shape.with_mtp(modules)
        self.device = torch.device(task.device)
        self.dtype = compute_dtype(task.device)
        self.batch = self.shape.read_from(task.store, task.first_step) if task.store else self.shape.draw()
        self.batch = self.batch.to(self.device)
        self.implementation = ("grouped_mm", "sdpa", False)  # of transformers: experts, attention, recomputing
        self.contestant: Contestant

    def choose(self) -> dict[str, Any]:
        """Try every implementation on the whole batch and keep the fastest.

        `batched_mm` copies the weights of every token's experts, 16 GB for the reference shape; a few tokens tell whether it is
        worth that. Where the device has no room for any of the others, they recompute.
        """
        for recompute in (False, True):
            whole = [(experts, attention, recompute) for experts in ("grouped_mm", "eager") for attention in ATTENTION]
            seconds = {candidate: self._try(candidate, self.batch) for candidate in whole}
            if min(seconds.values()) < float("inf"):
                break
        rate = min(seconds.values()) / self.shape.tokens
        few = Batch(*(part[:1, : FEW + 1].contiguous() for part in self.batch))
        for attention in ATTENTION:
            candidate = ("batched_mm", attention, recompute)
            hopeless = self._try(candidate, few) / FEW > HOPELESS * rate
            seconds[candidate] = float("inf") if hopeless else self._try(candidate, self.batch)
        self.implementation = min(seconds, key=seconds.__getitem__)
        return {
            "fastest": label(self.implementation),
            "seconds": {label(c): s if math.isfinite(s) else None for c, s in seconds.items()},
        }

    def warm(self, steps: int, weights: Path) -> dict[str, Any]:
        """Train on the store's first steps, and write the weights for all. Ours only."""
        assert self.task.store
        ours = Ours(self.shape, self.device, self.dtype, self.task.recompute)
        for step in range(steps):
            result = ours.train(self.shape.read_from(self.task.store, step).to(self.device), step)
        torch.save(ours.model.state_dict(), weights)
        counts = result.expert_counts.double()  # [MoE layers, E]
        busiest = counts.amax(-1) / counts.mean(-1).clamp_min(1)
        return {"steps": steps, "loss": result.losses.main, "busiest_expert_over_mean": busiest.mean().item()}

    def start(self) -> float:
        """The first loss: of fresh weights, or of those that were warmed."""
        self.contestant = self._build(self.implementation)
        if self.task.weights:
            given = torch.load(self.task.weights, mmap=True, map_location="cpu")
            own = self.contestant.model.state_dict()
            self.contestant.model.load_state_dict({name: given[name] for name in own})
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

    def profile(self, peak: float) -> dict[str, Any]:
        """Where a step's time goes (`step_profile`)."""
        return profile(lambda: self.contestant.step(self.batch), self.shape, self.task.recompute, self.device, peak)

    def _build(self, implementation: tuple[str, str, bool]) -> Contestant:
        if self.name == "theirs":
            return Theirs(self.shape, self.device, self.dtype, *implementation)
        return Ours(self.shape, self.device, self.dtype, self.task.recompute)

    def _try(self, implementation: tuple[str, str, bool], batch: Batch) -> float:
        """Seconds of the best of three steps after a first; infinite where the implementation fails on this device.

        On a CPU these are seconds of CPU time: the candidates do not alternate, and a neighbour must not choose among them.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            contestant = self._build(implementation)
            contestant.step(batch)
            times = [timed(lambda: contestant.step(batch), self.device, 1) for _ in range(3)]
        except (RuntimeError, NotImplementedError, ImportError, ValueError):
            return float("inf")
        return min(time.cpu if self.device.type == "cpu" else time.wall for time in times)


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def label(implementation: tuple[str, str, bool]) -> str:
    experts, attention, recompute = implementation
    return f"{experts} experts, {attention} attention" + ", recomputing" * recompute


def timed(step: Callable[[], Any], device: torch.device, in_a_row: int = IN_A_ROW) -> Seconds:
    """How long one call takes; on a GPU the mean of some in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(in_a_row):
            step()
        end.record()
        end.synchronize()
        return Seconds(begin.elapsed_time(end) / 1e3 / in_a_row, float("nan"))
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
