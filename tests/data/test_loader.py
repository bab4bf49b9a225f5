"""Batches: right targets, and one order under any number of ranks, micro-batches and threads."""

import threading

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import Loader, Samples, StoreEntry, validation_batches

T, D_MTP = 32, 2
WIDTH = T + 1 + D_MTP


@pytest.fixture(scope="module")
def samples(tiny_store):
    return Samples([StoreEntry(tiny_store.path)], T, D_MTP, seed=0)


def streams(store, split):
    """Every source's packed stream, token by token, put together the slow way: {source: (tokens, document of each)}."""
    result = {}
    for span in store.manifest.splits[split].sources:
        documents = [store.split(split).document(n) for n in range(span.first_document, span.last_document + 1)]
        numbers = np.concatenate([np.full(len(d), n) for n, d in enumerate(documents)])
        result[span.name] = np.concatenate(documents).astype(np.int64), numbers
    return result


def test_a_sample_is_a_window_of_its_source_with_real_targets(tiny_store, samples):
    windows = {}
    for name, (tokens, numbers) in streams(tiny_store, "train").items():
        for start in range(0, len(tokens) - WIDTH + 1, T):
            windows[tuple(tokens[start : start + WIDTH])] = name, start // T, numbers[start : start + WIDTH].tolist()
    for i in range(200):
        tokens, documents = samples[i]
        assert tokens.dtype == torch.int64 and documents.dtype == torch.int32
        assert tokens.shape == documents.shape == (WIDTH,)
        assert documents.tolist() == windows[tuple(tokens.tolist())][2]


def test_an_epoch_of_a_source_has_each_window_once(tiny_store, samples):
    for name, (tokens, _) in streams(tiny_store, "train").items():
        count = (len(tokens) - 1 - D_MTP) // T
        first = samples._window_numbers(name, np.arange(count))
        second = samples._window_numbers(name, np.arange(count, 2 * count))
        assert sorted(first) == sorted(second) == list(range(count))
        assert (first != second).any()


def test_a_sample_depends_on_its_index_alone(tiny_store, samples):
    expected = [samples[i] for i in range(40)]
    again = Samples([StoreEntry(tiny_store.path)], T, D_MTP, seed=0)
    for i in (39, 0, 17, 3):
        assert torch.equal(again[i][0], expected[i][0]) and torch.equal(again[i][1], expected[i][1])
    batch = again.batch(5, 20)
    assert torch.equal(batch.tokens, torch.stack([tokens for tokens, _ in expected[5:25]]))
    assert torch.equal(batch.documents, torch.stack([documents for _, documents in expected[5:25]]))


def test_another_seed_gives_another_order(tiny_store, samples):
    other = Samples([StoreEntry(tiny_store.path)], T, D_MTP, seed=1)
    same = sum(torch.equal(samples[i][0], other[i][0]) for i in range(50))
    assert same < 10


def test_samples_follow_the_weights(samples):
    assert samples.consumed(0) == {"verse": 0, "code": 0}
    consumed = samples.consumed(1000)
    assert abs(consumed["verse"] - 750) <= 3 and sum(consumed.values()) == 1000
    assert samples.epochs(1000)["verse"] == pytest.approx(consumed["verse"] / samples._window_count("verse"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_ranks_and_micro_batches_share_out_one_global_batch(samples, world_size, micro_batch):
    plan = [(0, 8), (8, 8), (16, 4), (20, 12)]
    ranks = [list(Loader(samples, rank, world_size, micro_batch).steps(plan)) for rank in range(world_size)]
    for step, (first, sequences) in enumerate(plan):
        expected = samples.batch(first, sequences)
        for part in (0, 1):
            found = torch.cat([batch[part] for rank in ranks for batch in rank[step]])
            assert torch.equal(found, expected[part])
        assert all(len(batch.tokens) <= micro_batch for rank in ranks for batch in rank[step])
        assert len({len(rank[step]) for rank in ranks}) == 1


def test_a_batch_that_the_ranks_do_not_divide_is_refused(samples):
    with pytest.raises(DataError, match=r"batch = 6 sequences: 4 ranks must divide it; use a multiple, e.g. 4"):
        list(Loader(samples, 0, 4).steps([(0, 6)]))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data-loader"]


def test_closing_ends_the_thread_of_an_endless_plan(samples):
    def endless():
        first = 0
        while True:
            yield first, 2
            first += 2

    steps = Loader(samples).steps(endless())
    for _ in range(6):
        next(steps)
    assert len(loader_threads()) == 1
    steps.close()
    assert not loader_threads()


def test_an_error_in_the_thread_reaches_the_consumer_in_its_turn(samples):
    def failing():
        yield 0, 1
        raise RuntimeError("the plan broke")

    steps = Loader(samples).steps(failing())
    next(steps)
    with pytest.raises(RuntimeError, match="the plan broke"):
        next(steps)
    assert not loader_threads()


def test_max_epochs_ends_the_samples_with_an_error_that_names_the_source(tiny_store, samples):
    limited = Samples([StoreEntry(tiny_store.path, max_epochs=2)], T, D_MTP, seed=0)
    n = limited.available
    assert max(limited.epochs(n).values()) <= 2 < max(limited.epochs(n + 1).values())
    limited[n - 1]
    with pytest.raises(DataError, match=rf"{n + 1} samples need \d+ of source \w+, max_epochs allows \d+"):
        limited[n]
    assert samples.available is None


def test_two_stores_keep_their_shares_and_names(tiny_store, tmp_path):
    (tmp_path / "other").symlink_to(tiny_store.path)
    both = Samples([StoreEntry(tiny_store.path, 1), StoreEntry(tmp_path / "other", 3)], T, D_MTP, seed=0)
    consumed = both.consumed(16_000)
    expected = {"store/verse": 3000, "store/code": 1000, "other/verse": 9000, "other/code": 3000}
    assert all(abs(consumed[name] - count) < 5 for name, count in expected.items())
    with pytest.raises(DataError, match="two sources are called store/verse"):
        Samples([StoreEntry(tiny_store.path), StoreEntry(tiny_store.path)], T, D_MTP, seed=0)


def test_a_source_shorter_than_a_sample_is_refused(tiny_store):
    with pytest.raises(DataError, match=r"data.sequence_length = 1000000: source verse of .* lower it"):
        Samples([StoreEntry(tiny_store.path)], 1_000_000, D_MTP, seed=0)


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
