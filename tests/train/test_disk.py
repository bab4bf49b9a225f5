"""A disk that fails while a run trains: what can wait waits, training goes on, and nothing that was complete is lost."""

import errno
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.small_run import STEPS, Run, assert_same_bits
from train.checkpoint import Checkpoints, DiskError, latest
from train.cli import main
from train.trainer import Trainer

GOES_ON = "training goes on, and the next save that is due tries again"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A filesystem of its own at `folder`."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def train_beside(arguments: list[str], commands: dict[int, list[str]]) -> int:
    """As the command line; before the step after `step` is launched, when no save is under way, its command is run."""
    launch = Trainer._launch

    def run_and_launch(self: Trainer, *given: Any) -> Any:
        if command := commands.get(self.step):
            if self.checkpoints._thread:
                self.checkpoints._thread.join()
            subprocess.run(command, check=True)
        return launch(self, *given)

    Trainer._launch = run_and_launch  # type: ignore[method-assign]
    return main(["train", *arguments])


def train_with_small_files(arguments: list[str], limit: int) -> int:
    """As the command line, where no file may be larger than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return main(["train", *arguments])


def one_line(text: str, said: str) -> str:
    """The only line of `text` with `said` in it."""
    (line,) = [line for line in text.splitlines() if said in line]
    return line


@pytest.mark.parametrize(("asynchronous", "processes"), [("true", 1), ("false", 2)])
def test_only_the_last_save_of_a_run_must_fit(run: Run, asynchronous: str, processes: int) -> None:
    changes = (f"checkpoint.asynchronous={asynchronous}", "logging.every_steps=1000")
    assert run.train("run.stop_at_step=4") == [0], run.said
    before = (run.folder / "metrics.jsonl").read_bytes()
    started = run.start(
        *changes, "checkpoint.every_steps=8", processes=processes, work=train_with_small_files, extra=(100_000,)
    )
    assert started.wait() == [2] * processes, run.said
    assert "Traceback" not in run.said, run.said
    for step in (8, 16):
        line = one_line(run.said, f"step-{step:08d}")
        assert line.startswith(f"checkpoint {run.folder}/checkpoints/step-{step:08d}: File too large; it needs 0.00")
        assert line.endswith(f"set run.dir to a larger disk; {GOES_ON}")
    last = run.said.splitlines()[-1]
    assert last.startswith(f"rorqual: checkpoint {run.folder}/checkpoints/step-{STEPS:08d}: File too large; it needs")
    assert last.endswith(
        "complete checkpoints are untouched; free space, lower checkpoint.keep or set run.dir to a larger disk"
    )
    assert run.checkpoints() == ["step-00000004"]
    assert (run.folder / "metrics.jsonl").read_bytes().startswith(before) and len(run.metrics()) == STEPS


def test_a_disk_that_is_full_to_the_last_byte_loses_nothing(whole: Run, tmp_path: Path) -> None:
    """Full to the end, the run ends with 2; where there is room again, what waited is written, in its order."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        run, ballast = Run(whole.store, disk / "run"), disk / "ballast"
        fill = ["sh", "-c", f"cat /dev/zero > {ballast} 2>&-; test -s {ballast}"]
        changes = ("checkpoint.every_steps=6", "logging.every_steps=1000")
        codes = run.start(*changes, work=train_beside, extra=({8: fill},)).wait()
        assert codes == [2] and "Traceback" not in run.said, run.said
        one_line(run.said, "step-00000012: No space left on device; it needs 0.00")
        line = one_line(run.said, "metrics.jsonl: No space left on device")
        assert line.startswith(f"{run.folder / 'metrics.jsonl'}: ") and line.endswith(
            "can be written again; free space"
        )
        assert "step-00000020: No space left on device" in run.said.splitlines()[-1]
        assert run.checkpoints() == ["step-00000006"]
        assert (run.folder / "metrics.jsonl").read_text().endswith("\n") and 6 <= len(run.metrics()) < STEPS

        ballast.unlink()
        codes = run.start(*changes, work=train_beside, extra=({8: fill, 15: ["rm", str(ballast)]},)).wait()
        assert codes == [0], run.said
        one_line(run.said, "step-00000012: No space left on device; it needs 0.00")
        assert " lines that waited are in it" in one_line(run.said, "can be written again; the ")
        assert run.checkpoints() == ["step-00000006", "step-00000018", "step-00000020"]
        assert_same_bits(run.tensors(), whole.tensors())
        assert run.metrics() == whole.metrics()


def test_checkpoints_that_may_not_be_written_for_a_while_do_not_end_a_run(run: Run, whole: Run) -> None:
    """Their disk becomes read-only after step 6, and is mended after step 14."""
    with small_disk(run.folder / "checkpoints", "8m") as disk:
        remount = {6: "ro", 14: "rw"}
        commands = {step: ["mount", "-o", f"remount,{how}", str(disk)] for step, how in remount.items()}
        codes = run.start("checkpoint.every_steps=4", work=train_beside, extra=(commands,)).wait()
        assert codes == [0], run.said
        for step in (8, 12):
            line = one_line(run.said, f"step-{step:08d}: Read-only file system")
            assert f"make {disk} writable or set another run.dir; {GOES_ON}" in line
        assert run.checkpoints() == ["step-00000004", "step-00000016", "step-00000020"]
        assert_same_bits(run.tensors(), whole.tensors())


def test_a_disk_error_is_told_and_the_next_save_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO, at the first file that is synced; and then also when the unfinished folder shall be removed."""
    if begun := not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(1, {"x": torch.zeros(1)}, {})
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        broken.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(
            DiskError, match="step-00000002: Input/output error; the run must be able to write its folder"
        ):
            checkpoints.save(2, {"x": torch.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000002.tmp", "step-00000001"]
    checkpoints.save(3, {"x": torch.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert latest(tmp_path) == tmp_path / "step-00000003"
    if begun:
        dist.destroy_process_group()


def fail(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def train_on_a_slow_disk_with_a_mad_clock(arguments: list[str]) -> int:
    """As the command line, where the disk needs half a second to have a file, and the clock on the wall jumps by years."""
    draw, sync = random.Random(0), os.fsync

    def slowly(file: int) -> None:
        time.sleep(0.5)
        sync(file)

    os.fsync = slowly
    time.time = lambda: draw.uniform(-1e9, 4e9)
    return main(["train", *arguments])


def test_a_slow_disk_is_told_and_a_clock_that_jumps_changes_nothing(run: Run, whole: Run) -> None:
    changes = ("checkpoint.every_minutes=60", "checkpoint.every_steps=10")
    codes = run.start(*changes, work=train_on_a_slow_disk_with_a_mad_clock).wait()
    assert codes == [0], run.said
    line = one_line(run.said, "training waited")
    assert line.startswith(f"step {STEPS}: training waited ") and line.endswith(
        " s for the last checkpoint to reach the disk; save less often (checkpoint.every_steps, checkpoint.every_minutes) or set "
        "run.dir to a faster disk"
    )
    assert run.checkpoints() == ["step-00000010", "step-00000020"]
    assert_same_bits(run.tensors(), whole.tensors())
    assert run.metrics() == whole.metrics()
