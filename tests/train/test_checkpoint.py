"""Checkpoints, with real processes: several ranks, kills in the middle of a save, disks that are full."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.processes import PROCESSES
from train.checkpoint import Checkpoint, CheckpointError, Checkpoints, DiskError, latest, load, read_run, verify


@pytest.fixture
def one_rank() -> Iterator[None]:
    """The one-rank process group that every run has."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state_of(step: int, size: int = 40) -> dict[str, Any]:
    """A state that is a function of the step, of every dtype a run saves."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(size, size, generator=draw)
    return {
        "parameters": {"a.weight": nn.Parameter(weight), "b.weight": nn.Parameter(weight[:, :3].T.clone())},
        "buffers": {"gate.bias": torch.randn(7, generator=draw)},
        "exp_avg": {"a.weight": weight.bfloat16(), "b.weight": torch.zeros(3, size)},
        "optimizer_steps": torch.tensor(step),
    }


def blank(state: Any) -> Any:
    if isinstance(state, Tensor):
        return torch.full_like(state, -1)
    return {key: blank(value) for key, value in state.items()}


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        return
    assert found.keys() == expected.keys()
    for key in expected:
        assert_equal(found[key], expected[key])


def run_ranks(work: Callable[..., None], size: int, *args: Any) -> None:
    """Run `work(rank, size, *args)` in so many processes; an error in one of them is an error here."""
    ranks = [PROCESSES.Process(target=work, args=(rank, size, *args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * size


def join_group(rank: int, size: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", asynchronous=asynchronous)
    assert checkpoints.latest() is None
    checkpoints.save(7, state_of(7), {"step": 7, "tokens": 1e6})
    checkpoints.wait()
    path = checkpoints.latest()
    assert path == tmp_path / "checkpoints" / "step-00000007"
    found = blank(state_of(7))
    assert checkpoints.load(path, found) == {"step": 7, "tokens": 1e6} == read_run(path)
    assert_equal(found, state_of(7))
    marker = json.loads((path / "COMPLETE").read_text())
    assert marker["step"] == 7
    written = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "COMPLETE"}
    assert sorted(written) == ["index.json", "rank-00000.safetensors", "run.json"]
    assert marker["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in written.items()
    }
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000007"]


@pytest.mark.usefixtures("one_rank")
def test_an_asynchronous_save_holds_the_state_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    state = state_of(3, size=600)
    checkpoints.save(3, state, {})
    with torch.no_grad():
        for section in ("parameters", "buffers", "exp_avg"):
            for tensor in state[section].values():
                tensor.add_(1)  # what the next optimizer step does while the thread writes
    state["optimizer_steps"].add_(1)
    checkpoints.wait()
    found = blank(state)
    checkpoints.load(tmp_path / "step-00000003", found)
    assert_equal(found, state_of(3, size=600))


@pytest.mark.usefixtures("one_rank")
def test_a_part_of_a_checkpoint_is_read_only_when_asked_for(tmp_path: Path) -> None:
    Checkpoints(tmp_path, asynchronous=False).save(1, state_of(1), {})
    part = {"parameters": {"a.weight": torch.zeros(40, 40, dtype=torch.bfloat16)}}
    with pytest.raises(CheckpointError, match=r"holds buffers.gate.bias \[7\] \(and 4 more\), which the run has not"):
        load(tmp_path / "step-00000001", part)
    load(tmp_path / "step-00000001", part, partial=True)
    assert_equal(part["parameters"]["a.weight"], state_of(1)["parameters"]["a.weight"].bfloat16())


@pytest.mark.usefixtures("one_rank")
def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    """Once a checkpoint is opened, which verifies all of it."""
    Checkpoints(tmp_path, asynchronous=False).save(
        1, {"large": torch.randn(1000, 1000), "small": torch.arange(100.0)}, {}
    )
    checkpoint = Checkpoint(tmp_path / "step-00000001")
    assert checkpoint.tensors["large"].shape == (1000, 1000)
    before, found = bytes_read(), torch.zeros(100)
    checkpoint.load({"small": found}, partial=True)
    assert bytes_read() - before < 100_000
    assert torch.equal(found, torch.arange(100.0))


def bytes_read() -> int:
    """By this process so far, as the system counts."""
    (count,) = (line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(count)


@pytest.mark.usefixtures("one_rank")
def test_a_state_that_does_not_fit_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    Checkpoints(tmp_path, asynchronous=False).save(1, state_of(1), {})
    path = tmp_path / "step-00000001"
    wrong = blank(state_of(1))
    wrong["buffers"]["gate.bias"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"buffers.gate.bias has shape \[7\], the run's has \[8\]"):
        load(path, wrong)
    wrong["buffers"] = {"gate.bias": torch.zeros(7), "other.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"has no buffers.other.bias \[2\]; it must hold every tensor"):
        load(path, wrong)
    assert_equal(wrong["parameters"], blank(state_of(1)["parameters"]))
    with pytest.raises(TypeError, match="holds tensors only"):
        Checkpoints(tmp_path).save(2, {"epoch": 3}, {})


@pytest.mark.usefixtures("one_rank")
def test_a_damaged_checkpoint_is_skipped_by_latest_and_refused_by_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {})
    newest = tmp_path / "step-00000002"
    data = newest / "rank-00000.safetensors"
    size = data.stat().st_size
    os.truncate(data, size - 100)
    caplog.clear()
    assert latest(tmp_path) == tmp_path / "step-00000001"
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "step-00000002: rank-00000.safetensors has" in warning.message and "\n" not in warning.message
    with pytest.raises(CheckpointError) as refused:
        checkpoints.load(newest, blank(state_of(2)))
    found = f"rank-00000.safetensors has {size - 100:,} bytes and must have {size:,} bytes; delete the folder"
    assert str(refused.value).startswith(f"checkpoint {newest}: {found}")

    data.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing and must have"):
        verify(newest)
    (newest / "COMPLETE").write_text('{"fil')
    with pytest.raises(CheckpointError, match="COMPLETE is not as it was written"):
        verify(newest)
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "step-00000009")


@pytest.mark.usefixtures("one_rank")
def test_the_newest_and_the_multiples_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every_steps=4, asynchronous=False)
    for step in range(1, 8):
        checkpoints.save(step, {"x": torch.zeros(1)}, {})
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [4, 6, 7]
    Checkpoints(tmp_path, keep=1).prune()
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [7]


@pytest.mark.usefixtures("one_rank")
def test_a_save_does_not_look_into_the_checkpoints_that_stay_for_ever(tmp_path: Path) -> None:
    """With files of thousands of ranks in each, a look at all that was ever written takes longer than the save."""
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every_steps=2, asynchronous=False)
    for step in range(1, 6):
        checkpoints.save(step, {"x": torch.zeros(1)}, {})
    read = opened(lambda: checkpoints.save(6, {"x": torch.zeros(1)}, {}))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [2, 4, 6]
    assert not [path for path in read if "step-00000002" in path or "step-00000004" in path]


@pytest.mark.usefixtures("one_rank")
def test_leftovers_of_a_kill_are_swept_by_the_first_save_and_not_by_latest(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.tmp").mkdir()
    (tmp_path / "step-00000004").mkdir()
    assert latest(tmp_path) is None
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.save(6, {"x": torch.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


@pytest.mark.usefixtures("one_rank")
def test_saving_a_step_again_keeps_a_complete_checkpoint_and_replaces_a_broken_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(1, {"x": torch.zeros(1)}, {"try": 1})
    checkpoints.save(1, {"x": torch.zeros(1)}, {"try": 2})
    path = tmp_path / "step-00000001"
    assert read_run(path) == {"try": 1}
    flip(path / "rank-00000.safetensors", 8 * 100)
    checkpoints.save(1, {"x": torch.zeros(1)}, {"try": 3})
    verify(path)
    assert read_run(path) == {"try": 3}


@pytest.mark.usefixtures("one_rank")
def test_a_damaged_checkpoint_takes_no_place_of_the_kept_ones(tmp_path: Path) -> None:
    """Newest by its number, whole by its sizes: counted, it would push out what the run goes on from."""
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    checkpoints.save(4, {"x": torch.zeros(1)}, {})
    Checkpoints(tmp_path, keep=2, asynchronous=False).save(8, {"x": torch.ones(1)}, {})
    flip(tmp_path / "step-00000008" / "rank-00000.safetensors", 8 * 100)
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    assert checkpoints.latest() == tmp_path / "step-00000004"
    checkpoints.save(6, {"x": torch.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]
    checkpoints.save(8, {"x": torch.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]
    verify(tmp_path / "step-00000008")


def opened(action: Callable[[], None]) -> list[str]:
    """Paths of the files that were opened meanwhile."""
    paths: list[str] = []
    is_on = True

    def note(event: str, arguments: Any) -> None:
        if is_on and event == "open":
            paths.append(str(arguments[0]))

    sys.addaudithook(note)
    action()
    is_on = False
    return paths


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def save_without_end(folder: Path, first: int) -> None:
    """A run that does nothing but save, until it is killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpoints(folder, keep=2)
    for step in range(first, 10**6):
        checkpoints.save(step, state_of(step, size=500), {"step": step})


def test_a_run_killed_while_it_saves_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    pick = random.Random(0)
    reached, interrupted = 0, 0
    for _ in range(6):
        process = PROCESSES.Process(target=save_without_end, args=(tmp_path, reached + 1))
        process.start()
        deadline = time.monotonic() + 30
        while not (tmp_path / f"step-{reached + 1:08d}" / "COMPLETE").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(pick.uniform(0, 0.1))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = latest(tmp_path)
        assert newest is not None
        step = int(newest.name[5:])
        assert step > reached
        found = blank(state_of(step, size=500))
        assert load(newest, found) == {"step": step}
        assert_equal(found, state_of(step, size=500))
        reached = step
        interrupted += any(not (path / "COMPLETE").exists() for path in tmp_path.iterdir())
    assert interrupted >= 2, "the kills were meant to hit saves"


def save_on_a_full_disk(rank: int, size: int, folder: Path, asynchronous: bool, limited_rank: int | None) -> None:
    """Save a small checkpoint, then one that does not fit; every rank sees the same one-line error and can go on."""
    join_group(rank, size, folder.parent / "rendezvous")
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    checkpoints.save(1, {"parameters": {"w": torch.ones(10)}}, {})
    checkpoints.wait()
    if rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    large = {f"w{i}": torch.ones(200_000) for i in range(4)}  # 3.2 MB
    with pytest.raises(DiskError) as refused:
        checkpoints.save(2, {"parameters": large}, {})
        checkpoints.wait()
    line = str(refused.value)
    assert line.startswith(f"checkpoint {folder / 'step-00000002'}: ") and "\n" not in line, line
    assert "it needs 0.003 GB" in line and "free space" in line, line
    assert "too large" in line or "No space" in line, line
    assert not checkpoints.failed
    path = checkpoints.latest()
    assert path == folder / "step-00000001"
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    checkpoints.load(path, {"parameters": {"w": torch.zeros(10)}})
    checkpoints.save(3, {"parameters": {"w": torch.ones(10)}}, {})
    checkpoints.wait()
    assert checkpoints.latest() == folder / "step-00000003"
    dist.destroy_process_group()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_may_not_grow_on_one_rank_is_one_error_on_all(tmp_path: Path, asynchronous: bool) -> None:
    run_ranks(save_on_a_full_disk, 2, tmp_path / "checkpoints", asynchronous, 1)


def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        run_ranks(save_on_a_full_disk, 1, disk / "checkpoints", True, None)
    finally:
        subprocess.run(["umount", disk], check=True)


def shard(tensor: Tensor, dim: int, mesh: DeviceMesh) -> DTensor:
    local = tensor.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    return DTensor.from_local(local, mesh, [Shard(dim)], shape=tensor.shape, stride=tensor.stride())


def write_with_two(rank: int, size: int, folder: Path) -> None:
    join_group(rank, size, folder.parent / "two")
    mesh = init_device_mesh("cpu", (size,))
    state = state_of(5)
    sharded = {name: shard(t, 0, mesh) for name, t in state["parameters"].items()}
    alike = {"c": torch.arange(20000.0), "d": torch.arange(10000.0), "e": torch.arange(11000.0)}
    checkpoints = Checkpoints(folder)
    checkpoints.save(
        5,
        {
            "parameters": sharded,
            "alike": alike,
            "replicated": DTensor.from_local(torch.arange(5.0), mesh, [Replicate()]),
            **({"ema": {"a": torch.full((4,), 2.0)}} if rank == 0 else {}),
        },
        {"step": 5},
    )
    with torch.no_grad():
        for tensor in (*alike.values(), *sharded.values()):
            tensor.zero_()
    checkpoints.wait()
    dist.destroy_process_group()


def read_with(rank: int, size: int, folder: Path) -> None:
    join_group(rank, size, folder.parent / f"read-{size}")
    mesh = init_device_mesh("cpu", (size,))
    checkpoints = Checkpoints(folder)
    path = checkpoints.latest()
    assert path is not None
    expected = state_of(5)["parameters"]
    sharded = {name: shard(torch.zeros_like(tensor), 1, mesh) for name, tensor in expected.items()}
    alike = {"c": torch.zeros(20000), "d": torch.zeros(10000), "e": torch.zeros(11000)}
    state = {
        "parameters": sharded,
        "alike": alike,
        "replicated": torch.zeros(5),
        **({"ema": {"a": torch.zeros(4)}} if rank == 0 else {}),
    }
    assert checkpoints.load(path, state) == {"step": 5}
    for name, tensor in sharded.items():
        assert torch.equal(tensor.to_local(), expected[name].chunk(size, dim=1)[rank])
    assert_equal(alike, {name: torch.arange(float(len(tensor))) for name, tensor in alike.items()})
    assert torch.equal(state["replicated"], torch.arange(5.0))
    if rank == 0:
        assert torch.equal(state["ema"]["a"], torch.full((4,), 2.0))
    if size > 1:  # damage in the share of one rank is known to all
        dist.barrier()
        if rank == 0:
            copy = folder.parent / "damaged"
            shutil.copytree(folder, copy)
            flip(copy / path.name / "rank-00001.safetensors", 8 * 5000)
        dist.barrier()
        with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is not what was written: its sha256 is"):
            Checkpoint(folder.parent / "damaged" / path.name, checkpoints._ranks)
    if rank == size - 1:
        state["alike"] = {**alike, "f": torch.zeros(1)}  # a mistake of one rank is an error on all
    with pytest.raises(CheckpointError, match=r"has no alike.f \[1\]"):
        checkpoints.load(path, state)
    dist.destroy_process_group()


def test_two_ranks_write_what_one_and_three_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(write_with_two, 2, folder)
    first, second = (folder / "step-00000005" / f"rank-{rank:05d}.safetensors" for rank in range(2))
    # c (80 kB) has one writer, d and e (84 kB) the other: tensors that are alike everywhere are written once, and evenly.
    assert abs(first.stat().st_size - second.stat().st_size) < 10_000
    for size in (1, 3):
        run_ranks(read_with, size, folder)
