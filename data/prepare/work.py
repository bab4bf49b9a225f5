"""Work that is cut into items: shared among processes and tasks, interrupted anywhere, and never done twice.

A stage is a list of items. An item writes its results and, last and atomically, the file that says it is done; an item whose
file is there is not done again. Nothing else is remembered, so a preparation that was killed continues with the items that are
left. An item's results depend on its arguments alone, never on who does it or when.

Several tasks, e.g. of a Slurm array, may share one folder. Each does its range of every stage's items and waits at the end of
the stage until the others have done theirs.
"""

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from data.errors import DataError
from data.files import replace_file
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
        self._failure = folder / f"task-{share.task}.failed"
        self._stack = ExitStack()

    def __enter__(self) -> "Work":
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"task-{self.share.task}.lock"
        self._stack.enter_context(_held(lock))
        self._started = lock.stat().st_mtime  # by the clock of the file system, which all tasks share
        self._failure.unlink(missing_ok=True)
        self._pool = self._stack.enter_context(_pool(self._workers)) if self._workers > 1 else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self.share.tasks > 1 and self.folder.is_dir():
            with replace_file(self._failure) as temporary:
                temporary.write_text(str(error), encoding="utf-8")
        self._stack.close()

    def run(self, stage: str, function: Callable[..., str], items: Sequence[Item]) -> None:
        """Do this task's range of the items, then wait until all are done.

        Args:
            function: does one item; returns what to show of it.

        Raises:
            DataError: an item cannot be done, a worker died, or another task failed.
        """
        mine = items[
            len(items) * self.share.task // self.share.tasks : len(items) * (self.share.task + 1) // self.share.tasks
        ]
        left = [item for item in mine if not item.done.exists()]
        for done, shown in enumerate(self._results(function, left), start=len(mine) - len(left) + 1):
            self.progress.update(f"{stage}: {done} of {len(mine)}{' of this task' * (self.share.tasks > 1)} ({shown})")
        self._wait_for_others(stage, items)

    def _results(self, function: Callable[..., str], items: list[Item]) -> Iterator[str]:
        if self._pool is None:
            for item in items:
                yield function(*item.arguments)
            return
        futures: list[Future[str]] = [self._pool.submit(function, *item.arguments) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, most likely for want of memory; what is finished is kept: start again with fewer workers"
            ) from None
        finally:
            for future in futures:
                future.cancel()

    def _wait_for_others(self, stage: str, items: Sequence[Item]) -> None:
        pause = SHORTEST_PAUSE
        missing = [item for item in items if not item.done.exists()]
        while missing:
            assert self.share.tasks > 1, (stage, missing[0].done)
            for failure in self.folder.glob("task-*.failed"):
                if failure.stat().st_mtime >= self._started:  # an older one is of a task that will be started again
                    task = failure.stem.removeprefix("task-")
                    raise DataError(f"task {task} of {self.share.tasks} failed: {failure.read_text(encoding='utf-8')}")
            self.progress.update(f"{stage}: waiting for {len(missing)} of {len(items)} items of other tasks")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
            missing = [item for item in missing if not item.done.exists()]


def remove_if_unused(folder: Path) -> None:
    """Remove a finished store's work, unless a task still looks at it."""
    for lock in folder.glob("task-*.lock"):
        with suppress(FileNotFoundError), lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise DataError(
                f"--out = {path.parent.parent}: process {file.read().strip() or 'unknown'} is preparing it; "
                "wait for it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
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


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only way to be told; processes share out the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
