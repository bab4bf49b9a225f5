"""Tokens that travel against tokens that stay: the all-to-all dispatcher, values and gradients, against the local one."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.moe import Dispatcher, LocalDispatcher
from parallel.expert import AllToAllDispatcher

EXPERTS, K, DIM = 8, 3, 6


def routed(dispatcher: Dispatcher, tokens: Tensor, ids: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each token's weighted sum of what its experts, matrices [E_local, D, D], make of it."""
    handle = dispatcher.dispatch(tokens, ids, weights)
    meanwhile = tokens.sum()  # autograd must cope with work between departure and arrival
    rows, counts = dispatcher.receive(handle)
    parts = [part @ matrix for part, matrix in zip(rows.split(counts.tolist()), experts)]
    return dispatcher.combine(torch.cat(parts), handle) + meanwhile


def tokens_of(rank: int, lengths: list[int], used: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    tokens = torch.randn(lengths[rank], DIM, generator=draw)
    ids = torch.rand(lengths[rank], used, generator=draw).argsort(-1)[:, :K]
    return tokens, ids, torch.rand(lengths[rank], K, generator=draw)


def travel(lengths: list[int], used: int) -> list[Tensor]:
    """Output and gradients of this rank's tokens and weights, and of its experts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens, ids, weights = tokens_of(rank, lengths, used)
    matrices = torch.randn(EXPERTS, DIM, DIM, generator=torch.Generator().manual_seed(99))
    mine = matrices.chunk(ranks)[rank].clone()
    leaves = [t.requires_grad_() for t in (tokens, weights, mine)]
    out = routed(AllToAllDispatcher(EXPERTS, dist.group.WORLD), tokens, ids, weights, mine)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("ranks", "lengths"), [(1, [9]), (2, [5, 8]), (4, [7, 0, 1, 12])])
@pytest.mark.parametrize("used", [EXPERTS, K], ids=["all experts", "three of them"])
def test_tokens_that_travel_come_back_as_if_they_had_stayed(
    workers: Any, ranks: int, lengths: list[int], used: int
) -> None:
    """Ranks with unequal numbers of tokens, or none; experts and whole ranks to which no token goes."""
    found = workers.run(ranks, travel, lengths, used)
    matrices = torch.randn(EXPERTS, DIM, DIM, generator=torch.Generator().manual_seed(99)).requires_grad_()
    for rank, (out, d_tokens, d_weights, _) in enumerate(found):
        tokens, ids, weights = tokens_of(rank, lengths, used)
        expected = routed(LocalDispatcher(EXPERTS), tokens.requires_grad_(), ids, weights.requires_grad_(), matrices)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(d_tokens, tokens.grad)
        torch.testing.assert_close(d_weights, weights.grad)
    torch.testing.assert_close(torch.cat([run[-1] for run in found]), matrices.grad)


def noting(method: Any, calls: list[str]) -> Any:
    def noted(tensor: Tensor, *args: Any, **more: Any) -> Any:
        calls.append(method.__name__)
        return method(tensor, *args, **more)

    return noted


def waits_for_the_device() -> int:
    """How often the host reads a tensor while tokens travel there and back."""
    tokens, ids, weights = tokens_of(dist.get_rank(), [5, 8], EXPERTS)
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD)
    reads: list[str] = []
    with ExitStack() as stack:
        for name in ("tolist", "item", "cpu", "__int__", "__float__", "__bool__", "__index__"):
            stack.enter_context(patch.object(Tensor, name, noting(getattr(Tensor, name), reads)))
        handle = dispatcher.dispatch(tokens.requires_grad_(), ids, weights)
        rows, _ = dispatcher.receive(handle)
        dispatcher.combine(rows, handle).sum().backward()
    return len(reads)


def test_the_host_waits_once_a_layer(workers: Any) -> None:
    assert workers.run(2, waits_for_the_device) == [1, 1]
