"""A Slurm of two virtual nodes on this machine runs launch_slurm.sbatch: stopped before its time is up, queued again, continued."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data.store import Store
from tests.launch.launched import SCRIPTS, environment
from tests.small_run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LONG = ("schedule.tokens=786432", "checkpoint.every_steps=64")  # 3,072 steps: Slurm looks at its limits every 30 s
CONFIGURATION = """
ClusterName=rorqual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=15
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{nodes}] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Daemons with folders and ports of their own; `call` runs a Slurm command against them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        controller, first, second = free_ports(3)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), controller=controller, nodes=f"{first}-{second}", folder=self.folder
            )
        )
        (self.folder / "state").mkdir()
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key-file").touch(mode=0o600)
        (munge / "key-file").write_bytes(os.urandom(128))
        files = [f"--{name}={munge / name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        self._start("munged", "munged", "--force", "--foreground", *files)
        until((munge / "socket").exists, 30)
        self._start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        until(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 90)

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As a power cut does: the daemon, and every process of a job there."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for process in self.processes():
            if process.environ().get("SLURMD_NODENAME") == name or f"-N {name}" in " ".join(process.cmdline()):
                process.kill()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as said:
            self.daemons[name] = subprocess.Popen(command, env=environment(self.site), stdout=said, stderr=said)

    def processes(self) -> Iterator[psutil.Process]:
        """All that were started with this configuration, whatever they became."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.site["SLURM_CONF"]:
                    yield process
            except psutil.Error:
                continue

    def call(self, *command: str, **site: str) -> str:
        done = subprocess.run(command, env=environment(self.site | site), capture_output=True, text=True)
        return done.stdout or done.stderr

    def submit(self, run: Run, **site: str) -> str:
        """The number of the job, of two nodes with a process on each."""
        (port,) = free_ports(1)
        two = {"NNODES": "2", "PROCESSES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = f"--output={run.folder.parent}/said"
        script = str(SCRIPTS / "launch_slurm.sbatch")
        said = self.call(script, *run.arguments(*LONG), **two, SBATCH_OPTIONS=output, **site)
        job = re.search(r"Submitted batch job (\d+)", said)
        assert job, said
        return job[1]

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))
        return found[1] if found else "?"

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root, and Debian's packages slurm-wlm and munge")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.end()


@pytest.fixture(scope="module")
def once(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes that nothing disturbed."""
    once = Run(tiny_store, tmp_path_factory.mktemp("once") / "run")
    assert once.start(*LONG, processes=2).wait(600) == [0, 0], once.said
    return once


@pytest.fixture
def run(tiny_store: Store, tmp_path: Path) -> Run:
    return Run(tiny_store, tmp_path / "run")


def test_before_its_time_is_up_a_job_saves_and_is_queued_again_and_ends_with_the_same_losses(
    slurm: Slurm, run: Run, once: Run
) -> None:
    job = slurm.submit(run, TIME_LIMIT="60", STOP_SECONDS="300")
    until(lambda: has_saved(run), 300)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # minutes: there are 300 seconds left at most
    began = time.monotonic()
    until(lambda: "stopped at step" in said(run), 180)
    stopped = time.monotonic() - began
    until(lambda: slurm.state(job) == "PENDING", 60)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    until(lambda: "continuing after step" in said(run), 300)
    continued = time.monotonic() - began - stopped
    until(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), 900)
    assert slurm.state(job) == "COMPLETED", said(run)
    assert f"job {job} ended with exit code 0; it is queued again to continue" in said(run)
    assert run.metrics() == once.metrics()
    print(f"Slurm: stopped {stopped:.1f} s after the limit came near, at work again {continued:.1f} s later")


def test_a_job_that_loses_a_node_is_queued_again_and_ends_with_the_same_losses(
    slurm: Slurm, run: Run, once: Run
) -> None:
    job = slurm.submit(run)
    until(lambda: has_saved(run), 300)
    slurm.kill_node("n2")
    began = time.monotonic()
    until(lambda: slurm.state(job) == "PENDING", 300)
    queued = time.monotonic() - began
    slurm.start_node("n2")
    until(lambda: "continuing after step" in said(run), 300)
    continued = time.monotonic() - began - queued
    until(lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), 900)
    assert slurm.state(job) == "COMPLETED", said(run)
    assert run.metrics() == once.metrics()
    print(f"Slurm: a node died, queued again after {queued:.1f} s, at work again {continued:.1f} s after it was back")


def test_a_cancelled_job_saves_and_ends(slurm: Slurm, run: Run) -> None:
    job = slurm.submit(run)
    until(lambda: has_saved(run), 300)
    slurm.call("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED", 60)
    until(lambda: not [process for process in slurm.processes() if "train" in process.cmdline()], 60)
    assert "stopped at step" in said(run), said(run)


def said(run: Run) -> str:
    path = run.folder.parent / "said"
    return path.read_text("utf-8") if path.exists() else ""


def has_saved(run: Run) -> bool:
    return bool(list(run.folder.glob("checkpoints/*/COMPLETE")))


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def free_ports(count: int) -> range:
    """So many ports in a row."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.socket())
            first.bind(("", 0))
            ports = range(first.getsockname()[1], first.getsockname()[1] + count)
            for port in ports[1:]:
                stack.enter_context(socket.socket()).bind(("", port))
            return ports
