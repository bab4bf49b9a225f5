"""A bit that flips on one rank is found before it is saved, wherever several ranks hold the same; without a flip nothing is."""

import math
import socket
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import Engine
from parallel.layout import ParallelConfig
from tests.parallel.harness import SETTINGS, Case, build, micro_batches
from tests.small_run import STEPS, Run
from train.cli import main
from train.guard.replicas import ReplicasDiffer, bits, compare_replicas
from train.ranks import Ranks
from train.trainer import Trainer

LOST = 4  # the exit code
EXPERT, BIAS = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.gate.e_score_correction_bias"
GATE, EMBEDDING = "model.layers.2.mlp.gate.weight", "model.embed_tokens.weight"
WEIGHTS = tuple(f"{section}.{name}" for section in ("parameters", "exp_avg", "exp_avg_sq") for name in (GATE, EXPERT))
EVERYWHERE = (f"buffers.{BIAS}",)

# processes, layout, what of it has copies, and the ranks that hold those of rank 1
LAYOUTS: dict[str, tuple[int, ParallelConfig, tuple[str, ...], tuple[int, ...]]] = {
    "ddp": (2, ParallelConfig("ddp"), (*WEIGHTS, *EVERYWHERE), (0, 1)),
    "ddp of three": (3, ParallelConfig("ddp"), (WEIGHTS[1], EVERYWHERE[0]), (0, 1, 2)),
    "fsdp, context": (2, ParallelConfig("fsdp", context=2), EVERYWHERE, (0, 1)),
    "fsdp, expert": (4, ParallelConfig("fsdp", expert=2), EVERYWHERE, (0, 1, 2, 3)),
    "HSDP": (4, ParallelConfig("fsdp", replicate=2), WEIGHTS, (1, 3)),
    "HSDP, expert": (4, ParallelConfig("fsdp", replicate=2, expert=2), WEIGHTS, (1, 3)),
    "ddp, pipeline": (2, ParallelConfig("ddp", pipeline=2), (f"parameters.{EMBEDDING}", f"exp_avg.{EMBEDDING}"), (0, 1)),
    "zero1": (2, ParallelConfig("zero1"), (f"parameters.{GATE}", *EVERYWHERE), (0, 1)),
    "zero2, expert": (4, ParallelConfig("zero2", expert=2), (f"parameters.{EXPERT}",), (1, 3)),
    "zero3": (2, ParallelConfig("zero3"), EVERYWHERE, (0, 1)),
}  # fmt: skip


def test_any_flipped_bit_changes_the_sum() -> None:
    """Bits of the first and last element: of sizes that 8 bytes divide or not, in memory that is aligned, contiguous or not."""
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for start, size in ((0, 4), (1, 5), (0, 1)):
            whole = torch.randn(16).to(dtype)
            for tensor in (whole[start : start + size], whole.view(4, 4)[:size, 0]):
                before = int(bits(tensor))
                words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
                for place in {0, len(words) - 1}:
                    for bit in range(8 * dtype.itemsize):
                        flip(tensor, place, bit)
                        assert int(bits(tensor)) != before, (dtype, start, size, place, bit)
                        flip(tensor, place, bit)
                assert int(bits(tensor)) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_is_found_with_all_that_hold_the_tensor(workers: Any, layout: str) -> None:
    processes, parallel, names, holders = LAYOUTS[layout]
    host = socket.gethostname()
    for found in workers.run(processes, find_flips, parallel, names):
        for name, line in zip(names, found, strict=True):
            assert line.startswith(f"step 1: {name} must have the same bits on all ranks that hold it: rank")
            if len(holders) > 2:
                others = ", ".join(f"{rank} ({host})" for rank in holders if rank != 1)
                assert f": rank 1 ({host}) against ranks {others}; " in line
            else:
                assert all(f"rank {rank} ({host})" in line for rank in holders) and "cannot tell which" in line


def test_a_run_with_a_flipped_bit_saves_nothing_more_and_goes_on_from_before_it(run: Run, whole: Run) -> None:
    """Found before the next save; or, where asked for, after the step in which it flips."""
    for flips_after, changes, found_after in ((5, (), 6), (7, ("run.compare_replicas_every_steps=1",), 7)):
        changes = ("checkpoint.every_steps=2", "checkpoint.keep=20", *changes)
        processes = run.start(*changes, processes=2, work=train_with_a_flip, extra=(flips_after,))
        assert processes.wait() == [LOST, LOST], run.said
        line = run.said.splitlines()[-1]
        assert line.startswith(
            f"rorqual: step {found_after}: exp_avg.model.layers.1.mlp.gate.weight must have the same bits"
        )
        assert "nothing was saved; start the same command again" in line
        assert "Traceback" not in run.said
        assert run.checkpoints()[-1] == f"step-{(found_after - 1) // 2 * 2:08d}"
    assert run.train(processes=2) == [0, 0], run.said
    assert f"continuing after step 6 of {STEPS}" in run.said
    for line, same in zip(run.metrics(), whole.metrics(), strict=True):
        assert math.isclose(line["loss"], same["loss"], rel_tol=1e-5), line["step"]


def train_with_a_flip(arguments: list[str], step: int) -> int:
    """`rorqual train` in which a bit of a moment flips on rank 1, behind a step."""
    launch = Trainer._launch

    def launch_and_flip(self: Trainer, *of_step: Any) -> Any:
        launched = launch(self, *of_step)
        if launched.number == step and self.process.rank == 1:
            flip(tensor_of(self.engine, "exp_avg.model.layers.1.mlp.gate.weight"), bit=3)
        return launched

    Trainer._launch = launch_and_flip  # type: ignore[method-assign]
    return main(["train", *arguments])


def find_flips(parallel: ParallelConfig, names: tuple[str, ...]) -> list[str]:
    """As one rank: after a step nothing differs; then a bit flips on rank 1, is found, and flips back, tensor by tensor."""
    case = Case(replace(parallel, micro_batch=4))
    engine, ranks, found = build(case), Ranks(dist.group.WORLD), []
    engine.step(micro_batches(case, 0), SETTINGS)
    compare_replicas(engine.alike(), ranks, torch.device("cpu"), 1)
    for name in names:
        if dist.get_rank() == 1:
            flip(tensor_of(engine, name))
        try:
            compare_replicas(engine.alike(), ranks, torch.device("cpu"), 1)
        except ReplicasDiffer as error:
            found.append(str(error))
        if dist.get_rank() == 1:
            flip(tensor_of(engine, name))
    compare_replicas(engine.alike(), ranks, torch.device("cpu"), 1)
    return found


def tensor_of(engine: Engine, name: str) -> Tensor:
    """What a rank holds alike with others, by the name it has in a checkpoint."""
    return next(alike.tensors[name] for alike in engine.alike() if name in alike.tensors)


def flip(tensor: Tensor, place: int = 0, bit: int = 0) -> None:
    """Flip a bit of one element."""
    local = tensor.detach()
    words = local.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()])
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), words.shape))
    mask = torch.tensor(1, dtype=words.dtype) << bit
    words[where] = words[where] ^ mask
