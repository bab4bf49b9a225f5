"""A forward and a backward pass on one rank at the same time: tokens of one travel while the other computes. DualPipe, V3 §3.2.1.

    forward, calling thread    attention, dispatch ▸                 ▸ experts, combine ▸                    ▸ …
    backward, a thread of its own                  ▸ combine's end ▸                    ▸ experts, dispatch ▸
    on their way               ── tokens of the forward pass ──────▸
                                                                   ── gradients of the backward pass ──────▸

Exactly one side has the turn and runs. Where it would wait for rows from other ranks (`meanwhile`, which `parallel.expert` calls
between the departure of rows and the wait for them) it hands the turn over, and waits when it has it again. A side that has ended
has given its turn up. So what runs is one sequence, which depends on the two passes alone and not on the timing of threads: ranks
with the same layers issue the same collectives in the same order, as NCCL and gloo demand.

The passes must be of different modules (different stages of a pipeline), as both change what a module remembers of its own pass.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Literal, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
Side = Literal["forward", "backward"]
OTHER: dict[Side, Side] = {"forward": "backward", "backward": "forward"}

_running: "Turns | None" = None  # of all threads: autograd runs backward functions in threads of its own


def meanwhile() -> None:
    """Let the other side run, if there is one, until it has to wait itself or has ended."""
    if _running is not None:
        _running.hand_over()


class Turns:
    """Two passes that take turns; one after the other, as often as one likes."""

    def __init__(self) -> None:
        # One thread for all backward passes: PyTorch keeps a pool of threads for each thread that computes.
        self._worker = ThreadPoolExecutor(1, "backward")
        self._changed = threading.Condition()
        self._turn: Side = "forward"
        self._ended: set[Side] = set()
        self._error: BaseException | None = None  # the first
        self._forward_thread = 0

    def run(self, forward: Callable[[], A], backward: Callable[[], B]) -> tuple[A, B]:
        """Both, the forward pass first until it waits; what each returns.

        Raises:
            what one of them raised; the other stops where it next would wait, or is not begun.
        """
        global _running
        assert _running is None, "two passes take turns already"
        self._turn, self._error, self._forward_thread = "forward", None, threading.get_ident()
        self._ended.clear()
        _running = self
        made: list[A] = []
        also_made: list[B] = []
        try:
            other = self._worker.submit(self._play, "backward", _as_here(lambda: also_made.append(backward())))
            self._play("forward", lambda: made.append(forward()))
            wait([other])
        finally:
            _running = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return made[0], also_made[0]

    def hand_over(self) -> None:
        # Not the forward pass's thread: a thread of the backward pass, whichever autograd has chosen.
        side: Side = "forward" if threading.get_ident() == self._forward_thread else "backward"
        with self._changed:
            if OTHER[side] not in self._ended:
                self._give(OTHER[side])
            self._take(side)

    def _play(self, side: Side, run: Callable[[], None]) -> None:
        try:
            with self._changed:
                self._take(side)
            run()
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._changed:
                self._ended.add(side)
                self._give(OTHER[side])

    def _give(self, side: Side) -> None:
        self._turn = side
        self._changed.notify_all()

    def _take(self, side: Side) -> None:
        self._changed.wait_for(lambda: self._turn == side)
        if self._error is not None:
            raise RuntimeError("the other side failed")


def _as_here(run: Callable[[], None]) -> Callable[[], None]:
    """`run` for another thread, where gradients are on or off, and stream and device are, as in this one."""
    is_enabled = torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def there() -> None:
        if stream is not None:
            torch.cuda.set_stream(
                stream
            )  # and its device; for good, since going back to device 0 would take memory there
        with torch.set_grad_enabled(is_enabled):
            run()

    return there
