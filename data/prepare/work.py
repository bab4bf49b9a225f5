"""Work that is cut into items: shared among processes and tasks, interrupted anywhere, and never done twice.

A stage is a list of items. An item writes its results and, last and atomically, the file that says it is done; an item whose
file is there is not done again. Nothing else is remembered, so a preparation that was killed continues with the items that are
left. An item's results depend on its arguments alone, never on who does it or when.

Several tasks, e.g. of a Slurm array, may share one folder. Each begins with its own range of a stage's items and goes on with
what the others have not begun, so that a task may start late, die or never come. An item in work is locked by its task; the lock
ends with the task. A stage ends when all its items are done.
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from data.errors import DataError
from data.locks import try_lock
from data.progress import Progress

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds between two looks at what other tasks have done


class Share(NamedTuple):
    """Which part of the work is this process's: task number `task` of `tasks`."""

    task: int = 0
    tasks: int = 1


ALONE = Share()


class Item(NamedTuple):
    """One piece of a stage's work."""

    done: Path  # written last by the function that does the item
    arguments: tuple[Any, ...]  # of that function; they must be picklable


class Work:
    """The items of a preparation, stage by stage.

    Args:
        folder: where results and marks lie; one process at a time may hold each task of it.
        workers: processes; 1 does the items in this one.
        share: this task among those that share the folder.
        progress: where to say how far it is.

    Raises:
        DataError: another process holds this task of the folder.
    """

    def __init__(self, folder: Path, workers: int, share: Share, progress: Progress) -> None:
        self.folder, self.share, self.progress = folder, share, progress
        self._workers = workers
        self._stack = ExitStack()

    def __enter__(self) -> "Work":
        self._stack.enter_context(_held(self.folder, self.share.task))
        self._pool = self._stack.enter_context(_pool(self._workers)) if self._workers > 1 else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, stage: str, function: Callable[..., str], items: Sequence[Item]) -> None:
        """Do the items that are left, beginning with this task's range, and return when all are done, by whomever.

        Args:
            function: does one item; returns what to show of it.

        Raises:
            DataError: an item cannot be done, or a worker died.
        """
        first = len(items) * self.share.task // self.share.tasks
        left = [item for item in (*items[first:], *items[:first]) if not item.done.exists()]
        pause = SHORTEST_PAUSE
        while left:
            done = 0
            for done, shown in enumerate(self._results(function, self._begun(left)), start=1):
                self.progress.update(f"{stage}: {shown}, {len(left) - done:,} of {len(items):,} items left")
            left = [item for item in left if not item.done.exists()]
            if left and not done:
                self.progress.update(f"{stage}: waiting for {len(left):,} of {len(items):,} items of other tasks")
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_PAUSE)

    def is_alone(self) -> bool:
        """Whether no other task of the folder is at work."""
        with ExitStack() as stack:
            own = f"task-{self.share.task}.lock"
            return all(try_lock(lock, stack) for lock in self.folder.glob("task-*.lock") if lock.name != own)

    def _begun(self, items: list[Item]) -> Iterator[tuple[Item, ExitStack]]:
        """The items that nobody does, each locked for this task until its stack is closed."""
        for item in items:
            with ExitStack() as stack:
                if try_lock(self._lock_of(item), stack) and not item.done.exists():
                    yield item, stack.pop_all()

    def _lock_of(self, item: Item) -> Path:
        place = os.path.relpath(item.done, self.folder)  # the same however two tasks spell the folder
        return self.folder / "locks" / hashlib.sha256(place.encode()).hexdigest()[:16]

    def _results(self, function: Callable[..., str], begun: Iterator[tuple[Item, ExitStack]]) -> Iterator[str]:
        """What the function returns of each item, in the order in which they end."""
        if self._pool is None:
            for item, lock in begun:
                with lock:
                    yield function(*item.arguments)
            return
        running: dict[Future[str], ExitStack] = {}
        try:
            while True:
                for item, lock in islice(begun, 2 * self._workers - len(running)):
                    running[self._pool.submit(function, *item.arguments)] = lock
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    with running.pop(future):
                        yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, most likely for want of memory; what is finished is kept: start again with fewer workers"
            ) from None
        finally:
            if (
                running
            ):  # an error or an interruption: nobody waits for the rest, and no lock is given up before its item ends
                _kill(self._pool)
            for lock in running.values():
                lock.close()


def remove_if_unused(folder: Path) -> None:
    """Remove a finished store's work, unless a task still looks at it."""
    with ExitStack() as stack, suppress(FileNotFoundError):  # another task may be removing it
        if not all(try_lock(lock, stack, "r+") for lock in folder.glob("task-*.lock")):
            return
    shutil.rmtree(folder, ignore_errors=True)  # no lock file is open any more, which NFS would keep


@contextmanager
def _held(folder: Path, task: int) -> Iterator[None]:
    """Hold a task of the work.

    Raises:
        DataError: another process does.
    """
    path = folder / f"task-{task}.lock"
    with ExitStack() as stack:
        while True:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a finished task has removed the folder in between
                if try_lock(path, stack):
                    break
                raise DataError(
                    f"--out = {folder.parent}: process {path.read_text() or 'unknown'} is preparing it; "
                    "wait for it, or give another folder"
                )
        path.write_text(f"{os.getpid()} on {platform.node()}")
        yield


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, since a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _kill(executor: ProcessPoolExecutor) -> None:
    """End the workers in the middle of their items (`kill_workers` of Python 3.14)."""
    for process in list((executor._processes or {}).values()):
        process.kill()
        process.join()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only way to be told; processes share out the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
