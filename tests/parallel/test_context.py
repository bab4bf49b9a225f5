"""How a sequence is cut for context parallelism. That the answer is right is the affair of `test_parity`."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.rope import Rotation
from parallel.context import ZigZag


def zigzag(ranks: int, rank: int) -> ZigZag:
    group: Any = SimpleNamespace(size=lambda: ranks)
    with patch("torch.distributed.get_rank", lambda _: rank):
        return ZigZag(group)


def test_each_rank_has_a_piece_and_the_one_opposite():
    """The drawing of `parallel.context`: eight pieces of one position on four ranks."""
    assert [zigzag(4, rank).mine for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    whole = torch.arange(8)[None]  # [B, T]
    by_rank = zigzag(4, 0).by_rank(whole)
    assert by_rank.flatten().tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert torch.equal(zigzag(4, 0).in_order(by_rank), whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_ranks_hand_out_is_put_in_order_and_back(ranks: int):
    """Pieces as `cut` makes them, of all ranks one behind the other, as an all-gather has them."""
    whole = torch.randn(3, 4 * 2 * ranks, 5)  # [B, T, …]
    handed_out = torch.cat([zigzag(ranks, rank).cut(whole, 0) for rank in range(ranks)])  # [C · 2B, L, …]
    context = zigzag(ranks, 0)
    assert torch.equal(context.in_order(handed_out), whole)
    assert torch.equal(context.by_rank(whole), handed_out)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_a_cut_gives_every_token_once_with_its_own_targets(ranks: int, depths: int):
    length, ahead = 24, 1 + depths
    whole = torch.arange(2 * (length + ahead)).view(2, -1)  # a token is its place
    seen = []
    for rank in range(ranks):
        pieces = zigzag(ranks, rank).cut(whole, ahead)
        tokens = pieces[:, :-ahead]
        assert pieces.shape == (2 * 2, length // (2 * ranks) + ahead)
        for k in range(1, ahead + 1):
            assert torch.equal(pieces[:, k : k + tokens.shape[1]], tokens + k)
        seen.append(tokens.flatten())
    assert torch.equal(torch.cat(seen).sort().values, whole[:, :length].flatten())


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_has_the_same_causal_work(ranks: int):
    """Counted where attention is called: queries are those of the last of the keys, and each reads what lies before it."""
    length = 6 * 2 * ranks
    rotation = Rotation(*torch.zeros(2, length, 1))
    work = []

    def count(q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None) -> Tensor:
        queries, keys = q.shape[1], kv.shape[1]
        assert k_rope.shape[1] == len(rotation[0]) == keys
        assert starts is not None and starts[0, 0] == keys - queries
        work[-1] += sum(range(keys - queries + 1, keys + 1))
        return q

    for rank in range(ranks):
        work.append(0)
        context = zigzag(ranks, rank)
        positions = torch.arange(length)[None]
        q = context.cut(positions, 0)[..., None, None]  # [2B, L, H, …]
        whole = positions[..., None, None]
        out = context.attention(count)(q, whole, whole[..., 0], rotation, 1.0, positions)
        assert torch.equal(out, q)
    assert work == [length * (length + 1) // 2 // ranks] * ranks
