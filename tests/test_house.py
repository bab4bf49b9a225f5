"""The rules of the house that no linter knows: what packages may mention, and that every command in a README runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train.config
from tests.conftest import write_tiny_recipe
from tests.processes import PROCESSES
from tests.small_run import CHANGES
from tests.train.scaling.forked import fork_cells
from tests.train.scaling.small_ladder import write_ladder
from train.cli import main
from train.config import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "parallel", "data", "train")
LAUNCHERS = {  # how a launcher tells a process who it is, and where it finds the others
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
}  # fmt: skip

# In this order a later README finds what an earlier one made.
READMES = [
    "README.md",
    "data/README.md",
    "train/README.md",
    "train/guard/README.md",
    "train/scaling/README.md",
    "model/README.md",
    "parallel/README.md",
]
# Commands that the test below does not run, and who does.
ELSEWHERE = {
    "./scripts/quickstart.sh": "by tests/test_quickstart.py, with --thorough",
    "./scripts/test.sh": "by .ci/run: it runs this test",
    "torchrun --nproc-per-node 2 -m train tiny run.dir=runs/two": "by tests/train/test_cli.py, with a smaller run's arguments",
}


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


def test_model_knows_no_ranks_and_no_environment() -> None:
    for path in sources("model"):
        found = re.findall(r"torch\.distributed|\bdist\.|environ|getenv", path.read_text("utf-8"))
        assert not found, f"{path}: {found}"


def test_nothing_is_switched_by_an_environment_variable() -> None:
    """Only `train` reads any, and only what a launcher sets. To set one for a library is another matter."""
    for path in sources(*PACKAGES):
        for line in path.read_text("utf-8").splitlines():
            if re.search(r"\benviron\b|getenv", line) and not re.search(
                r'os\.environ(\["\w+"\] = |\.setdefault\()', line
            ):
                names = set(re.findall(r'"(\w+)"', line))
                assert path.is_relative_to(ROOT / "train") and names & LAUNCHERS, f"{path}: {line.strip()}"


def commands() -> list[str]:
    """The lines of the shell blocks of every README, without their comments."""
    found = []
    for name in READMES:
        path = ROOT / name
        for block in re.findall(
            r"^```(?:ba)?sh\n(.*?)^```", path.read_text("utf-8") if path.exists() else "", re.M | re.S
        ):
            found += [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]
    return [command for command in found if command]


def test_every_readme_is_looked_at() -> None:
    tracked = subprocess.run(["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    others = {"benchmarks/README.md", "scripts/README.md"}  # whose commands tests/benchmarks and tests/launch run
    assert set(tracked.stdout.split()) <= {*READMES, *others}


def test_every_command_of_every_readme_runs(tmp_path: Path) -> None:
    """Verbatim and in order, in a folder where the recipe `tiny` and the built-in text are smaller than they are."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = tmp_path / "text"
    text.mkdir()
    (tmp_path / "data/recipes/default.yaml").write_text(write_tiny_recipe(text).model_dump_json())
    smaller = CHANGES | {"model.max_position_embeddings": 512, "data.train": "stores/default", "run.dir": "runs/tiny"}
    recipe = load_recipe("tiny", [f"{key}={value}" for key, value in smaller.items()])
    (tmp_path / "train/recipes/tiny.yaml").write_text(recipe.to_yaml())
    small = {"budgets": [4e8], "lr": [4e-3], "max_cells": 1, "seeds": 1, "row": [16], "sizes": 1, "dir": "runs/ladder"}
    ladder = write_ladder(text, Path("stores/default"), **small)
    ladder.rename(tmp_path / "train/scaling/ladders/cpu.yaml")
    beside: list[tuple[str, Any, Path]] = []
    for number, command in enumerate(commands()):
        if command in ELSEWHERE:
            continue
        program, *words = shlex.split(command)
        assert program == "rorqual", f"{command}: say in ELSEWHERE who runs it"
        said = tmp_path / f"said-{number}"
        process = PROCESSES.Process(target=rorqual, args=(tmp_path, words, said))
        process.start()
        if "plan" in words or "forecast" in words or "--dry-run" in words:  # nobody reads what they leave
            beside.append((command, process, said))
        else:
            check_end(command, process, said)
        while len(beside) > 1:
            check_end(*beside.pop(0))
    for one in beside:
        check_end(*one)


def check_end(command: str, process: Any, said: Path) -> None:
    process.join()
    assert process.exitcode == 0, f"{command}: exit code {process.exitcode}\n{said.read_text('utf-8')}"


def rorqual(folder: Path, words: list[str], said: Path) -> None:
    """The command `rorqual` with `folder` as the working directory, and its recipes. A ladder's cells are forks of it."""
    os.chdir(folder)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.config.RECIPES = folder / "train" / "recipes"
    fork_cells()
    sys.exit(main(words))
