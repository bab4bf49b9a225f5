"""Who has come, and with what: asked before anything waits for everybody, so that whoever is missing has a name.

Every rank writes its host, its process and its facts (`train.guard.alike`) into the store of the launch. Rank 0 looks at all of
them, the others wait for what it makes of them: no rank but the first reads what N others wrote.

The store is the one of torchrun's agent, or one that rank 0 opens at MASTER_ADDR:MASTER_PORT, as `init_process_group` would. It
is looked into, never waited on: PyTorch's own waits fail with a screen of C++ frames.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from train.guard.alike import Facts, UnlikeError, difference
from train.guard.lost import Lost, first_line
from train.guard.members import Member, ranks_in_words
from train.guard.patience import Patience

PAUSE = 0.05  # seconds between two looks, at first
LONGEST_PAUSE = 1.0
SAME = "start every process with the same command, and install the same packages on every node"


@dataclass(frozen=True)
class Seat:
    """The place of a process among those of its run, as the launcher gave it."""

    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int]  # of the store

    @classmethod
    def from_environment(cls) -> "Seat":
        """As torchrun, deepspeed, accelerate and plain variables describe it; without any, alone."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        address = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29500))
        return cls(rank, world_size, local_rank, address)

    @property
    def speaks(self) -> bool:
        """Whether it says what every rank knows: one does on each node, and beside rank 0, which may be dead, the next."""
        return self.local_rank == 0 or self.rank == self.local_rank == 1

    @property
    def where(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"


def open_store(seat: Seat, patience: Patience) -> Store:
    """This process's client of the launch's store.

    Raises:
        Lost: nobody answers at the store's address.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = seat.address
    limit = timedelta(seconds=max(patience.tell, 30))
    try:
        if not agents and seat.rank == 0:
            store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=limit)
        else:
            who = "the launcher's agent of the first node" if agents else "rank 0"
            _until(
                lambda: _answers(seat.address),
                patience,
                lambda: (
                    f"{who} does not answer at {seat.where}: it has not started, or its node or the link to it is down"
                ),
                seat,
            )
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    except DistError as error:
        raise Lost(f"the store of the launch at {seat.where}: {first_line(error)}") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"rorqual/{attempt}", store)


def roll_call(
    store: Store, seat: Seat, facts: Facts, patience: Patience, news: dict[str, Any]
) -> tuple[list[Member], dict[str, Any]]:
    """Wait until all are here; every rank calls it.

    Args:
        facts: what must be the same on all.
        news: what rank 0 has to tell the others.

    Returns:
        Of all ranks on rank 0, else of rank 0 and this one; and rank 0's news.

    Raises:
        Lost: some have not come, or rank 0 has not.
        UnlikeError: the facts differ.
    """
    me = Member(seat.rank, socket.gethostname(), os.getpid())
    try:
        store.set(f"here/{seat.rank}", json.dumps([me, facts]))
        if seat.rank == 0:
            members, verdict = _look(store, seat, patience, news)
            store.set("verdict", json.dumps(verdict))
            if verdict["missing"] or verdict["unlike"]:  # the store may end with this process
                _wait_for_readers(store, seat.world_size)
        else:
            members, verdict = _wait(store, me, seat, patience)
    except DistError as error:
        raise Lost(
            f"the store of the launch at {seat.where} is gone: its node or the link to it is down ({first_line(error)})"
        ) from None
    if verdict["missing"]:
        raise Lost(verdict["missing"])
    if verdict["unlike"]:
        raise UnlikeError(verdict["unlike"])
    return members, verdict["news"]


def _look(store: Store, seat: Seat, patience: Patience, news: dict[str, Any]) -> tuple[list[Member], dict[str, Any]]:
    """Rank 0's part: the members, and its verdict."""
    awaited = list(range(seat.world_size))

    def all_here() -> bool:
        while awaited and store.check([f"here/{awaited[0]}"]):
            awaited.pop(0)
        return not awaited

    def missing() -> str:
        awaited[:] = [rank for rank in awaited if not store.check([f"here/{rank}"])]
        plural = len(awaited) > 1
        line = (
            f"{ranks_in_words(awaited)} of {seat.world_size} {'have' if plural else 'has'} not come: "
            f"{'their processes have' if plural else 'its process has'} not started, or cannot reach {seat.where}"
        )
        store.set("told", line)
        return line

    try:
        _until(all_here, patience, missing, seat)
    except Lost as lost:
        return [], {"missing": str(lost), "unlike": None, "news": {}}
    said = [json.loads(text) for text in store.multi_get([f"here/{rank}" for rank in range(seat.world_size)])]
    members = [Member(*member) for member, _ in said]
    return members, {"missing": None, "unlike": difference(members, [facts for _, facts in said], SAME), "news": news}


def _wait(store: Store, me: Member, seat: Seat, patience: Patience) -> tuple[list[Member], dict[str, Any]]:
    """Every other rank's part."""

    def missing() -> str:
        if not store.check(["here/0"]):
            return (
                f"rank 0 of {seat.world_size} has not come: its process has not started, or cannot reach {seat.where}"
            )
        # Rank 0 has said it on its own node.
        return store.get("told").decode() if seat.local_rank == 0 and store.check(["told"]) else ""

    _until(lambda: store.check(["verdict"]), patience, missing, seat, more=patience.tell)
    (first, _), verdict = json.loads(store.get("here/0")), json.loads(store.get("verdict"))
    store.add("readers", 1)
    return [Member(*first), me], verdict


def _wait_for_readers(store: Store, world_size: int) -> None:
    """Rank 0 stays until all who came have read its verdict."""
    others = sum(store.check([f"here/{rank}"]) for rank in range(1, world_size))
    deadline = time.monotonic() + 2 * LONGEST_PAUSE
    while store.add("readers", 0) < others and time.monotonic() < deadline:
        time.sleep(PAUSE)


def _until(
    condition: Callable[[], bool], patience: Patience, missing: Callable[[], str], seat: Seat, more: float = 0.0
) -> None:
    """Return once `condition` holds; say after a while what is missing, if anything is known, and raise Lost with it in the end.

    A node's first process will print what is raised; where it is the one that is missing, the next has to.
    """
    started, told, pause = time.monotonic(), False, PAUSE
    while not condition():
        waited = time.monotonic() - started
        if waited > patience.hang + more:
            end = f"{missing() or 'rank 0 has come and does not answer any more'}; waited {waited:.0f} s"
            if seat.speaks and seat.local_rank > 0:
                print(f"rorqual: {end}", file=sys.stderr, flush=True)
            raise Lost(end)
        if waited > patience.tell and not told and (line := missing()):
            told = True
            if seat.speaks:
                print(f"rorqual: {line}; waiting for {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(pause * 1.1, LONGEST_PAUSE, patience.tell / 20)


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
