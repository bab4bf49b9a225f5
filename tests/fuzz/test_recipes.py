"""Whatever stands in a recipe: it is accepted, or refused in one line with exit code 2; what is wrong is never accepted."""

import random
from pathlib import Path

import pytest

from tests.fuzz.recipes import VALUES, WRONG, Recipe, data_recipes, fuzzed, training_recipes
from train.cli import main

LONGEST = 1500  # characters of a line that somebody reads


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says where it refuses; nothing where it does what it was asked for."""
    code = main(arguments)
    said = capsys.readouterr().err
    assert code in (0, 2)
    if code == 0:
        return ""
    assert said.startswith("rorqual: ") and said.endswith("\n"), said
    line = said.removesuffix("\n")
    assert line.isprintable() and len(line) <= LONGEST, said
    return line


def check_training(recipe: Recipe, command: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a training recipe is accepted."""
    path = folder / "recipe.yaml"
    path.write_bytes(recipe.text)
    line = refused((["train", str(path), "--dry-run"], ["plan", str(path)])[command % 2], capsys)
    return not line


def check_data(recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a data recipe is accepted. What is accepted is not prepared: the place for it is taken."""
    path, taken = folder / "recipe.yaml", folder / "taken"
    path.write_bytes(recipe.text)
    taken.mkdir(exist_ok=True)
    (taken / "letter.txt").touch()
    line = refused(["data", "prepare", str(path), "--out", str(taken)], capsys)
    assert line
    return line.startswith(f"rorqual: --out = {taken}: holds letter.txt, which is no part of a store")


@pytest.mark.parametrize("count", [30, pytest.param(700, marks=pytest.mark.slow)])
def test_fuzzed_training_recipes(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accepted = 0
    for number, recipe in enumerate(fuzzed(training_recipes(), count, seed=0)):
        is_accepted = check_training(recipe, number, tmp_path, capsys)
        assert not (is_accepted and recipe.is_wrong), recipe.what
        accepted += is_accepted
    assert accepted >= count // 100
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # nothing that a recipe said was done


@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_fuzzed_data_recipes(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accepted = 0
    for recipe in fuzzed(data_recipes(), count, seed=1):
        is_accepted = check_data(recipe, tmp_path, capsys)
        assert not (is_accepted and recipe.is_wrong), recipe.what
        accepted += is_accepted
    assert accepted >= count // 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "taken"]


def test_fuzzed_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands behind `train RECIPE` on the command line is YAML from elsewhere too."""
    draw = random.Random(0)
    keys = (
        "schedule.lr",
        "data.train",
        "model.rope_scaling",
        "run.dir",
        "evaluate.sample_prompts",
        "parallel",
        "a.b.c",
        "",
    )
    for value in draw.sample(VALUES, 25):
        refused(["train", "tiny", f"{draw.choice(keys)}={value}", "--dry-run"], capsys)
    for value in (*WRONG, "[" * 5000, "{a: " * 5000):
        assert refused(["train", "tiny", f"{draw.choice(keys)}={value}", "--dry-run"], capsys), value
