"""Seeded permutations of 0 … n−1 that are computed, not stored.

A Feistel network on the smallest number of bits that holds n: the bits are cut in two halves, and each half in turn is
xored with a keyed hash of the other, which is a bijection of 2^bits numbers whatever the hash. A result ≥ n is put through
the network again until it falls below n (cycle walking), which keeps it a bijection of the first n; since 2^bits < 2n, two
passes are enough on average.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from data.hashing import scramble

ROUNDS = 8  # half-rounds; 4 full Feistel rounds suffice for a pseudorandom permutation (Luby and Rackoff, 1988)


class Permutation:
    """A bijection of 0 … size−1 chosen by `key`; constant memory, any position at once.

    Args:
        size: n ≥ 1, below 2^62.
        key: anything whose text names this permutation, e.g. (seed, source, epoch).
    """

    def __init__(self, size: int, *key: object) -> None:
        assert 1 <= size < 2**62, size
        self.size = size
        bits = max(size - 1, 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._masks = (np.uint64((1 << bits - bits // 2) - 1), np.uint64((1 << bits // 2) - 1))  # high half, low half
        digest = blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Images [n] of positions [n], each in 0 … size−1."""
        images = self._pass(np.asarray(positions, dtype=np.uint64))
        while (outside := images >= self.size).any():
            images[outside] = self._pass(images[outside])
        return images.astype(np.int64)

    def _pass(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One trip through the network: [n] → [n] below 2^bits."""
        high_mask, low_mask = self._masks
        high, low = numbers >> self._low_bits, numbers & low_mask
        for turn in range(0, ROUNDS, 2):
            high = high ^ (scramble(low + self._keys[turn]) & high_mask)
            low = low ^ (scramble(high + self._keys[turn + 1]) & low_mask)
        return (high << self._low_bits) | low
