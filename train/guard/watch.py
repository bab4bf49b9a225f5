"""The watch over a run's ranks: notices who has died, stopped or hung, asks all where they stand, says so once, and ends the run.

Every rank but the first keeps a connection to the first, beside those of its training, and a thread of its own at each end:

    rank r → 0   what it is at, every few seconds, and whether its main thread has moved lately; that it leaves; that it is lost
    rank 0 → r   that it is alive; "where do you stand?"; "it is over"

* A process that dies closes its connection, which is noticed at once. One that was stopped, or whose node or link is down, is
  silent: after `Patience.tell` a line says so, after `Patience.hang`, or the `patience` of its mark, the run ends: while a
  process waits for a page of a slow disk, its threads wait too.
* A run hangs when no rank moves. Whether a main thread moves is seen by looking at it: its stack is at another instruction
  than before, or `at` was called. So nothing has to report progress, however long a validation takes. What may rest for long in
  one place, a save, a compiler, says so with the `patience` of its mark.
* A rank that goes round for ever moves. It is noticed as the only one that does: all others wait for it, for `Patience.alone`.
* A collective that fails because another rank is gone comes to `lost` from the main thread.

In the end processes leave by `os._exit`: a collective that hangs cannot be left otherwise, and a run loses nothing, since all that
counts of it are its complete checkpoints.
"""

import math
import os
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from secrets import token_hex
from typing import Any, NoReturn

from train.guard.lost import LOST, Lost, first_line
from train.guard.members import Member, in_words
from train.guard.patience import START, Patience
from train.guard.place import Place, Position, error_in, place_of, place_of_error, position
from train.guard.report import Answer, Mark, report
from train.guard.roll_call import Seat
from train.guard.wire import Message, Wire

AGAIN = "start the same command again: the run continues from its newest complete checkpoint"
LINGER = 0.2  # seconds that rank 0's connections stay, so that its last word arrives
DEAD = "it was killed, or its node has failed"
CUT_OFF = "it was stopped, or its node or the link to it is down, or its interpreter waits (for a disk?)"


class Watch:
    """What a process's main thread says and asks. Alone it notes where it is, and nobody looks.

    Args:
        end: called with the exit code before the process is ended.
    """

    def __init__(self, end: Callable[[int], None] = lambda code: None) -> None:
        self._end = end
        self._main = threading.get_ident()
        self.mark = Mark("starting", patience=START)
        self.error: BaseException | None = None  # of a collective, in the main thread
        self._thread: _Thread | None = None

    def at(self, doing: str, step: int | None = None, patience: float = 0.0, meeting: int = 0) -> None:
        """The main thread begins something else.

        Args:
            step: the training step that it belongs to.
            patience: seconds in which it may stay at one place, if longer than the run's own.
            meeting: 1, 2, 3 … where ranks wait for each other for the first time: who is late will be named.
        """
        is_sooner = patience < self.mark.patience
        self.mark = Mark(doing, step, patience, meeting)
        if is_sooner and self._thread and self._thread.is_alive():
            self._thread.ask("tell")  # by what the others know of this rank they would still wait for long

    def begin(self, thread: "_Thread") -> None:
        self._thread = thread
        os.register_at_fork(after_in_child=thread.close_copies)
        thread.start()

    def lost(self, error: BaseException) -> NoReturn:
        """The main thread cannot go on, for an error that came from the loss of another rank: tell where all stand, and end."""
        self.error = error
        if self._thread and self._thread.is_alive():
            self._thread.ask("lost")
            self._thread.join(2 * self._thread.patience.answer + self._thread.patience.grace)
        self.end(LOST, [f"{first_line(error)}; {AGAIN}"])

    def leave(self, code: int, line: str) -> None:
        """This rank ends for a reason of its own, `line`, which the others may not share."""
        if self._thread:
            self._thread.ask("leave", {"code": code, "line": line})
            self._thread.join(self._thread.patience.grace)

    def close(self) -> None:
        """This rank has done its work."""
        if self._thread:
            self._thread.ask("close")
            self._thread.join(self._thread.patience.grace)

    def end(self, code: int, lines: list[str]) -> NoReturn:
        """Say why, and end this process now."""
        if lines:
            print("rorqual: " + "\n".join(lines), file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if sys.__stderr__ is not None and sys.__stderr__.isatty():
            sys.__stderr__.write("\x1b[?25h")  # the live line of a run hides the cursor
        self._end(code)
        os._exit(code)

    def answer(self) -> Answer:
        """Where the main thread stands."""
        error = self.error or error_in(self._main)
        return Answer(self.mark, place_of_error(error, first_line(error)) if error else place_of(self._main))

    def position(self) -> tuple[Mark, Position]:
        return self.mark, position(self._main)


class _Thread(threading.Thread):
    """What both ends have in common: it waits for messages, and looks at the clock."""

    def __init__(self, watch: Watch, me: Member, patience: Patience) -> None:
        super().__init__(name="watch", daemon=True)
        self.watch, self.me, self.patience = watch, me, patience
        self.selector = selectors.DefaultSelector()
        self.asked: list[tuple[str, Message]] = []  # by the main thread
        self.is_over = False
        self._bell, ring = socket.socketpair()
        self._ring = ring
        self.selector.register(self._bell, selectors.EVENT_READ)
        self._position, self._since = watch.position(), time.monotonic()

    def ask(self, what: str, message: Message | None = None) -> None:
        """From the main thread."""
        self.asked.append((what, message or {}))
        self._ring.send(b"!")

    def close_copies(self) -> None:
        """In a forked process: a connection is closed by the death of its rank only if no other process has it open."""
        for one in [*(self.selector.get_map() or {}).values()]:
            if isinstance(one.fileobj, socket.socket):
                one.fileobj.close()
        self._ring.close()
        self.selector.close()

    def run(self) -> None:
        try:
            beat = time.monotonic()
            while not self.is_over:
                ready = {key.fileobj for key, _ in self.selector.select(max(beat - time.monotonic(), 0))}
                if self._bell in ready:
                    self._bell.recv(1 << 10)
                while self.asked:
                    self.on_ask(*self.asked.pop(0))
                self.on_ready(ready)
                if time.monotonic() >= beat:
                    beat = time.monotonic() + self.patience.beat
                    self.on_beat()
        except Exception as error:
            if not self.is_over:
                print(f"rorqual: warning: the watch of {self.me} has failed ({first_line(error)})", file=sys.stderr)
                self.on_ask("close", {})  # or the others would take its silence for a death
        finally:
            self.selector.close()

    def on_ask(self, what: str, message: Message) -> None: ...
    def on_ready(self, ready: set[Any]) -> None: ...
    def on_beat(self) -> None: ...

    def rests(self) -> bool:
        """Whether the main thread has not moved for longer than it may."""
        now, found = time.monotonic(), self.watch.position()
        if found != self._position:
            self._position, self._since = found, now
        return now - self._since > max(self.patience.hang, self.watch.mark.patience)

    def sign(self) -> Message:
        """Of life."""
        return {"mark": self.watch.mark, "rests": self.rests()}


class _Peer:
    """What rank 0 knows of another."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.wire: Wire | None = None
        self.heard = time.monotonic()
        self.mark = Mark("starting", patience=START)
        self.rests = self.has_left = self.is_told = False
        self.answer: Answer | None = None

    @property
    def is_lost(self) -> bool:
        return self.wire is not None and self.wire.is_lost

    @property
    def silence(self) -> float:
        return 0.0 if self.has_left else time.monotonic() - self.heard


class First(_Thread):
    """Rank 0's: looks at all, asks, and reports."""

    def __init__(
        self, watch: Watch, members: list[Member], patience: Patience, server: socket.socket, token: str
    ) -> None:
        super().__init__(watch, members[0], patience)
        self.peers = {member.rank: _Peer(member) for member in members[1:]}
        self.server, self.token = server, token
        self.strangers: dict[Any, Wire] = {}
        self.by_socket: dict[Any, _Peer] = {}
        self.selector.register(server, selectors.EVENT_READ)
        server.setblocking(False)
        self.why: str | None = None  # every rank has been asked where it stands
        self.until = math.inf
        self.left: tuple[float, int, str] | None = None  # a rank has ended for a reason: when all shall, code, line
        self.alone: tuple[Member, Mark] | None = None  # who moves while all others rest, and at what
        self.alone_since = math.inf
        self.late: tuple[Mark, Mark] | None = None  # of the ranks that meet: what the last one is at, and the first
        self.late_since = math.inf

    def on_ask(self, what: str, message: Message) -> None:
        if what == "lost":
            assert self.watch.error is not None
            self.alarm(f"{self.me} has lost another: {first_line(self.watch.error)}")
        elif what == "tell":
            self._tell_all({"patience": self.watch.mark.patience})
        else:
            self._tell_all({"left": message})
            self.is_over = True

    def on_ready(self, ready: set[Any]) -> None:
        if self.server in ready:
            self._open()
        for one in ready & self.strangers.keys():
            self._meet(one)
        for one in ready & self.by_socket.keys():
            peer = self.by_socket[one]
            assert peer.wire is not None
            self._hear(peer, peer.wire.receive())
        if self.why is not None:
            self._report_once_known()

    def on_beat(self) -> None:
        self._tell_all({"patience": self.watch.mark.patience})
        for peer in self.peers.values():
            self._tell_of_silence(peer)
        self._look_who_moves()
        self._look_who_is_late()
        if self.why is not None:
            self._report_once_known()
        elif self.left and time.monotonic() > self.left[0]:
            _, code, line = self.left
            self._end(code, [line])

    def alarm(self, why: str) -> None:
        """Ask everybody where they stand. The first reason counts; where a rank has ended for one of its own, that is it."""
        if self.why is None and self.left is None:
            self.why, self.until = why, time.monotonic() + self.patience.answer
            self._tell_all({"where": True})

    def _tell_all(self, message: Message) -> None:
        for peer in self.peers.values():
            if peer.wire:
                peer.wire.send(message)

    def _look_who_moves(self) -> None:
        """Nobody: the run hangs. One alone, for very long: all others wait for it, and it never comes to them."""
        marks = {self.me: (self.watch.mark, self.rests())}
        marks |= {peer.member: (peer.mark, peer.rests) for peer in self.peers.values() if not peer.has_left}
        moving = [(member, mark) for member, (mark, rests) in marks.items() if not rests]
        alone = moving[0] if len(moving) == 1 < len(marks) else None
        if alone != self.alone:
            self.alone, self.alone_since = alone, time.monotonic()
        waited = time.monotonic() - self.alone_since
        if not moving:
            self.alarm(f"the run hangs: no rank has moved for {self.patience.hang:.0f} s")
        elif alone and waited > max(self.patience.alone, alone[1].patience):
            self.alarm(
                f"the run hangs: {alone[0]} has gone round in {alone[1]} for {waited:.0f} s, and all others wait"
            )

    def _look_who_is_late(self) -> None:
        """Where ranks meet for the first time, say who does not come, or where they meet for too long: it is no reason to end."""
        marks = {self.me: self.watch.mark} | {peer.member: peer.mark for peer in self.peers.values()}
        last, first = (choose(marks.values(), key=lambda mark: mark.meeting) for choose in (min, max))
        late = (last, first) if first.meeting else None
        if late != self.late:
            self.late, self.late_since = late, time.monotonic()
        elif late and time.monotonic() - self.late_since > self.patience.tell:
            self.late_since = math.inf  # once
            waits = f"for {self.patience.tell:.0f} s"
            if last.meeting < first.meeting:
                behind = [member for member, mark in marks.items() if mark.meeting == last.meeting]
                have = "have" if len(behind) > 1 else "has"
                self._say(f"{in_words(behind)} {have} not come to the {first} {waits}; last heard of in: {last}")
            else:
                self._say(f"all ranks have been in the {first} {waits}: look at the network between them")

    def _open(self) -> None:
        """Who has called at the door."""
        try:
            connection, _ = self.server.accept()
        except OSError:  # gone again, or this process has too many files open, which may pass
            time.sleep(LINGER)
            return
        self.strangers[connection] = Wire(connection)
        self.selector.register(connection, selectors.EVENT_READ)

    def _meet(self, connection: Any) -> None:
        wire = self.strangers[connection]
        messages = wire.receive()
        if messages and messages[0].get("token") == self.token:
            peer = self.by_socket[connection] = self.peers[messages[0]["rank"]]
            peer.wire = self.strangers.pop(connection)
            self._hear(peer, messages)
        elif messages or wire.is_lost:
            self.strangers.pop(connection)
            self.selector.unregister(connection)
            wire.close()

    def _hear(self, peer: _Peer, messages: list[Message]) -> None:
        assert peer.wire is not None
        for message in messages:
            peer.heard = time.monotonic()
            if "mark" in message:
                peer.mark, peer.rests = Mark(*message["mark"]), message["rests"]
            if "answer" in message:
                peer.answer = _read_answer(message["answer"])
            if "lost" in message:
                self.alarm(f"{peer.member} has lost another: {message['lost']}")
            if "left" in message:
                peer.has_left = True
                if message["left"] and self.left is None:
                    self.left = (time.monotonic() + self.patience.grace, *_end_of(peer.member, message["left"]))
        if peer.wire.is_lost:
            self.selector.unregister(peer.wire.socket)
            self.by_socket.pop(peer.wire.socket)
            if not peer.has_left:
                self.alarm(f"{peer.member} {_end_of_connection(peer.silence, self.patience)}")

    def _tell_of_silence(self, peer: _Peer) -> None:
        limit = max(self.patience.hang, peer.mark.patience)
        if peer.silence > limit:
            self.alarm(f"{peer.member} has not answered for {peer.silence:.0f} s: {CUT_OFF}")
        elif peer.is_told and peer.silence < self.patience.tell:
            peer.is_told = False
            self._say(f"{peer.member} answers again")
        elif not peer.is_told and peer.silence > self.patience.tell:
            peer.is_told = True
            end = f"; the run ends after {limit:.0f} s" if limit < math.inf else ""
            self._say(f"{peer.member} has not answered for {peer.silence:.0f} s, last heard of in {peer.mark}{end}")

    def _report_once_known(self) -> None:
        """End the run once all have said where they stand who still can."""
        assert self.why is not None
        soon = 4 * self.patience.beat
        living = [peer for peer in self.peers.values() if not (peer.is_lost or peer.has_left)]
        if any(peer.answer is None and peer.silence < soon for peer in living) and time.monotonic() < self.until:
            return
        answers = {self.me: self.watch.answer()} | {p.member: p.answer for p in living if p.answer}
        silent = {p.member: p.mark for p in self.peers.values() if not p.answer and not p.has_left}
        self._end(LOST, [*report(self.why, answers, silent), AGAIN])

    def _end(self, code: int, lines: list[str]) -> NoReturn:
        """Of the run."""
        self._tell_all({"end": code})
        time.sleep(LINGER)
        self.watch.end(code, lines)

    def _say(self, line: str) -> None:
        print(f"rorqual: {line}", file=sys.stderr, flush=True)


class Other(_Thread):
    """Another rank's: keeps the first informed, and looks at it."""

    def __init__(self, watch: Watch, first: Member, me: Member, patience: Patience, seat: Seat, wire: Wire) -> None:
        super().__init__(watch, me, patience)
        self.first, self.seat, self.wire = first, seat, wire
        self.heard, self.is_told = time.monotonic(), False
        self.patience_of_first = START
        self.has_first_left = False
        self.selector.register(wire.socket, selectors.EVENT_READ)
        self.has_answered = False
        self.left: tuple[float, int, str] | None = (
            None  # the first has ended for a reason: when this rank shall, code, line
        )

    def on_ask(self, what: str, message: Message) -> None:
        if what == "lost":
            assert self.watch.error is not None
            self.wire.send({"lost": first_line(self.watch.error)})
            self._answer()
        elif what == "tell":
            self.wire.send(self.sign())
        else:
            self.wire.send({"left": message})
            self.is_over = True

    def on_ready(self, ready: set[Any]) -> None:
        silence = time.monotonic() - self.heard
        for message in self.wire.receive():
            self.heard = time.monotonic()
            self.patience_of_first = message.get("patience", self.patience_of_first)
            if "where" in message:
                self._answer()
            if "end" in message:
                self.watch.end(message["end"], [])
            if "left" in message:
                self.has_first_left = True
                if message["left"]:
                    self.left = (time.monotonic() + self.patience.grace, *_end_of(self.first, message["left"]))
        if self.wire.is_lost and self.wire.socket in ready:
            self.selector.unregister(self.wire.socket)
            if not self.has_first_left:
                self._end_alone(f"{self.first} {_end_of_connection(silence, self.patience)}")

    def on_beat(self) -> None:
        self.wire.send(self.sign())
        if self.left and time.monotonic() > self.left[0]:
            _, code, line = self.left
            self.watch.end(code, [line] if self.seat.local_rank == 0 else [])
        if self.has_first_left:
            return
        silence = time.monotonic() - self.heard
        if silence > max(self.patience.hang, self.patience_of_first):
            self._end_alone(f"{self.first} has not answered for {silence:.0f} s: {CUT_OFF}")
        if silence > self.patience.tell and not self.is_told and self.seat.speaks:
            print(f"rorqual: {self.first} has not answered {self.me} for {silence:.0f} s", file=sys.stderr, flush=True)
        self.is_told = silence > self.patience.tell

    def _answer(self) -> None:
        mark, place = self.watch.answer()
        self.wire.send({"answer": [mark, vars(place)]})
        self.has_answered = True

    def _end_alone(self, why: str) -> NoReturn:
        """Without the first: what this rank knows is all there is to say. It is silent if the first has asked, and so reported."""
        speaks = self.seat.speaks and not self.has_answered
        self.watch.end(LOST, [*report(why, {self.me: self.watch.answer()}, {}), AGAIN] if speaks else [])


def _end_of_connection(silence: float, patience: Patience) -> str:
    """What it means: the system closes it at a process's death, and gives it up some 15 minutes after the other node's."""
    if silence < patience.tell:
        return f"has ended without a word: {DEAD}"
    return f"has not answered for {silence:.0f} s: {CUT_OFF}"


def _end_of(member: Member, said: Message) -> tuple[int, str]:
    """The exit code and the line of all, when one has ended for a reason: a mistake of the user's is one of all."""
    return said["code"] if said["code"] > 1 else LOST, f"{member} has ended: {said['line']}"


def _read_answer(message: Any) -> Answer:
    mark, place = message
    return Answer(Mark(*mark), Place(**place | {"beside": tuple(place["beside"])}))


def open_server(world_size: int) -> tuple[socket.socket, dict[str, Any]]:
    """Where rank 0 listens, and what the others need to know of it.

    It listens at every address of its machine: its name for itself may be one that no other machine reaches it by.

    Args:
        world_size: so many connections must be open at a time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + 2 * world_size
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=both)
    return server, {"port": server.getsockname()[1], "token": token_hex(8)}


def connect(host: str, news: dict[str, Any], me: Member, patience: Patience) -> Wire:
    """The connection of another rank to the first.

    Args:
        host: of the first rank, by the name or address by which this one reaches its store.

    Raises:
        Lost: it is not to be had.
    """
    port = news["port"]
    try:
        wire = Wire(socket.create_connection((host, port), timeout=max(patience.tell, 5)))
    except OSError as error:
        raise Lost(f"{me} cannot reach rank 0 at {host}:{port}, where its watch listens: {error}") from None
    wire.send({"token": news["token"], "rank": me.rank})
    return wire
