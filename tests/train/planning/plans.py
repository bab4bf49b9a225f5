"""Plans to look at."""

from functools import cache
from typing import Any
from unittest.mock import Mock

from parallel.layout import ParallelConfig
from parallel.placement import Placement
from train.config import load_recipe
from train.planning.devices import find_device
from train.planning.plan import Plan
from train.schedule import Schedule

FIXED = ["schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 16384}"]
# Steps of the last and largest batch alone: the first ones do not fill so long a pipeline on so many devices.
V3 = [
    "parallel={engine: fsdp, pipeline: 16, expert: 64, schedule: dualpipev, recompute: selective}",
    "precision.fp8_dispatch=true",
    "schedule.batch_tokens=62914560",
]


def plan_of(name: str, processes: int, device: str | None, *changes: str) -> Plan:
    where = "cpu" if device in (None, "cpu") else "cuda"
    recipe = load_recipe(name, [f"run.device={where}", *changes])
    found = find_device(device) if device else None
    return Plan.of(recipe, Schedule(recipe.schedule, recipe.data.lengths), processes, found)


@cache
def tiny() -> Plan:
    """One process, on nobody knows what."""
    return plan_of("tiny", 1, None, *FIXED)


@cache
def two() -> Plan:
    """A pipeline of two H100."""
    return plan_of("tiny", 2, "H100", *FIXED, "parallel={engine: fsdp, pipeline: 2, schedule: zbv, unproven: true}")


@cache
def v3() -> Plan:
    """DeepSeek-V3's, on 2,048 H800."""
    return plan_of("v3", 2048, "H800", *V3)


def even(schedule: Any, ranks: int, micro_batches: int) -> Mock:
    """A step of a pipeline whose stages cost the same."""
    stages = ranks if schedule == "1f1b" else 2 * ranks
    parallel = ParallelConfig("fsdp", pipeline=ranks, schedule=schedule, unproven=True)
    placed = Placement(tuple(range(n, n + 1) for n in range(stages)), ranks, stages > ranks, (1 / stages,) * stages)
    return Mock(layout=Mock(config=parallel, placement=placed), micro_batches=micro_batches)
