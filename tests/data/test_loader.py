"""Batches: one order under any number of ranks, micro-batches and reading processes, whatever happens to these processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import psutil
import pytest
import torch

from data.errors import DataError, MakerDied
from data.loader import Loader, Planned
from data.prefetch import ITEMS_AHEAD
from data.samples import Phase, Samples, StoreEntry
from tests.data.test_samples import D_MTP, T

PLAN = [Planned(0, 8, 3), Planned(8, 8, 1), Planned(16, 4, 8), Planned(20, 12, 3)]


@pytest.fixture(scope="module")
def samples(tiny_store):
    return Samples([Phase(0, [StoreEntry(tiny_store.path)], T)], D_MTP, seed=0)


def endless(samples=None):
    first = 0
    while True:
        yield Planned(first, 2, 2)
        first += 2


def children():
    """Processes that this one has forked and not yet waited for."""
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_micro_batches_and_processes_share_out_one_global_batch(samples, world_size, workers):
    ranks = [list(Loader(samples, rank, world_size, workers).steps(PLAN)) for rank in range(world_size)]
    for step, planned in enumerate(PLAN):
        expected = samples.batch(planned.first_sample, planned.sequences)
        for part in (0, 1):
            found = torch.cat([batch[part] for rank in ranks for batch in rank[step]])
            assert torch.equal(found, expected[part])
        sizes = [[len(batch.tokens) for batch in rank[step]] for rank in ranks]
        assert max(sizes[0]) <= planned.micro_batch and all(size == sizes[0] for size in sizes)
        assert len(sizes[0]) == -(-planned.sequences // world_size // planned.micro_batch)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_that_the_ranks_do_not_divide_is_refused_in_its_turn(samples, workers):
    steps = Loader(samples, 0, 4, workers).steps([Planned(0, 8, 1), Planned(8, 6, 1)])
    next(steps)
    with pytest.raises(DataError, match=r"batch = 6 sequences: 4 ranks must divide it; use a multiple, e.g. 4"):
        next(steps)


def test_steps_of_phases_of_several_lengths_follow_one_another(tiny_store):
    entries = [StoreEntry(tiny_store.path)]
    samples = Samples([Phase(0, entries, T), Phase(8, entries, 2 * T, "best_fit")], D_MTP, seed=0)
    plan = [Planned(0, 8, 8), Planned(8, 4, 2)]
    for workers in (0, 2):
        first, second = Loader(samples, workers=workers).steps(plan)
        assert [tuple(batch.tokens.shape) for batch in first] == [(8, T + 1 + D_MTP)]
        assert [tuple(batch.tokens.shape) for batch in second] == [(2, 2 * T + 1 + D_MTP)] * 2


def test_a_batch_stays_as_it_is_after_the_next_ones_and_after_the_end(samples):
    steps = Loader(samples, workers=2).steps(endless())
    kept = [next(steps) for _ in range(30)]
    steps.close()
    for index, (batch,) in enumerate(kept):
        assert torch.equal(batch.tokens, samples.batch(2 * index, 2).tokens)
        batch.tokens.zero_()  # it is the owner's, and nobody else's


def test_closing_ends_the_processes_of_an_endless_plan(samples):
    before = children()
    steps = Loader(samples, workers=2).steps(endless())
    for _ in range(6):
        next(steps)
    assert len(children() - before) == 2
    steps.close()
    assert children() == before


def test_steps_that_are_forgotten_end_their_processes(samples):
    before = children()
    steps = Loader(samples).steps(endless())
    next(steps)
    del steps
    assert children() == before


class Counted:
    """Samples that note in a file every batch that is made of them. One of them takes its time."""

    def __init__(self, notes, slow=None):
        self.notes, self.slow = notes, slow

    def width(self, i):
        return 4

    def fill(self, first, tokens, documents):
        tokens.fill(first)
        time.sleep(0.2 if first == self.slow else 0)
        with self.notes.open("ab") as file:
            file.write(b".")


def test_processes_make_a_few_batches_ahead_and_wait(tmp_path):
    notes = tmp_path / "notes"
    steps = Loader(Counted(notes), workers=2).steps(endless())
    for taken in range(1, 7):
        next(steps)
        deadline = time.monotonic() + 10
        while notes.stat().st_size < taken + 2 * ITEMS_AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert notes.stat().st_size == taken + 2 * ITEMS_AHEAD
    steps.close()


def test_the_last_batch_of_a_plan_arrives_after_its_maker_has_no_more_to_do(tmp_path):
    """The maker is told of three batches taken while it makes its last: it must not go with that unread."""
    last = 2 * ITEMS_AHEAD
    steps = Loader(Counted(tmp_path / "notes", slow=last)).steps(islice(endless(), ITEMS_AHEAD + 1))
    for _ in range(ITEMS_AHEAD):
        next(steps)
    time.sleep(0.4)
    assert next(steps)[0].tokens[0, 0] == last


class Broken:
    """Samples that fail from the second batch on."""

    def __init__(self, error):
        self.error = error

    def width(self, i):
        return 4

    def fill(self, first, tokens, documents):
        tokens.fill(first)
        if first:
            raise self.error


class Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


@pytest.mark.parametrize(
    ("error", "arrives"), [(DataError("field: value: rule; fix"), DataError), (KeyError("x"), KeyError)]
)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_process_reaches_the_consumer_in_its_turn(error, arrives, workers):
    before = children()
    steps = Loader(Broken(error), workers=workers).steps(PLAN)
    assert next(steps)[0].tokens[0, 0] == 0
    with pytest.raises(arrives) as raised:
        next(steps)
    assert raised.value.args == error.args
    assert children() == before


def test_an_error_that_cannot_be_passed_on_tells_where_it_came_from():
    steps = Loader(Broken(Unpicklable("not", "this")), workers=1).steps(PLAN[1:])
    with pytest.raises(RuntimeError, match=r"in fill(.|\n)*Unpicklable: not this"):
        next(steps)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_the_plan_reaches_the_consumer_in_its_turn(samples, workers):
    def failing():
        yield from PLAN[:2]
        raise RuntimeError("the plan broke")

    steps = Loader(samples, workers=workers).steps(failing())
    next(steps), next(steps)
    with pytest.raises(RuntimeError, match="the plan broke"):
        next(steps)


def test_the_end_of_a_plan_is_the_end_of_its_processes(samples):
    before = children()
    steps = Loader(samples, workers=2).steps(PLAN)
    assert len(list(steps)) == len(PLAN)
    assert children() == before
    assert list(steps) == []


def test_a_killed_process_is_one_clear_line_and_no_hang(samples):
    before = children()
    steps = Loader(samples, workers=2).steps(endless())
    next(steps)
    victim = max(children() - before)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(MakerDied) as raised:
        for _ in range(20):  # what it had made before is good
            next(steps)
    line = str(raised.value)
    assert line.startswith(f"data.workers: process {victim}, which read ahead, was killed by signal SIGKILL; ")
    assert "\n" not in line
    assert children() == before


def test_signals_to_all_processes_of_a_run_leave_its_batches(samples):
    """A scheduler signals every process; the run decides when it ends."""
    before = children()
    steps = Loader(samples).steps(endless())
    next(steps)
    (process,) = children() - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process, number)
    assert len([next(steps) for _ in range(20)]) == 20
    steps.close()


FORKING = """
import os, signal, sys
from pathlib import Path
from data.loader import Loader
from tests.data.test_loader import Counted, endless
fork = os.fork
def interrupted():
    process = fork()
    if not process:
        os.kill(os.getpid(), signal.SIGINT)
    return process
os.fork = interrupted
try:
    steps = Loader(Counted(Path(sys.argv[1])), workers=2).steps(endless())
    print(len([next(steps) for _ in range(8)]), flush=True)
    steps.close()
finally:
    print("the run ends", flush=True)
"""


def test_a_signal_at_the_moment_of_the_fork_makes_no_second_run(tmp_path):
    run = subprocess.run([sys.executable, "-c", FORKING, str(tmp_path / "notes")], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "8\nthe run ends\n", "")


def test_a_run_that_is_stopped_while_its_processes_start_leaves_none(tmp_path, monkeypatch):
    before, fork = children(), os.fork

    def stopping():
        if process := fork():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return process

    monkeypatch.setattr(os, "fork", stopping)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            Loader(Counted(tmp_path / "notes"), workers=2).steps(endless())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert children() == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_process_that_cannot_be_started_ends_those_before_it(tmp_path, monkeypatch):
    before, fork, started = children(), os.fork, []

    def once():
        if started:
            raise BlockingIOError("Resource temporarily unavailable")
        started.append(fork())
        return started[0]

    monkeypatch.setattr(os, "fork", once)
    with pytest.raises(BlockingIOError):
        Loader(Counted(tmp_path / "notes"), workers=2).steps(endless())
    assert started and children() == before


PARENT = """
import os, sys, time
from pathlib import Path
from data.loader import Loader
from data.samples import Phase, Samples, StoreEntry
from tests.data.test_loader import endless
samples = Samples([Phase(0, [StoreEntry(Path(sys.argv[1]))], 32)], 2, seed=0)
one = Loader(samples, workers=2).steps(endless())
other = Loader(samples, workers=1).steps(endless())
next(one), next(other)
print(*(maker.process for steps in (one, other) for maker in steps._ahead._makers), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_when_their_run_is_killed_and_leave_nothing_behind(tiny_store, number):
    left = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_store.path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 3
        parent.send_signal(number)
        assert parent.wait() == -number
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{process}") and not is_zombie(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert set(os.listdir("/dev/shm")) <= left


def is_zombie(process):
    """Ended, and its new parent has not looked yet."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
