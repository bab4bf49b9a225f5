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
            "parallel.reshard_after_forward=true",
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


def test_a_layout_without_a_row_in_parity_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(layout_module, "PROVEN", PROVEN - {Cell("fsdp", frozenset({"expert", "offload"}))})
    assert refusal(8, engine="fsdp", expert=2, offload="all") == (
        "parallel: fsdp + expert + offload has no row in parallel/PARITY.md: nothing shows that its answer is right, and "
        "parallel.unproven=true runs it all the same; use parallel.expert=1 or parallel.offload=none or parallel.replicate=2"
    )
    Layout(ParallelConfig(engine="fsdp", expert=2, offload="all", unproven=True), 8, V2_LITE)


# Every combination ----------------------------------------------------------------------------------------------------


def combinations(world_size: int) -> list[ParallelConfig]:
    """Every combination of engine and axes with small numbers, and those that only just fit or do not."""
    numbers = sorted({1, 2, 3, 4, world_size, world_size + 1})
    fields = {
        "engine": get_args(EngineName),
        "replicate": numbers,
        "expert": numbers,
        "offload": get_args(Offload),
        "recompute": get_args(Recompute),
    }
    return [ParallelConfig(**dict(zip(fields, values))) for values in itertools.product(*fields.values())]


def accepted(config: ParallelConfig, world_size: int) -> Layout | None:
    try:
        return Layout(config, world_size, SMALL)
    except LayoutError:
        return None


def test_every_accepted_layout_gives_each_rank_one_place_and_every_part_an_equal_share(monkeypatch):
    """The equations of the docstring of `parallel.layout`, on 1 to 64 processes."""
    monkeypatch.setattr(layout_module, "nearest", lambda *_: [])
    for world_size in range(1, 65):
        layouts = [layout for config in combinations(world_size) if (layout := accepted(config, world_size))]
        assert {layout.config.engine for layout in layouts} == set(get_args(EngineName))
        for layout in layouts:
            c, copies = layout.config, world_size // layout.shard
            assert copies * layout.shard == world_size
            assert copies == (world_size if c.engine == "ddp" else c.replicate)
            assert layout.expert_shard * c.expert == layout.shard
            places = [
                replica * layout.shard + part * c.expert + expert
                for replica, part, expert in itertools.product(
                    range(copies), range(layout.expert_shard), range(c.expert)
                )
            ]
            assert places == list(range(world_size))
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
    rest = [{}, {"reshard_after_forward": False}, {"deepspeed": {"steps_per_print": 1}}]
    closed = drawn.sample(sorted(PROVEN, key=str), len(PROVEN) // 3)
    refused = 0
    for proven in (PROVEN, PROVEN - {*closed} | {Cell("ddp", frozenset())}):
        monkeypatch.setattr(layout_module, "PROVEN", proven)
        for world_size in range(1, 65):
            for config in drawn.sample(combinations(world_size), 6):
                config = replace(config, **drawn.choice(rest))
                if accepted(config, world_size):
                    continue
                refused += 1
                suggestions = nearest(config, world_size, SMALL)
                assert any("parallel." in text for text in suggestions), config
                for text in suggestions:
                    assert accepted(*follow(text, config, world_size)), (text, config, world_size)
    assert refused > 500


def follow(suggestion: str, config: ParallelConfig, world_size: int) -> tuple[ParallelConfig, int]:
    """A configuration and a number of processes after what a refusal suggests."""
    if suggestion.endswith(("process", "processes")):
        return config, int(suggestion.split()[0])
    pairs = [change.removeprefix("parallel.").split("=") for change in suggestion.split()]
    return replace(config, **{name: _read(value) for name, value in pairs}), world_size


def _read(value: str) -> Any:
    """As YAML would: a number, a truth value, null for no map, or else text."""
    try:
        return json.loads(value) or {}
    except json.JSONDecodeError:
        return value
