"""What is done to a run, and when: the three kinds and the three moments of a disturbance."""

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.chaos.layouts import HANG_SECONDS
from tests.small_run import Processes, Run
from train.guard.lost import LOST

Kind = Literal["one", "all", "stop"]
Moment = Literal["start", "step", "save"]
KILLED = -signal.SIGKILL  # as an exit code
NOTICED_WITHIN = HANG_SECONDS + 25  # seconds, on a machine that is busy with other things


@dataclass(frozen=True)
class Disturbance:
    """A rank is killed, all are, or one is stopped, which the others must notice: while a run starts, steps or saves."""

    kind: Kind
    moment: Moment
    rank: int
    after: int  # steps or saves of this start
    delay: float  # seconds

    @classmethod
    def draw(cls, pick: random.Random, processes: int, during_save: bool) -> "Disturbance":
        moment: Moment = "save" if during_save else pick.choices(("start", "step"), (1, 3))[0]
        kind: Kind = "all"  # while ranks come together, the others of a single one would wait for it for a minute
        if processes > 1 and moment != "start":
            kind = pick.choices(("one", "all", "stop"), (5, 4, 1))[0]
        longest = {"start": 1.0, "step": 0.05, "save": 0.02}[moment]
        after = pick.randint(1, 2 if moment == "save" else 6)
        return cls(kind, moment, pick.randrange(processes), after, pick.uniform(0, longest))

    def __str__(self) -> str:
        who = {"one": f"rank {self.rank} killed", "all": "all killed", "stop": f"rank {self.rank} stopped"}[self.kind]
        when = {"start": "at the start", "step": "between saves", "save": "in a save"}[self.moment]
        return f"{who} {when}"

    def strike(self, run: Run, processes: Processes) -> bool:
        """Wait for the moment and do it; False where the run has ended before."""
        folder, begun = run.folder / "checkpoints", steps_on_record(run)
        if self.moment == "step":
            processes.until(lambda: steps_on_record(run) >= begun + self.after)
        elif self.moment == "save":
            seen = saves_under_way(folder)
            for _ in range(self.after):
                processes.until(lambda: saves_under_way(folder) - seen)
                seen.update(saves_under_way(folder))
        time.sleep(self.delay)
        if not all(process.is_alive() for process in processes.ranks):
            return False
        if self.kind == "stop":
            processes.send(signal.SIGSTOP, self.rank)
        else:
            processes.send(signal.SIGKILL, None if self.kind == "all" else self.rank)
        return True

    def end(self, processes: Processes) -> list[int]:
        """The exit codes, once every rank that can has ended by itself. A launcher kills what then is left."""
        deadline = time.monotonic() + NOTICED_WITHIN
        left = [process for rank, process in enumerate(processes.ranks) if self.kind != "stop" or rank != self.rank]
        for process in left:
            process.join(max(0.0, deadline - time.monotonic()))
        processes.send(signal.SIGKILL)
        return processes.wait()

    def expects(self, rank: int) -> int:
        """How a rank ends: who was not killed has noticed that another one is lost."""
        return KILLED if self.kind == "all" or rank == self.rank else LOST


def steps_on_record(run: Run) -> int:
    """Steps in `metrics.jsonl` so far."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saves_under_way(folder: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints that are being written, or were when their writer was killed."""
    found = set()
    for path in folder.glob(".step-*.tmp"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # it has just become a checkpoint
            continue
    return found
