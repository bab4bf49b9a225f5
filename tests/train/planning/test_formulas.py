"""No figure of a plan is without its formula."""

import dataclasses
import importlib
import re

import pytest

from tests.train.planning.plans import FIXED, plan_of, tiny, two, v3
from train.config import RecipeError
from train.planning.memory import RankMemory
from train.planning.shown.formulas import FORMULAS, explain


def test_every_figure_has_a_formula_and_every_formula_a_figure() -> None:
    law = ["schedule={tokens: 1e8, lr: auto, batch_tokens: auto, law: deepseek-llm}"]
    figures = {"peak", *(field.name for field in dataclasses.fields(RankMemory))}
    for plan in (tiny(), two(), plan_of("tiny", 1, None, *law)):
        figures |= plan.numbers().keys()
    assert FORMULAS.keys() == figures
    assert all(FORMULAS.values())


def test_every_function_that_a_formula_names_is_there() -> None:
    for key, formula in FORMULAS.items():
        for name in re.findall(r"`([\w.]+)`", formula):
            module, _, function = name.rpartition(".")
            assert hasattr(importlib.import_module(module), function), f"{key}: {name}"


def test_the_time_of_a_step_is_explained_term_by_term() -> None:
    plan = v3()
    assert plan.time
    lines = explain(plan, "step_seconds")
    assert max(map(len, lines)) <= 132 and lines[1].strip() == FORMULAS["step_seconds"]
    said = " ".join(line.strip() for line in lines)
    for term in plan.time.terms:
        assert f"{term.name}: {term.formula}" in said


def test_all_is_everything_and_what_is_not_there_is_a_mistake() -> None:
    lines = explain(two(), "all")
    for name in two().numbers():
        assert any(line.startswith(name.replace("_", " ")) for line in lines)
    assert explain(two(), "bytes_of_parameters")[0].startswith("bytes of parameters = ")
    with pytest.raises(
        RecipeError, match="'bubbles': is no number of this plan; give all, or one of total_parameters, "
    ):
        explain(two(), "bubbles")
    assert "bubble" not in plan_of("tiny", 1, None, *FIXED).numbers()
