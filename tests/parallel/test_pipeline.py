"""What a pipeline does besides giving the right answer, which is the affair of `test_parity`."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.distributed.pipelining.stage import _PipelineStageBase

from model.ops.fp8.kernels import Reference
from model.transformer import Transformer
from parallel.layout import Layout, ParallelConfig
from parallel.parts import EMBEDDING, keep_parts, parts_of
from parallel.pipeline import Stage
from parallel.placement import V_SHAPED, Schedule
from tests.parallel.harness import CONFIG, LENGTH, SETTINGS, Batch, Case, build
from tests.parallel.traffic_counter import TrafficCounter

DEEP = CONFIG.override({"num_hidden_layers": 6})
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def layout_of(schedule: Schedule, ranks: int) -> Layout:
    return Layout(ParallelConfig(pipeline=ranks, schedule=schedule, unproven=True), ranks, DEEP, (LENGTH,))


def model_on(layout: Layout, rank: int) -> Transformer:
    """What a rank keeps of the model."""
    with torch.device("meta"):
        model = Transformer(DEEP, fp8=Reference())
    parts = parts_of(layout)
    keep_parts(model, [parts[stage] for stage in layout.placement.stages_of(rank)])
    return model


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_rank_holds_its_own_layers_and_no_others(schedule: Schedule, ranks: int) -> None:
    layout = layout_of(schedule, ranks)
    placement = layout.placement
    with torch.device("meta"):
        whole = Transformer(DEEP, fp8=Reference())
    last = placement.rank_of(len(placement.layers) - 1)
    ends = {"model.norm": {last}, "lm_head": {last}, "model.embed_tokens": {placement.rank_of(0), last}}
    homes = {layer: {placement.rank_of(stage)} for stage, layers in enumerate(placement.layers) for layer in layers}
    homes |= {layer: {last} for layer in range(DEEP.num_hidden_layers, len(whole.model.layers))}

    def ranks_with(name: str) -> set[int]:
        return homes[int(name.split(".")[2])] if ".layers." in name else ends[name.removesuffix(".weight")]

    held = 0
    for rank in range(ranks):
        model = model_on(layout, rank)
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert found.keys() == {n for n in whole.state_dict() if rank in ranks_with(n)}
        assert list(model.fp8) == [name for name in whole.fp8 if rank in ranks_with(name)]
        assert model.fp8_names == whole.fp8_names
        held += sum(p.numel() for p in model.parameters())
    twice = 0 if schedule in V_SHAPED else whole.model.embed_tokens.weight.numel()
    assert held == sum(p.numel() for p in whole.parameters()) + twice


# Steps of two ranks: sequences of a step, in one micro-batch, and their length.
STEPS = [(8, 2, 24), (7, 2, 24), (6, 1, 16), (8, 2, 32), (7, 2, 24)]


def take_steps(case: Case) -> dict[str, Any]:
    """Steps of different numbers and sizes of micro-batches and lengths, as one rank; all ranks read the same sequences."""
    engine: Any = build(case)
    found: dict[str, Any] = {"numbers": [], "sent": [], "reduced": [], "left": 0}
    for step, (sequences, size, length) in enumerate(STEPS):
        generator = torch.Generator().manual_seed(step)
        width = length + 1 + CONFIG.num_nextn_predict_layers
        tokens = torch.randint(CONFIG.vocab_size, (sequences, width), generator=generator)
        documents = (torch.rand(sequences, width, generator=generator) < 0.1).cumsum(1).int()
        batches = [Batch(*parts) for parts in zip(tokens.split(size), documents.split(size))]
        with TrafficCounter() as counter:
            result = engine.step(batches, replace(SETTINGS, batch=sequences))
        found["numbers"].append([result.losses.main, *result.losses.mtp, result.losses.balance, result.grad_norm])
        found["sent"].append([call.whole for call in counter.calls if call.collective == "send"])
        found["reduced"].append(sum(c.collective == "all_reduce" and c.ranks > 1 for c in counter.calls))
    named = engine.model.named_parameters(remove_duplicate=False)
    found["embedding"] = {name: parameter.tolist() for name, parameter in named if "embed" in name}
    if engine.pipeline is not None:
        found["left"] = sum(map(len, unfinished(engine.pipeline)))
    return found


def unfinished(pipeline: Any) -> list[Any]:
    """What the stages of all schedules that have run hold of chunks."""
    stages = [stage for stages, _ in pipeline.schedules.values() for stage in stages]
    kinds = ("incoming", "under_way", "of_outgoing", "of_incoming", "later")
    return [getattr(stage, kind) for stage in stages for kind in kinds]


@pytest.fixture(scope="module")
def alone(workers: Any) -> dict[str, Any]:
    return workers.run(1, take_steps, Case(experts="reference"))[0]


@pytest.fixture(scope="module")
def by_schedule(workers: Any) -> dict[str, list[dict[str, Any]]]:
    """Of both ranks under each schedule."""
    cases = [Case(ParallelConfig(pipeline=2, schedule=schedule)) for schedule in SCHEDULES]
    return dict(zip(SCHEDULES, zip(*workers.run(2, take_steps_of_all, cases))))


def take_steps_of_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [take_steps(case) for case in cases]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_may_differ_in_number_size_and_length_from_step_to_step(by_schedule, alone, schedule):
    for rank in by_schedule[schedule]:
        torch.testing.assert_close(torch.tensor(rank["numbers"]), torch.tensor(alone["numbers"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_states_and_their_gradients_travel_and_nothing_else(by_schedule, schedule):
    """B·T·D numbers for each micro-batch and boundary between ranks, forward and backward; none where a rank's stages meet."""
    boundaries = {"1f1b": 1, "interleaved": 3, "zbv": 2, "dualpipev": 2}[schedule]
    ranks = by_schedule[schedule]
    for step, (sequences, size, length) in enumerate(STEPS):
        sizes = [min(size, sequences - first) for first in range(0, sequences, size)]
        expected = sorted(2 * boundaries * [4 * batch * length * CONFIG.hidden_size for batch in sizes])
        # Before its first step a schedule sends a number between neighbours, for NCCL's sake.
        states = sorted(sent for rank in ranks for sent in rank["sent"][step] if sent > 4)
        assert states == expected


def test_nothing_is_left_of_a_chunk_after_a_step(by_schedule):
    assert all(rank["left"] == 0 for ranks in by_schedule.values() for rank in ranks)


def test_a_v_shaped_pipeline_has_one_embedding_where_others_sum_two(by_schedule):
    reductions = {s: ranks[0]["reduced"] for s, ranks in by_schedule.items()}
    for schedule in SCHEDULES:
        first, last = (rank["embedding"] for rank in by_schedule[schedule])
        assert first.keys() == {EMBEDDING} and last == ({} if schedule in V_SHAPED else first)
        expected = [number - (schedule in V_SHAPED) for number in reductions["1f1b"]]
        assert reductions[schedule] == expected


def test_what_a_stage_overrides_is_what_pytorch_calls():
    """A hook that another release calls otherwise would leave PyTorch's own in its place."""
    own = {"begin", "end", "_receive", "_await", "_send", "_transfer"}
    hooks = {name for name, value in vars(Stage).items() if callable(value) and not name.startswith("__")} - own
    assert len(hooks) >= 15 and all(hasattr(_PipelineStageBase, name) for name in hooks), hooks
