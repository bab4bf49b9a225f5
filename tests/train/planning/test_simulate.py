"""A simulated step has the bytes of a real one, and those that formulas know."""

from functools import partial
from typing import Any

import pytest
import torch

from data.samples import Batch
from model.init import initialize
from parallel.build import build_engine
from parallel.engine import StepSettings
from parallel.footprint import footprint
from parallel.layout import LayoutError
from parallel.recompute import apply_recompute
from tests.small_run import CHANGES
from train.config import load_recipe
from train.optimizer import build_optimizer
from train.planning.devices import find_device
from train.planning.memory import memory_of
from train.planning.simulation.live_bytes import KINDS, StepBytes
from train.planning.simulation.simulate import Asked, Simulation, enough, model_of, simulate, simulate_all
from train.planning.step import PlannedStep
from train.schedule import Schedule

CPU = torch.device("cpu")
LENGTH, SEQUENCES = 32, 16
FSDP, SPREAD = "parallel.engine=fsdp", ("parallel.engine=fsdp", "parallel.expert=2")
ZBV = (FSDP, "parallel.pipeline=2", "parallel.schedule=zbv", "parallel.micro_batch=2")


def planned(processes: int, *changes: str, imbalance: float = 1.0, name: str = "tiny") -> PlannedStep:
    given = {**CHANGES, "schedule.batch_tokens": SEQUENCES * LENGTH, "data.train": "stores/none"}
    small = [f"{key}={value}" for key, value in given.items()] if name == "tiny" else []
    recipe = load_recipe(name, [*small, "parallel.unproven=true", *changes])
    spans = Schedule(recipe.schedule, recipe.data.lengths).spans
    return PlannedStep(recipe, recipe.layout(processes), max(spans, key=lambda span: span.batch_tokens), imbalance)


ASKED = {
    "alone": Asked(planned(1)),
    "ddp": Asked(planned(2, "parallel.micro_batch=4")),
    "fsdp": Asked(planned(2, FSDP, "parallel.micro_batch=4", "precision.compute=bf16")),
    "experts": Asked(planned(4, *SPREAD)),
    "experts, 1.5": Asked(planned(4, *SPREAD, imbalance=1.5)),
    "context": Asked(planned(4, FSDP, "parallel.context=2", "parallel.recompute=selective")),
    "pipeline": Asked(planned(4, *ZBV), 1),
    "pipeline, all micro-batches": Asked(planned(4, *ZBV), 1, 8),
    "overlapped, a GPU's": Asked(
        planned(
            4, *SPREAD, "parallel.pipeline=2", "parallel.schedule=dualpipev", "parallel.micro_batch=1", "run.device=cuda",
            "precision.fp8=true", "precision.moments=bf16",
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Simulation]:
    return dict(zip(ASKED, simulate_all(list(ASKED.values()))))


@pytest.mark.parametrize("name", ASKED)
def test_parameters_and_moments_are_those_of_the_footprint(found, name) -> None:
    step, rank, _ = ASKED[name]
    moments = 2 if step.recipe.precision.moments == "bf16" else 4
    known = footprint(step.layout, step.config, moment_size=moments, pipeline_rank=rank)
    at_peak = found[name].at_peak
    assert tuple(at_peak) == KINDS
    assert sum(at_peak.values()) == found[name].peak
    assert (at_peak["parameters"], at_peak["moments"]) == (known.parameters, known.moments)


@pytest.mark.parametrize("name, processes", [("alone", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_real_step_has_as_many_bytes(workers, found, name, processes) -> None:
    real = workers.run(processes, counted, ASKED[name].step)[0]
    for kind in KINDS:
        assert found[name].at_peak[kind] == pytest.approx(real[kind], rel=0.02, abs=8192), kind


def test_rows_that_arrive_at_the_fullest_rank_take_memory(found) -> None:
    """Half as many again of N·K rows in each MoE layer: at least the rows themselves are kept, in fp32."""
    step = ASKED["experts"].step
    c = step.config
    rows = c.n_moe_layers * step.micro_batch * LENGTH * c.num_experts_per_tok // 2
    more = found["experts, 1.5"].peak - found["experts"].peak
    assert rows * 4 * c.hidden_size <= more <= rows * 4 * (3 * c.hidden_size + 6 * c.moe_intermediate_size)


def test_more_micro_batches_than_fill_a_pipeline_add_their_tokens_alone(found) -> None:
    few, all_of_them = found["pipeline"], found["pipeline, all micro-batches"]
    step = ASKED["pipeline"].step
    assert (few.micro_batches, all_of_them.micro_batches) == (4, 8)
    tokens = 4 * step.micro_batch * (LENGTH + 1 + step.config.num_nextn_predict_layers) * 12  # bytes
    assert 0 <= all_of_them.peak - few.peak <= tokens + 4096


def test_enough_micro_batches_keep_the_rules_of_their_schedule() -> None:
    for schedule, expected in [("1f1b", 8), ("zbv", 8), ("interleaved", 8), ("dualpipev", 8)]:
        layout = planned(
            4, FSDP, "parallel.pipeline=4", f"parallel.schedule={schedule}", "model.num_hidden_layers=8"
        ).layout
        assert enough(layout, 64) == expected
    assert enough(planned(1).layout, 64) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ("parallel.engine=zero2", "parallel.engine = zero2: .* use parallel.engine=fsdp"),
        ("parallel={engine: fsdp, offload: all}", "parallel.offload = all: .* use parallel.offload=none"),
    ],
)
def test_what_cannot_be_simulated_is_refused(change, message) -> None:
    with pytest.raises(LayoutError, match=message):
        simulate(planned(2, change, "parallel.unproven=true"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 15])
def test_v3_on_its_2048_processes(rank) -> None:
    """The layout of the report, §3.1: 16 ranks of a pipeline, experts of a layer on 64 processes, rows in E4M3. It fits an H800."""
    layout = "{engine: fsdp, pipeline: 16, expert: 64, schedule: dualpipev, recompute: selective, micro_batch: 1, unproven: true}"
    step = planned(2048, "run.device=cuda", f"parallel={layout}", "precision.fp8_dispatch=true", name="v3")
    found = simulate(step, rank)
    known = footprint(step.layout, step.config, moment_size=2, pipeline_rank=rank)
    assert (found.at_peak["parameters"], found.at_peak["moments"]) == (known.parameters, known.moments)
    assert found.peak == pytest.approx(memory_of(step, rank).peak, rel=0.05)
    assert found.peak < find_device("H800").usable


def counted(step: PlannedStep) -> dict[str, int]:
    """Bytes by kind at the peak of a real step, of a process of the current group."""
    recipe, layout, config = step.recipe, step.layout, step.config.at_length(LENGTH)
    with torch.device("meta"):
        model = model_of(step)
    apply_recompute(model, layout.config.recompute)
    optimizer = partial(build_optimizer, settings=recipe.optimizer, moments=recipe.precision.moments)
    engine: Any = build_engine(
        layout, model, CPU, lambda model, write: initialize(model, 0, CPU, write), optimizer, recipe.optimizer.clip
    )
    engine.model.set_positions(config)
    size = step.micro_batch, LENGTH + 1 + config.num_nextn_predict_layers
    settings = StepSettings(lr=1e-4, gamma=1e-3, alpha=1e-4, lambda_=0.3, batch=SEQUENCES)
    live = StepBytes(engine)
    with live.watching():
        for _ in range(3):  # in its second step DDP fills its buckets anew
            batches = [
                Batch(torch.randint(config.vocab_size, size), torch.zeros(size, dtype=torch.int32))
                for _ in range(step.micro_batches)
            ]
            live.start()
            engine.launch(batches, settings)
    return live.at_peak()
