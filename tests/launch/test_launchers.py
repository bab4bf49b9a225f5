"""Two processes of one node by every launcher: the run of one process, ended, stopped, killed and started again."""

import signal
import socket
from pathlib import Path

import pytest

from data.store import Store
from tests.launch.launched import Script, have_ended
from tests.small_run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
LONG = ("schedule.tokens=32768", "checkpoint.every_steps=8")  # 128 steps


@pytest.fixture(scope="module")
def once(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes that nothing disturbed."""
    once = Run(tiny_store, tmp_path_factory.mktemp("once") / "run")
    assert once.train(*LONG, processes=2) == [0, 0], once.said
    return once


@pytest.fixture
def run(tiny_store: Store, tmp_path: Path) -> Run:
    return Run(tiny_store, tmp_path / "run")


def launch(launcher: str, run: Run, *changes: str, **site: str) -> Script:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return Script(f"launch_{launcher}.sh", run, *LONG, *changes, PROCESSES="2", MASTER_PORT=port, **site)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_run_ends_with_0_and_goes_on_to_the_same_losses(launcher: str, run: Run, once: Run) -> None:
    with launch(launcher, run) as script:
        script.until_saved()
        script.signal(signal.SIGUSR1)
        assert script.wait() == 0, script.said
        assert "rorqual: asked to stop: the run saves and ends" in script.said and "stopped at step" in script.said
    assert 8 <= len(run.metrics()) < 128
    with launch(launcher, run) as script:
        assert script.wait() == 0, script.said
    assert run.metrics() == once.metrics()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("killed", ["worker", "agent"])
def test_a_killed_process_is_followed_by_a_restart_that_ends_with_the_same_losses(
    launcher: str, killed: str, run: Run, once: Run
) -> None:
    with launch(launcher, run) as script:
        script.until_saved()
        ranks = [script.rank(0), script.rank(1)]
        (ranks[1] if killed == "worker" else script.agent()).kill()
        noticed = script.until_said("restart 1 of 10")
        back = script.until_said("continuing after step")
        assert have_ended(ranks), "a process outlived its launcher"
        assert script.wait() == 0, script.said
        assert script.said.count("starts again") == 1, script.said
    print(f"{launcher}, {killed} killed: noticed after {noticed:.1f} s, at work again after {noticed + back:.1f} s")
    assert run.metrics() == once.metrics()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_mistake_is_said_in_a_line_and_nothing_is_started_again(launcher: str, run: Run) -> None:
    with launch(launcher, run, "data.train=nowhere") as script:
        assert script.wait() == 2, script.said
        errors = [line for line in script.said.splitlines() if line.startswith("rorqual: ")]
        assert len(errors) == 1 and "nowhere" in errors[0], script.said
        assert "Traceback" not in script.said and "starts again" not in script.said
