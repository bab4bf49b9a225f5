"""Validation: each token is a target once, and the set of windows is the same under any number of ranks."""

import pytest
import torch

from data.errors import DataError
from data.validation import validation_batches
from tests.data.test_samples import D_MTP, T, streams


def test_validation_has_each_token_once_as_a_target(tiny_store):
    targets = {}
    for source, batch in validation_batches(tiny_store, T, D_MTP, batch=4):
        targets.setdefault(source, []).append(batch.tokens[:, 1 : T + 1].flatten())
    for name, (tokens, _) in streams(tiny_store, "validation").items():
        found = torch.cat(targets[name])
        count = (len(tokens) - 1 - D_MTP) // T * T
        assert found.tolist() == tokens[1 : count + 1].tolist()
        assert len(tokens) - count <= T + 1 + D_MTP


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_the_same_set_under_any_world_size(tiny_store, world_size):
    def rows(rank, world_size, batch):
        return list(validation_batches(tiny_store, T, D_MTP, batch, None, rank, world_size))

    def collect(ranks):
        return sorted((source, *row) for rank in ranks for source, batch in rank for row in batch.tokens.tolist())

    ranks = [rows(rank, world_size, 3) for rank in range(world_size)]
    assert collect(ranks) == collect([rows(0, 1, 5)])
    assert len({len(rank) for rank in ranks}) == 1


def test_max_tokens_bounds_validation(tiny_store):
    batches = list(validation_batches(tiny_store, T, D_MTP, batch=4, max_tokens=10 * T))
    counts = {}
    for source, batch in batches:
        counts[source] = counts.get(source, 0) + len(batch.tokens)
    assert counts == {"verse": 5, "code": 5}


def test_validation_without_a_whole_window_is_refused(tiny_store):
    with pytest.raises(DataError, match=r"data.validation: no source of .* lower data.sequence_length"):
        next(validation_batches(tiny_store, 1_000_000, D_MTP, batch=1))
