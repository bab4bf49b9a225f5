"""Arrays made ahead of their use, in processes of their own.

The processes are forked, so that they start in milliseconds and find everything open, and they compute nothing but what they are
asked for. Process w of N makes the items w, w + N, w + 2N … of a plan, each into shared memory of its own (a `memfd`), and passes
the memory's descriptor through a socket. What the maker wrote is what the user reads: there is no copy in between, nothing has a
name in /dev/shm that could be left behind, and the memory is free as soon as nobody looks at it any more.

The socket is also how each side learns of the other's end, however it came: a maker whose user is gone reads its end and exits, and
the user of a dead maker gets an error that says so. Signals that ask a run to stop reach all its processes; makers leave
them to the run, which may still need a batch before it saves, from the moment of the fork on: an exception there would make
a second run of them.

Linux only. Fork before large tensors are made: what is written later is copied for as long as a maker may look at the old pages.
"""

import gc
import mmap
import os
import pickle
import signal
import socket
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from data.errors import DataError, MakerDied

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # signals that ask a run to stop
ITEMS_AHEAD = 4  # of each process: made, and not yet asked for
MESSAGE = 1 << 16  # bytes; the largest error that is passed on as it is
PATIENCE = 5.0  # seconds that a process gets to end by itself

E = TypeVar("E")
Shape = tuple[type[np.generic], tuple[int, ...]]  # of one array
Arrays = list[npt.NDArray[Any]]


class Prefetch(Generic[E]):
    """The items of a plan in its order: pairs of an entry and its arrays.

    Args:
        plan: what shall be made; every process walks through it by itself.
        shapes: dtype and shape of the arrays of an entry, the ones with the larger elements first.
        fill: writes an entry's arrays. What it raises is raised here, in the entry's turn.
        workers: processes, at least 1.
    """

    def __init__(
        self,
        plan: Iterable[E],
        shapes: Callable[[E], Sequence[Shape]],
        fill: Callable[[E, Arrays], None],
        workers: int,
    ) -> None:
        self._shapes = shapes
        self._makers: list[_Maker] = []
        self._end = weakref.finalize(self, _end, self._makers)
        plan = iter(plan)
        self._plan = enumerate(plan)
        try:
            with _signals_blocked():
                for number in range(workers):
                    self._makers.append(_start(self._makers, _every(plan, number, workers), shapes, fill))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[E, Arrays]]:
        return self

    def __next__(self) -> tuple[E, Arrays]:
        if not self._end.alive:
            raise StopIteration
        try:
            number, entry = next(self._plan)
            return entry, self._receive(self._makers[number % len(self._makers)], self._shapes(entry))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes. What has been handed out stays."""
        self._end()

    def _receive(self, maker: "_Maker", shapes: Sequence[Shape]) -> Arrays:
        try:
            message, memories, _, _ = socket.recv_fds(maker.socket, MESSAGE, 1)
        except ConnectionError:
            message, memories = b"", []
        if memories:
            with suppress(OSError):  # it has made its last entry, or is dead: what was made is good
                maker.socket.send(b"+")
            try:
                return _map(memories[0], shapes)
            finally:
                os.close(memories[0])
        if message:
            raise pickle.loads(message)
        raise MakerDied(
            f"data.workers: process {maker.process}, which read ahead, {maker.death()}; the run cannot go on without its batches; "
            "look for what ended it (a lack of memory?) and start the same command again"
        )


@dataclass
class _Maker:
    """A process, and the socket to it."""

    process: int
    socket: socket.socket
    status: int | None = None  # as `waitpid` gives it

    def wait(self, seconds: float) -> bool:
        """Whether the process has ended within this time."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            try:
                process, status = os.waitpid(self.process, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                process, status = self.process, 0
            if process:
                self.status = status
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.001)
        return True

    def death(self) -> str:
        """How it ended, in words."""
        if not self.wait(PATIENCE) or self.status is None:
            return "has closed its socket"
        code = os.waitstatus_to_exitcode(self.status)
        return f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Let signals that ask a run to stop wait: a process that is forked here never gets them, and this thread gets them at the end.

    Another thread may still take one. If the exception then comes between a fork and its record, the maker finds its socket closed.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(
    makers: Sequence[_Maker],
    entries: Iterator[E],
    shapes: Callable[[E], Sequence[Shape]],
    fill: Callable[[E, Arrays], None],
) -> _Maker:
    """One more maker beside these, which makes these entries."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        if process := os.fork():
            return _Maker(process, ours)
        try:
            for end in [ours, *(maker.socket for maker in makers)]:
                end.close()
            _make(theirs, entries, shapes, fill)
        finally:
            os._exit(1)  # whatever went wrong, the forked program does not go on here


def _end(makers: Sequence[_Maker]) -> None:
    for maker in makers:
        maker.socket.close()
    for maker in makers:
        if not maker.wait(PATIENCE):
            os.kill(maker.process, signal.SIGKILL)
            maker.wait(PATIENCE)


def _every(plan: Iterator[E], number: int, workers: int) -> Iterator[E]:
    """The entries that this process makes. Where the plan itself fails, so it does in its user, in its turn."""
    try:
        for index, entry in enumerate(plan):
            if index % workers == number:
                yield entry
    except Exception:
        return


def _make(
    user: socket.socket, entries: Iterator[E], shapes: Callable[[E], Sequence[Shape]], fill: Callable[[E, Arrays], None]
) -> NoReturn:
    """The life of a process. It ends without running what the forked program has registered for its exit."""
    code = 1
    try:
        gc.freeze()  # what the forked program has made is not for this process to collect
        for made, entry in enumerate(entries):
            if made >= ITEMS_AHEAD and not user.recv(1):
                break
            try:
                kinds = shapes(entry)
                memory = os.memfd_create("batches")
                os.ftruncate(memory, _size(kinds))
                fill(entry, _map(memory, kinds))
            except Exception as error:
                user.send(_pickled(error))
                break
            socket.send_fds(user, [b"="], [memory])
            os.close(memory)
        # Nothing is left to make. A socket that was closed now could take with it what has been sent.
        while user.recv(1):
            pass
        code = 0
    except OSError:  # the user is gone
        code = 0
    finally:
        os._exit(code)


def _pickled(error: Exception) -> bytes:
    """An error as a message; one that cannot be passed on as it is becomes a RuntimeError that tells of it."""
    told = "".join(traceback.format_exception(error))
    if not isinstance(error, DataError):
        error.add_note(told)
    try:
        message = pickle.dumps(error)
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(RuntimeError(told[-MESSAGE // 8 :]))
    return message if len(message) <= MESSAGE else pickle.dumps(RuntimeError(told[-MESSAGE // 8 :]))


def _size(shapes: Sequence[Shape]) -> int:
    """Bytes of the arrays; at least one, for nothing cannot be mapped."""
    return max(sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in shapes), 1)


def _map(memory: int, shapes: Sequence[Shape]) -> Arrays:
    """Arrays in the memory of a descriptor, which stays mapped as long as one of them is there."""
    mapped = mmap.mmap(memory, _size(shapes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    arrays: Arrays = []
    at = 0
    for dtype, shape in shapes:
        arrays.append(np.frombuffer(mapped, dtype, prod(shape), at).reshape(shape))
        at += arrays[-1].nbytes
    return arrays
