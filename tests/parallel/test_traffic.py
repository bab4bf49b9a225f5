"""What travels in a step is what `parallel.traffic` says: counted, by kind of collective and number of ranks, to the byte."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.attention import MultiHeadLatentAttention
from model.config import ModelConfig, load_preset
from model.init import initialize
from model.rope import Rotation
from model.router import Router, Routing
from model.transformer import Transformer
from parallel.context import ZigZag
from parallel.layout import Layout, ParallelConfig
from parallel.traffic import Flow, sent, step_traffic
from tests.parallel.harness import CONFIG, LENGTH, SEQUENCES, SETTINGS, Case, build, micro_batches
from tests.parallel.traffic_counter import Call, TrafficCounter

# Steps until the traffic is that of all later ones: DDP then has its buckets in order, and DeepSpeed knows that of the modules.
WARMUP = {"ddp": 2, "fsdp": 1, "zero1": 1, "zero2": 1, "zero3": 2}


class Step(NamedTuple):
    """What one rank did in a step."""

    calls: list[Call]
    leaving: int  # (token, expert) pairs of this rank whose expert lies on another, each counted in every forward pass


def count(case: Case) -> dict[int, Step]:
    """As one rank: a step of one micro-batch and one of two; recomputing, one of two; in a pipeline one of all."""
    engine = build(case)
    away = PairsAway(engine.model, case.parallel.expert)
    numbers = (1, 2) if case.parallel.recompute == "none" else (2,)
    if case.parallel.pipeline > 1:
        numbers = (len(micro_batches(case, 0)),)
    for _ in range(WARMUP[case.parallel.engine]):
        engine.step(micro_batches(case, 0)[: numbers[0]], SETTINGS)
    counted = {}
    for number in numbers:
        away.pairs = 0
        with TrafficCounter() as counter:
            engine.step(micro_batches(case, 1)[:number], SETTINGS)
        counted[number] = Step(counter.calls, away.pairs)
    return counted


class PairsAway:
    """Counts, in every forward pass of a router, the pairs whose expert is on another rank."""

    def __init__(self, model: torch.nn.Module, ranks: int):
        self.ranks, self.pairs = ranks, 0
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self.note)

    def note(self, router: Router, inputs: tuple[Tensor], routing: Routing) -> None:
        owner = routing.expert_ids // (router.config.n_routed_experts // self.ranks)
        self.pairs += int((owner != torch.distributed.get_rank() % self.ranks).sum())


def zero(**options: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": options}}


FREED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 300}
LAYOUTS = {
    "ddp": (2, ParallelConfig()),
    "fsdp": (4, ParallelConfig("fsdp")),
    "fsdp, kept gathered": (4, ParallelConfig("fsdp", reshard_after_forward=False)),
    "fsdp, recomputing": (2, ParallelConfig("fsdp", recompute="full")),
    "HSDP": (4, ParallelConfig("fsdp", replicate=2)),
    "HSDP, kept gathered": (4, ParallelConfig("fsdp", replicate=2, reshard_after_forward=False)),
    "experts": (4, ParallelConfig("fsdp", expert=4)),
    "experts and shards": (4, ParallelConfig("fsdp", expert=2)),
    "experts, recomputing": (2, ParallelConfig("fsdp", expert=2, recompute="full")),
    "experts, recomputing some": (4, ParallelConfig("fsdp", expert=2, replicate=2, recompute="selective")),
    "experts, FP8 dispatch": (4, ParallelConfig("fsdp", expert=4, fp8=True, fp8_dispatch=True)),
    "experts, FP8 dispatch, recomputing": (
        2,
        ParallelConfig("fsdp", expert=2, recompute="full", fp8=True, fp8_dispatch=True),
    ),
    "context": (2, ParallelConfig("fsdp", context=2)),
    "context, recomputing some": (2, ParallelConfig("ddp", context=2, recompute="selective")),
    "context, recomputing": (4, ParallelConfig("fsdp", context=2, expert=2, recompute="full")),
    "1f1b": (2, ParallelConfig("ddp", pipeline=2)),
    "1f1b, shards": (4, ParallelConfig("fsdp", pipeline=2)),
    "dualpipev, context": (4, ParallelConfig("ddp", pipeline=2, schedule="dualpipev", context=2)),
    # Not under dualpipev, which runs backward passes in a thread that the counter does not see.
    "zbv, experts, context": (
        4,
        ParallelConfig("fsdp", pipeline=2, schedule="zbv", context=2, expert=2, recompute="selective"),
    ),
    "zero1": (2, ParallelConfig("zero1")),
    "zero2": (2, ParallelConfig("zero2")),
    "zero1, experts": (4, ParallelConfig("zero1", expert=2)),
    "zero2, experts": (4, ParallelConfig("zero2", expert=2)),
    "zero2, reduced to owners": (2, ParallelConfig("zero2", **zero(use_multi_rank_bucket_allreduce=False))),
    "zero3, small parameters whole": (2, ParallelConfig("zero3")),
    "zero3, none freed before the turn": (2, ParallelConfig("zero3", **zero(stage3_param_persistence_threshold=0))),
    "zero3": (2, ParallelConfig("zero3", **zero(**FREED))),
    "zero3, recomputing": (2, ParallelConfig("zero3", recompute="full", **zero(**FREED))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_count_is_the_formulas(workers, name):
    world_size, config = LAYOUTS[name]
    check(workers.run(world_size, count, Case(config_of(config, world_size))), config, world_size)


def test_in_bf16_blocks_travel_in_two_bytes_and_the_rest_in_four(workers):
    config = ParallelConfig("fsdp")
    case = Case(config_of(config, 2), compute_dtype=torch.bfloat16)
    check(workers.run(2, count, case), config, 2, element_size=2)


def test_padding_of_uneven_shards_is_counted(workers):
    """On 4 ranks 26 rows of the query latent become 28, 97 of the vocabulary 100; 6 experts are cut inside, without padding."""
    uneven = CONFIG.override(
        {"q_lora_rank": 26, "vocab_size": 97, "n_routed_experts": 6, "n_group": 2, "topk_group": 1}
    )
    config = ParallelConfig("fsdp")
    check(workers.run(4, count, Case(config_of(config, 4), model=uneven)), config, 4, uneven)


def test_v3_sends_latents_with_a_71st_of_the_bytes_of_keys_and_values(workers):
    """512 + 64 numbers a token and layer, in place of 128 · (128 + 64 + 128); their gradients too. Attention is that of V3."""
    latents, keys_and_values = workers.run(2, exchange, False), workers.run(2, exchange, True)
    for (sent_latents, found), (sent_both, expected) in zip(latents, keys_and_values):
        assert sent_latents == {("all_gather", 2): 4 * TOKENS * 576, ("reduce_scatter", 2): 4 * TOKENS * 576}
        assert sent_both == {("all_gather", 2): 4 * TOKENS * 40960, ("reduce_scatter", 2): 4 * TOKENS * 40960}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


TOKENS = 16
ONE_LAYER = replace(
    ModelConfig.from_hf(load_preset("v3")), vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    first_k_dense_replace=1, num_nextn_predict_layers=0, q_lora_rank=None,
)  # fmt: skip


def exchange(keys_and_values: bool) -> tuple[dict[tuple[str, int], int], Tensor]:
    """As one of two ranks that share a sequence: bytes that a forward and a backward pass send, and a gradient."""
    attention = attend_to_exchanged_keys_and_values if keys_and_values else MultiHeadLatentAttention.forward
    with patch.object(MultiHeadLatentAttention, "forward", attention):
        model = Transformer(ONE_LAYER)
        initialize(model, seed=0)
        model.set_context(ZigZag(torch.distributed.group.WORLD))
        tokens = torch.arange(TOKENS + 1)[None]
        with TrafficCounter() as counter:
            model(tokens, torch.zeros_like(tokens), torch.ones(1)).losses.main.backward()
    return by_kind(counter.calls), model.main_layers[0].self_attn.kv_a_proj_with_mqa.weight.grad


def attend_to_exchanged_keys_and_values(
    self: MultiHeadLatentAttention, x: Tensor, rotation: Rotation, starts: Tensor | None
) -> Tensor:
    """`MultiHeadLatentAttention.forward` as others do it: each rank makes keys and values of its pieces alone, and sends them."""
    q, latent, k_rope = self._project(x)
    of_nope, values = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.v_dim), dim=-1)
    keys = torch.cat((of_nope, k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)  # [B', L, H, nope + rope]
    keys, values = self.context.gather(keys, values)
    kv = torch.cat((keys[..., : self.nope], values), dim=-1)
    k_rope = keys[..., self.nope :].mean(2)  # the same in every head
    return self.o_proj(self.context.attention(self.backend)(q, kv, k_rope, rotation, self.scale, starts).flatten(-2))


def config_of(config: ParallelConfig, world_size: int) -> ParallelConfig:
    """Two micro-batches in this rank's share of a step, in a pipeline as many as the largest of these has stages."""
    share = SEQUENCES // (world_size // config.pipeline // config.context)
    return replace(config, micro_batch=share // (2 if config.pipeline == 1 else 4), unproven=True)


def check(
    steps: list[dict[int, Step]],
    config: ParallelConfig,
    world_size: int,
    model: ModelConfig = CONFIG,
    element_size: int = 4,
) -> None:
    """Hold the steps of all ranks against the formula."""
    layout = Layout(config_of(config, world_size), world_size, model, (LENGTH,))
    for number in steps[0]:
        tokens = number * layout.config.micro_batch * LENGTH // config.context
        flows = [
            step_traffic(
                layout, model, tokens=tokens, micro_batches=number, element_size=element_size,
                pipeline_rank=rank // layout.stage_ranks,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for step, of_rank in zip(steps, flows):
            fixed = [flow for flow in of_rank if flow.collective != "all_to_all"]
            assert by_kind(weights_and_gradients(step[number].calls)) == by_kind(fixed)
        check_tokens([step[number] for step in steps], list(chain(*flows)), config, model, element_size)


def check_tokens(
    steps: list[Step], flows: list[Flow], config: ParallelConfig, model: ModelConfig, element_size: int
) -> None:
    """Rows sent to other ranks: to the byte those that routing sends away, and about those of the formula for all ranks."""
    found = sum(call.sent for step in steps for call in tokens_of(step.calls))
    leaving = sum(step.leaving for step in steps)
    if config.recompute != "none":
        leaving //= 2  # the router runs twice, and gives out what it decided the first time
    plain, in_fp8 = model.hidden_size * element_size, model.hidden_size + -(-model.hidden_size // 128)
    there = in_fp8 if config.fp8_dispatch else plain
    # Rows with their weights to the experts, and rows home; the gradients of those that came home, and of both.
    trips = [there + 4, plain, there, plain + 4]
    assert found == leaving * sum(trips + (trips[:2] if config.recompute == "full" else []))
    expected = sum(flow.sent for flow in flows if flow.collective == "all_to_all")
    assert found == pytest.approx(expected, rel=0.2)  # popular experts are where chance put them


def by_kind(transfers: list[Any]) -> dict[tuple[str, int], int]:
    """Bytes of whole tensors by (collective, ranks), but those that a rank has with itself."""
    whole: Counter[tuple[str, int]] = Counter()
    for transfer in transfers:
        if transfer.ranks > 1:
            whole[transfer.collective, transfer.ranks] += transfer.whole
    return dict(whole)


def weights_and_gradients(calls: list[Call]) -> list[Call]:
    return [call for call in calls if not is_bookkeeping(call) and call.collective != "all_to_all"]


def tokens_of(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.collective == "all_to_all" and not is_bookkeeping(call)]


def is_bookkeeping(call: Call) -> bool:
    """Targets, losses, expert counts and norms: in int64 or fp64, or a single number. In FP8 the largest scale of each tensor."""
    is_of_scales = call.collective == "all_reduce" and call.whole <= 1024
    return call.dtype in (torch.int64, torch.float64) or call.whole <= 8 or is_of_scales


def test_a_ring_sends_what_the_text_books_say():
    """4 ranks, 8 bytes: three quarters of the tensor for a gather or a scatter, twice that for both."""
    assert sent("all_gather", 4, 8) == sent("reduce_scatter", 4, 8) == 6
    assert sent("all_reduce", 4, 8) == 12
    assert sent("all_reduce", 1, 8) == 0


@pytest.mark.parametrize(
    "flow, node, expected",
    [
        # 64 neighbours, 8 to a node, 64 bytes: 7 go to others of the node, 56 to other nodes, one stays.
        (Flow("tokens", "all_to_all", 64, 64), 8, (7, 56)),
        (Flow("tokens", "all_to_all", 64, 64), 72, (63, 0)),
        # Two nodes of 4: a ring of 8 sends 7 of 8 bytes; one of the 4 rings through a node leaves it at this device.
        (Flow("blocks", "all_gather", 8, 8), 4, (7 * 3 / 4, 7 / 4)),
        (Flow("gradients", "all_reduce", 8, 8), 4, (14 * 3 / 4, 14 / 4)),
        (Flow("gradients", "reduce_scatter", 8, 8), 8, (7, 0)),
        # 4 replicas, 8 apart: each on a node of its own. 2 apart: all on one.
        (Flow("gradients", "all_reduce", 4, 8, stride=8), 8, (0, 12)),
        (Flow("gradients", "all_reduce", 4, 8, stride=2), 8, (12, 0)),
        # 6 neighbours on nodes of 4: 3 to a node, as 4 would not divide them.
        (Flow("blocks", "all_gather", 6, 6), 4, (5 * 2 / 3, 5 / 3)),
        # From rank 4 to rank 8 and to rank 0, on nodes of 8.
        (Flow("states", "send", 2, 8, stride=4, first=4), 8, (0, 8)),
        (Flow("gradients of states", "send", 2, 8, stride=-4, first=4), 8, (8, 0)),
    ],
)
def test_what_leaves_a_node_follows_from_where_ranks_lie(flow: Flow, node: int, expected: tuple[float, float]):
    links = flow.by_link(node)
    assert links == pytest.approx(expected)
    if flow.collective != "all_to_all":
        assert sum(links) == pytest.approx(flow.sent)


def test_neighbours_share_experts_and_replicas_are_far_apart():
    """8 ranks in 2 stages of 4: 2 replicas, 2 ranks apart, of experts on 2 neighbours."""
    config = ParallelConfig("fsdp", pipeline=2, replicate=2, expert=2, unproven=True)
    layout = Layout(config, 8, CONFIG, (LENGTH,))
    flows = step_traffic(layout, CONFIG, tokens=64, micro_batches=2, element_size=2, pipeline_rank=1)
    places = {(flow.what, flow.collective): (flow.ranks, flow.stride, flow.first) for flow in flows}
    assert places["tokens", "all_to_all"] == (2, 1, 0)
    assert places["blocks", "all_gather"] == (2, 1, 0)
    assert ("experts", "all_gather") not in places  # whole on each
    assert places["gradients of states", "send"] == (2, -4, 4)
    strides = {flow.stride for flow in flows if flow.what == "gradients" and flow.ranks == 2}
    assert strides >= {1, 2}
