"""The gate as one operation: which experts a token goes to, how much each counts, and the sequence-wise balance loss.

Scores, choice, weights and loss read the same logits, so one pass over them makes all, and one pass backward all of their gradient.
Kept for it are the logits, the chosen experts with their weights, and f of the balance loss, [B, E].

Equal affinities: the lower number is chosen. NaN is chosen first, and every number handed out is one of an expert.
"""

from ctypes import c_bool, c_float
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.balance import affinity_shares, routed_frequency, sequence_balance_loss
from model.ops import cpu
from model.ops.operation import operation


class Rule(NamedTuple):
    """How experts are chosen and weighed. DeepSeek-V3 §2.1.2."""

    n_group: int  # of E / n_group experts each
    topk_group: int  # groups that a token's experts may come from
    top_k: int  # K
    normalise: bool  # weights over their sum
    scale: float  # of the weights


class Sorted(NamedTuple):
    """The (token, expert) pairs in the order of their experts, and those of an expert in the order of their tokens."""

    order: Tensor  # [N·K] int64, pair of each row: n·K + k
    place: Tensor  # [N, K] int64, row of each pair: the inverse
    counts: Tensor  # [E] int64, rows of each expert


def route(logits: Tensor, bias: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts and weigh them.

    Args:
        logits: [B, T, E] fp32, sigmoid of which are the affinities.
        bias: [E] fp32, added to the affinities for the choice alone.

    Returns:
        The chosen experts [B·T, K] int64, in any order; their weights [B·T, K] fp32, whose gradient flows to the logits of the
        chosen; and the sequence-wise balance loss [] (`model.balance.sequence_balance_loss`).
    """
    return _Route.apply(logits, bias, rule)


def reference_route(logits: Tensor, bias: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """`route` by PyTorch's operations and its autograd."""
    flat = logits.flatten(0, 1)
    ids = choose(flat.detach(), bias, rule)
    return ids, weigh(flat, ids, rule), sequence_balance_loss(logits, rule.top_k)


def choose(logits: Tensor, bias: Tensor, rule: Rule) -> Tensor:
    """The K experts of each token with the highest biased affinities, within its best groups. [N, E] → [N, K]."""
    choice = logits.sigmoid() + bias
    if rule.topk_group < rule.n_group:
        choice = limit_to_groups(choice, rule.n_group, rule.topk_group)
    return _top(choice, rule.top_k)


def limit_to_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Mask every expert outside each token's best groups (node-limited routing, DeepSeek-V3 §2.1.2).

    A group stands for the experts of one node, so a token is sent to at most `topk_group` nodes.

    Args:
        choice: [N, E] biased affinities; used to choose experts, never to weigh them.
        n_group: number of groups; must divide E.
        topk_group: groups kept per token.

    Returns:
        [N, E] `choice`, with -inf where the expert's group was not kept.
    """
    grouped = choice.unflatten(-1, (n_group, -1))  # [N, G, E/G]
    score = grouped.topk(2, dim=-1).values.sum(-1)  # [N, G]  two best experts speak for the group
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(-1, _top(score, topk_group), True)  # [N, G]
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def weigh(logits: Tensor, ids: Tensor, rule: Rule) -> Tensor:
    """How much each of the chosen counts. [N, E], [N, K] → [N, K]."""
    chosen = logits.gather(-1, ids)
    # softmax(log sigmoid) is sigmoid over its own sum, without a denominator that can vanish.
    weights = affinity_shares(chosen) if rule.normalise else chosen.sigmoid()
    return weights * rule.scale


def _top(numbers: Tensor, k: int) -> Tensor:
    """As `topk`, which does not say what it takes of equals."""
    return numbers.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights, frequency, loss = _route(logits, bias, *rule)
        ctx.save_for_backward(logits, ids, weights, frequency)
        ctx.rule = rule
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return ids, weights, loss

    @staticmethod
    def backward(ctx: Any, _: None, d_weights: Tensor | None, d_loss: Tensor | None) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _route_backward(*ctx.saved_tensors, d_weights, d_loss, ctx.rule.normalise, ctx.rule.scale), None, None


def _shapes(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, ...]:
    tokens = logits.shape[0] * logits.shape[1]
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    frequency = logits.new_empty(logits.shape[0], logits.shape[2])
    return ids, logits.new_empty(tokens, top_k), frequency, logits.new_empty(())


@operation(
    "route(Tensor logits, Tensor bias, int n_group, int topk_group, int top_k, bool normalise, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _shapes,
)
def _route(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, ...]:
    """Chosen experts [N, K], their weights [N, K], f of the balance loss [B, E], the loss []."""
    rule = Rule(n_group, topk_group, top_k, normalise, scale)
    logits = logits.contiguous()
    if logits.is_cuda:
        from model.ops.triton import routing as kernels

        return kernels.route(logits, bias, rule)
    if cpu.takes(logits, bias) and (library := cpu.library("routing")):
        results = _shapes(logits, bias, *rule)
        library.route(
            *cpu.numbers(*logits.shape, top_k, n_group, topk_group), c_bool(normalise), c_float(scale),
            cpu.address(logits), cpu.address(bias), *map(cpu.address, results), cpu.threads(),
        )  # fmt: skip
        return results
    ids, weights, loss = reference_route(logits, bias, rule)
    return ids, weights, routed_frequency(logits, top_k), loss


@operation(
    "route_backward(Tensor logits, Tensor ids, Tensor weights, Tensor frequency, Tensor? d_weights, Tensor? d_loss, bool normalise,"
    " float scale) -> Tensor",
    lambda logits, *_: torch.empty_like(logits),
)
def _route_backward(
    logits: Tensor, ids: Tensor, weights: Tensor, frequency: Tensor,
    d_weights: Tensor | None, d_loss: Tensor | None, normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """With g the gradient of a softmax's input, the gradient of the logit is g · (1 − sigmoid(logit))."""
    logits = logits.contiguous()
    d_weights = None if d_weights is None else d_weights.contiguous()
    if logits.is_cuda:
        from model.ops.triton import routing as kernels

        return kernels.route_backward(logits, ids, weights, frequency, d_weights, d_loss, normalise, scale)
    if cpu.takes(logits, weights, frequency, d_weights, d_loss) and (library := cpu.library("routing")):
        d_logits = torch.empty_like(logits)
        library.route_backward(
            *cpu.numbers(*logits.shape, ids.shape[1]), c_bool(normalise), c_float(scale),
            *map(cpu.address, (logits, ids, weights, frequency, d_weights, d_loss, d_logits)), cpu.threads(),
        )  # fmt: skip
        return d_logits
    d = torch.zeros_like(logits)
    if d_loss is not None:
        p = affinity_shares(logits)
        f = frequency.unsqueeze(1)  # [B, 1, E]
        d += p * (f - (p * f).sum(-1, keepdim=True)) * (d_loss / logits.shape[1])
    if d_weights is not None:
        mean = (weights * d_weights).sum(-1, keepdim=True) / scale if normalise else 0
        d.flatten(0, 1).scatter_add_(-1, ids, weights * (d_weights - mean))
    return d * (-logits).sigmoid()


def sort_by_expert(ids: Tensor, experts: int) -> Sorted:
    """Chosen experts [N, K] int64 → their pairs sorted, and how many each expert has. No device waits for the host."""
    return Sorted(*_sort_by_expert(ids, experts))


def count_experts(ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert. [N, K] ids → [E] int64, exact and without a host round trip."""
    flat = ids.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _sorted_shapes(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids.new_empty(ids.numel()), torch.empty_like(ids), ids.new_empty(experts)


@operation("sort_by_expert(Tensor ids, int experts) -> (Tensor, Tensor, Tensor)", _sorted_shapes)
def _sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = ids.contiguous()
    if ids.device.type == "cpu" and (library := cpu.library("routing")):
        results = _sorted_shapes(ids, experts)
        library.sort_by_expert(*cpu.numbers(ids.numel(), experts), cpu.address(ids), *map(cpu.address, results))
        return results
    # A radix sort goes over 16 bits in a quarter of the time of 64.
    flat = ids.flatten()
    order = (flat.to(torch.int16) if experts < 2**15 else flat).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return order, place.view_as(ids), count_experts(ids, experts)
