"""One answer under every layout: each open combination of engine and axes against one process with plain PyTorch.

    pytest tests/parallel/test_parity.py --write-parity -m "slow or not slow"      writes the first table of parallel/PARITY.md anew

Three steps of a model with two MTP depths, node-limited routing and balancing, masked documents, padding that leaves ranks with
unequal numbers of targets, uneven micro-batches, clipping active. The tolerance is 1e-5 of a tensor's largest element, about a
hundred roundings of fp32: sums over 16 · 24 tokens are taken in another order, and three optimizer steps carry the difference on.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import ParallelConfig, cell
from parallel.proven import PROVEN, Cell
from tests.parallel.faults import FAULTS
from tests.parallel.harness import CONFIG, REFERENCE, SEQUENCES, STEPS, Case, check_equal, errors, train

TABLE = Path(__file__).parents[2] / "parallel" / "PARITY.md"
ROW = re.compile(r"^\| `([^`]+)` \|.*\n", re.M)


# A model this small DeepSpeed would gather once and keep whole. So every parameter is cut, and freed as soon as it has been used.
CUT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
}
ZERO3 = ParallelConfig("zero3", micro_batch=3, deepspeed={"zero_optimization": CUT})


def layout_of(open_cell: Cell, recompute: str | None = None) -> tuple[int, ParallelConfig]:
    """Processes and layout for a cell: each axis in use has size 2, and so has the shard that is left."""
    axes = open_cell.axes
    replicate, expert = (2 if axis in axes else 1 for axis in ("replicate", "expert"))
    world_size = 2 * replicate * expert
    modes = {"ddp": "full", "fsdp": "selective" if expert == 2 else "full", "zero1": "selective"}
    offload = {"fsdp": "all", "zero3": "all"}.get(open_cell.engine, "optimizer")
    config = ParallelConfig(
        engine=open_cell.engine,
        replicate=replicate,
        expert=expert,
        micro_batch=max(SEQUENCES // world_size - 1, 1),  # two micro-batches, the second smaller
        recompute=(recompute or modes.get(open_cell.engine, "full")) if "recompute" in axes else "none",
        offload=offload if "offload" in axes else "none",
        fp8="fp8" in axes,
        deepspeed=ZERO3.deepspeed if open_cell.engine == "zero3" else {},
    )
    assert cell(config) == open_cell
    return world_size, config


# Offload and recomputation together: the two are proved apart in every run, together with --thorough.
CELLS = [
    pytest.param(c, marks=[pytest.mark.slow] if {"offload", "recompute"} <= c.axes else [])
    for c in sorted((c for c in PROVEN if "fp8" not in c.axes), key=str)
]

# What the cells do not say: the other recomputation mode, gathered parameters kept, other sizes of each axis.
VARIANTS = [
    (1, ParallelConfig("fsdp", micro_batch=5)),
    (4, ParallelConfig("fsdp", micro_batch=3, reshard_after_forward=False)),
    (4, ParallelConfig("fsdp", micro_batch=3, expert=4, recompute="full")),
    (4, ParallelConfig("fsdp", micro_batch=1, expert=2, replicate=2, reshard_after_forward=False)),
    (8, ParallelConfig("fsdp", micro_batch=1, expert=4, recompute="full", reshard_after_forward=False)),
    (8, ParallelConfig("fsdp", micro_batch=2, expert=8)),
    (4, ParallelConfig("ddp", micro_batch=3, recompute="selective")),
    (4, ParallelConfig("zero1", micro_batch=3, recompute="full")),
    (4, ParallelConfig("zero2", micro_batch=3, recompute="selective")),
    (4, ParallelConfig("zero2", micro_batch=3, expert=4, recompute="full")),
    (8, ParallelConfig("zero1", micro_batch=1, expert=2, recompute="full", offload="optimizer")),
    (4, replace(ZERO3, recompute="selective")),
    (4, replace(ZERO3, offload="optimizer")),
]


@pytest.fixture(scope="module")
def reference(workers: Any) -> dict[str, Any]:
    """One process, the whole batch at once, experts computed by the plain loop."""
    return workers.run(1, train, REFERENCE)[0]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Rows of PARITY.md by layout, written at the end if the command line asks for it."""
    rows: dict[str, str] = {}
    yield rows
    if request.config.getoption("--write-parity"):
        write_rows(rows, fp8=False)


def write_rows(rows: dict[str, str], fp8: bool) -> None:
    """Write one of the tables of PARITY.md anew: that with FP8 or that without."""
    open_cells = {str(open_cell) for open_cell in PROVEN if ("fp8" in open_cell.axes) == fp8}
    assert rows.keys() == open_cells, "run the whole file to write the whole table"
    text = TABLE.read_text("utf-8")
    text = ROW.sub(lambda row: "" if row[1] in open_cells else row[0], text)
    rule = (text.rindex if fp8 else text.index)("\n|---") + 1
    start = text.index("\n", rule) + 1
    TABLE.write_text(text[:start] + "".join(rows[layout] + "\n" for layout in sorted(rows)) + text[start:], "utf-8")


def size_of(config: ParallelConfig, world_size: int) -> str:
    """The processes of a layout, or replicate × expert_shard × expert."""
    if config.engine != "fsdp" and config.expert == 1:
        return str(world_size)
    return f"{config.replicate} × {world_size // config.replicate // config.expert} × {config.expert}"


@pytest.mark.parametrize("open_cell", CELLS, ids=str)
def test_every_open_layout_gives_the_answer_of_one_process(workers, reference, table, open_cell):
    world_size, config = layout_of(open_cell)
    runs = workers.run(world_size, train, Case(config))
    worst = check_equal(runs[0], reference)
    for run in runs[1:]:
        assert run["losses"] == runs[0]["losses"] and run["norms"] == runs[0]["norms"]
    shown = [f"{worst[kind]:.0e}" for kind in ("losses", "norms", "gradients")]
    shown.append(f"{max(worst['exp_avg'], worst['exp_avg_sq']):.0e}")
    shown.append(f"{runs[0]['margin']:.0e}")
    columns = [f"`{open_cell}`", size_of(config, world_size), config.recompute, *shown]
    table[str(open_cell)] = "| " + " | ".join(columns) + " |"


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "config"), VARIANTS)
def test_every_size_and_mode_gives_the_answer_of_one_process(workers, reference, world_size, config):
    check_equal(workers.run(world_size, train, Case(config))[0], reference)


def test_experts_that_ranks_do_not_divide_are_cut_inside(workers):
    """Six experts on four ranks: each rank has a quarter of every expert, none a whole one and padding."""
    six = CONFIG.override({"n_routed_experts": 6, "n_group": 2, "topk_group": 1})
    reference = workers.run(1, train, replace(REFERENCE, model=six))[0]
    run = workers.run(4, train, Case(ParallelConfig("fsdp", micro_batch=3), model=six))[0]
    check_equal(run, reference)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig("fsdp", micro_batch=4, expert=2, recompute="full"),
        ParallelConfig("fsdp", micro_batch=4, expert=2, replicate=2, recompute="selective"),
        ParallelConfig("zero2", micro_batch=4, expert=2, recompute="selective"),
    ],
    ids=["expert + full", "expert + replicate + selective", "zero2 + expert + selective"],
)
def test_half_precision_composes_with_experts_replicas_and_recomputation(workers, reference, config, dtype):
    """Experts see the tokens of two ranks at once, whose gradients DDP rounds apart: the answer is fp32's to the rounding."""
    run = workers.run(4, train, Case(config, compute_dtype=dtype))[0]
    if dtype is torch.float16:
        assert run["skipped"] == [False] * STEPS
    worst = errors(run, reference)
    assert worst["losses"] < 2**-9 and worst["norms"] < 2**-5, worst


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bf16_differs_from_fp32_by_its_rounding_and_not_by_the_engine(workers, reference, world_size):
    """All engines cast at the same places and add in fp32: what bf16 changes, it changes alike under each of them.

    Against fp32, losses are off by less than half a unit in the last place of bf16, 2⁻⁹; some routing decisions turn, so single
    gradients differ by more than rounding, and their norm by a few per cent at most.
    """
    half = [ParallelConfig(engine, micro_batch=SEQUENCES // 2) for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")]
    half.append(ParallelConfig("fsdp", micro_batch=SEQUENCES // 2, recompute="selective", reshard_after_forward=False))
    runs = [workers.run(world_size, train, Case(config, compute_dtype=torch.bfloat16))[0] for config in half]
    for run in runs:
        check_equal(run, runs[0])
        worst = errors(run, reference)
        assert worst["losses"] < 2**-9 and worst["norms"] < 2**-5, worst


def test_the_table_has_a_row_for_every_open_layout_and_no_other(request):
    if request.config.getoption("--write-parity"):
        pytest.skip("the table is being written")
    assert set(ROW.findall(TABLE.read_text("utf-8"))) == {str(open_cell) for open_cell in PROVEN}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(workers, reference, fault):
    if "half" in fault or "mtp" in fault:
        config = ParallelConfig("ddp", micro_batch=3)
    else:
        config = ParallelConfig("fsdp", micro_batch=3, replicate=2 if "replica" in fault else 1, expert=2)
    run = workers.run(4, train, Case(config, fault=fault))[0]
    with pytest.raises(AssertionError):
        check_equal(run, reference)
