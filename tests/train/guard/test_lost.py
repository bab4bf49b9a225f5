"""What ends a run with exit code 4, for the same command may do better, and what does not."""

import errno
import fcntl
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from tests.small_run import Run
from train import runlog
from train.cli import BUG, LOST, MISTAKE, code_of, main
from train.guard.lost import Lost, is_ambiguous, is_of_a_lost_peer
from train.runlog import written_into
from train.trainer import Trainer


def train_and_kill_a_maker(arguments: list[str]) -> int:
    """As the command line; before step 7 a process that reads ahead for rank 1 is killed, as the system does that lacks memory."""
    launch = Trainer._launch

    def kill_and_launch(trainer: Trainer, *given: Any) -> Any:
        if trainer.step + 1 == 7 and trainer.process.rank == 1:
            assert trainer.batches._ahead
            os.kill(trainer.batches._ahead._makers[0].process, signal.SIGKILL)
        return launch(trainer, *given)

    Trainer._launch = kill_and_launch  # type: ignore[method-assign]
    return main(["train", *arguments])


def test_a_process_that_reads_ahead_and_is_killed_disturbs_the_run(run: Run, tmp_path: Path) -> None:
    arguments = ("checkpoint.every_steps=2", "--status", str(tmp_path / "status"))
    assert run.start(*arguments, processes=2, work=train_and_kill_a_maker).wait() == [4, 4], run.said
    (line,) = [line for line in run.said.splitlines() if line.startswith("rorqual: ")]
    assert "which read ahead, was killed by signal SIGKILL; " in line and line.endswith("start the same command again")
    assert "Traceback" not in run.said and (tmp_path / "status").read_text().endswith("exit=4\n")
    assert run.checkpoints()[-1] >= "step-00000006"


def test_a_disk_that_fails_now_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    codes = {errno.EIO: LOST, errno.ENOSPC: MISTAKE, errno.EROFS: MISTAKE, errno.EBADF: BUG}
    for number, code in codes.items():
        assert code_of(OSError(number, os.strerror(number), "somewhere")) == code
    for number, code in {errno.EIO: LOST, errno.ENOSPC: MISTAKE}.items():
        with pytest.raises(Exception) as raised, written_into(tmp_path):
            raise OSError(number, os.strerror(number), "somewhere")
        assert code_of(raised.value) == code


SYSTEM = "NCCL error in: NCCLUtils.cpp:77, ncclSystemError: System call (e.g. socket, malloc) or external library call failed"


@pytest.mark.parametrize(
    "error, is_lost, ambiguous",
    [
        (DistNetworkError("The client socket has timed out after 60000ms"), True, False),
        (DistStoreError("wait timeout after 300000ms, keys: /group//0//cuda//0"), True, False),
        (DistBackendError("NCCL error in: NCCLUtils.cpp:77, ncclRemoteError: A call failed possibly"), True, False),
        (DistBackendError("[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d"), True, False),
        (DistBackendError(SYSTEM), True, True),
        (DistBackendError("NCCL error in: X.cpp:1, ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1"), False, False),
        (DistBackendError("NCCL error in: X.cpp:1, ncclUnhandledCudaError: Cuda failure 'out of memory'"), False, False),
        (RuntimeError("[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer [10.0.0.1]:5"), True, False),
        (RuntimeError("planted"), False, False),
        (OSError(errno.EPIPE, "Broken pipe"), False, False),
    ],
)  # fmt: skip
def test_only_what_another_ranks_end_causes_counts_as_its_loss(
    error: Exception, is_lost: bool, ambiguous: bool
) -> None:
    assert (is_of_a_lost_peer(error), is_ambiguous(error)) == (is_lost, ambiguous)
    wrapped = ValueError("a save failed")
    wrapped.__cause__ = error
    assert (is_of_a_lost_peer(wrapped), is_ambiguous(wrapped)) == (is_lost, ambiguous)


def train_into_nccls_system_error(arguments: list[str]) -> int:
    """As the command line; rank 1 gets this error before step 7, while rank 0 goes on."""
    launch = Trainer._launch

    def fail_or_launch(trainer: Trainer, *given: Any) -> Any:
        if trainer.step + 1 == 7 and trainer.process.rank == 1:
            raise DistBackendError(SYSTEM)
        return launch(trainer, *given)

    Trainer._launch = fail_or_launch  # type: ignore[method-assign]
    return main(["train", *arguments])


@pytest.mark.slow
def test_an_error_that_may_be_this_ranks_own_is_seen_with_its_traceback(run: Run) -> None:
    assert run.start(processes=2, work=train_into_nccls_system_error).wait() == [4, 4], run.said
    assert run.said.count("Traceback") == 1 and "in fail_or_launch" in run.said


@pytest.mark.parametrize("holder", ["node-b 4711", f"{socket.gethostname()} {2**22 + 1}", ""])
def test_a_lock_that_only_a_file_server_still_holds_is_waited_for_and_no_mistake(
    holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runlog, "HANDOVER", 0.4)
    monkeypatch.setattr(runlog, "TELL", 0.1)
    (tmp_path / ".lock").write_text(f"{holder}\n")
    named = "process {1} on {0}".format(*holder.split()) if holder else "another process"
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Lost, match=f"locked by {re.escape(named)} for 0 s; ") as raised, runlog._alone_in(tmp_path):
            pass
    assert code_of(raised.value) == LOST
    assert capsys.readouterr().err == f"rorqual: run.dir = {tmp_path}: locked by {named}; waiting for up to 0 s\n"
    with runlog._alone_in(tmp_path) as waited:
        assert not waited and (tmp_path / ".lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_file_system_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with runlog._alone_in(tmp_path) as waited:
        assert not waited
    assert "its file system has no locks (Function not implemented)" in caplog.text


def test_what_another_run_has_saved_while_this_one_waited_is_not_gone_back_behind(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.folder.mkdir()
    lock, marker = run.folder / ".lock", run.folder / "checkpoints" / "step-00000004" / "COMPLETE"

    def save_and_end() -> None:
        while sum(file.path == str(lock) for file in psutil.Process().open_files()) < 2:
            time.sleep(0.05)
        marker.parent.mkdir(parents=True)
        marker.touch()
        held.close()

    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = threading.Thread(target=save_and_end, daemon=True)
        other.start()
        assert main(["train", *run.arguments("data.workers=0")]) == 4
        other.join()
    assert "another run has saved step-00000004 meanwhile; start the same command again" in capsys.readouterr().err
