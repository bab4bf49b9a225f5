"""The door: the same run from every launcher, and commands that answer before anything is built."""

import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import PROCESSES
from tests.small_run import STEPS, Run
from train.cli import main
from train.config import load_recipe

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Launcher:
    """A launcher as a shell starts it, from the repository's root, in a fork of the tests' server: it imports torch too.

    The processes that it starts are new ones.
    """

    def __init__(self, said: Path, command: str, *words: str) -> None:
        self._said = said
        self.process = PROCESSES.Process(target=_launch, args=(said, [str(BIN / command), *words]))
        self.process.start()

    def wait(self) -> tuple[int | None, str]:
        """Its exit code and standard error."""
        self.process.join(120)
        self.process.kill()
        return self.process.exitcode, self._said.read_text("utf-8")


def _launch(said: Path, words: list[str]) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def test_torchrun_is_stopped_by_a_signal_and_accelerate_continues_the_same_run(
    run: Run, whole: Run, tmp_path: Path
) -> None:
    """Two processes, then one, as accelerate has on a CPU; the losses are those of a run that nothing stopped."""
    torchrun = Launcher(
        tmp_path / "torchrun", "torchrun", "--standalone", "--nproc-per-node=2", "-m", "train", *run.arguments()
    )
    deadline = time.monotonic() + 90
    while len(steps(run)) < 3 and torchrun.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    torchrun.process.terminate()
    _, said = torchrun.wait()
    reached = len(steps(run))
    assert 3 <= reached < STEPS, said
    assert run.record(reached)["world_size"] == 2
    assert f"stopped at step {reached} of {STEPS}; start the same command again to continue from" in said

    one = ("--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    code, said = Launcher(tmp_path / "accelerate", "accelerate", "launch", *one, "-m", "train", *run.arguments()).wait()
    assert code == 0, said
    found = [step["loss"] for step in run.metrics()]
    expected = [step["loss"] for step in whole.metrics()]
    assert len(found) == STEPS
    assert all(math.isclose(loss, same, rel_tol=1e-5) for loss, same in zip(found, expected)), (found, expected)


def steps(run: Run) -> list[str]:
    path = run.folder / "metrics.jsonl"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def test_the_argument_that_deepspeeds_launcher_adds_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--local_rank=0", "tiny", "run.seed=3", "--dry-run"]) == 0
    assert "local_rank" not in capsys.readouterr().out


def test_a_dry_run_prints_the_resolved_recipe_and_what_it_amounts_to(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *run.arguments(), "--dry-run"]) == 0
    text, _, table = capsys.readouterr().out.partition("\n\n")
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(run.arguments()[0], run.arguments()[1:])
    for name in ("total parameters", "flops per token", "tokens", "steps", "peak bytes per rank"):
        assert any(line.startswith(name + " ") for line in table.splitlines()), table
    assert not run.folder.exists()


def test_plan_says_what_a_run_amounts_to_and_draws_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "v3.png"
    assert main(["plan", "v3", "--json", "--plot", str(picture)]) == 0
    amounts = json.loads(capsys.readouterr().out)
    assert amounts["total_parameters"] == 671_026_419_200
    assert amounts["mtp_parameters"] == 11_610_068_224
    assert amounts["tokens"] >= 14.8e12
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_counts_what_one_of_many_processes_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """V3 in bf16, its moments too: 671 B and 11.6 B of MTP on 1,024 processes, 4 + 4 + 2·2 bytes each."""
    layout = ["parallel={engine: fsdp, expert: 64, recompute: full}", "--processes", "1024"]
    assert main(["plan", "v3", *layout, "--json"]) == 0
    amounts = json.loads(capsys.readouterr().out)
    assert amounts["world_size"] == 1024
    state = [amounts[f"bytes_of_{kind}"] for kind in ("parameters", "gradients", "moments")]
    assert sum(state) == pytest.approx(12 * (671.026e9 + 11.610e9) / 1024, rel=0.01)
    transient = sum(amounts[f"bytes_of_{kind}"] for kind in ("gathered_modules", "activations", "a_block_at_work"))
    assert amounts["peak_bytes_per_rank"] == sum(state) + transient
    assert amounts["host_bytes_per_rank"] == pytest.approx(4 * (671.026e9 + 11.610e9) / 1024, rel=0.01)  # the average


@pytest.mark.parametrize("command", [["plan", "tiny"], ["train", "--dry-run", "tiny"]])
def test_a_layout_is_tried_on_a_number_of_processes_before_there_are_any(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["parallel={engine: fsdp, expert: 4}"]
    assert main([*command, *layout, "--processes", "8"]) == 0
    assert "peak bytes per rank" in capsys.readouterr().out
    assert main([*command, *layout, "--processes", "6"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "rorqual: parallel.expert = 4: does not divide 6 processes; use parallel.expert=1 or 4 processes\n",
    )
    assert main([*command, "schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 4096}", "--processes", "3"]) == 2
    assert "a global batch of 16 sequences does not divide over 3 processes" in capsys.readouterr().err
    stage_3 = ["parallel={engine: zero2, deepspeed: {zero_optimization: {stage: 3}}}"]
    assert main([*command, *stage_3, "--processes", "2"]) == 2
    assert "parallel.deepspeed.zero_optimization.stage = 3: the recipe says 2" in capsys.readouterr().err


def test_processes_are_started_by_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--processes", "2"]) == 2
    assert "torchrun --nproc-per-node 2 -m train tiny" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report", "x"], ["plan", "tiny", "--gpus", "8"]])
def test_what_is_not_built_yet_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("not built yet\n")


def test_an_import_names_the_weight_it_does_not_understand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["data", "import", "a=a.bin", "--tokenizer", "folder", "--out", str(tmp_path / "store")]
    assert main([*command, "--weight", "a=1", "--weight", "a=2"]) == 2
    assert capsys.readouterr().err == "rorqual: --weight a: given 2 times; give each source one weight\n"
    assert main([*command, "--weight", "a=much"]) == 2
    assert capsys.readouterr().err == "rorqual: --weight a=much: must be NAME=NUMBER\n"


def test_the_file_of_the_commands_is_itself_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.cli", "data", "import", "a=a.bin", "--weight", "b=1", "--tokenizer", "t"]
    done = subprocess.run([*command, "--out", str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("rorqual: b: no source is called so")) == (2, True), done.stderr


@pytest.mark.parametrize(("option", "value"), [("--task", "-1"), ("--tasks", "0")])
def test_a_share_of_the_work_is_one_that_there_can_be(
    option: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", "prepare", "default", "--out", str(tmp_path / "store"), option, value]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_help_of_every_command_is_there_and_needs_no_torch() -> None:
    program = """
import sys
from train.cli import main
for command in ([], ["train"], ["plan"], ["export"], ["import"], ["evaluate"], ["generate"], ["data"], ["data", "prepare"],
                ["data", "verify"], ["data", "inspect"], ["data", "stats"], ["tokenizer", "train"], ["tokenizer", "evaluate"]):
    assert main([*command, "--help"]) == 0, command
assert not {"torch", "transformers", "matplotlib"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RECIPE" in done.stdout
