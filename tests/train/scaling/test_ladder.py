"""Which runs a ladder asks for: a pure function of its file and of the losses so far."""

import math
from itertools import combinations
from pathlib import Path

import pytest

from data.store import Store
from model.config import ModelConfig, load_preset
from model.flops import flops_scaling
from tests.train.scaling.small_ladder import write_ladder
from train.scaling.errors import ScalingError
from train.scaling.family import at_width, with_flops
from train.scaling.ladder.ladder import Ladder, load_ladder
from train.scaling.ladder.wanted import Cell, open_ends
from train.scaling.ladder.wanted import wanted as wanted_of

PRESET = ModelConfig.from_hf(load_preset("small"))
LENGTH = 32  # of the small ladder's sequences


def wanted(ladder: Ladder, losses: dict[Cell, float]) -> list[Cell]:
    return wanted_of(ladder, losses, LENGTH)


def loss_of(cell: Cell) -> float:
    """A basin in ln lr and ln batch, 1 % up a factor of two from 4e-3 and 256, and a parabola in ln width with its bottom at 24."""
    hyper = math.log2(cell.lr / 4e-3) ** 2 + math.log2(cell.batch_tokens / 256) ** 2
    return 3 * (1 + 0.01 * hyper + 0.02 * math.log2(cell.width / 24) ** 2)


def finish(ladder: Ladder, rounds: int = 20) -> dict[Cell, float]:
    """Run what is asked for until nothing is."""
    losses: dict[Cell, float] = {}
    for _ in range(rounds):
        new = [cell for cell in wanted(ladder, losses) if cell not in losses]
        if not new:
            return losses
        losses |= {cell: loss_of(cell) for cell in new}
    raise AssertionError("the ladder never ends")


@pytest.fixture
def ladder(tiny_store: Store, tmp_path: Path) -> Ladder:
    return load_ladder(write_ladder(tmp_path, tiny_store.path, lr=[1e-3, 2e-3], batch_tokens=[64], budgets=[1e9, 2e9]))


def test_a_grid_grows_until_its_best_cell_has_all_its_neighbours(ladder: Ladder) -> None:
    cells = [cell for cell in finish(ladder) if cell.budget == 1e9 and cell.width == 16 and cell.seed == 0]
    best = min(cells, key=loss_of)
    assert (best.lr, best.batch_tokens) == (4e-3, 256)
    tried = {(cell.lr, cell.batch_tokens) for cell in cells}
    assert {(2e-3, 256), (8e-3, 256), (4e-3, 128), (4e-3, 512)} <= tried


def test_a_grid_grows_over_all_that_the_noise_makes_equal(ladder: Ladder) -> None:
    quiet = finish(ladder)
    noisy = {cell: loss * (1 + 0.008 * (cell.seed - 1)) for cell, loss in quiet.items()}  # sd 0.8 %: a band of 1.6 %
    again = [cell for cell in wanted(ladder, noisy) if cell not in noisy]
    assert again and {cell.seed for cell in again} == {0}
    assert set(wanted(ladder, quiet)) == set(quiet)


def test_a_grid_stops_growing_at_its_limit(ladder: Ladder) -> None:
    grid = ladder.hyperparameters.model_copy(update={"max_cells": 5})
    cells = finish(ladder.model_copy(update={"hyperparameters": grid}))
    for budget in ladder.budgets:
        assert sum(cell.budget == budget and cell.width == 16 and cell.seed == 0 for cell in cells) == 5


def test_a_grid_of_any_spacing_has_no_cell_twice(ladder: Ladder) -> None:
    grid = ladder.hyperparameters.model_copy(update={"spacing": 1.41421356, "max_cells": 60, "lr": (1e-3, 2e-3, 4e-3)})
    cells = list(finish(ladder.model_copy(update={"hyperparameters": grid})))
    assert len({cell.name for cell in cells}) == len(cells)
    at = {(cell.lr, cell.batch_tokens) for cell in cells if (cell.budget, cell.width, cell.seed) == (1e9, 16, 0)}
    assert {(4e-3, 192), (4e-3, 352), (0.00282843, 256), (0.00565685, 256)} <= at  # 181 and 362 in whole sequences
    assert not [pair for pair in combinations(sorted({lr for lr, _ in at}), 2) if pair[1] < 1.01 * pair[0]]


def test_a_finished_cell_stands_for_all_within_one_per_cent(ladder: Ladder) -> None:
    done = Cell(1e9, 16, 1.004e-3, 64)
    cells = wanted(ladder, {done: 3.0})
    assert done in cells and Cell(1e9, 16, 1e-3, 64) not in cells


def test_what_a_grid_or_a_row_left_open_is_said_with_the_key_to_change(ladder: Ladder) -> None:
    wide = ladder.allocation.model_copy(update={"widths": (8, 16, 24, 32)})  # type: ignore[union-attr]
    ladder = ladder.model_copy(update={"allocation": wide})
    assert open_ends(ladder, finish(ladder), LENGTH) == []
    small = ladder.hyperparameters.model_copy(update={"max_cells": 5})
    limited = ladder.model_copy(update={"hyperparameters": small})
    lines = open_ends(limited, finish(limited), LENGTH)
    assert len(lines) == 2 and all("raise hyperparameters.max_cells = 5" in line for line in lines), lines
    rows = ladder.allocation.model_copy(update={"sizes": 2, "widths": (8, 16)})  # type: ignore[union-attr]
    narrow = ladder.model_copy(update={"allocation": rows})
    lines = open_ends(narrow, finish(narrow), LENGTH)
    assert len(lines) == 2 and all("width 16; add a larger one to allocation.widths" in line for line in lines), lines


def test_a_row_grows_until_its_minimum_lies_inside(ladder: Ladder) -> None:
    rows = ladder.allocation.model_copy(update={"sizes": 2, "widths": (8, 16, 24, 32, 40)})  # type: ignore[union-attr]
    cells = finish(ladder.model_copy(update={"allocation": rows}))
    assert {cell.width for cell in cells if cell.budget == 1e9} == {16, 24, 32}


def test_the_best_cell_of_each_budget_is_repeated_with_other_seeds(ladder: Ladder) -> None:
    repeated = {(cell.budget, cell.lr, cell.batch_tokens, cell.seed) for cell in finish(ladder) if cell.seed}
    assert repeated == {(budget, 4e-3, 256, seed) for budget in (1e9, 2e9) for seed in (1, 2)}


def test_a_budget_whose_runs_all_diverged_asks_for_no_more(ladder: Ladder) -> None:
    grid = wanted(ladder, {})
    assert wanted(ladder, dict.fromkeys(grid, math.inf)) == grid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budgets": [2e9, 1e9]},
            "budgets = [2000000000.0, 1000000000.0]: must grow; write [1000000000.0, 2000000000.0]",
        ),
        ({"budgets": []}, "budgets = []: has no entry; write for example [1e11, 2e11, 4e11]"),
        ({"budgets": [1e9, 1e9]}, "budgets = [1000000000.0, 1000000000.0]: has 1000000000.0 twice; drop one of them"),
        ({"budgets": 1e9}, "budgets = 1000000000.0: must be a list; write"),
        ({"budgets": [1e9, 1e29]}, "budgets.1 = 1e+29: must be more than 0 and at most 1e+28; write it like 1e12"),
        ({"budgets": [1]}, "budgets.0 = 1: is less than one step of batch 256 at width 16 ("),
        (
            {"batch_tokens": [256, 3200000]},
            "hyperparameters.batch_tokens.1 = 3200000: is more than the whole run of budgets.0",
        ),
        (
            {"batch_tokens": [100]},
            "hyperparameters.batch_tokens.0 = 100: is not a multiple of the sequence length 32; write for",
        ),
        ({"batch_tokens": []}, "hyperparameters.batch_tokens = []: has no entry; write for example [1024, 2048]"),
        ({"batch_tokens": [256, 256]}, "hyperparameters.batch_tokens = [256, 256]: has 256 twice; drop one"),
        (
            {"warmup_tokens": 10**9},
            "warmup_tokens = 1000000000: is not less than the whole run of budgets.0 = 4e+08 at",
        ),
        ({"widths": [16, 16, 16]}, "hyperparameters.widths = [16, 16, 16]: has 3 entries for 2 budgets; give"),
        ({"widths": [16, 16], "budgets": [1e9]}, "hyperparameters.widths = [16, 16]: has 2 entries for 1 budget; give"),
        ({"widths": [20]}, "hyperparameters.widths.0 = 20: must be a multiple of 8; write for example 24"),
        ({"widths": []}, "hyperparameters.widths = []: has no entry; write for example [64, 128]"),
        ({"row": [8, 16, 20]}, "allocation.widths.2 = 20: must be a multiple of 8"),
        ({"row": [8, 24]}, "allocation.widths = [8, 24]: lacks 16, a width of hyperparameters.widths; add it"),
        ({"row": [16, 16]}, "allocation.widths = [16, 16]: has 16 twice"),
        ({"lr": [-1.0]}, "hyperparameters.lr.0 = -1.0: must be a number more than 0"),
        ({"lr": [1e-3, 4]}, "hyperparameters.lr.1 = 4: is more than 1; write it like 4e-3"),
        ({"lr": [1e-3, 1e-3]}, "hyperparameters.lr = [0.001, 0.001]: has 0.001 twice"),
        ({"seeds": 101}, "seeds = 101: must be at most 100; write for example 3"),
        (
            {"spacing": 1.05},
            "hyperparameters.spacing = 1.05: is the ratio of two neighbours, at least 1.1 and at most 10; wr",
        ),
        ({"spacing": 11}, "hyperparameters.spacing = 11: is the ratio"),
        (
            {"max_cells": 1},
            "hyperparameters.max_cells = 1: is less than the 2 cells that lr and batch_tokens begin with; wr",
        ),
        ({"hyperparameters": None}, "hyperparameters = null: must be a map of keys; write key: value pairs below it"),
        ({"dir": 5}, "dir = 5: must be text; write it in quotes"),
        ({"keep_checkpoints": "x"}, "keep_checkpoints = 'x': must be true or false; write one of them"),
        ({"colour": "blue"}, "colour: unknown key"),
    ],
)
def test_a_mistake_in_a_ladder_is_one_line_that_names_it(
    tiny_store: Store, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _is_refused(write_ladder(tmp_path, tiny_store.path, **changes), message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": None}, "data: must be a map of keys; write for example data: {train: STORE, sequence_length: 128}"),
        ({"data": []}, "data: must be a map of keys"),
        ({"schedule": 5}, "schedule: must be a map of keys; write for example schedule: {shape: wsd}"),
        ({"run": "x"}, "run: must be a map of keys"),
        ({"model": 5}, "model = 5: must be a map of keys"),
        (
            {"model": {}},
            "model = {}: has neither preset nor config; give one of recipe.model.preset: tiny and recipe.model.c",
        ),
        ({"model": {"preset": "none"}}, "model.preset: 'none' is not a preset"),
        ({"data": {"train": "STORE", "sequence_length": 0}}, "data.sequence_length = 0: must be a whole number"),
        ({"data": {"sequence_length": 32}}, "data.train: missing; it has no default; give it"),
        (
            {"data": {"train": "STORE", "sequence_length": "x", "stages": 5}},
            "data.sequence_length = 'x': must be a whole number",
        ),
        ({"schedule": {"gama": 1}}, "schedule.gama = 1: unknown key; did you mean recipe.schedule.gamma?"),
        ({"schedule": {"law": "no-law"}}, "schedule.law = 'no-law': must be a file or one of"),
        ({"optimiser": {}}, "optimiser = {}: unknown key; did you mean optimizer?"),
    ],
)
def test_a_mistake_in_the_recipe_of_a_ladder_is_said_as_the_ladder_has_it(
    tiny_store: Store, tmp_path: Path, sections: dict[str, object], message: str
) -> None:
    _is_refused(write_ladder(tmp_path, tiny_store.path, sections=sections), f"recipe.{message}")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("no-such-recipe", "recipe = 'no-such-recipe': is no recipe; give the path of one"),
        (5, "recipe = 5: must be a recipe's name or path, or a map of its sections; write for example recipe: small"),
        (None, "recipe = null: must be"),
        ({}, "recipe = {}: must be"),
    ],
)
def test_what_stands_for_the_recipe_of_a_ladder_must_be_one(
    tiny_store: Store, tmp_path: Path, recipe: object, message: str
) -> None:
    _is_refused(write_ladder(tmp_path, tiny_store.path, recipe=recipe), message)


def _is_refused(path: Path, message: str) -> None:
    with pytest.raises(ScalingError) as error:
        load_ladder(path)
    line = str(error.value)
    assert line.startswith(f"{path}: {message}") and "\n" not in line and "as data." not in line, line


def test_the_budget_that_a_ladder_suggests_is_taken(tiny_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ScalingError) as error:
        load_ladder(write_ladder(tmp_path, tiny_store.path, budgets=[1], warmup_tokens=0, row=[16], sizes=1))
    least = float(str(error.value).rpartition("at least ")[2])
    ladder = write_ladder(tmp_path, tiny_store.path, budgets=[least], warmup_tokens=0, row=[16], sizes=1)
    assert load_ladder(ladder).budgets == (least,)


def test_a_family_keeps_the_proportions_of_its_template() -> None:
    twice = at_width(PRESET, 2 * PRESET.hidden_size)
    assert twice.num_attention_heads == 2 * PRESET.num_attention_heads
    assert twice.moe_intermediate_size == 2 * PRESET.moe_intermediate_size
    assert twice.num_hidden_layers == round(PRESET.num_hidden_layers * 2**0.5)
    assert (twice.qk_nope_head_dim, twice.n_routed_experts) == (PRESET.qk_nope_head_dim, PRESET.n_routed_experts)
    assert at_width(PRESET, PRESET.hidden_size) == PRESET


@pytest.mark.parametrize("flops_per_token", [1e7, 3e8, 1e10])
def test_the_member_of_a_family_with_given_flops_is_the_nearest(flops_per_token: float) -> None:
    found = flops_scaling(with_flops(PRESET, flops_per_token, 2048), 2048)
    assert found == pytest.approx(flops_per_token, rel=0.15)
