"""The bytes that a plan says of a process against the engine's own step: on tensors without memory, and in real processes."""

from dataclasses import replace
from typing import Any

import pytest

from parallel.footprint import footprint
from parallel.layout import Layout, ParallelConfig
from parallel.peak import forward_pass, fullest, moments_of
from tests.parallel.harness import CONFIG, LENGTH, SEQUENCES, SETTINGS, Case, build, micro_batches
from train.config import load_recipe
from train.planning.memory import memory_of
from train.planning.plan import Plan
from train.planning.simulation.live_bytes import StepBytes
from train.planning.simulation.simulate import Asked, simulate_all
from train.planning.step import PlannedStep
from train.schedule import Schedule

# Large enough that vectors of a few bytes do not count.
MODEL = replace(CONFIG, vocab_size=768, hidden_size=128, intermediate_size=384, moe_intermediate_size=96, num_attention_heads=4,
                kv_lora_rank=48, q_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32)  # fmt: skip


def step_of(recipe: str, processes: int, parallel: str, *others: str, imbalance: float = 1.0) -> PlannedStep:
    read = load_recipe(recipe, [f"parallel={{{parallel}, unproven: true}}", *others])
    return Plan.of(read, Schedule(read.schedule, read.data.lengths), processes, imbalance=imbalance).step


def test_a_simulated_step_holds_what_is_counted() -> None:
    """Within 5 %. The last is on GPUs, in bf16, with 4 expert ranks, the fullest of which gets 1.2 times the mean."""
    small = "schedule={tokens: 1e6, lr: 1e-3, batch_tokens: 16384}"
    on_cpu, on_gpu = ("run.device=cpu", small), ("run.device=cuda", small)
    steps = [
        step_of("tiny", 2, "engine: fsdp, micro_batch: 4", *on_cpu),
        step_of("tiny", 4, "engine: fsdp, replicate: 2, micro_batch: 4, reshard_after_forward: false", *on_cpu),
        step_of("tiny", 2, "engine: ddp, pipeline: 2, schedule: zbv, micro_batch: 4", *on_cpu),
        step_of("tiny", 8, "engine: fsdp, expert: 4, micro_batch: 8", *on_gpu, imbalance=1.2),
    ]
    for step, simulated in zip(steps, simulate_all([Asked(step) for step in steps])):
        assert memory_of(step).peak == pytest.approx(simulated.peak, rel=0.05), step.layout.config


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig("ddp", micro_batch=4),
        ParallelConfig("fsdp", micro_batch=4),
        ParallelConfig("fsdp", pipeline=2, schedule="1f1b", micro_batch=4),
    ],
    ids=["ddp", "fsdp", "fsdp, 1f1b"],
)
def test_two_processes_hold_what_is_counted(workers: Any, parallel: ParallelConfig) -> None:
    """Within 10 %."""
    layout = Layout(parallel, 2, MODEL, (LENGTH,))
    forward = forward_pass(layout, sequence_length=LENGTH, micro_batch=parallel.micro_batch, element_size=4)
    number = SEQUENCES // layout.data_ranks // parallel.micro_batch
    for rank, measured in enumerate(workers.run(2, most_alive, Case(parallel, model=MODEL))):
        pipeline_rank = rank // layout.stage_ranks
        held = footprint(layout, MODEL, micro_batches=number, pipeline_rank=pipeline_rank)
        most = fullest(moments_of(layout, MODEL, forward, 4, number, pipeline_rank))
        assert held.parameters + held.moments + most.all == pytest.approx(measured, rel=0.1), most.when


def most_alive(case: Case) -> int:
    """As one rank: bytes that live at most in the third step."""
    engine: Any = build(case)
    batches, live = micro_batches(case, 0), StepBytes(engine)
    engine.step(batches, SETTINGS)
    with live.watching():
        engine.step(batches, SETTINGS)
        live.start()
        engine.step(batches, SETTINGS)
    return live.peak(set()).everything
