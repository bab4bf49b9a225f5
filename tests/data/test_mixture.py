"""The mixture and the permutations: what they compute at once equals what a walk over all samples gives."""

import numpy as np
import pytest

from data.mixture import M, Mixture, _floor_sum
from data.permutation import Permutation


def test_floor_sum_equals_a_worked_example():
    # Σ_{i<4} ⌊(5i + 3) / 7⌋ = ⌊3/7⌋ + ⌊8/7⌋ + ⌊13/7⌋ + ⌊18/7⌋ = 0 + 1 + 1 + 2
    assert _floor_sum(4, 7, 5, 3) == 4


def test_floor_sum_equals_the_plain_sum():
    numbers = np.random.default_rng(0)
    for _ in range(300):
        n, m, a, b = (int(x) for x in numbers.integers([0, 1, 0, 0], [60, 100, 300, 300]))
        assert _floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.3, 0.7], [5, 1, 1, 0.01], [0.6, 1e-9, 0.4], [1 / 3] * 3])
def test_index_within_a_source_counts_its_earlier_samples(weights):
    mixture, n = Mixture(weights), 3000
    sources, indices = mixture.locate(0, n)
    seen = [0] * len(weights)
    for i in range(n):
        assert indices[i] == seen[sources[i]]
        seen[sources[i]] += 1
        if i % 271 == 0:
            assert mixture.counts(i + 1) == seen
    assert mixture.counts(n) == seen


def test_location_is_the_same_from_wherever_it_is_asked():
    mixture = Mixture([2, 1, 4])
    sources, indices = mixture.locate(0, 500)
    for first, n in ((0, 1), (1, 7), (123, 200), (499, 1)):
        part_sources, part_indices = mixture.locate(first, n)
        assert (part_sources == sources[first : first + n]).all()
        assert (part_indices == indices[first : first + n]).all()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.05, 0.15, 0.8]])
def test_shares_are_never_off_by_more_than_a_few_samples(weights):
    mixture, n = Mixture(weights), 20_000
    sources, _ = mixture.locate(0, n)
    samples = np.arange(1, n + 1)
    for source, weight in enumerate(weights):
        assert abs(np.cumsum(sources == source) - weight * samples).max() < 4
    for far in (10**9, 10**12):
        assert all(abs(count - weight * far) < 16 for count, weight in zip(mixture.counts(far), weights))


def test_counts_are_exact_where_the_sequence_comes_round():
    assert Mixture([1, 3]).counts(M) == [M // 4, 3 * M // 4]  # x_i takes each of the M values once


@pytest.mark.parametrize("tiny", [0, 1, 2])
def test_a_weight_too_small_to_be_drawn_is_named_and_its_limit_is_no_endless_search(tiny):
    weights = [1.0, 2.0]
    weights.insert(tiny, 1e-20)
    mixture = Mixture(weights)
    assert mixture.too_small == [tiny]
    n = mixture.samples_until([5 if source == tiny else None for source in range(3)])
    assert n is None or n > 2**48  # the rounding of a neighbour's share may leave it one place in 2^48
    n = mixture.samples_until([0 if source == tiny else 7 for source in range(3)])
    assert max(mixture.counts(n)) == 7 and max(mixture.counts(n + 1)) == 8


def test_the_smallest_weight_that_is_taken_is_drawn_once_in_a_round():
    mixture = Mixture([1, M - 1])
    assert mixture.too_small == [] and mixture.counts(M) == [1, M - 1]


def test_samples_end_where_a_limited_source_ends():
    mixture = Mixture([0.25, 0.75])
    n = mixture.samples_until([10, None])
    assert mixture.counts(n)[0] == 10
    assert mixture.counts(n + 1)[0] == 11
    assert mixture.samples_until([None, None]) is None


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    images = Permutation(size, 0, "verse", 0)(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


def test_permutation_depends_on_every_part_of_its_key():
    positions = np.arange(1000)
    orders = [Permutation(1000, *key)(positions) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    for one in range(4):
        for other in range(one):
            assert (orders[one] == orders[other]).mean() < 0.01


def test_permutation_mixes_well():
    # Of two independent orders of n numbers the correlation is about 1/√n = 0.01.
    images = Permutation(10_000, "mixing")(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.04
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 0.04
