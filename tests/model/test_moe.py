"""Routing, dispatch and the MoE layer against naive loops and worked examples."""

import pytest
import torch
import torch.nn.functional as F

from model.moe import LocalDispatcher, MoE
from model.ops.experts import BACKENDS
from model.ops.routing import count_experts, limit_to_groups
from model.ops.rows import sum_rows
from model.router import Router

INF = float("inf")


@pytest.fixture
def make_router(make_config, randomize):
    def make(**changes):
        router = Router(make_config(**changes))
        randomize(router, 0.3)
        return router

    return make


# choosing -------------------------------------------------------------------------------------------------------------


def test_limit_to_groups_keeps_the_groups_with_the_best_two_experts():
    # groups      (0.9 0.0 0.1)   (0.6 0.5 0.0)   (-1 -2 -9)   (0.3 0.3 0.3)
    # two best         1.0             1.1            -3            0.6        → keep the second and the first
    choice = torch.tensor([[0.9, 0.0, 0.1, 0.6, 0.5, 0.0, -1.0, -2.0, -9.0, 0.3, 0.3, 0.3]])
    kept = limit_to_groups(choice, n_group=4, topk_group=2)
    assert kept.tolist() == [[*choice[0, :6].tolist(), -INF, -INF, -INF, -INF, -INF, -INF]]


def test_limit_to_groups_drops_groups_even_below_zero():
    # all negative: the kept group must win against the dropped one, which 0.0 as a mask would not ensure
    kept = limit_to_groups(torch.tensor([[-0.5, -0.6, -0.7, -0.8]]), n_group=2, topk_group=1)
    assert kept[0, :2].max() > kept[0, 2:].max() == -INF


def naive_choice(scores, bias, config):
    """Eq. 16 with node-limited routing, for one token, in Python numbers."""
    biased = [s + b for s, b in zip(scores, bias)]
    size = len(biased) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    by_two_best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))
    allowed = [e for g in by_two_best[: config.topk_group] for e in g]
    return sorted(sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok])


@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (3, 2), (3, 3), (6, 4)])
def test_routing_equals_the_equations_token_by_token(make_router, groups):
    router = make_router(n_group=groups[0], topk_group=groups[1])
    tokens = torch.randn(50, router.config.hidden_size)
    routing = router(tokens)
    scores = (tokens @ router.weight.T).sigmoid()
    for token in range(50):
        chosen = naive_choice(scores[token].tolist(), router.e_score_correction_bias.tolist(), router.config)
        assert sorted(routing.expert_ids[token].tolist()) == chosen
        s = scores[token, routing.expert_ids[token]]
        torch.testing.assert_close(routing.weights[token], 2.5 * s / s.sum())


def test_a_token_reaches_at_most_topk_group_groups(make_router):
    router = make_router(n_group=6, topk_group=2, num_experts_per_tok=4)
    group_of = router(torch.randn(200, 48)).expert_ids // 2
    assert max(len(set(row)) for row in group_of.tolist()) == 2


def test_the_bias_changes_who_is_chosen_and_never_a_weight(make_router):
    router = make_router(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    tokens = torch.randn(30, 48)
    before = router(tokens)
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[5] = 10.0
    after = router(tokens)
    assert (after.expert_ids == 5).any(-1).all() and not (before.expert_ids == 5).any(-1).all()
    torch.testing.assert_close(after.weights, after.logits.sigmoid().gather(-1, after.expert_ids))
    # the same bias for all changes nothing
    router.e_score_correction_bias.fill_(-7.0)
    shifted = router(tokens)
    router.e_score_correction_bias.zero_()
    assert torch.equal(shifted.expert_ids.sort().values, router(tokens).expert_ids.sort().values)


def test_the_bias_takes_no_gradient(make_router):
    router = make_router()
    assert "e_score_correction_bias" in dict(router.named_buffers())
    assert [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize("logit", [-120.0, -1000.0, 0.0, 120.0])
def test_weights_stay_finite_and_normalised_for_extreme_logits(make_router, logit):
    router = make_router(hidden_size=4)
    with torch.no_grad():
        router.weight.fill_(logit / 4)
    tokens = torch.ones(3, 4, requires_grad=True)
    routing = router(tokens)
    assert torch.equal(routing.logits, torch.full((3, 12), logit))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((3,), 2.5))
    routing.weights.square().sum().backward()
    assert tokens.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_the_gate_computes_in_fp32_whatever_the_tokens_are(make_router):
    router = make_router()
    tokens = torch.randn(20, 48).bfloat16()
    routing = router(tokens)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, tokens.float() @ router.weight.T)


# moving ---------------------------------------------------------------------------------------------------------------


def random_choice(tokens, experts, k):
    return torch.rand(tokens, experts).topk(k).indices


def test_dispatch_sorts_the_pairs_by_expert_and_keeps_their_order():
    # token 0 → experts 2, 0; token 1 → 2, 1; token 2 → 0, 1
    tokens = torch.tensor([[10.0], [20.0], [30.0]])
    dispatcher = LocalDispatcher(4)
    handle = dispatcher.dispatch(tokens, torch.tensor([[2, 0], [2, 1], [0, 1]]), torch.ones(3, 2))
    rows, index, place, counts, _ = dispatcher.receive(handle)
    assert rows[index].flatten().tolist() == [10, 30, 20, 30, 10, 20]  # expert 0: tokens 0, 2; 1: tokens 1, 2; 2: 0, 1
    assert place.tolist() == [[4, 0], [5, 2], [1, 3]]
    assert counts.tolist() == [2, 2, 2, 0]


def test_every_pair_arrives_with_its_weight():
    weights = torch.rand(17, 3)
    dispatcher = LocalDispatcher(8)
    arrived = dispatcher.receive(dispatcher.dispatch(torch.randn(17, 5), random_choice(17, 8, 3), weights))
    assert torch.equal(arrived.weights[arrived.place], weights)
    assert torch.equal(arrived.row_of[arrived.place], torch.arange(17).unsqueeze(1).expand(17, 3))


def test_dispatch_and_combine_have_the_gradients_of_a_naive_loop():
    tokens = torch.randn(17, 5, requires_grad=True)
    weights = torch.rand(17, 3, requires_grad=True)
    maps = torch.randn(8, 5, 5, requires_grad=True)  # each expert a matrix
    ids = random_choice(17, 8, 3)
    dispatcher = LocalDispatcher(8)
    handle = dispatcher.dispatch(tokens, ids, weights)
    rows, index, place, counts, weigh = dispatcher.receive(handle)
    parts = [part @ m for part, m in zip(rows[index].split(counts.tolist()), maps)]
    ours = dispatcher.combine(sum_rows(torch.cat(parts) * weigh.unsqueeze(-1), place), handle)

    naive = torch.stack([sum(weights[n, k] * (tokens[n] @ maps[ids[n, k]]) for k in range(3)) for n in range(17)])
    torch.testing.assert_close(ours, naive)
    upstream = torch.randn_like(naive)
    inputs = (tokens, weights, maps)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(naive, inputs, upstream)):
        torch.testing.assert_close(a, b)


def test_counts_are_exact_and_sum_to_all_pairs():
    ids = random_choice(100, 12, 3)
    counts = count_experts(ids, 12)
    assert counts.dtype == torch.int64 and counts.sum() == 300
    assert counts.tolist() == [(ids == expert).sum().item() for expert in range(12)]


# the layer ------------------------------------------------------------------------------------------------------------


def ffn(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_is_the_shared_experts_plus_every_chosen_one(make_config, randomize, backend):
    config = make_config()
    layer = MoE(config, BACKENDS[backend])
    randomize(layer, 0.3)
    x = torch.randn(2, 9, 48)
    y, stats = layer(x)
    routing = layer.gate(x.flatten(0, 1))
    shared = layer.shared_experts
    for n, token in enumerate(x.flatten(0, 1)):
        expected = ffn(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        for expert, weight in zip(routing.expert_ids[n], routing.weights[n]):
            gate, up = layer.experts.gate_up_proj[expert].split(config.moe_intermediate_size)
            expected = expected + weight * ffn(token, gate, up, layer.experts.down_proj[expert])
        torch.testing.assert_close(y.flatten(0, 1)[n], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(stats.expert_counts, count_experts(routing.expert_ids, 12))


def test_no_token_is_dropped_when_all_choose_the_same_experts(make_config, randomize):
    layer = MoE(make_config(n_group=1, topk_group=1), BACKENDS["grouped_mm"])
    randomize(layer, 0.3)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0] * 3 + [0.0] * 9))  # experts 0, 1, 2 for everyone
    x = torch.randn(1, 64, 48)
    y, stats = layer(x)
    assert stats.expert_counts.tolist() == [64] * 3 + [0] * 9
    alone = torch.cat([layer(x[:, i : i + 1])[0] for i in range(64)], dim=1)
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-4)


def test_idle_experts_have_zero_gradients_and_not_none(make_config, randomize):
    """Every rank must have a gradient for every parameter, or data parallelism would wait for it."""
    layer = MoE(make_config(n_group=1, topk_group=1), BACKENDS["grouped_mm"])
    randomize(layer, 0.3)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0] * 3 + [0.0] * 9))
    layer(torch.randn(1, 8, 48))[0].sum().backward()
    assert layer.experts.gate_up_proj.grad[:3].abs().amax((1, 2)).all()
    assert not layer.experts.gate_up_proj.grad[3:].any()
