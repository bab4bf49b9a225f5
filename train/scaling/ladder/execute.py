"""Running a ladder: several cells at once, each the project's own trainer in processes of its own.

Nothing is remembered but the cells' results, so a ladder may be interrupted anywhere and started again, and several tasks (of a
Slurm array, on machines that share the folder) may work on it together: a cell in work is locked, and each asks anew what is
wanted after every cell that ends. A cell that a kill has left half-way goes on from its checkpoint. One that a killed ladder has
left running keeps its place on the machine until it ends.
"""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.files import replace_file
from data.locks import try_lock
from train.scaling.errors import ScalingError
from train.scaling.ladder.cells import RESULT, Cells, Result, diverged, result_of, seconds_of_steps
from train.scaling.ladder.code_version import code_version
from train.scaling.ladder.ladder import Ladder
from train.scaling.ladder.outlook import counted, describe, duration
from train.scaling.ladder.pace import Pace
from train.scaling.ladder.reuse import ConstantStages, inherit
from train.scaling.ladder.table import TABLE, write_table
from train.scaling.ladder.wanted import Cell, open_ends, wanted
from train.trainer import DIVERGED, FINISHED

POLL = 0.2  # seconds between two looks at the running cells
POLL_OTHERS = 5.0  # seconds between two looks at cells that other tasks run
REMIND = 600.0  # seconds until it is said again that all wait for them
CODE = "code_version.txt"


@dataclass
class _Running:
    """A cell in work."""

    cell: Cell
    slot: int  # which share of the machine it has
    process: subprocess.Popen[bytes]
    lock: ExitStack
    spent: float  # seconds of steps made in earlier sessions
    started: float = field(default_factory=time.monotonic)


class Execution:
    """One task's work on a ladder.

    Args:
        jobs: cells at once.
        processes: of each cell, started with torchrun.
        say: where lines about the progress go.
    """

    def __init__(self, ladder: Ladder, jobs: int, processes: int, say: Callable[[str], None]) -> None:
        self.ladder, self.jobs, self.processes, self.say = ladder, jobs, processes, say
        self.cells = Cells(ladder)
        self.stages = ConstantStages(self.cells)
        self.results: dict[Cell, Result] = {}  # of all finished cells, wanted or not
        self.wanted: list[Cell] = []  # what they ask for
        self.failed: dict[Cell, str] = {}
        self._running: list[_Running] = []
        self._reminded = -math.inf
        self.pace = Pace(self.cells, _threads(jobs, processes))
        self.look()

    def run(self) -> None:
        """Run what is wanted until nothing is.

        Raises:
            ScalingError: cells failed; the line names the first one, and where its log is.
            KeyboardInterrupt: after the cells in work have saved themselves, at a signal.
        """
        (self.cells.folder / "locks").mkdir(parents=True, exist_ok=True)
        self.cells.common().write(Path(self.ladder.dir))
        with _hang_up_as_interrupt():
            try:
                while left := self._left():
                    self._start(left)
                    if self._running:
                        self._wait()
                    elif all(cell in self.failed for cell in left):
                        break
                    else:
                        self._wait_for_others(left)
            finally:
                self._stop()
                self._write_table()
        if self.failed:
            self._say_all(self._open_ends())
            cell, reason = next(iter(self.failed.items()))
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            raise ScalingError(
                f"cell {cell.name}: failed: {reason}; see {self.cells.place(cell) / 'log.txt'}, mend the cause and start the "
                f"same command again{more}"
            )
        if not self.ladder.keep_checkpoints:
            for cell in self.results:
                shutil.rmtree(self._run(cell) / "checkpoints", ignore_errors=True)
        self._say_all(self._ending())

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to run."""
        return not self._left()

    def describe(self) -> list[str]:
        """What is before us, in lines for people."""
        if self.is_finished:
            return self._ending()
        finished = [cell for cell in self.wanted if cell in self.results]
        lines = describe(self.cells, self.stages, self.pace, self.jobs, self.wanted, finished)
        return [*lines, *self._others()]

    def look(self) -> None:
        """Read the results that there are, whoever made them, and what they ask for."""
        results = self.cells.results()
        if self.wanted and results.keys() == self.results.keys():
            return
        self.results = results
        self.wanted = wanted(self.ladder, self._losses(), self.cells.sequence_length)

    def _ending(self) -> list[str]:
        """What a finished ladder came to, and what to do with it."""
        number, more = len(self.wanted), len(self.results.keys() - set(self.wanted))
        all_cells = f"all {number} cells are finished" if number > 1 else "the only cell is finished"
        unwanted = f" ({more} more {'are' if more > 1 else 'is'} no longer wanted)" if more else ""
        folder = self.ladder.dir
        line = f"{all_cells}{unwanted}; table: {Path(folder) / TABLE}; next: rorqual scaling fit {shlex.quote(folder)}"
        return [*self._open_ends(), *self._others(), line]

    def _open_ends(self) -> list[str]:
        return open_ends(self.ladder, self._losses(), self.cells.sequence_length)

    def _others(self) -> list[str]:
        """A line about finished cells of another recipe, if there are any."""
        if not (others := self.cells.others):
            return []
        belong = "belongs" if len(others) == 1 else "belong"
        return [
            f"{counted(len(others), 'finished cell')} of {self.cells.folder} {belong} to another recipe (first difference: "
            f"{next(iter(others.values()))})"
        ]

    def _say_all(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line)

    def _losses(self) -> dict[Cell, float]:
        return {cell: result.loss for cell, result in self.results.items()}

    def _left(self) -> list[Cell]:
        self.look()
        return [cell for cell in self.wanted if cell not in self.results]

    def _start(self, left: list[Cell]) -> None:
        """Fill the free slots with cells that nobody runs and whose donor is not in work."""
        orphans, own = self._orphans(left), [running.slot for running in self._running]
        room = max(0, self.jobs - len(orphans) - len(own))
        free = sorted({*range(self.jobs)} - {*orphans, *own})[:room]
        for cell in left:
            if not free:
                return
            donor = self.stages.donor(cell, self.wanted)
            waits = donor is not None and donor in left and donor not in self.failed
            if cell in self.failed or waits or any(cell == running.cell for running in self._running):
                continue
            with ExitStack() as stack:
                lock = try_lock(self._lock(cell), stack)
                if lock is not None and not (self.cells.place(cell) / RESULT).exists():
                    slot, spent = free.pop(0), seconds_of_steps(self._run(cell))
                    process = self._launch(cell, donor, slot, lock.fileno())
                    lock.truncate(0)
                    owner = {"host": socket.gethostname(), "ladder": os.getpid(), "cell": process.pid, "slot": slot}
                    lock.write(json.dumps(owner) + "\n")
                    lock.flush()
                    self._running.append(_Running(cell, slot, process, stack.pop_all(), spent))

    def _orphans(self, left: list[Cell]) -> list[int]:
        """Slots of this machine where cells of a killed ladder are still at work."""
        slots = []
        for path in map(self._lock, left):
            owner = _owner(path)
            if owner.get("host") != socket.gethostname() or _is_alive(owner["ladder"]) or not _is_alive(owner["cell"]):
                continue
            if _is_locked(path):
                slots.append(owner["slot"])
        return slots

    def _wait_for_others(self, left: list[Cell]) -> None:
        """Wait a little for cells that others run; say now and then which."""
        if time.monotonic() - self._reminded > REMIND:
            held = [cell.name for cell in left if _is_locked(self._lock(cell))]
            if held:
                self._reminded = time.monotonic()
                self.say(f"waiting for cells that other tasks run, or that a killed one has left: {', '.join(held)}")
        time.sleep(POLL_OTHERS)

    def _lock(self, cell: Cell) -> Path:
        return self.cells.folder / "locks" / self.cells.place(cell).name

    def _launch(self, cell: Cell, donor: Cell | None, slot: int, lock: int) -> subprocess.Popen[bytes]:
        """Start a cell's trainer. It inherits the lock, so that it keeps the cell even if this process is killed."""
        place, run = self.cells.place(cell), self._run(cell)
        place.mkdir(parents=True, exist_ok=True)
        if (version := code_version()) not in _lines(place / CODE):
            with (place / CODE).open("a", encoding="utf-8") as file:
                file.write(f"{version}\n")
        recipe = self.cells.recipe(cell)
        changes = {"run": recipe.run.model_copy(update={"dir": str(run)})}
        if step := self.stages.kept(cell):
            saving = {"every_steps": step, "keep_every_steps": step}
            changes["checkpoint"] = recipe.checkpoint.model_copy(update=saving)  # type: ignore[assignment]
        with replace_file(place / "recipe.yaml") as path:
            path.write_text(recipe.model_copy(update=changes).to_yaml(), encoding="utf-8")
        if donor is not None:
            inherit(self._run(donor) / "checkpoints", run / "checkpoints", self.stages.kept(donor))
        variables = [f"OMP_NUM_THREADS={_threads(self.jobs, self.processes)}"]
        if count := torch.cuda.device_count():
            devices = [(slot * self.processes + i) % count for i in range(self.processes)]
            # By their names: numbers would count from the machine's first device, not from the first that this process may use.
            names = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
            variables.append(f"CUDA_VISIBLE_DEVICES={','.join(names)}")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        trainer = [*(launcher if self.processes > 1 else []), "train", str(place / "recipe.yaml")]
        command = ["env", *variables, sys.executable, "-m", *trainer]
        with (place / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True)

    def _wait(self) -> None:
        """Return when a cell has ended."""
        while all(running.process.poll() is None for running in self._running):
            time.sleep(POLL)
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            with running.lock:
                self._finish(running)

    def _finish(self, running: _Running) -> None:
        cell, code, place = running.cell, running.process.returncode, self.cells.place(running.cell)
        seconds, versions = running.spent + time.monotonic() - running.started, "+".join(_lines(place / CODE))
        if code == FINISHED:
            result = result_of(self.cells, cell, self._run(cell), versions, seconds)
        elif code == DIVERGED:
            result = diverged(self.cells, cell, versions, seconds)
        else:
            result = None
        if result is None:
            self.failed[cell] = _last_line(place / "log.txt") or f"exit code {code}"
            self.say(f"{cell.name}: failed: {self.failed[cell]}")
            return
        result.write(place)
        self.look()
        self.pace.learn(result)
        kept = f"step-{self.stages.kept(cell) or 0:08d}"
        if not self.ladder.keep_checkpoints:
            for checkpoint in (self._run(cell) / "checkpoints").glob("step-*"):
                if checkpoint.name != kept:
                    shutil.rmtree(checkpoint)
        self._write_table()
        self._say(result)

    def _say(self, result: Result) -> None:
        left = [cell for cell in self.wanted if cell not in self.results]
        loss = f"{result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte"
        reused = f", {result.reused_tokens:,} tokens reused" if result.reused_tokens else ""
        self.say(
            f"[{len(self.wanted) - len(left)} of {len(self.wanted)}] {result.cell.name}: "
            f"{loss if math.isfinite(result.loss) else 'diverged'} ({result.seconds:.0f} s{reused}); "
            f"about {duration(self.pace.seconds(left) / self.jobs)} for those known to be wanted"
        )

    def _stop(self) -> None:
        """Let the cells in work save themselves and end."""
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.wait()
            running.lock.close()
        self._running.clear()

    def _write_table(self) -> None:
        write_table(Path(self.ladder.dir) / TABLE, self.results.values())

    def _run(self, cell: Cell) -> Path:
        return self.cells.place(cell) / "run"


def _threads(jobs: int, processes: int) -> int:
    """Cores of each process where all share the machine equally."""
    return max(1, len(os.sched_getaffinity(0)) // (jobs * processes))


def _owner(lock: Path) -> dict[str, Any]:
    """Who had a cell last: host, processes of the ladder and of the cell, slot."""
    lines = _lines(lock)
    return json.loads(lines[0]) if lines else {}


def _is_locked(path: Path) -> bool:
    with ExitStack() as stack:
        return path.exists() and try_lock(path, stack) is None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _last_line(log: Path) -> str:
    return next((line.strip() for line in reversed(_lines(log)) if line.strip()), "")


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []


@contextmanager
def _hang_up_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless `nohup` has it ignored, end a ladder as Ctrl-C does: its cells save themselves first."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
