"""What the launch scripts run, refuse, start again and hand on. Small shell programs stand where a launcher would; the real ones
are in the other files of this folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.launched import SCRIPTS, environment

TWO = {"NNODES": "2", "PROCESSES": "4", "MASTER_ADDR": "10.0.0.1"}


def call(script: str, *arguments: str, cwd: Path | None = None, **site: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / script, *arguments], env=environment(site), cwd=cwd, capture_output=True, text=True
    )


def test_shellcheck_has_nothing_to_say() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = sorted(path for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch", ".env"))
    done = subprocess.run(["shellcheck", *found], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "site", "command"),
    [
        (
            "launch_torchrun.sh",
            {"PROCESSES": "8"},
            "torchrun --standalone --nproc-per-node 8 --max-restarts 0 -m train",
        ),
        (
            "launch_torchrun.sh",
            TWO | {"JOB_ID": "seven"},
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id seven --rdzv-conf is_host=1 "
            "--local-addr 10.0.0.1 --nproc-per-node 4 --max-restarts 0 -m train",
        ),
        (
            "launch_torchrun.sh",
            TWO | {"NODE_RANK": "1", "LOCAL_ADDR": "10.0.0.2"},
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id rorqual --rdzv-conf is_host=0 "
            "--local-addr 10.0.0.2 --nproc-per-node 4 --max-restarts 0 -m train",
        ),
        ("launch_deepspeed.sh", {"PROCESSES": "2"}, "deepspeed --num_gpus 2 --master_port 29500 --module train"),
        (
            "launch_deepspeed.sh",
            TWO | {"HOSTFILE": "hosts"},
            "deepspeed --hostfile hosts --log_level warning --master_addr 10.0.0.1 --master_port 29500 --module train",
        ),
        (
            "launch_deepspeed.sh",
            TWO | {"HOSTFILE": "hosts", "NO_SSH": "1", "NODE_RANK": "1"},
            "deepspeed --hostfile hosts --log_level warning --no_ssh --node_rank 1 --master_addr 10.0.0.1 "
            "--master_port 29500 --module train",
        ),
        (
            "launch_accelerate.sh",
            TWO | {"NODE_RANK": "1"},
            "accelerate launch --num_machines 2 --num_processes 8 --mixed_precision no --dynamo_backend no "
            "--num_cpu_threads_per_process 1 --multi_gpu --machine_rank 1 --main_process_ip 10.0.0.1 "
            "--main_process_port 29500 -m train",
        ),
    ],
)
def test_a_dry_run_prints_the_command_and_runs_nothing(
    script: str, site: dict[str, str], command: str, tmp_path: Path
) -> None:
    write_hosts(tmp_path, socket.gethostname())
    site |= {"INTERFACE": "ib0", "NCCL_IB_HCA": "mlx5", "DRY_RUN": "1"}
    done = call(script, "tiny", "run.dir=a b", cwd=tmp_path, **site)
    network = "GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=ib0 OMP_NUM_THREADS=1"
    assert done.stdout == f"{network} {command} tiny run.dir=a\\ b --status FILE\n", done.stderr


def test_a_dry_run_of_slurm_prints_what_is_submitted() -> None:
    site = {
        "NNODES": "4",
        "PARTITION": "big",
        "TIME_LIMIT": "1-00:00:00",
        "SBATCH_OPTIONS": "--exclusive --gpus-per-node=8",
    }
    done = call("launch_slurm.sbatch", "tiny", "schedule.lr=1e-3", DRY_RUN="1", **site)
    assert done.stdout == (
        "OMP_NUM_THREADS=1 sbatch --job-name rorqual --nodes 4 --ntasks-per-node 1 --signal B:USR1@300 --requeue "
        f"--open-mode append --export ALL\\,SCRIPTS={SCRIPTS} --partition big --time 1-00:00:00 --exclusive --gpus-per-node=8 "
        f"{SCRIPTS}/launch_slurm.sbatch tiny schedule.lr=1e-3\n"
    ), done.stderr


def test_every_command_of_the_readme_is_one(tmp_path: Path) -> None:
    write_hosts(tmp_path, socket.gethostname())
    commands = re.search(r"```bash\n(.*?)```", (SCRIPTS / "README.md").read_text("utf-8"), re.DOTALL)[1].splitlines()
    assert {Path(found).name for found in re.findall(r"scripts/launch_\S+", "\n".join(commands))} == {
        path.name for path in SCRIPTS.glob("launch_*")
    }
    for command in commands:
        command = command.replace(" scripts/", f" {SCRIPTS}/")
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment({"DRY_RUN": "1"}), capture_output=True, text=True
        )
        assert done.returncode == 0 and " small" in done.stdout, f"{command}: {done.stderr}"


@pytest.mark.parametrize(
    ("script", "site", "said"),
    [
        ("launch_torchrun.sh", {"NNODES": "1:2"}, "NNODES=1:2: must be a number of nodes"),
        ("launch_accelerate.sh", TWO | {"NNODES": "1:2"}, "NNODES=1:2: must be a number of nodes;"),
        ("launch_torchrun.sh", {"NNODES": "2"}, "MASTER_ADDR=: must be the address of node 0 where NNODES=2"),
        ("launch_torchrun.sh", {"PROCESSES": "none"}, "PROCESSES=none: must be a number of processes, 1 or more"),
        ("launch_deepspeed.sh", TWO, "HOSTFILE=: must be a file of lines"),
        ("launch_torchrun.sh", {"VENV": "nowhere"}, "nowhere: no Python environment is there"),
        ("launch_slurm.sbatch", {"STOP_SECONDS": "soon"}, "STOP_SECONDS=soon: must be seconds"),
    ],
)
def test_a_value_of_the_site_that_cannot_be_is_refused_in_a_line(script: str, site: dict[str, str], said: str) -> None:
    done = call(script, "tiny", DRY_RUN="1", **site)
    assert done.returncode == 2
    assert done.stderr.startswith("rorqual: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


def test_deepspeed_starts_a_run_by_ssh_from_one_of_its_nodes_alone(tmp_path: Path) -> None:
    write_hosts(tmp_path, "nowhere.invalid")
    done = call("launch_deepspeed.sh", "tiny", cwd=tmp_path, HOSTFILE="hosts", DRY_RUN="1")
    assert done.returncode == 2 and done.stderr.startswith("rorqual: HOSTFILE=hosts: must name this node"), done.stderr
    for name in ("127.0.0.1", "localhost"):
        write_hosts(tmp_path, name)
        assert call("launch_deepspeed.sh", "tiny", cwd=tmp_path, HOSTFILE="hosts", DRY_RUN="1").returncode == 0


def write_hosts(folder: Path, first: str) -> None:
    (folder / "hosts").write_text(f"# name slots\n{first} slots=4\nelsewhere.invalid slots=4\n")


def test_a_recipe_is_asked_for() -> None:
    done = call("launch_torchrun.sh")
    assert done.returncode == 2 and "launch_torchrun.sh RECIPE key=value …" in done.stderr


class Launch:
    """`keep_running` with a shell program in place of a launcher. `$2` is the status file, `$turns` counts its starts."""

    def __init__(self, folder: Path, program: str, **site: str) -> None:
        self.ready = folder / "ready"
        turns = f"turns={folder}/turns; echo >>$turns; turns=$(wc -l <$turns); ready={self.ready}"
        (folder / "launcher").write_text(f"{turns}\n{program}\n")
        self.process = subprocess.Popen(
            ["bash", "-c", f'source {SCRIPTS}/launch.sh; keep_running bash "$0"', folder / "launcher"],
            env=environment(site),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_listen_to_interrupts,
        )

    def wait(self) -> tuple[int, list[str]]:
        """Exit code, and the lines said."""
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said.splitlines()

    def until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while not self.ready.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        """To everything in the script's process group, as a scheduler or a terminal does."""
        os.killpg(self.process.pid, number)


def _listen_to_interrupts() -> None:
    """A shell in the background is started deaf to them, so is what it starts, and bash cannot undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


TABLE = (
    "echo 'E1123 06:00:00.000 12 torch/distributed/elastic/multiprocessing/api.py:9] failed' >&2; echo Root Cause >&2"
)


STORE = "echo '[W1123 06:00:00.000 TCPStore.cpp:115] [c10d] recvVector failed' >&2; echo frame >&2"  # node 0 has ended first


@pytest.mark.parametrize(("code", "words"), [(0, STORE), (2, TABLE), (3, TABLE)])
def test_what_the_run_has_decided_ends_it_and_the_launcher_does_not_repeat_it(
    tmp_path: Path, code: int, words: str
) -> None:
    launch = Launch(tmp_path, f"echo the run >&2; echo pid=$$ >>$2; echo exit={code} >>$2; {words}; exit 1")
    assert launch.wait() == (code, ["the run"])


def test_a_run_that_was_disturbed_or_killed_is_started_again_and_each_time_says_why(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path,
        f"""
        case $turns in
          1) echo pid=$$ >>$2; echo exit=4 >>$2; exit 1 ;;
          2) {TABLE}; kill -KILL $$ ;;
          3) exit 0 ;;
          4) echo exit=0 >>$2 ;;
        esac
        """,
        RESTARTS="3",
    )
    code, said = launch.wait()
    assert code == 0
    again = "after 0 s; starts again in 0 s (restart"
    assert [re.sub(r"after \d+ s", "after 0 s", line) for line in said] == [
        f"rorqual: the run was disturbed {again} 1 of 3)",
        "E1123 06:00:00.000 12 torch/distributed/elastic/multiprocessing/api.py:9] failed",
        "Root Cause",
        f"rorqual: the run ended without a word, its launcher with exit code 137 {again} 2 of 3)",
        f"rorqual: the run ended without a word, its launcher with exit code 0 {again} 3 of 3)",
    ]


def test_restarts_are_bounded(tmp_path: Path) -> None:
    code, said = Launch(tmp_path, "echo exit=4 >>$2; exit 1", RESTARTS="1").wait()
    assert code == 4
    assert said[-1] == "rorqual: the run was disturbed; gives up after 1 restarts in a row (RESTARTS)"


def test_starts_of_several_nodes_that_have_not_met_are_bounded_by_time_alone(tmp_path: Path) -> None:
    program = "if [ $turns = 4 ]; then echo pid=$$ >>$2; echo exit=0 >>$2; fi; exit 1"
    code, said = Launch(tmp_path, program, RESTARTS="0", NNODES="2").wait()
    assert code == 0 and len(said) == 3 and all("(without a run for " in line for line in said)
    code, said = Launch(tmp_path, "sleep 0.6; exit 1", RESTARTS="0", NNODES="2", ABSENCE="1").wait()
    assert code == 1 and "gives up after" in said[-1] and said[-1].endswith("s without a run (ABSENCE)")


def test_a_run_that_has_lasted_is_worth_as_many_restarts_again(tmp_path: Path) -> None:
    program = "if [ $turns = 3 ]; then echo exit=0 >>$2; else sleep 1.1; exit 1; fi"
    code, said = Launch(tmp_path, program, RESTARTS="1", LASTED="1").wait()
    assert code == 0 and all("restart 1 of 1" in line for line in said) and len(said) == 2


RUN = """
import os, signal, sys, time

def save(*_):
    print("saved", file=sys.stderr)
    status.write("exit=0\\n")
    sys.exit()

status = open(sys.argv[1], "a", buffering=1)
signal.signal(signal.SIGUSR1, save)
status.write(f"pid={os.getpid()}\\n")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_the_run_listens_and_reaches_it_alone(tmp_path: Path, number: signal.Signals) -> None:
    """The launcher, which would die of it, does not see it."""
    (tmp_path / "run.py").write_text(RUN)
    run = f"{sys.executable} {tmp_path}/run.py"
    launch = Launch(tmp_path, f"touch $ready; sleep 0.5; {run} $2; sleep 0.3; echo last >&2")
    launch.until_ready()
    launch.signal(number)
    assert launch.wait() == (0, ["rorqual: asked to stop: the run saves and ends", "saved", "last"])


def test_a_second_signal_kills_the_run(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "trap '' USR1; echo pid=$$ >>$2; touch $ready; sleep 300 & wait")
    launch.until_ready()
    launch.signal(signal.SIGUSR1)
    time.sleep(0.3)
    launch.signal(signal.SIGTERM)
    code, said = launch.wait()
    assert code == 137
    assert said[1:] == [
        "rorqual: asked again: the run is killed",
        "rorqual: the run ended without a word, its launcher with exit code 137",
    ]


def test_a_signal_between_two_starts_ends_the_script(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "exit 1", PAUSE="60")
    assert "starts again in 60 s" in launch.process.stderr.readline()
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == (0, ["rorqual: asked to stop: the run saves and ends"])


SRUN = """
while [ "$1" != bash ]; do shift; done
worst=0
for node in 0 1; do
  code=0; SLURM_NODEID=$node "$@" || code=$?
  worst=$((code > worst ? code : worst))
done
exit $worst  # as srun does
"""


class Job:
    """launch_slurm.sbatch as a job of two nodes, with shell programs for Slurm's commands and for launch_torchrun.sh."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder
        for name in ("launch.sh", "site.env"):
            (folder / name).symlink_to(SCRIPTS / name)
        for name, text in {"srun": SRUN, "scontrol": "echo $*", "launch_torchrun.sh": program}.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)

    def run(self, **site: str) -> tuple[int, bool]:
        """Exit code, and whether it is queued again."""
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "MASTER_ADDR": "n1",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        slurm |= {"SCRIPTS": str(self.folder), "PATH": f"{self.folder}:{os.environ['PATH']}"}
        done = call("launch_slurm.sbatch", "tiny", **slurm, **site)
        return done.returncode, "requeue 7" in done.stdout


def test_a_mistake_of_one_node_ends_a_job_however_the_others_were_ended(tmp_path: Path) -> None:
    assert Job(tmp_path, "if [ $SLURM_NODEID = 0 ]; then exit 2; else kill -KILL $$; fi").run() == (2, False)


def test_a_job_is_queued_again_after_so_many_faults_in_a_row_whatever_slurm_has_counted(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 4")
    site = {"RESTARTS": "1", "SLURM_RESTART_COUNT": "30"}  # of time limits
    assert job.run(**site) == (0, True)
    assert job.run(**site, LASTED="0") == (0, True)  # it has lasted, so the count begins anew
    assert job.run(**site) == (4, False)
    assert not list(tmp_path.glob("*.faults"))
