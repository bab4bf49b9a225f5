"""Layouts: what is refused and with which words, and the arithmetic of those that are not."""

import itertools
import json
import random
from dataclasses import replace
from typing import Any, get_args

import pytest

from model.config import ModelConfig, load_preset
from model.flops import Recompute
from parallel import layout as layout_module
from parallel.layout import EngineName, Layout, LayoutError, Offload, ParallelConfig, cell, nearest
from parallel.proven import PROVEN, Cell
from parallel.timeline import order_of
from tests.small_model import small_config

V2_LITE = ModelConfig.from_hf(load_preset("v2-lite"))  # 64 experts; D = 2048, F = 1408
SMALL = small_config()  # 12 experts; D = 48, F = 24
DENSE = small_config(first_k_dense_replace=3, num_nextn_predict_layers=0)


def refusal(world_size: int, model: ModelConfig | None = V2_LITE, **parallel: Any) -> str:
    with pytest.raises(LayoutError) as caught:
        Layout(ParallelConfig(**parallel), world_size, model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "world_size", "line"),
    [
        # the number of processes
        ({"expert": 3}, 8, "expert = 3: does not divide 8 processes; use parallel.expert=4 or parallel.expert=2"),
        (
            {"replicate": 3},
            8,
            "replicate = 3: does not divide 8 processes; use parallel.replicate=4 or parallel.replicate=2 or 6 processes",
        ),
        (
            {"replicate": 16, "expert": 16},
            64,
            "expert = 16: does not divide the 4 processes of each of 16 copies; use parallel.expert=4 or parallel.replicate=4 or "
            "parallel.expert=2 or 256 processes",
        ),
        ({"expert": 2}, 7, "expert = 2: does not divide 7 processes; use parallel.expert=1 or 8 processes"),
        ({"expert": 2}, 1, "expert = 2: does not divide 1 process; use parallel.expert=1 or 2 processes"),
        (
            {"replicate": 5},
            7,
            "replicate = 5: does not divide 7 processes; use parallel.replicate=7 or parallel.replicate=1 or 5 processes",
        ),
        # the model
        (
            {"expert": 128},
            128,
            "expert = 128: does not divide model.n_routed_experts = 64; use parallel.expert=64 or parallel.expert=32",
        ),
        (
            {"expert": 2},
            24,
            "expert = 2: each expert is spread over 12 processes, which do not divide model.hidden_size = 2048; "
            "use parallel.engine=zero2 or parallel.engine=zero1 or parallel.expert=1",
        ),
        (
            {"expert": 5},
            60,
            "expert = 5: does not divide model.n_routed_experts = 64; use parallel.expert=1",
        ),
        # the engine
        (
            {"offload": "optimizer"},
            8,
            "offload = optimizer: fsdp offloads parameters and optimizer together; use parallel.offload=all or "
            "parallel.engine=zero3 or parallel.engine=zero2",
        ),
        (
            {"engine": "zero3", "expert": 2},
            8,
            "expert = 2: fsdp, zero1 and zero2 spread experts, zero3 does not; use parallel.engine=zero2 or "
            "parallel.engine=zero1 or parallel.expert=1",
        ),
        (
            {"engine": "ddp", "expert": 4},
            8,
            "expert = 4: fsdp, zero1 and zero2 spread experts, ddp does not; use parallel.engine=fsdp or "
            "parallel.engine=zero1 or parallel.expert=1",
        ),
        (
            {"engine": "ddp", "expert": 3},
            8,
            "expert = 3: fsdp, zero1 and zero2 spread experts, ddp does not; use parallel.engine=fsdp "
            "parallel.expert=4 or parallel.engine=fsdp parallel.expert=2 or parallel.expert=1",
        ),
        (
            {"engine": "ddp", "replicate": 2},
            8,
            "replicate = 2: belongs to fsdp; ddp has a copy on every process; use parallel.engine=fsdp or parallel.replicate=1",
        ),
        (
            {"engine": "zero2", "reshard_after_forward": False},
            8,
            "reshard_after_forward = false: belongs to fsdp, not to zero2; use parallel.engine=fsdp or "
            "parallel.reshard_after_forward=null",
        ),
        (
            {"engine": "ddp", "offload": "optimizer"},
            8,
            "offload = optimizer: ddp keeps everything on its device; use parallel.engine=fsdp parallel.offload=all or "
            "parallel.engine=zero1 or parallel.engine=zero2",
        ),
        (
            {"engine": "zero1", "offload": "all"},
            8,
            "offload = all: zero1 keeps whole parameters on every device; only its optimizer can go; use "
            "parallel.offload=optimizer or parallel.engine=zero3 or parallel.engine=fsdp",
        ),
        (
            {"deepspeed": {"comms_logger": {"enabled": True}}},
            8,
            "deepspeed = {comms_logger}: belongs to zero1, zero2 and zero3, not to fsdp; use parallel.engine=zero3 or "
            "parallel.engine=zero2 or parallel.deepspeed=null",
        ),
        # a pipeline, and shared sequences
        (
            {"pipeline": 3},
            8,
            "pipeline = 3: does not divide 8 processes; use parallel.pipeline=4 or parallel.pipeline=2 or 6 processes",
        ),
        (
            {"pipeline": 2, "context": 8},
            8,
            "context = 8: does not divide 4 processes of each of 2 pipeline ranks; use parallel.context=4 or parallel.context=2 or "
            "parallel.pipeline=1 or 16 processes",
        ),
        (
            {"pipeline": 2, "expert": 8},
            8,
            "expert = 8: does not divide 4 processes of each of 2 pipeline ranks; use parallel.expert=4 or parallel.expert=2 or "
            "parallel.pipeline=1 or 16 processes",
        ),
        (
            {"engine": "zero1", "pipeline": 2},
            8,
            "pipeline = 2: ddp and fsdp spread layers, zero1 does not; use parallel.engine=ddp or parallel.engine=fsdp or "
            "parallel.pipeline=1",
        ),
        (
            {"pipeline": 2, "offload": "all"},
            8,
            "offload = all: under a pipeline parameters and optimizer stay on the device; use parallel.pipeline=1 or "
            "parallel.offload=none",
        ),
        (
            {"pipeline": 2, "reshard_after_forward": True},
            8,
            "reshard_after_forward = true: under a pipeline several micro-batches are under way, and parameters stay gathered for "
            "all of them; use parallel.pipeline=1 or parallel.reshard_after_forward=null",
        ),
        (
            {"schedule": "zbv"},
            8,
            "schedule = zbv: is for a parallel.pipeline above 1; use parallel.schedule=1f1b or parallel.pipeline=2 or "
            "parallel.pipeline=4",
        ),
        (
            {"pipeline": 2, "stages_per_rank": 2},
            8,
            "stages_per_rank = 2: 1f1b has one stage a rank; use parallel.stages_per_rank=null or parallel.schedule=interleaved or "
            "parallel.schedule=zbv",
        ),
        (
            {"pipeline": 2, "schedule": "dualpipev", "stages_per_rank": 3},
            8,
            "stages_per_rank = 3: dualpipev has two stages a rank; use parallel.schedule=interleaved or "
            "parallel.stages_per_rank=null",
        ),
        (
            {"pipeline": 16, "schedule": "zbv"},
            32,
            "pipeline = 16: 32 stages need a layer each but the first and the last, and model.num_hidden_layers = 27; use "
            "parallel.pipeline=8 or parallel.pipeline=4 or parallel.schedule=1f1b",
        ),
    ],
)
def test_an_impossible_layout_names_the_field_the_rule_and_the_nearest_that_work(parallel, world_size, line):
    assert refusal(world_size, **{"engine": "fsdp", **parallel}) == f"parallel.{line}"


def test_experts_need_layers_that_have_them():
    assert refusal(8, DENSE, engine="fsdp", expert=4) == (
        "parallel.expert = 4: the model has no layer with experts; use parallel.expert=1"
    )


@pytest.mark.parametrize(
    ("parallel", "world_size", "shard", "expert_shard"),
    [
        ({"engine": "ddp"}, 8, 1, 1),
        ({"engine": "zero2", "offload": "optimizer"}, 8, 8, 8),
        ({"engine": "fsdp", "expert": 4}, 8, 8, 2),
        ({"engine": "fsdp", "replicate": 2, "expert": 2, "offload": "all"}, 8, 4, 2),  # 2 copies of 2 · 2
        ({"engine": "fsdp", "replicate": 8}, 8, 1, 1),
        ({"engine": "fsdp"}, 7, 7, 7),  # dense parameters may be spread unevenly
    ],
)
def test_a_layout_that_works_says_how_far_it_spreads(parallel, world_size, shard, expert_shard):
    layout = Layout(ParallelConfig(**parallel), world_size, V2_LITE)
    assert (layout.shard, layout.expert_shard, layout.data_ranks) == (shard, expert_shard, world_size)


def test_a_batch_that_the_data_ranks_cannot_share_is_refused():
    layout = Layout(ParallelConfig(engine="fsdp", expert=2), 6, SMALL)
    layout.check_batch(12)
    with pytest.raises(LayoutError, match=r"a global batch of 8 sequences does not divide over 6 processes; choose"):
        layout.check_batch(8)


def test_context_parallelism_cuts_the_sequences_of_every_stage_of_the_data_evenly():
    with pytest.raises(LayoutError) as caught:
        Layout(ParallelConfig(engine="fsdp", context=4), 8, SMALL, (64, 4100))
    assert str(caught.value) == (
        "parallel.context = 4: cuts sequences into 8 equal pieces, which a sequence_length of 4100 does not give; "
        "use parallel.context=2 or parallel.context=1"
    )


@pytest.mark.parametrize(
    ("parallel", "sequences", "micro_batch", "line"),
    [
        (
            {"pipeline": 4},
            24,
            None,
            "parallel.micro_batch = 2: of a batch of 24 sequences that is 3 a rank, and 1f1b needs as many micro-batches as "
            "stages, 4, at least; write micro_batch=1, or parallel.schedule=zbv, which takes any number",
        ),
        (
            {"pipeline": 4, "schedule": "dualpipev"},
            24,
            None,
            "parallel.micro_batch = 2: of a batch of 24 sequences that is 3 a rank, and dualpipev needs as many micro-batches as "
            "stages, 8, at least; give the batch at least 32 sequences (schedule.batch_tokens), or parallel.schedule=zbv, which "
            "takes any number",
        ),
        (
            {"pipeline": 2, "schedule": "interleaved"},
            160,
            8,
            "data.stages: micro_batch = 8: of a batch of 160 sequences that is 5 a rank, and interleaved needs them in 2 equal "
            "rounds; write micro_batch=5, or parallel.schedule=zbv, which takes any number",
        ),
    ],
)
def test_a_batch_that_does_not_fill_a_pipeline_is_refused(parallel, sequences, micro_batch, line):
    layout = Layout(ParallelConfig(micro_batch=2, **parallel), 4 * parallel["pipeline"], V2_LITE)
    with pytest.raises(LayoutError) as caught:
        layout.check_batch(sequences, micro_batch)
    assert str(caught.value) == line


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 1), ("interleaved", 3), ("zbv", 2), ("dualpipev", 2)])
def test_as_many_micro_batches_are_taken_as_pytorch_takes(schedule, stages, ranks):
    given = stages if schedule == "interleaved" else None
    layout = Layout(ParallelConfig(pipeline=ranks, schedule=schedule, stages_per_rank=given), ranks, V2_LITE)

    def works(check, *args):
        try:
            check(*args)
        except ValueError:
            return False
        return True

    for number in range(1, 13):
        assert works(layout.check_batch, number) == works(order_of, schedule, ranks, stages, number), number


def test_a_layout_without_a_row_in_parity_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(layout_module, "PROVEN", PROVEN - {Cell("fsdp", frozenset({"expert", "offload"}))})
    assert refusal(8, engine="fsdp", expert=2, offload="all") == (
        "parallel: fsdp + expert + offload has no row in parallel/PARITY.md: nothing shows that its answer is right, and "
        "parallel.unproven=true runs it all the same; use parallel.expert=1 or parallel.offload=none or parallel.replicate=2"
    )
    Layout(ParallelConfig(engine="fsdp", expert=2, offload="all", unproven=True), 8, V2_LITE)


# Every combination ----------------------------------------------------------------------------------------------------


def choices(world_size: int) -> dict[str, Any]:
    """Engines and axes with small numbers, and those that only just fit or do not."""
    numbers = sorted({1, 2, 3, 4, world_size, world_size + 1})
    return {
        "engine": get_args(EngineName),
        "replicate": numbers,
        "expert": numbers,
        "offload": get_args(Offload),
        "recompute": get_args(Recompute),
        "pipeline": [1, 2],
        "context": [1, 2],
    }


def combinations(world_size: int) -> list[ParallelConfig]:
    fields = choices(world_size)
    return [ParallelConfig(**dict(zip(fields, values))) for values in itertools.product(*fields.values())]


def accepted(config: ParallelConfig, world_size: int) -> Layout | None:
    try:
        return Layout(config, world_size, SMALL)
    except LayoutError:
        return None


def test_every_accepted_layout_gives_each_rank_one_place_and_every_part_an_equal_share(monkeypatch):
    """The equations of the docstring of `parallel.layout`, on 1 to 64 processes."""
    monkeypatch.setattr(layout_module, "nearest", lambda *_: [])
    for world_size in (*range(1, 13), 16, 24, 36, 64):
        layouts = [layout for config in combinations(world_size) if (layout := accepted(config, world_size))]
        assert {layout.config.engine for layout in layouts} == set(get_args(EngineName))
        for layout in layouts:
            c, in_stage = layout.config, layout.stage_ranks
            copies = in_stage // layout.shard
            assert c.pipeline * copies * layout.shard == world_size
            assert copies == (in_stage if c.engine == "ddp" else c.replicate)
            assert layout.expert_shard * c.expert == layout.shard
            places = [
                pipeline * in_stage + replica * layout.shard + part * c.expert + expert
                for pipeline, replica, part, expert in itertools.product(
                    range(c.pipeline), range(copies), range(layout.expert_shard), range(c.expert)
                )
            ]
            assert places == list(range(world_size))
            readers = [layout.data_rank(rank) for rank in places]
            shared = [data for data in range(layout.data_ranks) for _ in range(c.context)]
            assert readers == shared * c.pipeline
            if c.expert > 1:
                assert c.engine in ("fsdp", "zero1", "zero2")
                assert SMALL.n_routed_experts % c.expert == 0
            if c.expert > 1 and c.engine == "fsdp":
                assert (
                    SMALL.hidden_size % layout.expert_shard
                    == 2 * SMALL.moe_intermediate_size % layout.expert_shard
                    == 0
                )
            assert cell(c) in PROVEN


def test_every_suggestion_is_accepted_as_it_is_written(monkeypatch):
    drawn = random.Random(0)
    rest = [
        {},
        {"reshard_after_forward": False},
        {"deepspeed": {"steps_per_print": 1}},
        {"schedule": "zbv"},
        {"schedule": "interleaved", "stages_per_rank": 3},
        {"reshard_after_forward": True, "context": 3},
    ]
    closed = drawn.sample(sorted(PROVEN, key=str), len(PROVEN) // 3)
    refused = 0
    for proven in (PROVEN, PROVEN - {*closed} | {Cell("ddp", frozenset())}):
        monkeypatch.setattr(layout_module, "PROVEN", proven)
        for world_size in range(1, 65):
            for _ in range(2):
                fields = {name: drawn.choice(values) for name, values in choices(world_size).items()}
                config = ParallelConfig(**fields | drawn.choice(rest))
                if accepted(config, world_size):
                    continue
                refused += 1
                suggestions = nearest(config, world_size, SMALL)
                assert any("parallel." in text for text in suggestions), config
                for text in suggestions:
                    assert accepted(*follow(text, config, world_size)), (text, config, world_size)
    assert refused > 200


def follow(suggestion: str, config: ParallelConfig, world_size: int) -> tuple[ParallelConfig, int]:
    """A configuration and a number of processes after what a refusal suggests."""
    if suggestion.endswith(("process", "processes")):
        return config, int(suggestion.split()[0])
    pairs = [change.removeprefix("parallel.").split("=") for change in suggestion.split()]
    return replace(config, **{name: _read(value) for name, value in pairs}), world_size


def _read(value: str) -> Any:
    """As YAML would: a number, a truth value, null, or else text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
