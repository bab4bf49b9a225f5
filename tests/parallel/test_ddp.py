"""What is DDP's own: uneven micro-batches, and a step that is skipped on all ranks together."""

import pytest
import torch

from parallel.layout import ParallelConfig
from tests.devices import DEVICES
from tests.parallel.harness import (
    CONFIG,
    GAMMA,
    LENGTH,
    REFERENCE,
    SEQUENCES,
    SETTINGS,
    STEPS,
    Batch,
    Case,
    build,
    check_equal,
    micro_batches,
    train,
)


@pytest.fixture(scope="module")
def reference(workers):
    return workers.run(1, train, REFERENCE)[0]


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "recompute"),
    [(1, 3, "none"), (2, 8, "selective"), (4, 1, "none")],
)
def test_every_layout_gives_the_reference_answer(workers, reference, world_size, micro_batch, recompute):
    case = Case(ParallelConfig(micro_batch=micro_batch, recompute=recompute))
    check_equal(workers.run(world_size, train, case)[0], reference)


def test_counts_are_those_of_the_global_batch(reference):
    """Every MoE layer sends each of the 16·24 tokens to 3 experts; recomputation and accumulation count none twice."""
    assert reference["counts"].shape == (CONFIG.n_moe_layers, CONFIG.n_routed_experts)
    assert (reference["counts"].sum(-1) == SEQUENCES * LENGTH * 3).all()


def test_a_nan_on_one_rank_skips_the_step_on_all(workers):
    """Step 1 of 0, 1, 2 is poisoned: the run ends where a run of steps 0 and 2 alone would."""
    case = Case(ParallelConfig(micro_batch=3, recompute="selective"), poison=1)
    for run in workers.run(2, train, case):
        assert run["skipped"] == [False, True, False]
        assert len(run["gradients"]) == 2
        assert all(torch.isfinite(tensor).all() for tensor in run["parameters"].values())
        for bias in run["buffers"].values():
            assert ((bias / GAMMA).round().abs() <= 2).all()


def late_and_at_once(device):
    """[steps, 4] numbers of steps that are read after the last is launched, of steps that are waited for, and who skipped."""
    case, found = Case(ParallelConfig(micro_batch=SEQUENCES)), []
    for late in (True, False):
        engine, results = build(case, device), []
        for step in range(STEPS):
            batches = [Batch(*(part.to(device) for part in batch)) for batch in micro_batches(case, step)]
            pending = engine.launch(batches, SETTINGS)
            results.append(pending if late else pending.result())
        results = [pending.result() for pending in results] if late else results
        assert not any(result.skipped for result in results)
        found.append([[r.losses.main, *r.losses.mtp, r.grad_norm, float(r.expert_biases.sum())] for r in results])
    return found


@pytest.mark.parametrize("place", DEVICES)
def test_steps_read_late_are_those_that_are_waited_for(workers, place):
    ((late, at_once),) = workers.run(1, late_and_at_once, place)
    assert len({tuple(step) for step in late}) == STEPS, "each step has numbers of its own"
    torch.testing.assert_close(torch.tensor(late), torch.tensor(at_once), rtol=1e-4, atol=1e-6)
