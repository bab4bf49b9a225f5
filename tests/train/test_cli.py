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
import torch

from tests.processes import PROCESSES
from tests.small_run import STEPS, Run
from train.cli import main
from train.config import load_recipe
from train.planning.simulation import simulate
from train.planning.simulation.simulate import Simulation

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
    layout = ["parallel={engine: fsdp, expert: 64, recompute: full}", "--gpus", "1024", "--device", "h800"]
    assert main(["plan", "v3", *layout, "--json"]) == 0
    amounts = json.loads(capsys.readouterr().out)
    assert (amounts["world_size"], amounts["device"], amounts["imbalance"]) == (1024, "H800", 1.2)
    state = [amounts[f"bytes_of_{kind}"] for kind in ("parameters", "gradients", "moments")]
    share = (671.026e9 + 11.610e9) / 1024
    assert (state[0], state[2]) == (pytest.approx(4 * share, rel=0.01), pytest.approx(4 * share, rel=0.01))
    # Of gradients, beside its own, what is not sent yet: of the head at most, 129,280 · 7,168, and of one layer's 0.41e9 elements.
    assert 4 * share * 0.99 <= state[1] <= 4 * share * 1.01 + 4 * (129280 * 7168 + 0.41e9)
    transient = ("gathered_modules", "messages", "activations", "a_block_at_work")
    assert amounts["peak_bytes_per_rank"] == sum(state) + sum(amounts[f"bytes_of_{kind}"] for kind in transient)
    assert amounts["host_bytes_per_rank"] == pytest.approx(
        2 * 4 * share, rel=0.01
    )  # the average, and what is copied for it
    # What is asked of a plan before a cluster is booked, and how its parts agree.
    assert amounts["total_parameters"] == 671_026_419_200 and 36e9 < amounts["active_parameters"] < 38e9
    assert amounts["fits"] is (amounts["peak_bytes_per_rank"] <= amounts["usable_bytes_per_device"])
    rate = 15360 * 4096 / amounts["step_seconds"] / 1024
    assert amounts["tokens_per_second_per_device"] == pytest.approx(rate)
    assert amounts["mfu"] == pytest.approx(rate * amounts["flops_per_token"] / 1978.9e12)
    assert amounts["gpu_hours_per_trillion_tokens"] == pytest.approx(1e12 / rate / 3600)
    assert amounts["days"] >= 14.8 * amounts["gpu_hours_per_trillion_tokens"] / 1024 / 24  # small batches take longer


@pytest.mark.parametrize("command", [["plan", "tiny", "--gpus"], ["train", "--dry-run", "tiny", "--processes"]])
def test_a_layout_is_tried_on_a_number_of_processes_before_there_are_any(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "plan":
        command = ["plan", "--device", "H100", *command[1:]]
    layout = ["parallel={engine: fsdp, expert: 4}"]
    assert main([*command, "8", *layout]) == 0
    assert "peak bytes per rank" in capsys.readouterr().out
    assert main([*command, "6", *layout]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "rorqual: parallel.expert = 4: does not divide 6 processes; use parallel.expert=1 or 4 processes\n",
    )
    assert main([*command, "3", "schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 4096}"]) == 2
    assert "a global batch of 16 sequences does not divide over 3 processes" in capsys.readouterr().err
    stage_3 = ["parallel={engine: zero2, deepspeed: {zero_optimization: {stage: 3}}}"]
    assert main([*command, "2", *stage_3]) == 2
    assert "parallel.deepspeed.zero_optimization.stage = 3: the recipe says 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "gpus = 0: must be a whole number, at least 1; write --gpus 1"),
        (["--device", "H10"], "device 'H10': is not in the table of devices; did you mean H100?"),
        (
            ["--imbalance", "0.5"],
            "imbalance = 0.5: is what the fullest process has over the mean, 1 or more; write --imb",
        ),
        (
            ["--search", "--simulate"],
            "simulate: is for one layout, and --search looks at many; leave one of the two out",
        ),
        (["--explain", "mfu", "--json"], "json: --explain prints a number and how it is computed; leave one of the"),
        (["--explain", "mfu", "--simulate"], "simulate: --explain prints a number and how it is computed; leave one"),
        (["--imbalance", "2"], "imbalance = 2: parallel.expert = 1, every process has all experts; leave it out"),
        (
            ["--imbalance", "5", "--gpus", "8", "parallel={engine: fsdp, expert: 4}"],
            "imbalance = 5: the fullest of 4 processes that share experts has at most all rows, 4 times the mean; write",
        ),
        (["--search", "--explain", "mfu"], "explain: is for one layout, and --search looks at many; leave one of the"),
        (
            ["--plot", "plan.txt"],
            "plot = 'plan.txt': must end in .html, .png, .svg or .pdf; write for example plan.html",
        ),
        (
            ["--plot", "none/plan.html"],
            "plot = 'none/plan.html': there is no folder none; make it or give another place",
        ),
        (
            ["--explain", "speed"],
            "explain = 'speed': is no number of this plan; give all, or one of total_parameters, ",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rorqual: {said}") and error.count("\n") == 1


def test_a_folder_is_no_place_for_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "d.png").mkdir()
    assert main(["plan", "tiny", "--plot", str(tmp_path / "d.png")]) == 2
    error = capsys.readouterr().err
    assert "d.png': is a folder; give the name of a file" in error and error.count("\n") == 1


def test_without_a_gpu_many_devices_are_planned_by_their_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V3's recipe is in FP8, which a CPU emulates: nobody asks for its time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "v3", "--gpus", "1024"]) == 0
    said = capsys.readouterr().out
    assert "peak bytes per rank" in said and "step seconds" not in said
    assert "whether it fits, and how long it takes: with --device" in said
    assert main(["plan", "v3", "--gpus", "1024", "--search"]) == 2
    assert capsys.readouterr().err.startswith("rorqual: device: is not given, and this machine has no GPU; write --dev")


def test_a_batch_that_does_not_divide_is_refused_with_a_layout_that_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    """V3 begins with 3,072 sequences."""
    command = ["plan", "v3", "--gpus", "2048", "--device", "h800"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "a global batch of 3072 sequences does not divide over 2048 processes" in error and error.count("\n") == 1
    fits = error[error.index(" parallel.engine=") :].split()
    assert main([*command, *fits, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_a_plan_that_does_not_fit_is_an_answer_with_one_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    """171 M parameters in fp32 with gradients and moments are 2.7 GB; a micro-batch of 64 × 2,048 tokens has more than 24 GB."""
    command = [
        "plan",
        "small",
        "parallel.micro_batch=64",
        "parallel.recompute=none",
        "--gpus",
        "1",
        "--device",
        "rtx-4090",
    ]
    assert main([*command, "--json"]) == 0
    amounts = json.loads(capsys.readouterr().out)
    assert amounts["fits"] is False and amounts["peak_bytes_per_rank"] > amounts["usable_bytes_per_device"]
    nearest = amounts["nearest_that_fits"]
    assert nearest["world_size"] == 1 and nearest["peak_bytes_per_rank"] <= amounts["usable_bytes_per_device"]
    assert main(command) == 0
    assert "it does not fit; what fits, with" in (text := capsys.readouterr().out)
    assert " ".join(nearest["overrides"]) in text
    assert main([*command, *nearest["overrides"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes_per_rank"] == nearest["peak_bytes_per_rank"]


def test_a_search_prints_what_to_write_and_why_the_others_fall_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["plan", "tiny", "--search", "--gpus", "2", "--device", "H100"]
    page = tmp_path / "plan.html"
    assert main([*command, "--json", "--plot", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["found"][0]
    assert found["candidates"] == len(found["found"]) + sum(fallen["how_many"] for fallen in found["fallen"])
    assert found["own"]["times_the_best"] >= 1 and found["own"]["place"] >= 1 and best["fits"]
    assert " ".join(best["overrides"]) in page.read_text("utf-8")
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"2 × H100, 74.8 GB each to use: {found['candidates']} layouts" in text
    assert " ".join(best["overrides"]) in text and f"the recipe's own: number {found['own']['place']}, " in text
    assert all(fallen["why"] in text for fallen in found["fallen"])


def test_a_search_without_an_answer_names_the_number_of_devices_that_has_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["model.num_hidden_layers=12", "--gpus", "8", "--device", "H100"]
    assert main(["plan", "v3", "--search", *changes]) == 2
    said = capsys.readouterr()
    assert "do not fit in 74.8 GB" in said.out
    assert said.err.startswith("rorqual: gpus = 8: of ") and said.err.endswith(" --gpus 32\n")


def test_a_simulation_stands_beside_what_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("parameters", "gradients", "moments", "gathered", "communication", "activations")
    found = Simulation(210_000_000, dict.fromkeys(kinds, 35_000_000), 1.5, 2)
    asked = []
    monkeypatch.setattr(
        simulate, "simulate", lambda step, rank: (asked.append((step.layout.world_size, rank)), found)[1]
    )
    command = ["plan", "tiny", "--gpus", "2", "--device", "H100", "--simulate"]
    assert main([*command, "--json"]) == 0
    amounts = json.loads(capsys.readouterr().out)
    assert asked == [(2, 0)]
    assert amounts["simulation"]["peak_bytes"] == 210_000_000
    assert amounts["simulation"]["formula_over_simulation"] == amounts["peak_bytes_per_rank"] / 210_000_000
    assert main(command) == 0
    assert "formula beside simulation" in capsys.readouterr().out


def test_a_number_of_a_plan_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--gpus", "1", "--device", "H100", "--explain", "step_seconds"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("step seconds = ") and "linear maps: " in said


def test_processes_are_started_by_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--processes", "2"]) == 2
    assert "torchrun --nproc-per-node 2 -m train tiny" in capsys.readouterr().err


def test_what_is_not_built_yet_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "x"]) == 2
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
