"""A launch script at work, with the processes that it has started."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.small_run import Run

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SPOKEN_FOR = {"NCCL", "GLOO", "TORCH", "CUDA", "OMP", "SLURM", "MASTER"}
SITE = {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PAUSE": "0"}


def environment(site: dict[str, str]) -> dict[str, str]:
    """This process's, without what would speak for a site, and with these values of one."""
    own = {name: value for name, value in os.environ.items() if name.split("_")[0] not in SPOKEN_FOR}
    return own | SITE | {"PYTHONPATH": str(ROOT)} | site


class Script:
    """`scripts/NAME` with the arguments of a small run; `prefix` is what starts it. Kills at the end of a `with` what is left."""

    def __init__(self, name: str, run: Run, *changes: str, prefix: Sequence[str] = (), **site: str) -> None:
        self.run = run
        self.said_in = run.folder.parent / f"said-{time.monotonic_ns()}"
        with self.said_in.open("wb") as said:
            self.process = psutil.Popen(
                [*prefix, str(SCRIPTS / name), *run.arguments(*changes)],
                env=environment(site),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def said(self) -> str:
        return self.said_in.read_text("utf-8")

    def wait(self, seconds: float = 240) -> int:
        """The exit code of the script."""
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.said}") from None

    def until(self, condition: Callable[[], object], seconds: float = 240) -> float:
        """Wait until the condition holds; the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds and self.process.poll() is None, self.said
            time.sleep(0.02)
        return time.monotonic() - began

    def until_said(self, words: str) -> float:
        return self.until(lambda: words in self.said)

    def until_saved(self) -> float:
        """Until the run has a complete checkpoint."""
        return self.until(lambda: list(self.run.folder.glob("checkpoints/*/COMPLETE")))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """Everything that descends from the script."""
        return self.process.children(recursive=True) if self.process.is_running() else []

    def rank(self, rank: int) -> psutil.Process:
        """A process of the run, by its number on the node."""
        for process in self.processes():
            try:
                if process.environ().get("LOCAL_RANK") == str(rank) and "train" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"no rank {rank}\n{self.said}")

    def agent(self) -> psutil.Process:
        """The launcher's process that watches over the ranks of the node."""
        return self.rank(0).parent()


def have_ended(processes: Sequence[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
