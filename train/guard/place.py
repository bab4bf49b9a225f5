"""Where a process stands: the collective its main thread waits in, and the line of ours that called it.

The main thread is looked at from another one, so that a process that hangs can still say where. PyTorch's collectives are
called by Python down to the last step; what DDP reduces during a backward pass is not, there the line of the backward pass stands.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch.distributed as dist

from train.guard.lost import is_of_a_lost_peer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("model", "parallel", "data", "train"))
OUTSIDE = (f"{ROOT / 'train' / 'guard'}/", str(ROOT / "train" / "ranks.py"))  # whom they help is more telling
COLLECTIVES = f"{Path(dist.__file__).parent}/"
WRAPPERS = ("c10d_logger.py", "logging_handlers.py")

Position = tuple[tuple[CodeType, int], ...]  # of a thread: each frame's code, and how far it is in it


@dataclass(frozen=True)
class Place:
    """Of a process, in words."""

    line: str  # of our packages, with the function
    collective: str | None = None
    beside: tuple[str, ...] = ()  # collectives of other threads: autograd's, a checkpoint's
    error: str | None = None  # that its main thread met there

    def __str__(self) -> str:
        inside = f"in {self.collective} at {self.line}" if self.collective else f"at {self.line}"
        beside = "".join(f"; another thread in {one}" for one in self.beside)
        return f"{inside}{beside}{f': {self.error}' if self.error else ''}"


def position(thread: int) -> Position:
    """Equal at two moments only if the thread has not moved, or has come back to the same instruction."""
    frame = sys._current_frames().get(thread)
    return tuple((one.f_code, one.f_lasti) for one in _outward(frame))


def place_of(thread: int) -> Place:
    """Where this process stands now, seen from its main thread."""
    frames = sys._current_frames()
    line, collective = _look([(one.f_code, one.f_lineno) for one in _outward(frames.get(thread))])
    beside = []
    for ident, frame in frames.items():
        if ident not in (thread, threading.get_ident()):
            there, inside = _look([(one.f_code, one.f_lineno) for one in _outward(frame)])
            beside += [f"{inside} at {there}"] if inside else []
    return Place(line, collective, tuple(beside))


def error_in(thread: int) -> BaseException | None:
    """The error that a thread is leaving its functions with, if another rank's loss has caused it."""
    found = sys._current_exceptions().get(thread)
    error = found[1] if isinstance(found, tuple) else found  # a triple before Python 3.12
    return error if error is not None and is_of_a_lost_peer(error) else None


def place_of_error(error: BaseException, said: str) -> Place:
    """Where an error came from."""
    line, collective = _look(list(_inward(error.__traceback__))[::-1])
    return Place(line, collective, error=said)


def _look(frames: list[tuple[CodeType, int]]) -> tuple[str, str | None]:
    """The innermost line of ours, and the innermost call of torch.distributed. `frames` come from the innermost outward."""
    collective = None
    for code, number in frames:
        file = code.co_filename
        if file.startswith(COLLECTIVES) and not file.endswith(WRAPPERS):
            collective = collective or code.co_name
        elif file.startswith(PACKAGES) and not file.startswith(OUTSIDE):
            return f"{Path(file).relative_to(ROOT)}:{number} ({code.co_name})", collective
    return "no line of ours", collective


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _inward(trace: TracebackType | None) -> Iterator[tuple[CodeType, int]]:
    while trace is not None:
        yield trace.tb_frame.f_code, trace.tb_lineno
        trace = trace.tb_next
