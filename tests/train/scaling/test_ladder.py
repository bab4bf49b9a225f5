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
from train.scaling.ladder import Cell, Ladder, load_ladder, open_ends
from train.scaling.ladder import wanted as wanted_of

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
        ({"budgets": [2e9, 1e9]}, "budgets"),
        ({"budgets": []}, "budgets"),
        ({"widths": [16, 16, 16]}, "3 entries for 2 budgets"),
        ({"widths": [20]}, "multiples of 8"),
        ({"row": [8, 24]}, "lacks 16"),
        ({"lr": [-1.0]}, "lr"),
        ({"spacing": 1.0}, "more than 1"),
        ({"colour": "blue"}, "colour"),
        ({"recipe": "no-such-recipe"}, "no-such-recipe"),
        ({"data": {"train": "STORE", "sequence_length": 0}}, "data.sequence_length"),
    ],
)
def test_a_mistake_in_a_ladder_is_one_line_that_names_it(
    tiny_store: Store, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ScalingError) as error:
        load_ladder(write_ladder(tmp_path, tiny_store.path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


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
