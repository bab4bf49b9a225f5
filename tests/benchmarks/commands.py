"""The commands of benchmarks/README.md, with other arguments."""

import re
import shlex
import sys
from pathlib import Path

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
