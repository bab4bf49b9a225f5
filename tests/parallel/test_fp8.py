"""FP8 under every layout: each open combination against one process in FP8 with the whole batch at once.

    pytest tests/parallel/test_fp8.py --write-parity -m "slow or not slow"      writes the last table of parallel/PARITY.md anew

A step in E4M3, and the same step with fp32 in the place of E4M3, everything else (scales, tiles, padding, transposes) as it is.
The second has the tolerance of `test_parity`, 1e-5: it proves the layout. In the first, what is computed of each token alone
(losses, routing, gradients of norms, gates, embedding and head) has the same tolerance. A weight's gradient is a sum over tokens
in tiles of 128, and which tokens share a tile, and hence a scale, is the layout's affair. Rounding a number to 3 bits of mantissa
is off by ε = 2⁻⁴/√3 · √(3/(8 ln 2)) = 0.0265 of it in the root mean square, its mantissa spread evenly on a logarithmic scale. In
two layouts the two factors of a product are rounded by four errors that have nothing to do with one another; by two where the
input is requantised by powers of two, which is exact. So the gradients of two layouts differ by at most √4·ε, in their Frobenius
norms, and these norms, which an error at right angles changes in second order, by half the square of that.

Ranks that share sequences compute parts of the gradient of each latent, and round them before they are summed, where one process
rounds the sum. So below the last attention all gradients have other errors of E4M3 in them. There a run's gradients are held to
what one process is: they may be no further from those without rounding, but for a tenth.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.ops.fp8 import quantize
from model.ops.fp8.kernels import Reference
from model.ops.fp8.quantize import dequantize, quantize_rows
from parallel.expert import AsTheyAre, InFp8, Trip
from parallel.layout import EngineName, ParallelConfig
from parallel.proven import Cell
from tests.parallel.harness import (
    CONFIG,
    SEQUENCES,
    SETTINGS,
    TOLERANCE,
    Case,
    build,
    full_gradients,
    meshes_made_once,
    micro_batches,
    smallest_margin,
    whole,
)
from tests.parallel.test_parity import ZERO3, Row, in_groups, layout_of, of_table, size_of, write_rows

# Rows of one tile and a part of a second, but for the narrow parts of attention.
MODEL = CONFIG.override(
    {
        "hidden_size": 160,
        "intermediate_size": 144,
        "moe_intermediate_size": 144,
        "num_hidden_layers": 2,
        "q_lora_rank": 136,
    }
)
ROUNDING = 2**-4 / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2)))  # ε
OF_GRADIENTS = math.sqrt(4) * ROUNDING  # 0.053
OF_THE_NORM = OF_GRADIENTS**2 / 2  # 0.0014
FURTHER = 1.1  # than one process from the step without rounding

# Each engine in every run; the rest with --thorough.
FAST = {
    "ddp + fp8", "fsdp + expert + fp8 + recompute", "zero1 + expert + fp8", "zero2 + fp8 + recompute", "zero3 + fp8 + recompute",
    "ddp + 1f1b + fp8", "fsdp + dualpipev + expert + fp8 + recompute", "fsdp + context + expert + fp8",
}  # fmt: skip


def row_of(open_cell: Cell) -> Row:
    world_size, config = layout_of(open_cell)
    return Row(world_size, Case(config, model=MODEL), slow=str(open_cell) not in FAST)


ROWS = [row_of(open_cell) for open_cell in sorted(of_table(2), key=str)]


@contextmanager
def without_rounding() -> Iterator[None]:
    """Numbers in fp32 where E4M3 would be."""
    with patch.object(quantize, "E4M3", torch.float32), patch.object(quantize, "_to_float", Tensor.clone):
        yield


def steps(case: Case, contexts: list[str]) -> list[dict[str, Any]]:
    """A step in each of some `CONTEXTS`, as one rank; gradients are whole and not clipped. The weights stay as they are."""
    engine: Any = build(case)
    margins, update = smallest_margin(engine), engine.update
    gradients: dict[str, Tensor] = {}

    def note_gradients(*step: Any) -> None:
        gradients.update(full_gradients(engine, case))
        update(*step)

    engine.update = note_gradients
    history = []
    for context in contexts:
        with CONTEXTS[context]():
            result = engine.step(micro_batches(case, 0), replace(SETTINGS, lr=0.0))
        losses, buffers = result.losses, dict(engine.model.named_buffers())
        history.append(
            {
                "losses": torch.tensor([losses.main, *losses.mtp, losses.balance]),
                "norm": torch.tensor(result.grad_norm),
                "counts": result.expert_counts,
                "biases": {name: (bias / SETTINGS.gamma).round() for name, bias in whole(buffers).items()},
                "gradients": dict(gradients),
                "margin": min(margins),
            }
        )
    return history


def steps_of_all(cases: list[Case], contexts: list[str]) -> list[list[dict[str, Any]]]:
    """`steps` of one case after another in one group."""
    with meshes_made_once():
        return [steps(case, contexts) for case in cases]


def of_products(name: str) -> bool:
    """Whether a weight is multiplied in FP8."""
    return (".self_attn." in name or ".mlp." in name) and "norm" not in name and not name.endswith(".gate.weight")


def relative(found: Tensor, expected: Tensor, order: float = math.inf) -> float:
    """‖Δ‖ / ‖expected‖, by default of the largest elements."""
    gap = torch.linalg.vector_norm(found - expected, order) / torch.linalg.vector_norm(expected, order)
    return float(gap) if gap.isfinite() else math.inf


def compare(
    run: dict[str, Any], reference: dict[str, Any], rounds: bool, exact: dict[str, Any] | None = None
) -> dict[str, float]:
    """Assert that a step gave the reference's answer, within what E4M3 allows if it `rounds`; returns the worst errors.

    exact: the reference without rounding, from which gradients may be as far as the reference is; None: they are held to it.
    """
    pairs = {name: (run["gradients"][name], expected) for name, expected in reference["gradients"].items()}
    worst = {
        "losses": float(((run["losses"] - reference["losses"]) / reference["losses"]).abs().max()),
        "norm": relative(run["norm"], reference["norm"]),
        "products": max(relative(*pair, order=2 if rounds else math.inf) for name, pair in pairs.items() if of_products(name)),
        "others": max(relative(*pair, order=2 if exact else math.inf) for name, pair in pairs.items() if not of_products(name)),
    }  # fmt: skip
    if exact:
        for name, (found, expected) in pairs.items():
            distance, usual = (relative(gradient, exact["gradients"][name], order=2) for gradient in (found, expected))
            assert distance <= FURTHER * usual, (
                f"{name}: {distance:.1e} from the step without rounding, not {usual:.1e}"
            )
    allowed = dict.fromkeys(worst, TOLERANCE) | ({"norm": OF_THE_NORM, "products": OF_GRADIENTS} if rounds else {})
    for kind, error in worst.items():
        if exact and kind in ("products", "others"):
            continue
        assert error <= allowed[kind], f"{kind}: {error:.1e}, smallest routing margin {run['margin']:.1e}: {worst}"
    assert torch.equal(run["counts"], reference["counts"])
    assert all(torch.equal(run["biases"][name], bias) for name, bias in reference["biases"].items())
    return worst


@pytest.fixture(scope="module")
def reference(workers: Any) -> list[dict[str, Any]]:
    """One process, the whole batch at once: in E4M3, and without its rounding."""
    case = Case(ParallelConfig(micro_batch=SEQUENCES, fp8=True), model=MODEL)
    return workers.run(1, steps, case, ["E4M3", "without rounding"])[0]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if request.config.getoption("--write-parity"):
        write_rows(2, rows)


@pytest.mark.parametrize("rows", in_groups("fp8", ROWS))
def test_every_open_layout_gives_the_answer_of_one_process(
    workers: Any, reference: Any, table: Any, rows: list[Row]
) -> None:
    failures = {}
    cases = [row.case for row in rows]
    runs = workers.run(rows[0].world_size, steps_of_all, cases, ["E4M3", "without rounding"])[0]
    for row, (rounded, exact) in zip(rows, runs):
        config = row.case.parallel
        try:
            of_context = reference[1] if config.context > 1 else None
            found = [
                *compare(rounded, reference[0], rounds=True, exact=of_context).values(),
                *compare(exact, reference[1], rounds=False).values(),
            ]
        except AssertionError as error:
            failures[str(row.cell)] = str(error)
            continue
        size = size_of(config, row.world_size // config.pipeline)
        columns = [f"`{row.cell}`", f"{config.pipeline} × {size}" if config.pipeline > 1 else size, config.recompute]
        columns += [f"{error:.0e}" for error in (*found, rounded["margin"])]
        table.append("| " + " | ".join(columns) + " |\n")
    assert not failures, "\n".join(f"{layout}: {failure}" for layout, failure in failures.items())


def test_in_bf16_the_engines_agree_cast_for_cast(workers: Any) -> None:
    """Under fsdp weights come in bf16 to where they are quantised; elsewhere in fp32, and are rounded to bf16 there. With the same
    tokens on the same ranks tiles are the same, so that E4M3's own errors are too."""
    layouts = [ParallelConfig(engine, micro_batch=SEQUENCES // 2, fp8=True) for engine in ("ddp", "fsdp", "zero2")]
    layouts.append(replace(ZERO3, micro_batch=SEQUENCES // 2, fp8=True))
    cases = [Case(layout, compute_dtype=torch.bfloat16, model=MODEL) for layout in layouts]
    expected, *others = [workers.run(2, steps, case, ["E4M3"])[0][0] for case in cases]
    for found in others:
        assert torch.equal(found["losses"], expected["losses"])
        for name, gradient in expected["gradients"].items():
            assert relative(found["gradients"][name], gradient) < TOLERANCE, name


# What does not change a bit -------------------------------------------------------------------------------------------


def differing(run: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same to the bit."""
    found = {**run["gradients"], "losses": run["losses"], "counts": run["counts"]}
    wanted = {**expected["gradients"], "losses": expected["losses"], "counts": expected["counts"]}
    return [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def kept(request: pytest.FixtureRequest, workers: Any) -> tuple[Case, dict[str, Any]]:
    """Experts on two of four ranks, everything kept, rows that travel as they are."""
    parallel = ParallelConfig("fsdp", expert=2, micro_batch=4, fp8=True)
    case = Case(parallel, compute_dtype=request.param, model=MODEL)
    return case, workers.run(4, steps, case, ["E4M3"])[0][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"fp8_dispatch": True},
        pytest.param({"recompute": "selective"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "full"}, marks=pytest.mark.slow),
        {"fp8_dispatch": True, "recompute": "selective"},
        pytest.param({"fp8_dispatch": True, "recompute": "full"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())).replace("True", "dispatch"),
)
def test_neither_fp8_dispatch_nor_recomputation_changes_a_bit(workers: Any, kept: Any, changes: dict[str, Any]) -> None:
    case, expected = kept
    run = workers.run(4, steps, replace(case, parallel=replace(case.parallel, **changes)), ["E4M3"])[0][0]
    assert not differing(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_fp8_dispatch_changes_no_bit_under_deepspeed_either(workers: Any, kept: Any, engine: EngineName) -> None:
    case, _ = kept
    parallel = [replace(case.parallel, engine=engine, fp8_dispatch=dispatch) for dispatch in (False, True)]
    runs = [workers.run(4, steps, replace(case, parallel=p), ["E4M3"])[0][0] for p in parallel]
    assert not differing(*runs)


def with_scales_that_are_no_powers_of_two() -> AbstractContextManager[Any]:
    def pack(self: InFp8, rows: Tensor) -> Tensor:
        return dequantize(quantize_rows(rows, power_of_two=False)).to(rows.dtype)

    return patch.multiple(InFp8, pack=pack, unpack=lambda self, rows: rows)


def with_gradients_in_the_form_of_their_rows() -> AbstractContextManager[Any]:
    """As if E4M3 would do for the gradients of the experts' inputs too."""
    honest = Trip.__init__

    def init(self: Trip, group: Any, send: Any, receive: Any, out: Any, home: Any) -> None:
        honest(self, group, send, receive, out, out)

    return patch.object(Trip, "__init__", init)


CONTEXTS: dict[str, Any] = {
    "E4M3": nullcontext,
    "without rounding": without_rounding,
    "no powers of two": with_scales_that_are_no_powers_of_two,
    "gradients like rows": with_gradients_in_the_form_of_their_rows,
}


def test_a_planted_fault_of_the_dispatch_is_caught(workers: Any) -> None:
    parallel = ParallelConfig("fsdp", expert=2, micro_batch=8, fp8=True, fp8_dispatch=True)
    honest, *faulty = workers.run(2, steps, Case(parallel, model=MODEL), list(CONTEXTS)[:1] + list(CONTEXTS)[2:])[0]
    for run in faulty:
        assert len(differing(run, honest)) > 10


# The form of rows on their way ----------------------------------------------------------------------------------------


def travelled(rows: Tensor) -> Tensor:
    form = InFp8(Reference(), rows.shape[1], rows.dtype)
    message = form.pack(rows)
    assert message.dtype is torch.uint8 and message.shape == (len(rows), rows.shape[1] + -(-rows.shape[1] // 128))
    return form.unpack(message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_as_quantising_left_them_and_quantising_again_finds_the_same_numbers(dtype: torch.dtype) -> None:
    """Rows over 200 binades, tiles whose largest number rounds to half of the range, and subnormals beside a large number."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 300, generator=draw) * torch.randint(-90, 90, (64, 1), generator=draw).float().exp2()
    rows[:8, :128] = rows[:8, :128].clamp(-1, 1) * 225 / 512  # 225 of 448 rounds to 224
    rows[:8, 0] = 225 / 512
    rows[8:16, 1::2] *= 2.0**-12
    rows = rows.to(dtype)
    arrived = travelled(rows)
    once, twice = quantize_rows(rows, True), quantize_rows(arrived, True)
    assert torch.equal(arrived.float(), dequantize(once)) and torch.equal(dequantize(twice), dequantize(once))
    assert torch.equal(twice.scale[:8, 0], once.scale[:8, 0] / 2)
    assert torch.equal(travelled(arrived), arrived)


def test_what_is_not_finite_arrives_so_with_its_tile_alone_and_no_rows_arrive_as_none() -> None:
    rows = torch.ones(3, 256)
    rows[0, 5], rows[1, 200] = math.nan, math.inf
    arrived = travelled(rows)
    assert arrived[0, :128].isnan().all() and arrived[1, 128:].isnan().all()
    assert arrived.isnan().sum() == 256 and travelled(rows[:0]).shape == (0, 256)
    assert AsTheyAre().unpack(rows) is rows
