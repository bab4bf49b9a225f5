"""Tokens that travel against tokens that stay: the all-to-all dispatcher, values and gradients, against the local one."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.moe import Dispatcher, LocalDispatcher
from model.ops.rows import sum_rows
from parallel.expert import TO_HOST, AllToAllDispatcher
from parallel.recompute import FullPolicy, contexts

EXPERTS, K, DIM = 8, 3, 6


def routed(dispatcher: Dispatcher, tokens: Tensor, ids: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each token's weighted sum of what its experts, matrices [E_local, D, D], make of it."""
    handle = dispatcher.dispatch(tokens, ids, weights)
    meanwhile = tokens.sum()  # autograd must cope with work between departure and arrival
    rows, index, place, counts, weigh = dispatcher.receive(handle)
    parts = [part @ matrix for part, matrix in zip(rows[index].split(counts.tolist()), experts)]
    return dispatcher.combine(sum_rows(torch.cat(parts) * weigh.unsqueeze(-1), place), handle) + meanwhile


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


class Waits(TorchDispatchMode):
    """Counts how often a number comes to the host: by the one operation that is meant for it, and in any other way."""

    def __init__(self) -> None:
        super().__init__()
        self.meant = self.other = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.meant += func is TO_HOST
        self.other += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def waits_of_a_recomputed_layer() -> tuple[int, int]:
    """Tokens there and back, forward, recomputed, and backward."""
    tokens, ids, weights = tokens_of(dist.get_rank(), [5, 8], EXPERTS)
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD)

    def layer(tokens: Tensor) -> Tensor:
        handle = dispatcher.dispatch(tokens, ids, weights)
        return dispatcher.combine(dispatcher.receive(handle).rows.sin(), handle)

    with Waits() as waits:
        policy = partial(contexts, FullPolicy())
        checkpoint(layer, tokens.requires_grad_(), use_reentrant=False, context_fn=policy).sum().backward()
    return waits.meant, waits.other


def test_the_host_waits_once_a_layer(workers: Any) -> None:
    assert workers.run(2, waits_of_a_recomputed_layer) == [(1, 0), (1, 0)]
