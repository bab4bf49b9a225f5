"""What benchmarks/README.md says to type exists. `train_step.py` and `ngram.py` run as it says in their own tests."""

import sys

import pytest

from tests.benchmarks.commands import ROOT, commands, run


@pytest.mark.parametrize(
    "program",
    [
        "auto.py",
        "balance.py",
        "coverage.py",
        "fp8.py",
        "learn.py",
        "long_context.py",
        "planned_memory.py",
        "planned_time.py",
        "prepare.py",
        "published_plans.py",
        "watch.py",
    ],
)
def test_every_option_of_the_readme_is_one_of_the_program(program):
    words = commands()[program]
    help_text = run([sys.executable, str(ROOT / "benchmarks" / program), "--help"])
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text
