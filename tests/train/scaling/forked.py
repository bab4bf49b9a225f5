"""`rorqual scaling run` in a fork of the tests' server, and its cells in forks of that: a new Python imports torch for seconds."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from tests.processes import PROCESSES
from train.cli import main
from train.scaling.ladder import execute


class Said(NamedTuple):
    """How a command ended."""

    code: int | None
    out: str
    err: str


class Command:
    """`rorqual scaling run` with these arguments, from here on."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = PROCESSES.Process(target=_run, args=(arguments, Path(self._folder.name)))
        self._process.start()

    def wait(self, seconds: float = 120) -> Said:
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
        texts = [(Path(self._folder.name) / name).read_text("utf-8") for name in ("out", "err")]
        self._folder.cleanup()
        return Said(self._process.exitcode, *texts)


def fork_cells() -> None:
    """From here on, cells that this process starts are forks of it. It must have no threads, as a fork of the server has none."""
    execute.subprocess = SimpleNamespace(Popen=_Cell)  # type: ignore[assignment]


def _run(arguments: Sequence[str], folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    fork_cells()
    execute.POLL = execute.POLL_OTHERS = 0.05
    sys.exit(main(["scaling", "run", *arguments]))


class _Cell:
    """What a ladder uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], stdout: IO[bytes], pass_fds: tuple[int, ...], **_: Any) -> None:
        words = command[command.index(sys.executable) + 1 :]
        assert command[0] == "env" and words[:2] == ["-m", "train"], command
        variables = dict(word.split("=", 1) for word in command[1 : command.index(sys.executable)])
        self._process: ForkProcess = multiprocessing.get_context("fork").Process(
            target=_train, args=(words[2:], variables, stdout)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.join()


def _train(arguments: list[str], variables: dict[str, str], log: IO[bytes]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(variables)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.exit(main(["train", *arguments]))
