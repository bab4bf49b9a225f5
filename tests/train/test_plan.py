"""What `rorqual plan` says of a pipeline, and of sequences that several processes share."""

from typing import Any
from unittest.mock import Mock

import pytest

from model.flops import flops_mfu
from parallel.layout import ParallelConfig
from parallel.placement import Placement
from train.config import load_recipe
from train.planning.plan import Plan
from train.planning.step import DTYPES, bubble_share
from train.schedule import Schedule

FIXED = ["run.device=cpu", "schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 16384}"]


def plan(processes: int, parallel: str, *changes: str) -> dict[str, Any]:
    recipe = load_recipe("tiny", [*FIXED, f"parallel={parallel}", *changes])
    return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), processes).numbers()


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


@pytest.mark.parametrize("schedule, waits, waits_without_split", [("zbv", 7, 28), ("dualpipev", 14, 34)])
def test_zero_bubble_is_planned_only_where_gradients_of_weights_can_wait(schedule, waits, waits_without_split) -> None:
    """Not under ddp in half precision, which casts weights first. 8 ranks with 32 micro-batches work 3 · 64 chunks each."""
    for engine, compute, fp8, expected in [
        ("fsdp", "bf16", False, waits),
        ("ddp", "fp32", False, waits),
        ("ddp", "bf16", True, waits),
        ("ddp", "bf16", False, waits_without_split),
        ("ddp", "fp16", False, waits_without_split),
    ]:
        parallel = ParallelConfig(engine, pipeline=8, schedule=schedule, fp8=fp8, unproven=True)
        even = Placement(tuple(range(n, n + 1) for n in range(16)), 8, v_shaped=True, costs=(1 / 16,) * 16)
        layout = Mock(config=parallel, placement=even)
        step = Mock(layout=layout, micro_batches=32, compute=DTYPES[compute])
        assert bubble_share(step) == pytest.approx(expected / (192 + expected)), (engine, compute, fp8)


def test_sequences_that_are_shared_are_so_many_tokens_less_for_each() -> None:
    alone, shared = plan(1, "{engine: ddp}"), plan(4, "{engine: ddp, context: 4, unproven: true}")
    recipe = load_recipe("tiny", FIXED)
    assert shared["micro_batches_per_step"] == alone["micro_batches_per_step"]
    length = recipe.data.lengths[0][1]
    assert alone["flops_per_step_and_rank"] == flops_mfu(recipe.model_config_resolved(), length) * 16384
    assert shared["bytes_of_parameters"] == alone["bytes_of_parameters"]
    assert alone["bytes_of_activations"] / 4 < shared["bytes_of_activations"] < alone["bytes_of_activations"]


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_each_of_those_that_share_makes_the_keys_and_values_of_all(recompute: str) -> None:
    """V3, T = 4,096: 61 layers and the MTP module expand latents of 512 into 128 heads of 128 + 128; what is made again for a
    backward pass is not counted, as nowhere."""
    changes = [
        f"parallel.recompute={recompute}",
        "run.device=cpu",
        "schedule={tokens: 1e9, lr: 1e-3, batch_tokens: 1048576}",
    ]
    found = {}
    for context, pipeline in [(1, 1), (8, 1), (1, 2), (8, 2)]:
        parallel = [f"parallel.{name}" for name in (f"context={context}", f"pipeline={pipeline}", "unproven=true")]
        recipe = load_recipe("v3", [*changes, *parallel])
        numbers = Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), 16).numbers()
        tokens = 1048576 * pipeline / 16  # of a rank
        found[context, pipeline] = numbers["flops_per_step_and_rank"] / tokens
    of_others = 7 * 3 * 2 * 512 * 128 * (128 + 128)
    assert found[8, 1] - found[1, 1] == pytest.approx(62 * of_others)
    assert found[8, 1] / found[1, 1] == pytest.approx(1 + 0.168, abs=1e-3)
    layers = recipe.layout(16).placement.layers  # of the 62, 30 on the rank with the heads, which has the most to do
    assert len(layers[1]) == 29 and found[8, 2] - found[1, 2] == pytest.approx(30 * of_others)
