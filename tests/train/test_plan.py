"""What `rorqual plan` says of a pipeline, and of sequences that several processes share."""

from typing import Any

import pytest

from model.flops import flops_mfu
from train.config import load_recipe
from train.planning.plan import amounts
from train.schedule import Schedule

FIXED = ["run.device=cpu", "schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 16384}"]


def plan(processes: int, parallel: str, *changes: str) -> dict[str, Any]:
    recipe = load_recipe("tiny", [*FIXED, f"parallel={parallel}", *changes])
    return amounts(recipe, Schedule(recipe.schedule, recipe.data.lengths), processes)


def test_a_pipeline_is_planned_by_its_fullest_rank() -> None:
    one, two = plan(1, "{engine: ddp}"), plan(2, "{engine: ddp, pipeline: 2, schedule: zbv, unproven: true}")
    assert one.keys() < two.keys()
    assert two.keys() - one.keys() == {"fullest_pipeline_rank", "bubble", "placement"}
    assert one["bytes_of_parameters"] / 2 < two["bytes_of_parameters"] < one["bytes_of_parameters"]
    assert [line.split(":")[0] for line in two["placement"]] == ["rank 0", "rank 1"]
    even = two["flops_per_token"] * 16384 / 2
    assert even <= two["flops_per_step_and_rank"] < 2 * even
    assert 0 < two["bubble"] < 0.5


@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_the_bubble_is_what_the_ranks_wait_for_each_other(micro_batch: int) -> None:
    """1f1b of 2 even ranks waits for one micro-batch in n + 1, whatever n; a bigger share of one rank comes on top."""
    found = plan(2, f"{{engine: ddp, pipeline: 2, micro_batch: {micro_batch}, unproven: true}}")
    n = found["micro_batches_per_step"]
    largest = found["flops_per_step_and_rank"] / (found["flops_per_token"] * 16384)  # of one rank
    assert found["bubble"] == pytest.approx(1 - n / 2 / (n * largest + 1 - largest), rel=1e-6)


def test_sequences_that_are_shared_are_so_many_tokens_less_for_each() -> None:
    alone, shared = plan(1, "{engine: ddp}"), plan(4, "{engine: ddp, context: 4, unproven: true}")
    recipe = load_recipe("tiny", FIXED)
    assert shared["micro_batches_per_step"] == alone["micro_batches_per_step"]
    assert shared["flops_per_step_and_rank"] * 4 == alone["flops_per_step_and_rank"]
    length = recipe.data.lengths[0][1]
    assert alone["flops_per_step_and_rank"] == flops_mfu(recipe.model_config_resolved(), length) * 16384
    assert shared["bytes_of_parameters"] == alone["bytes_of_parameters"]
    assert alone["bytes_of_activations"] / 4 < shared["bytes_of_activations"] < alone["bytes_of_activations"]
