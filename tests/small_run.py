"""A run small enough to be started, killed and continued dozens of times: 20 steps of 8 × 32 tokens, some 20 ms each.

`Run(store, folder)` starts it as processes of its own, by the same `main` that `rorqual` and `torchrun -m train` call.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.store import Store
from tests.processes import PROCESSES
from train.checkpoint import Checkpoint, read_run, verify
from train.cli import main

STEPS, SEQUENCES, LENGTH = 20, 8, 32
CHANGES = {
    "model.vocab_size": 512,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 2,
    "model.n_routed_experts": 8,
    "model.n_group": 2,
    "model.topk_group": 1,
    "model.num_experts_per_tok": 2,
    "model.num_attention_heads": 2,
    "model.kv_lora_rank": 16,
    "model.q_lora_rank": 16,
    "model.qk_rope_head_dim": 8,
    "model.qk_nope_head_dim": 8,
    "model.v_head_dim": 8,
    "model.max_position_embeddings": 64,
    "model.initializer_range": 0.1,
    "data.sequence_length": LENGTH,
    "parallel.micro_batch": 8,
    "optimizer.ema": 0.9,
    "schedule.tokens": STEPS * SEQUENCES * LENGTH,
    "schedule.batch_tokens": SEQUENCES * LENGTH,
    "schedule.lr": 1e-2,
    "schedule.warmup_steps": 4,
    "schedule.gamma": 0.01,
    "schedule.alpha": 1e-3,
    "evaluate.every_steps": "null",
    "evaluate.tokens": 512,
    "evaluate.sample_prompts": "[]",
    "checkpoint.every_steps": "null",
    "run.device": "cpu",
}
CLOCKS = {"tokens_per_second", "data_seconds", "mfu", "memory_bytes"}  # what differs between two runs that are the same


class Run:
    """A run folder, and what its processes said."""

    def __init__(self, store: Store | Path, folder: Path) -> None:
        self.store = store.path if isinstance(store, Store) else store
        self.folder = folder
        self.said = ""  # standard error of the processes started last, rank by rank

    def arguments(self, *changes: str) -> list[str]:
        """What stands behind `train` on the command line."""
        given = CHANGES | {"data.train": self.store, "run.dir": self.folder}
        return ["tiny", *(f"{key}={value}" for key, value in given.items()), *changes]

    def train(self, *changes: str, processes: int = 1) -> list[int]:
        """Train in new processes to their end; the exit code of each."""
        return self.start(*changes, processes=processes).wait()

    def start(
        self, *changes: str, processes: int = 1, work: Callable[..., Any] | None = None, extra: tuple[Any, ...] = ()
    ) -> "Processes":
        """Start processes as `torchrun` does. `work(arguments, *extra)` takes the place of the command line's `main`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        said = Path(tempfile.mkdtemp(prefix="said-"))
        for rank in range(processes):
            environment = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_PORT": port}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            arguments = self.arguments(*changes)
            process = PROCESSES.Process(
                target=_command, args=(arguments, environment if processes > 1 else {}, said / str(rank), work, extra)
            )
            process.start()
            ranks.append(process)
        return Processes(self, ranks, said)

    def checkpoints(self) -> list[str]:
        """Names of the folders in `checkpoints/`, complete or not."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))

    def checkpoint(self, step: int = STEPS) -> Path:
        path = self.folder / "checkpoints" / f"step-{step:08d}"
        verify(path)
        return path

    def tensors(self, step: int = STEPS) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: parameters, buffers, moments, average of the weights, steps, loss scale."""
        checkpoint = Checkpoint(self.checkpoint(step))
        state = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in checkpoint.tensors.items()}
        checkpoint.load(state)
        return state

    def record(self, step: int = STEPS) -> dict[str, Any]:
        """`run.json` of a checkpoint."""
        return read_run(self.checkpoint(step))

    def metrics(self) -> list[dict[str, Any]]:
        """The objects of `metrics.jsonl` without what clocks say."""
        lines = (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


class Processes:
    """The processes of a started run."""

    def __init__(self, run: Run, ranks: list[Any], said: Path) -> None:
        self.run, self.ranks, self.said = run, ranks, said

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit code of each, once all have ended."""
        for process in self.ranks:
            process.join(seconds)
            if process.exitcode is None:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {self.run.folder}")
        self.run.said = "".join(path.read_text("utf-8") for path in sorted(self.said.iterdir()))
        shutil.rmtree(self.said)
        return [process.exitcode for process in self.ranks]

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def until(self, condition: Callable[..., bool], *args: Any) -> None:
        """Return as soon as `condition(*args)` holds, or when a process has ended."""
        deadline = time.monotonic() + 60
        while not condition(*args) and all(process.is_alive() for process in self.ranks):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), f"{name} differs by {(found[name] - tensor).abs().max()}"


def _command(
    arguments: list[str],
    environment: dict[str, Any],
    said: Path,
    work: Callable[..., Any] | None,
    extra: tuple[Any, ...],
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(work(arguments, *extra) if work else main(["train", *arguments]))
