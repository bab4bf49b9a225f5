"""One answer under every layout: each open combination of engine and axes against one process with plain PyTorch.

    pytest tests/parallel/test_parity.py --write-parity -m "slow or not slow"      writes the tables of PARITY.md but that in FP8

A few steps of a model with MTP, node-limited routing and balancing, padding that leaves ranks with unequal numbers of targets,
uneven micro-batches, clipping active. The tolerance is 1e-5 of a tensor's largest element, about a hundred roundings of fp32: sums
over 16 · 24 tokens are taken in another order, and the optimizer's steps carry the difference on.

Rows that need equally many processes are trained one after the other by the same ones: making process groups takes longer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch

from model.config import ModelConfig
from parallel.layout import Layout, ParallelConfig, cell
from parallel.placement import Schedule
from parallel.proven import PROVEN, Cell
from tests.parallel.faults import EVERYWHERE, OF_PIPELINES, OF_SHARED_SEQUENCES
from tests.parallel.harness import (
    CONFIG,
    REFERENCE,
    SEQUENCES,
    STEPS,
    Case,
    check_equal,
    errors,
    reference_of,
    train,
    train_all,
)

TABLE = Path(__file__).parents[2] / "parallel" / "PARITY.md"
TABLES = ("# Layouts that give the answer of one process", "## Pipelines and shared sequences", "## In FP8")  # headings
ROW = re.compile(r"^\| `([^`]+)` \|.*\n", re.M)


class Row(NamedTuple):
    """A layout to be compared."""

    world_size: int
    case: Case
    slow: bool = False  # with --thorough only

    @property
    def cell(self) -> Cell:
        return cell(self.case.parallel)


def of_table(table: int) -> set[Cell]:
    """The cells whose rows stand in one of the `TABLES`."""
    return {open_cell for open_cell in PROVEN if _table_of(open_cell) == table}


def _table_of(open_cell: Cell) -> int:
    return 2 if "fp8" in open_cell.axes else 1 if open_cell.axes & {"context", *get_args(Schedule)} else 0


# A model this small DeepSpeed would gather once and keep whole. So every parameter is cut, and freed as soon as it has been used.
CUT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
}
ZERO3 = ParallelConfig("zero3", micro_batch=3, deepspeed={"zero_optimization": CUT})


def layout_of(open_cell: Cell, sequences: int = SEQUENCES) -> tuple[int, ParallelConfig]:
    """Processes and layout for a cell: each axis in use has size 2, and so has the shard that is left; a sequence is shared by
    ranks that share parameters or experts too, and so are the layers of a stage."""
    axes = open_cell.axes
    schedule = next((s for s in get_args(Schedule) if s in axes), None)
    pipeline, replicate, expert, context = (
        2 if used else 1 for used in (schedule, "replicate" in axes, "expert" in axes, "context" in axes)
    )
    world_size = pipeline * replicate * (expert if pipeline * expert == 4 else 2 * expert)
    modes = {"ddp": "full", "fsdp": "selective" if expert == 2 else "full", "zero1": "selective"}
    offload = {"fsdp": "all", "zero3": "all"}.get(open_cell.engine, "optimizer")
    config = ParallelConfig(
        engine=open_cell.engine,
        replicate=replicate,
        expert=expert,
        pipeline=pipeline,
        schedule=schedule or "1f1b",
        context=context,
        recompute=modes.get(open_cell.engine, "full") if "recompute" in axes else "none",
        offload=offload if "offload" in axes else "none",
        fp8="fp8" in axes,
        deepspeed=ZERO3.deepspeed if open_cell.engine == "zero3" else {},
    )
    assert cell(config) == open_cell
    return world_size, replace(config, micro_batch=micro_batch_of(config, world_size, sequences))


def micro_batch_of(config: ParallelConfig, world_size: int, sequences: int) -> int:
    """The largest that lets the last micro-batch of a step be smaller, or else the largest: two, or enough for a pipeline."""
    share = sequences // Layout(replace(config, unproven=True), world_size).data_ranks
    chunks = max(4, config.stages) if config.pipeline > 1 else 2
    sizes = [size for size in range(1, share) if -(-share // size) >= chunks] or [1]
    return max(sizes, key=lambda size: (share % size > 0, size))


def plain_row(open_cell: Cell) -> Row:
    """Offload and recomputation together: the two are proved apart in every run, together with --thorough."""
    world_size, config = layout_of(open_cell)
    return Row(world_size, Case(config), slow={"offload", "recompute"} <= open_cell.axes)


# Pipelines and shared sequences ---------------------------------------------------------------------------------------

ONE_DEPTH = CONFIG.override({"num_nextn_predict_layers": 1})
DEEP = ONE_DEPTH.override({"num_hidden_layers": 6})  # so that each of 8 stages has one but the first and the last
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def shared_row(
    world_size: int,
    model: ModelConfig = CONFIG,
    mask_documents: bool = True,
    slow: bool = False,
    **parallel: Any,
) -> Row:
    """Two steps, of as many sequences as give each data rank a last micro-batch that is smaller."""
    config = ParallelConfig(**parallel)
    ranks = Layout(replace(config, unproven=True), world_size).data_ranks
    sequences = 15 * ranks if config.stages > 4 else 7 * max(ranks, 2)
    config = replace(config, micro_batch=micro_batch_of(config, world_size, sequences))
    case = Case(config, model=model, mask_documents=mask_documents, sequences=sequences, steps=2)
    return Row(world_size, case, slow)


def shared_rows_of_every_run() -> Iterator[Row]:
    for schedule in SCHEDULES:
        yield shared_row(2, ONE_DEPTH, engine="ddp", pipeline=2, schedule=schedule)
        yield shared_row(4, engine="fsdp", pipeline=2, schedule=schedule)
        yield shared_row(4, ONE_DEPTH, engine="fsdp", expert=2, pipeline=2, schedule=schedule)
    for engine in ("ddp", "fsdp"):
        yield shared_row(2, context=2, engine=engine)
        yield shared_row(4, mask_documents=False, context=4, engine=engine)
    yield shared_row(4, DEEP, engine="ddp", pipeline=4, schedule="dualpipev")
    yield shared_row(4, engine="fsdp", pipeline=2, schedule="zbv", recompute="selective")
    yield shared_row(4, engine="fsdp", expert=2, pipeline=2, schedule="dualpipev", recompute="selective")
    yield shared_row(4, engine="fsdp", expert=2, pipeline=2, context=2, schedule="dualpipev")
    yield shared_row(4, ONE_DEPTH, engine="fsdp", expert=2, pipeline=2, context=2, schedule="zbv", recompute="full")
    yield shared_row(4, engine="fsdp", replicate=2, pipeline=2)
    yield shared_row(4, engine="fsdp", replicate=2, context=2)
    for engine in ("zero1", "zero2", "zero3"):
        yield shared_row(2, context=2, engine=engine, deepspeed=ZERO3.deepspeed if engine == "zero3" else {})


def shared_rows_of_thorough_runs(done: set[Cell]) -> Iterator[Row]:
    for open_cell in sorted(of_table(1) - done, key=str):
        world_size, config = layout_of(open_cell)
        yield shared_row(world_size, slow=True, **vars(config))
    for schedule in SCHEDULES:
        yield shared_row(4, slow=True, engine="ddp", pipeline=2, schedule=schedule)
        yield shared_row(4, ONE_DEPTH, slow=True, engine="fsdp", pipeline=2, schedule=schedule)
        yield shared_row(4, slow=True, engine="fsdp", expert=2, pipeline=2, schedule=schedule)
        for engine in ("ddp", "fsdp"):
            if (engine, schedule) != ("ddp", "dualpipev"):
                yield shared_row(4, DEEP, slow=True, engine=engine, pipeline=4, schedule=schedule)
        deep = {"engine": "fsdp", "expert": 2, "pipeline": 4, "recompute": "selective"}
        yield shared_row(8, DEEP, slow=True, schedule=schedule, **deep)
        yield shared_row(8, slow=True, engine="fsdp", expert=2, pipeline=2, schedule=schedule)
        yield shared_row(8, ONE_DEPTH, False, True, engine="fsdp", expert=2, pipeline=2, context=4, schedule=schedule)
    yield shared_row(4, DEEP, slow=True, engine="ddp", pipeline=2, schedule="interleaved", stages_per_rank=3)
    for engine in ("ddp", "fsdp"):
        yield shared_row(4, mask_documents=False, slow=True, context=2, engine=engine)
        yield shared_row(4, slow=True, context=4, engine=engine)
    for context, masked in product((2, 4), (True, False)):
        yield shared_row(8, mask_documents=masked, slow=True, engine="fsdp", expert=4, context=context)


PLAIN = [plain_row(open_cell) for open_cell in sorted(of_table(0), key=str)]
SHARED = list(shared_rows_of_every_run())
SHARED += shared_rows_of_thorough_runs({row.cell for row in SHARED})


# The comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_for(workers: Any) -> Callable[[Case], dict[str, Any]]:
    """One process, the whole batch at once, experts computed by the plain loop: the same steps as those of a case."""
    made: dict[str, dict[str, Any]] = {}

    def reference_for(case: Case) -> dict[str, Any]:
        alone = reference_of(case)
        if repr(alone) not in made:
            made[repr(alone)] = workers.run(1, train, alone)[0]
        return made[repr(alone)]

    return reference_for


@pytest.fixture(scope="module")
def reference(reference_for: Any) -> dict[str, Any]:
    return reference_for(REFERENCE)


@pytest.fixture(scope="module")
def tables(request: pytest.FixtureRequest) -> Iterator[list[list[str]]]:
    """Rows of the first two tables of PARITY.md, written at the end if the command line asks for it."""
    rows: list[list[str]] = [[], []]
    yield rows
    if request.config.getoption("--write-parity"):
        for table, found in enumerate(rows):
            write_rows(table, found)


def write_rows(table: int, rows: Sequence[str]) -> None:
    """Write one of the tables of PARITY.md anew."""
    wanted = {str(open_cell) for open_cell in of_table(table)}
    assert set(ROW.findall("".join(rows))) == wanted, "run the whole file to write the whole table"
    text = TABLE.read_text("utf-8")
    rule = text.index("\n|---", text.index(TABLES[table] + "\n")) + 1
    start = text.index("\n", rule) + 1
    end = start
    while text.startswith("|", end):
        end = text.index("\n", end) + 1
    TABLE.write_text(text[:start] + "".join(sorted(rows, key=_order)) + text[end:], "utf-8")


def in_groups(name: str, rows: Sequence[Row], most: int = 12) -> list[Any]:
    """Rows that can be trained one after the other by the same processes, as parameters of a test."""
    groups = []
    for (slow, world_size, library), found in groupby(sorted(rows, key=_group), key=_group):
        same = list(found)
        parts = [same[start : start + most] for start in range(0, len(same), most)]
        marks = [pytest.mark.slow] if slow else []
        groups += [
            pytest.param(part, marks=marks, id=f"{name}, {library} on {world_size}, {n}")
            for n, part in enumerate(parts)
        ]
    return groups


def _group(row: Row) -> tuple[bool, int, str]:
    engine = row.case.parallel.engine
    return row.slow, row.world_size, "zero" if engine.startswith("zero") else "torch"


def _order(row: str) -> tuple[str, str]:
    return row.split("`")[1], row


def size_of(config: ParallelConfig, world_size: int) -> str:
    """The processes of a layout, or replicate × expert_shard × expert."""
    if config.engine != "fsdp" and config.expert == 1:
        return str(world_size)
    return f"{config.replicate} × {world_size // config.replicate // config.expert} × {config.expert}"


def columns_of(row: Row) -> list[str]:
    """What a row of a table says before its errors."""
    case, c = row.case, row.case.parallel
    if _table_of(row.cell) == 0:
        return [f"`{row.cell}`", size_of(c, row.world_size), c.recompute]
    layout = Layout(c, row.world_size)
    sizes = (c.pipeline, c.replicate, layout.stage_ranks // c.replicate // c.expert, c.expert)
    return [
        f"`{row.cell}`",
        " × ".join(map(str, sizes)),
        str(c.context),
        str(c.stages),
        str(case.model.num_nextn_predict_layers),
        "masked" if case.mask_documents else "open",
        f"{case.sequences // layout.data_ranks} by {c.micro_batch}",
        c.recompute,
        "thorough" if row.slow else "every",
    ]


@pytest.mark.parametrize("rows", in_groups("plain", PLAIN) + in_groups("shared", SHARED))
def test_every_open_layout_gives_the_answer_of_one_process(workers, reference_for, tables, rows):
    failures = {}
    by_rank = workers.run(rows[0].world_size, train_all, [row.case for row in rows])
    for row, runs in zip(rows, zip(*by_rank)):
        columns = columns_of(row)
        try:
            worst = check_equal(runs[0], reference_for(row.case))
            for run in runs[1:]:
                assert run["losses"] == runs[0]["losses"] and run["norms"] == runs[0]["norms"]
        except AssertionError as error:
            failures[" ".join(columns)] = str(error)
            continue
        columns += [f"{worst[kind]:.0e}" for kind in ("losses", "norms", "gradients")]
        columns.append(f"{max(worst['exp_avg'], worst['exp_avg_sq']):.0e}")
        columns.append(f"{runs[0]['margin']:.0e}")
        tables[_table_of(row.cell)].append("| " + " | ".join(columns) + " |\n")
    assert not failures, "\n".join(f"{layout}: {failure}" for layout, failure in failures.items())


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


def faulty_row(fault: str) -> Row:
    """A layout in which the fault makes a difference."""
    if fault in OF_PIPELINES:
        copies = fault == "the_copy_of_the_embedding_left_alone"
        return shared_row(4, engine="fsdp", pipeline=2, schedule="1f1b" if copies else "zbv")
    if fault in OF_SHARED_SEQUENCES:
        return shared_row(2, engine="fsdp", context=2)
    if "half" in fault or "of_mtp" in fault:
        return Row(4, Case(ParallelConfig("ddp", micro_batch=3), steps=2))
    replicate = 2 if "replica" in fault else 1
    return Row(4, Case(ParallelConfig("fsdp", micro_batch=3, replicate=replicate, expert=2), steps=2))


def is_caught(run: dict[str, Any], reference: dict[str, Any]) -> bool:
    try:
        check_equal(run, reference)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("faults", [EVERYWHERE, OF_PIPELINES, OF_SHARED_SEQUENCES], ids=["any", "pipeline", "context"])
def test_planted_faults_are_caught(workers, reference_for, faults):
    rows = {fault: faulty_row(fault) for fault in faults}
    (world_size,) = {row.world_size for row in rows.values()}
    runs = workers.run(world_size, train_all, [replace(row.case, fault=fault) for fault, row in rows.items()])[0]
    for (fault, row), run in zip(rows.items(), runs):
        assert is_caught(run, reference_for(row.case)), fault
