"""The commands of benchmarks/README.md, with other arguments."""

import multiprocessing.context
import os
import re
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

from tests.processes import PROCESSES

ROOT = Path(__file__).parents[2]


def commands() -> dict[str, list[str]]:
    """Program (`train_step.py`, …) → the words behind it, of every line of the README's ```sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "benchmarks/README.md").read_text("utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        python, program, *words = shlex.split(line, comments=True)
        assert python == "python"
        found[Path(program).name] = words
    return found


def command(program: str, values: dict[str, str], *more: str) -> list[str]:
    """The README's command for a program; the values of the options named in `values` are replaced."""
    words = commands()[program]
    for option, value in values.items():
        words[words.index(option) + 1] = value
    return [sys.executable, str(ROOT / "benchmarks" / program), *words, *more]


def run(words: list[str], folder: Path = ROOT, **variables: str) -> str:
    """What a command prints that is run in a fork of the tests' server, where most of what it imports is there already."""
    with tempfile.TemporaryDirectory() as said:
        files = [Path(said, name) for name in ("out", "err")]
        process = PROCESSES.Process(target=_main, args=(words[1:], folder, variables, files))
        process.start()
        process.join()
        out, err = (file.read_text("utf-8") for file in files)
    assert process.exitcode == 0, err
    return out


def _main(words: list[str], folder: Path, variables: dict[str, str], files: list[Path]) -> None:
    for number, path in enumerate(files, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.update(variables)
    # Processes of its own are forks too. There are no threads yet.
    multiprocessing.set_start_method("fork", force=True)
    for method in ("spawn", "forkserver"):
        multiprocessing.context._concrete_contexts[method] = multiprocessing.get_context("fork")  # type: ignore
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")
