"""No figure of a plan is without its formula."""

import dataclasses
import importlib
import re

import pytest

from model.flops import flops_mfu
from tests.train.planning.plans import FIXED, V3, plan_of, tiny, two, v3
from train.config import RecipeError
from train.planning.memory import RankMemory
from train.planning.shown.contents import timeline_of
from train.planning.shown.formulas import FORMULAS, explain
from train.planning.step import bubble_share


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


def test_simple_figures_are_what_their_formulas_say() -> None:
    """V3 on 2,048 H800: every batch of 15,360 sequences of 4,096 tokens; FP8's peak is 1978.9 TFLOP/s."""
    numbers = v3().numbers()
    rate = 15360 * 4096 / numbers["step_seconds"] / 2048
    assert numbers["tokens_per_second_per_device"] == pytest.approx(rate)
    assert numbers["mfu"] == pytest.approx(numbers["flops_per_token"] * rate / 1978.9e12)
    assert numbers["gpu_hours_per_trillion_tokens"] == pytest.approx(1e12 / rate / 3600)
    assert numbers["days"] == pytest.approx(numbers["steps"] * numbers["step_seconds"] / 86400)
    assert numbers["fits"] and numbers["peak_bytes_per_rank"] <= numbers["usable_bytes_per_device"]
    assert numbers["tokens"] == numbers["steps"] * 15360 * 4096
    assert numbers["total_flops"] == numbers["flops_per_token"] * numbers["tokens"]
    memory = ("parameters", "gradients", "moments", "gathered_modules", "messages", "activations", "a_block_at_work")
    assert numbers["peak_bytes_per_rank"] == sum(numbers[f"bytes_of_{kind}"] for kind in memory)


def test_a_context_that_grows_is_counted_at_the_length_of_its_largest_step() -> None:
    """V3 at 32K, then 128K: what MFU multiplies is what is printed."""
    plan = plan_of("v3-long", 8, None)
    config = plan.step.config
    assert plan.step.span.sequence_length == 131072
    assert plan.numbers()["flops_per_token"] == flops_mfu(config, 131072) > flops_mfu(config, 32768)


def test_one_bubble_is_said_by_time_where_a_device_is_known() -> None:
    known, unknown = v3(), plan_of("v3", 2048, None, *V3)
    course = timeline_of(known.step, known.time)
    assert known.numbers()["bubble"] == course.waits != bubble_share(known.step)
    assert unknown.numbers()["bubble"] == bubble_share(unknown.step)
    assert "bytes_sent_per_step" in unknown.numbers() and "bytes_sent_per_step" not in known.numbers()


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
