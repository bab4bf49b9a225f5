"""Two hosts, as network namespaces joined by a cable (veth): one run on both, by every launcher, also when the cable is pulled."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data.store import Store
from tests.launch.launched import Script, have_ended
from tests.small_run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONG = ("schedule.tokens=65536", "checkpoint.every_steps=16", "run.hang_seconds=10")  # 256 steps


class Hosts:
    """The namespaces; host `n` has the address 10.77.0.n+1 on its interface `cable`."""

    def __init__(self) -> None:
        self.names = [f"rorqual-{os.getpid()}-{host}" for host in (0, 1)]

    def connect(self) -> None:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cable(self, state: str) -> None:
        """`down` pulls it, `up` puts it back."""
        ip("-n", self.names[1], "link", "set", "cable", state)

    def start(self, launcher: str, run: Run, host: int, **site: str) -> Script:
        values = {
            "NNODES": "2",
            "NODE_RANK": str(host),
            "PROCESSES": "1",
            "INTERFACE": "cable",
            "MASTER_ADDR": "10.77.0.1",
        }
        values |= {"LOCAL_ADDR": f"10.77.0.{host + 1}"} | site
        return Script(f"launch_{launcher}.sh", run, *LONG, prefix=("ip", "netns", "exec", self.names[host]), **values)

    def remove(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                for process in ip("netns", "pids", name).split():
                    with contextlib.suppress(psutil.Error):
                        psutil.Process(int(process)).kill()
                ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root, and iproute2")
    hosts = Hosts()
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.remove()


@pytest.fixture(scope="module")
def once(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes that nothing disturbed."""
    once = Run(tiny_store, tmp_path_factory.mktemp("once") / "run")
    assert once.start(*LONG, processes=2).wait(300) == [0, 0], once.said
    return once


@pytest.fixture
def run(tiny_store: Store, tmp_path: Path) -> Run:
    return Run(tiny_store, tmp_path / "run")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_two_hosts_train_as_one_does(launcher: str, hosts: Hosts, run: Run, once: Run, tmp_path: Path) -> None:
    site = {}
    if launcher == "deepspeed":
        (tmp_path / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
        site = {"HOSTFILE": str(tmp_path / "hosts"), "NO_SSH": "1"}
    with hosts.start(launcher, run, 0, **site) as first, hosts.start(launcher, run, 1, **site) as second:
        assert first.wait() == 0, first.said
        assert second.wait() == 0, second.said
    assert run.metrics() == once.metrics()


def test_a_host_whose_cable_is_pulled_is_missed_and_comes_back(hosts: Hosts, run: Run, once: Run) -> None:
    with hosts.start("torchrun", run, 0) as first, hosts.start("torchrun", run, 1) as second:
        first.until_saved()
        hosts.cable("down")
        noticed = [script.until_said("starts again") for script in (first, second)]
        hosts.cable("up")
        back = first.until_said("continuing after step")
        assert first.wait() == 0, first.said
        assert second.wait() == 0, second.said
        print(
            f"cable: noticed after {noticed[0]:.1f} s, at work {back:.1f} s after it was back\n{first.said}\n{second.said}"
        )
    assert run.metrics() == once.metrics()


def test_a_host_whose_launcher_is_killed_comes_back(hosts: Hosts, run: Run, once: Run) -> None:
    with hosts.start("torchrun", run, 0) as first, hosts.start("torchrun", run, 1) as second:
        first.until_saved()
        rank = second.rank(0)
        second.agent().kill()
        noticed = second.until_said("starts again")
        back = first.until_said("continuing after step")
        assert have_ended([rank]), "a process outlived its launcher"
        assert first.wait() == 0, first.said
        assert second.wait() == 0, second.said
        print(f"agent of a host: noticed after {noticed:.1f} s, at work again {back:.1f} s later")
    assert run.metrics() == once.metrics()
