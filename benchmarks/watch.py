"""What the watch over a run's ranks costs: a mark of the main thread, a look at where it stands, and rank 0's share for many ranks.

The other ranks are connections of one process here, each of which gives a sign of life as often as a rank does.
"""

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from train.guard.members import Member
from train.guard.patience import Patience
from train.guard.place import place_of, position
from train.guard.report import Mark
from train.guard.watch import First, Watch, connect, open_server

REPEATS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 256, 2048])
    parser.add_argument("--seconds", type=float, default=20, help="that rank 0 is watched for each number of ranks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    watch, main_thread = Watch(), threading.get_ident()
    found: dict[str, Any] = {
        "mark_us": 1e6 * _each(lambda: watch.at("forward and backward", 12)),
        "look_us": 1e6 * _each(lambda: position(main_thread)),
        "place_us": 1e6 * _each(lambda: place_of(main_thread)),
        "rank_0": {ranks: _of_rank_0(ranks, options.seconds) for ranks in options.ranks},
    }
    print(f"a mark {found['mark_us']:.2f} us, a look {found['look_us']:.2f} us, a place {found['place_us']:.2f} us")
    for ranks, share in found["rank_0"].items():
        print(f"rank 0 of {ranks}: {share:.3%} of a core")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def _each(work: Any) -> float:
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return (time.perf_counter() - started) / REPEATS


def _of_rank_0(ranks: int, seconds: float) -> float:
    """The share of a core that rank 0's thread takes."""
    members = [Member(rank, f"node-{rank // 8}", rank) for rank in range(ranks)]
    patience = Patience(600)
    server, news = open_server(ranks)
    others = os.fork()
    if others == 0:
        _be(members[1:], news, patience)
    thread = First(Watch(), members, patience, server, news["token"])
    thread.start()
    assert thread.ident is not None
    while any(peer.wire is None for peer in thread.peers.values()):
        time.sleep(0.1)
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(seconds)
    used = time.clock_gettime(clock) - before
    thread.ask("close")
    thread.join()
    os.kill(others, signal.SIGKILL)
    os.waitpid(others, 0)
    return used / seconds


def _be(members: list[Member], news: dict[str, Any], patience: Patience) -> None:
    """The other ranks."""
    wires = [connect("127.0.0.1", news, member, patience) for member in members]
    while True:
        for wire in wires:
            wire.send({"mark": Mark("forward and backward", 12), "rests": False})
            wire.receive()
        time.sleep(patience.beat)


if __name__ == "__main__":
    main()
