"""Signals that ask a run to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def listen_for_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 (a scheduler's warning) ask for a checkpoint and an end; yields a function that says whether one came."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends a process that hangs

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
