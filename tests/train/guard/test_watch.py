"""What a run of two processes says and does when one of them dies, stops, hangs or goes wrong alone."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.store import Store
from tests.small_run import STEPS, Processes, Run, assert_same_bits
from train.cli import main
from train.guard.members import Member, in_words, spans
from train.guard.patience import Patience
from train.guard.place import Place, place_of, position
from train.guard.report import Answer, Mark, report
from train.guard.watch import First, Watch, connect, open_server
from train.guard.wire import Wire
from train.launch import process_group
from train.trainer import Trainer

SOON = "run.hang_seconds=3"  # where something is planted: by itself a rank on a busy machine may rest for as long
OFTEN = ("checkpoint.every_steps=4", "checkpoint.asynchronous=false")
RANK = r"rank {} \([^ ,]+, pid \d+\)"
MEMBERS, PATIENCE = [Member(0, "node", 1), Member(1, "node", 2)], Patience(600)
LAST = "start the same command again: the run continues from its newest complete checkpoint"


@pytest.fixture(scope="module")
def undisturbed(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two processes. It is not to be changed."""
    run = Run(tiny_store, tmp_path_factory.mktemp("undisturbed") / "run")
    assert run.train(*OFTEN, processes=2) == [0, 0], run.said
    return run


def train_with_a_fault(arguments: list[str], rank: int, step: int, fault: str) -> int:
    """As the command line, with a fault in a rank's step of this number."""
    launch = Trainer._launch

    def faulty(trainer: Trainer, *given: Any) -> Any:
        if trainer.step + 1 == step and trainer.process.rank == rank:
            FAULTS[fault]()
        return launch(trainer, *given)

    Trainer._launch = faulty  # type: ignore[method-assign]
    return main(["train", *arguments])


def go_wrong() -> None:
    raise RuntimeError("planted")


def work_slowly() -> None:
    """For longer than a run waits for one that does not move."""
    end = time.monotonic() + 4
    while time.monotonic() < end:
        time.sleep(0.01)
        time.sleep(0.01)


def die_beside_a_child() -> None:
    """As a rank is killed whose reading-ahead process hangs in a disk: what it has forked has its connections too."""
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def go_round() -> None:
    while True:
        time.sleep(0.01)
        time.sleep(0.01)


FAULTS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": threading.Event().wait,
    "goes wrong": go_wrong,
    "is slow": work_slowly,
    "goes round": go_round,
    "dies beside a child": die_beside_a_child,
}


@pytest.mark.parametrize(
    "fault, rank",
    [
        ("SIGKILL", 0),
        pytest.param("SIGKILL", 1, marks=pytest.mark.slow),
        pytest.param("SIGSTOP", 0, marks=pytest.mark.slow),
        ("SIGSTOP", 1),
    ],
)
def test_a_rank_that_is_killed_or_stopped_is_named_and_the_run_goes_on_to_the_same_end(
    run: Run, undisturbed: Run, tmp_path: Path, fault: str, rank: int
) -> None:
    status = tmp_path / "status"
    processes = run.start(
        *OFTEN, SOON, "--status", str(status), processes=2, work=train_with_a_fault, extra=(rank, 7, fault)
    )
    processes.ranks[1 - rank].join(30)
    assert processes.ranks[1 - rank].exitcode == 4
    processes.send(signal.SIGKILL)
    processes.wait()
    reason = (
        "ended without a word"
        if fault == "SIGKILL"
        else r"not answered for \d+ s: it was stopped, or its node or the link"
    )
    said = reported(run)
    assert re.search(f"^rorqual: {RANK.format(rank)} has {reason}", said, re.M), run.said
    assert re.search(rf"^  {RANK.format(1 - rank)}: step 7: .*in \w+ at (parallel|train)/", said, re.M), run.said
    assert said.endswith(LAST) and "Traceback" not in run.said
    assert re.fullmatch(rf"pid=\d+\n{'exit=4' if rank else ''}\n?", status.read_text())  # rank 0 writes it
    assert run.train(*OFTEN, processes=2) == [0, 0], run.said
    assert "continuing after step 4 of 20" in run.said
    assert_same_bits(run.tensors(), undisturbed.tensors())
    assert run.metrics() == undisturbed.metrics()


@pytest.mark.slow
def test_a_rank_that_comes_back_in_time_is_told_of_and_nothing_is_lost(run: Run, undisturbed: Run) -> None:
    processes = run.start("run.hang_seconds=6", processes=2, work=train_with_a_fault, extra=(1, 7, "SIGSTOP"))
    processes.until(lambda: "has not answered" in said(processes))
    processes.send(signal.SIGCONT, 1)
    assert processes.wait() == [0, 0], run.said
    told = f"{RANK.format(1)} has not answered for 3 s, last heard of in step .*; the run ends after 6 s\n"
    assert re.search(told, run.said) and re.search(f"{RANK.format(1)} answers again\n", run.said), run.said
    assert_same_bits(run.tensors(), undisturbed.tensors())


def test_where_every_rank_stands_is_told_when_one_hangs(run: Run) -> None:
    processes = run.start(SOON, processes=2, work=train_with_a_fault, extra=(1, 5, "hangs"))
    assert processes.wait() == [4, 4], run.said
    first, waits, hangs, last = reported(run).splitlines()
    assert first == "rorqual: the run hangs: no rank has moved for 3 s" and last == LAST
    assert re.fullmatch(rf"  {RANK.format(0)}: step 5: .*, in \w+ at (parallel|train)/\S+ \(\w+\)", waits)
    assert re.fullmatch(rf"  {RANK.format(1)}: step 5: waiting for data, at train/trainer.py:\d+ \(\w+\)", hangs)


@pytest.mark.slow
def test_a_rank_that_works_for_long_is_no_hang(run: Run, undisturbed: Run) -> None:
    assert run.start(SOON, processes=2, work=train_with_a_fault, extra=(1, 5, "is slow")).wait() == [0, 0], run.said
    assert "rorqual:" not in run.said
    assert_same_bits(run.tensors(), undisturbed.tensors())


def with_each_other(_: list[str], fault: str) -> int:
    """Processes that wait for each other, and rank 1 for something else first."""
    with process_group("cpu", hang_seconds=1.5) as process:
        process.watch.at("waiting" if process.is_first else fault, 3)
        if not process.is_first:
            FAULTS[fault]()
        dist.barrier()
    return 0


@pytest.mark.slow
def test_a_rank_that_goes_round_for_ever_while_the_others_wait_is_named(run: Run) -> None:
    processes = run.start(processes=2, work=with_each_other, extra=("goes round",))
    assert processes.wait() == [4, 4], run.said
    first, waits, loops, last = reported(run).splitlines()
    assert re.fullmatch(
        rf"rorqual: the run hangs: {RANK.format(1)} has gone round in step 3: goes round for 3 s, .*", first
    )
    assert re.fullmatch(rf"  {RANK.format(0)}: step 3: waiting, .*", waits)
    assert re.fullmatch(rf"  {RANK.format(1)}: step 3: goes round, .*", loops) and last == LAST


def test_a_rank_that_dies_beside_a_child_is_noticed_at_once(run: Run) -> None:
    processes = run.start(processes=2, work=with_each_other, extra=("dies beside a child",))
    assert processes.wait() == [4, -signal.SIGKILL], run.said
    assert re.search(rf"^rorqual: {RANK.format(1)} has ended without a word: ", run.said), run.said


def test_an_error_of_one_rank_is_told_by_its_name(run: Run) -> None:
    processes = run.start(SOON, processes=2, work=train_with_a_fault, extra=(1, 5, "goes wrong"))
    assert processes.wait() == [4, 1], run.said
    assert re.search(rf"rorqual: {RANK.format(1)} has ended: RuntimeError: planted\n", run.said), run.said
    assert run.said.count("Traceback") == 1  # its own


def test_a_process_ends_with_the_launcher_that_started_it(tmp_path: Path) -> None:
    lives = "from train.guard.orphan import die_with_launcher as d; d(); print('ready', flush=True); import time; time.sleep(60)"
    starts = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {lives!r}]); print(p.pid, flush=True); p.wait()"
    environment = os.environ | {"RANK": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", starts], env=environment, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        pid, ready = int(launcher.stdout.readline()), launcher.stdout.readline()
        assert ready == "ready\n" and Path(f"/proc/{pid}").exists()
        launcher.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mistake_is_the_last_line_of_the_status(run: Run, tmp_path: Path) -> None:
    status = tmp_path / "status"
    assert main(["train", *run.arguments("schedule.lr=-1", "--status", str(status))]) == 2
    assert status.read_text() == "exit=2\n"
    assert main(["train", *run.arguments("run.stop_at_step=1", "--status", str(status))]) == 0
    assert status.read_text() == f"pid={os.getpid()}\nexit=0\n"
    assert STEPS > 1


def test_a_thread_is_seen_where_it_stands_and_whether_it_moves() -> None:
    waits, stop = threading.Event(), threading.Event()
    still = threading.Thread(target=waits.wait, daemon=True)
    busy = threading.Thread(target=spin, args=(stop,), daemon=True)
    still.start(), busy.start()
    assert still.ident and busy.ident
    time.sleep(0.1)
    seen = [(position(still.ident), position(busy.ident)) for _ in range(50) if time.sleep(0.002) is None]
    waits.set(), stop.set()
    assert len({a for a, _ in seen}) == 1 < len({b for _, b in seen})
    assert place_of(threading.get_ident()) == Place("no line of ours")  # tests are none of the packages


def spin(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(100))


def test_ranks_are_told_in_groups() -> None:
    assert spans([5, 0, 1, 2, 8, 9]) == "0-2, 5, 8-9"
    members = [Member(rank, f"node-{rank // 4}", 100 + rank) for rank in range(8)]
    waiting = Answer(Mark("forward", 7), Place("parallel/ddp.py:70 (forward)", "all_reduce"))
    behind = Answer(Mark("forward", 6), Place("data/store.py:9 (read)"))
    answers = {member: behind if member.rank == 5 else waiting for member in members if member.rank != 2}
    assert report("why", answers, {members[2]: Mark("forward", 6)}) == [
        "why",
        "  rank 2 (node-0, pid 102): does not answer; last heard of in step 6: forward",
        "  ranks 0-1, 3 (node-0), 4, 6-7 (node-1): step 7: forward, in all_reduce at parallel/ddp.py:70 (forward)",
        "  rank 5 (node-1, pid 105): step 6: forward, at data/store.py:9 (read), behind the others",
    ]
    assert in_words(members[:2]) == "rank 0 (node-0, pid 100) and rank 1 (node-0, pid 101)"


def test_a_line_comes_before_the_end() -> None:
    assert (Patience(600).tell, Patience(3).tell, Patience().tell) == (60, 1.5, 60)


def reported(run: Run) -> str:
    """From the report of a disturbance to its end."""
    end = run.said.index(LAST)
    return run.said[run.said.rindex("rorqual: ", 0, end) : end + len(LAST)]


def said(processes: Processes) -> str:
    return "".join(path.read_text("utf-8") for path in processes.said.iterdir())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def first() -> Iterator[tuple[First, dict[str, Any]]]:
    """The thread of rank 0 of two, and what rank 1 must know to call it."""
    server, news = open_server(2)
    thread = First(Watch(), MEMBERS, PATIENCE, server, news["token"])
    thread.start()
    yield thread, news
    thread.ask("close")
    thread.join(10)
    assert not thread.is_alive()


def soon(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(held)


def test_a_stranger_at_the_port_of_the_watch_disturbs_nobody_and_a_rank_comes_by_any_address(first: Any) -> None:
    thread, news = first
    strangers = [socket.create_connection(("127.0.0.1", news["port"])) for _ in range(4)]
    for stranger, words in zip(
        strangers, (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guessed", "rank": 1}\n', b"\xff\n", b"[1]\n")
    ):
        stranger.sendall(words)
    wire = connect("127.0.1.1", news, MEMBERS[1], PATIENCE)  # what Debian has a machine call itself
    assert soon(lambda: thread.peers[1].wire) and thread.is_alive()
    wire.send({"left": {}})
    for one in (*strangers, wire):
        one.close()


def test_a_rank_that_leaves_as_soon_as_it_has_come_has_left(first: Any) -> None:
    thread, news = first
    wire = Wire(socket.create_connection(("127.0.0.1", news["port"])))
    wire.send({"token": news["token"], "rank": 1}), wire.send({"left": {}})
    wire.close()
    assert soon(lambda: thread.peers[1].has_left) and thread.why is None


def test_a_watch_without_files_to_open_goes_on_and_one_that_fails_is_no_death(first: Any) -> None:
    thread, news = first
    caller = socket.socket()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        caller.connect(("127.0.0.1", news["port"]))
        time.sleep(0.3)
        assert thread.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    wire = Wire(caller)
    wire.send({"token": news["token"], "rank": 1})
    assert soon(lambda: thread.peers[1].wire)
    wire.send({"mark": 1})
    assert soon(lambda: {"left": {}} in wire.receive()) and soon(lambda: not thread.is_alive())
    wire.close()
