# mypy: disallow-untyped-defs=False
"""The gate in Triton: a program reads the logits of some tokens once and writes what is chosen, and its part of the balance loss.

Experts lie in groups, both padded to powers of two: slot g · SIZE + i is expert i of group g. Slots are searched from the left, so
that of equals the lower number is chosen. Parts are added in order and without atomics: the same bits in every run.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from model.ops.routing import Rule

SLOTS = 2048  # of several tokens at a time
PARTS = 32  # at a time
WARPS = 4
LOWEST = tl.constexpr(-3.4e38)  # of what may be chosen; what may not is −∞


def route(logits: Tensor, bias: Tensor, rule: "Rule") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen experts [N, K], their weights [N, K], f of the balance loss [B, E], the loss []. logits [B, T, E], contiguous."""
    b, t, e = logits.shape
    groups, size, height = blocks(e, rule.n_group)
    parts = triton.cdiv(t, height)  # of a sequence
    ids = torch.empty(b * t, rule.top_k, dtype=torch.int64, device=logits.device)
    weights, frequency, losses = logits.new_empty(ids.shape), logits.new_empty(b, e), logits.new_empty(b)
    shares, hits = logits.new_empty(b * parts, e), logits.new_empty(b * parts, e)
    if parts:
        _route[(b * parts,)](
            logits, bias, ids, weights, shares, hits, t, rule.scale, e, rule.n_group, rule.topk_group, rule.top_k,
            rule.normalise, groups, size, triton.next_power_of_2(rule.top_k), height, num_warps=WARPS,
        )  # fmt: skip
    if b:
        _balance[(b,)](
            shares, hits, frequency, losses, t, parts, rule.top_k, e, triton.next_power_of_2(e), PARTS, num_warps=WARPS
        )
    return ids, weights, frequency, losses.sum()


def route_backward(
    logits: Tensor, ids: Tensor, weights: Tensor, frequency: Tensor,
    d_weights: Tensor | None, d_loss: Tensor | None, normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of logits [B, T, E], contiguous."""
    b, t, e = logits.shape
    k, d_logits = ids.shape[1], torch.empty_like(logits)
    _, block, height = blocks(e, 1)
    if b * t:
        _route_backward[(b * triton.cdiv(t, height),)](
            logits, ids, weights, frequency, d_weights, d_loss, d_logits, t, scale,
            e, k, normalise, block, triton.next_power_of_2(k), height, num_warps=WARPS,
        )  # fmt: skip
    return d_logits


def blocks(experts: int, groups: int) -> tuple[int, int, int]:
    """The powers of two that hold the groups and the experts of one; tokens of a program."""
    padded, size = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    return padded, size, max(1, SLOTS // (padded * size))


@triton.jit(do_not_specialize=["T"])
def _route(
    logits, bias, ids, weights, shares, hits, T, scale,
    E: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, KS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """HEIGHT tokens of one sequence. Its parts of Σ_t s_i / Σ_j s_j and of the numbers of hits go to shares and hits."""
    token, inside_rows = tokens(T, HEIGHT)
    slot = tl.arange(0, GROUPS * SIZE)
    expert = slot // SIZE * (E // G) + slot % SIZE
    is_expert = (slot // SIZE < G) & (slot % SIZE < E // G)
    inside = inside_rows[:, None] & is_expert[None, :]
    x = tl.load(logits + token[:, None] * E + expert[None, :], mask=inside, other=0.0)

    biased = 1.0 / (1.0 + tl.exp(-x)) + tl.load(bias + expert, mask=is_expert, other=0.0)[None, :]
    choice = tl.where(is_expert[None, :], comparable(biased), float("-inf"))
    if KEPT < G:
        choice = limit_to_groups(choice, G, KEPT, GROUPS, SIZE, HEIGHT)
    place = tl.arange(0, KS)[None, :]
    chosen, found = tl.zeros((HEIGHT, KS), tl.float32), tl.zeros((HEIGHT, KS), tl.int32)
    for k in range(K):
        best = tl.argmax(choice, 1)[:, None]
        is_best = slot[None, :] == best
        chosen = tl.where(place == k, tl.sum(tl.where(is_best, x, 0.0), 1)[:, None], chosen)
        found = tl.where(place == k, best // SIZE * (E // G) + best % SIZE, found)
        choice = tl.where(is_best, float("-inf"), choice)
    weight = share(chosen, place < K) if NORMALISE else 1.0 / (1.0 + tl.exp(-chosen))
    to, is_pair = token[:, None] * K + place, inside_rows[:, None] & (place < K)
    tl.store(ids + to, found.to(tl.int64), mask=is_pair)
    tl.store(weights + to, weight * scale, mask=is_pair)

    choice = tl.where(is_expert[None, :], comparable(x), float("-inf"))
    hit = tl.zeros((HEIGHT, GROUPS * SIZE), tl.float32)
    for _ in range(K):
        is_best = slot[None, :] == tl.argmax(choice, 1)[:, None]
        hit += tl.where(is_best & inside_rows[:, None], 1.0, 0.0)
        choice = tl.where(is_best, float("-inf"), choice)
    part = tl.program_id(0).to(tl.int64) * E + expert
    tl.store(hits + part, tl.sum(hit, 0), mask=is_expert)
    p = tl.where(inside_rows[:, None], share(x, is_expert[None, :]), 0.0)
    tl.store(shares + part, tl.sum(p, 0), mask=is_expert)


@triton.jit(do_not_specialize=["T", "parts"])
def _balance(
    shares, hits, frequency, losses, T, parts, top_k, E: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """f and Σ_i f_i P_i of one sequence, from its parts."""
    sequence, expert = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    p, f = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        place, inside = (sequence * parts + part) * E + expert[None, :], (part < parts) & (expert < E)[None, :]
        p += tl.sum(tl.load(shares + place, mask=inside, other=0.0), 0)
        f += tl.sum(tl.load(hits + place, mask=inside, other=0.0), 0)
    f = f * E / (top_k * T)
    tl.store(frequency + sequence * E + expert, f, mask=expert < E)
    tl.store(losses + sequence, tl.sum(f * (p / T), 0))


@triton.jit(do_not_specialize=["T"])
def _route_backward(
    logits, ids, weights, frequency, d_weights, d_loss, d_logits, T, scale,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr, KS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """HEIGHT tokens of one sequence. With g the gradient of log sigmoid(x), that of x is g · sigmoid(−x)."""
    token, inside_rows = tokens(T, HEIGHT)
    expert = tl.arange(0, BLOCK)[None, :]
    inside = inside_rows[:, None] & (expert < E)
    x = tl.load(logits + token[:, None] * E + expert, mask=inside, other=0.0)
    d = tl.zeros((HEIGHT, BLOCK), tl.float32)
    if d_loss is not None:
        sequence = (tl.program_id(0) // tl.cdiv(T, HEIGHT)).to(tl.int64)
        f = tl.load(frequency + sequence * E + expert, mask=expert < E, other=0.0)
        p = share(x, expert < E)
        d += p * (f - tl.sum(p * f, 1)[:, None]) * (tl.load(d_loss) / T)
    if d_weights is not None:
        mean = tl.zeros((HEIGHT,), tl.float32)
        if NORMALISE:
            place = tl.arange(0, KS)[None, :]
            pairs, is_pair = token[:, None] * K + place, inside_rows[:, None] & (place < K)
            w = tl.load(weights + pairs, mask=is_pair, other=0.0)
            mean += tl.sum(w * tl.load(d_weights + pairs, mask=is_pair, other=0.0), 1) / scale
        for k in range(K):
            pair = token * K + k
            g = tl.load(d_weights + pair, mask=inside_rows, other=0.0) - mean
            g *= tl.load(weights + pair, mask=inside_rows, other=0.0)
            chosen = tl.load(ids + pair, mask=inside_rows, other=0)
            d += tl.where(expert == chosen[:, None], g[:, None], 0.0)
    tl.store(d_logits + token[:, None] * E + expert, d / (1.0 + tl.exp(x)), mask=inside)


@triton.jit
def tokens(T, HEIGHT: tl.constexpr):
    """A program's tokens, all of one sequence, and which of them there are."""
    parts = tl.cdiv(T, HEIGHT)
    row = tl.program_id(0) % parts * HEIGHT + tl.arange(0, HEIGHT)
    return (tl.program_id(0) // parts).to(tl.int64) * T + row, row < T


@triton.jit
def comparable(x):
    """A number above −∞, so that it is chosen before one that may not be; NaN is the largest."""
    return tl.where(x != x, float("inf"), tl.maximum(x, LOWEST))


@triton.jit
def limit_to_groups(
    choice, G: tl.constexpr, KEPT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, HEIGHT: tl.constexpr
):
    """−∞ for the experts outside the KEPT groups whose two best have the highest sum. [HEIGHT, GROUPS · SIZE]"""
    grouped = tl.reshape(choice, (HEIGHT, GROUPS, SIZE))
    is_best = tl.arange(0, SIZE)[None, None, :] == tl.argmax(grouped, 2)[:, :, None]
    second = tl.max(tl.where(is_best, float("-inf"), grouped), 2)
    group = tl.arange(0, GROUPS)[None, :]
    score = tl.where(group < G, tl.maximum(tl.max(grouped, 2) + second, LOWEST), float("-inf"))
    kept = tl.zeros((HEIGHT, GROUPS), tl.int32)
    for _ in range(KEPT):
        is_best_group = group == tl.argmax(score, 1)[:, None]
        kept = tl.where(is_best_group, 1, kept)
        score = tl.where(is_best_group, float("-inf"), score)
    return tl.reshape(tl.where(kept[:, :, None] == 1, grouped, float("-inf")), (HEIGHT, GROUPS * SIZE))


@triton.jit
def share(x, inside):
    """sigmoid(x) over its sum along each row; where all are tiny, all are multiplied by e^−(largest x)."""
    top = tl.minimum(tl.max(tl.where(inside, x, float("-inf")), 1), 0.0)[:, None]
    s = tl.where(x > 0.0, 1.0, tl.exp(x - top)) / (1.0 + tl.exp(-tl.abs(x)))
    s = tl.where(inside, s, 0.0)
    return s / tl.sum(s, 1)[:, None]
