"""What a run says before its first step: who has not come, and who has come with something else."""

import ctypes
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from data.prepare import prepare
from tests.conftest import write_tiny_recipe
from tests.small_run import Run
from tests.train.guard.test_watch import RANK
from train.cli import main
from train.guard.alike import difference
from train.guard.members import Member
from train.guard.patience import START
from train.guard.start import _lines, check_groups_and_devices
from train.launch import process_group
from train.ranks import Ranks

CLONE_NEWNS = 0x20000  # of linux/sched.h


def train_or_stay_away(arguments: list[str], absent: int) -> int:
    return 0 if os.environ["RANK"] == str(absent) else main(["train", *arguments])


@pytest.mark.parametrize("absent", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_rank_that_does_not_come_is_named(run: Run, absent: int) -> None:
    processes = run.start("run.hang_seconds=2", processes=3, work=train_or_stay_away, extra=(absent,))
    assert processes.wait() == [0 if rank == absent else 4 for rank in range(3)]
    told, ended = run.said.splitlines()
    if absent:
        line = f"rorqual: rank {absent} of 3 has not come: its process has not started, or cannot reach 127.0.0.1:"
    else:  # its store is not there either
        line = "rorqual: rank 0 does not answer at 127.0.0.1:"
    assert told.startswith(line) and told.endswith("; waiting for 1 s")
    assert re.fullmatch(re.escape(told.removesuffix("waiting for 1 s")) + r"waited \d s", ended)


def train_with_another(arguments: list[str], change: str) -> int:
    return main(["train", *arguments, *([change] if os.environ["RANK"] == "1" else [])])


def test_a_rank_with_another_recipe_is_named_with_both_values(run: Run) -> None:
    assert run.start(processes=3, work=train_with_another, extra=("schedule.lr=2e-2",)).wait() == [2, 2, 2]
    (line,) = run.said.splitlines()
    assert re.fullmatch(
        rf"rorqual: schedule.lr: 0.02 on {RANK.format(1)}; 0.01 on the others; it must be the same on every rank; start every "
        "process with the same command, and install the same packages on every node",
        line,
    )
    assert not run.folder.exists()


def train_over(arguments: list[str], store: str, other: str) -> int:
    """Train; rank 1 sees the other store under the path of this one, as on a node with a disk of its own."""
    if os.environ["RANK"] == "1":
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--bind", other, store], check=True)
    return main(["train", *arguments])


@pytest.fixture
def other_store(tmp_path: Path) -> Path:
    """A store of less text."""
    (tmp_path / "text").mkdir()
    return prepare(write_tiny_recipe(tmp_path / "text", documents=150), tmp_path / "other").path


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_rank_that_reads_other_text_is_named(run: Run, other_store: Path) -> None:
    assert run.start(processes=2, work=train_over, extra=(str(run.store), str(other_store))).wait() == [2, 2]
    (line,) = run.said.splitlines()
    assert re.fullmatch(
        rf"rorqual: data {run.store}: content \w+ on {RANK.format(1)}; content \w+ on the others; it must be the same on every "
        "rank; copy one store to all nodes, or read it from a file system that they share",
        line,
    )


def be_late(_: list[str]) -> int:
    with process_group("cpu", hang_seconds=1.5) as process:
        process.watch.at("building the engine", patience=START)
        time.sleep(1.5 * process.rank)
        check_groups_and_devices(Ranks(dist.group.WORLD), {}, process.device, process.watch)
    return 0


def test_a_rank_that_is_late_at_the_first_sum_is_named_and_waited_for(run: Run) -> None:
    assert run.start(processes=2, work=be_late).wait() == [0, 0], run.said
    assert re.fullmatch(
        rf"rorqual: {RANK.format(1)} has not come to the first sum over the ranks of all for 1 s; last heard of in: building the "
        r"engine\n",
        run.said,
    )


def test_what_differs_is_told_with_the_value_of_most() -> None:
    members = [Member(rank, f"node-{rank // 2}", 100 + rank) for rank in range(4)]
    facts = [{"torch": "2.13"}, {"torch": "2.13"}, {"torch": "2.13"}, {"torch": "2.12"}]
    assert difference(members, facts, "fix") == (
        "torch: 2.12 on rank 3 (node-1, pid 103); 2.13 on the others; it must be the same on every rank; fix"
    )
    assert difference(members, facts[:1] * 4, "fix") is None


def test_a_slow_device_is_named() -> None:
    found = [
        (Member(rank, "node", rank), {"all": (0.02, 0.001 * rank)}, 0.004 if rank == 3 else 0.001) for rank in range(5)
    ]
    line, warning = _lines(found)
    assert line == (
        "start: 5 ranks alike; first and second sum over all 20.0 and 4.0 ms; slowest product 4.00 of the median, on rank 3"
    )
    assert warning.startswith(
        "warning: rank 3 (node, pid 3) takes 4.0 times as long for a product as the median rank (4.00 ms)"
    )
