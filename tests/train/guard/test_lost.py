"""What ends a run with exit code 4, for the same command may do better, and what does not."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.small_run import Run
from train.cli import BUG, LOST, MISTAKE, code_of, main
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
