"""Which source sample i of a run comes from, as a pure function of i.

Sample i is the point x_i = A·i mod M of a Weyl sequence, with M = 2^48 and A the odd number next to M divided by the golden
ratio. The sources share out [0, M) in proportion to their weights, and x_i falls into one of them. Such points fill every
interval evenly: after any number of samples a source's count is within a few samples of its share.

The index of a sample within its source is the number of earlier samples of that source, counted without walking over them.
For 0 ≤ b ≤ M, [x mod M < b] = ⌊x/M⌋ − ⌊(x − b)/M⌋, so the samples among the first n that fall below b are

    Σ_{i<n} ⌊A·i / M⌋ − Σ_{i<n} ⌊(A·i − b) / M⌋

and each of the two is a floor sum, which Euclid's algorithm gives in O(log M) steps.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

M = 2**48
A = 173_961_102_589_771  # the odd number nearest to M · (√5 − 1)/2


class Mixture:
    """Shares samples among sources by weight.

    Args:
        weights: one number a source, none below 0 and not all 0; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert any(weights) and all(weight >= 0 for weight in weights), weights
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        self.too_small = [source for source, weight in enumerate(exact) if weight * M < total]  # may never be drawn
        self._bounds = [int(M * sum(exact[:j]) / total) for j in range(len(exact) + 1)]  # [S+1] from 0 to M

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each source [S]."""
        below = [_points_below(bound, n) for bound in self._bounds]
        return [right - left for left, right in pairwise(below)]

    def locate(self, first: int, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source and index within the source of samples first … first+n−1: two arrays [n]."""
        samples = np.arange(first, first + n, dtype=np.uint64)
        points = (samples * np.uint64(A)) & np.uint64(M - 1)  # products wrap at 2^64, a multiple of M
        inner = np.asarray(self._bounds[1:-1], dtype=np.uint64)
        sources = np.searchsorted(inner, points, side="right").astype(np.int64)
        indices = np.empty(n, dtype=np.int64)
        for source, count in enumerate(self.counts(first)):
            mine = np.flatnonzero(sources == source)
            indices[mine] = count + np.arange(len(mine))
        return sources, indices

    def samples_until(self, limits: Sequence[int | None]) -> int | None:
        """The largest n for which no source gives more than its limit among the first n; None without any limit."""
        drawn = [left < right for left, right in pairwise(self._bounds)]
        limited = {source: limit for source, limit in enumerate(limits) if limit is not None and drawn[source]}
        if not limited:
            return None

        def fits(n: int) -> bool:
            counts = self.counts(n)
            return all(counts[source] <= limit for source, limit in limited.items())

        high = 1
        while fits(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def _points_below(bound: int, n: int) -> int:
    """How many of the first n points lie below `bound`, 0 ≤ bound ≤ M."""
    # ⌊(A·i − b)/M⌋ = ⌊(A·i + M − b)/M⌋ − 1 keeps the second sum's offset from being negative.
    return _floor_sum(n, M, A, 0) - _floor_sum(n, M, A, M - bound) + n


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ_{i<n} ⌊(a·i + b)/m⌋ for a, b ≥ 0: whole parts are taken out, then the axes are swapped (Euclid)."""
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b = divmod(top, m)
        m, a = a, m
    return total
