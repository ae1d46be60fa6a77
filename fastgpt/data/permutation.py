"""An order of n numbers that is computed and not stored."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]


class Permutation:
    """The numbers 0, ..., n - 1 in an order that `key` decides, any part of it at once: 10^9 of them take no memory.

    It is a Feistel network (Luby and Rackoff 1988) on pairs x = l + a r, with l below a and r below b: a round adds to
    one of the two a hash of the other, which could be taken off again, so no two x become the same. a b is n or up to
    a - 1 more; an x that leaves [0, n) goes through again until it is back inside (cycle walking: Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains").
    """

    ROUNDS = 8  # even: l and r take turns

    def __init__(self, n: int, key: Sequence[int]) -> None:
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        # From all of the key: with a sum, (0, 1) and (1, 0) would be the same.
        self._keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, start: int, stop: int) -> list[int]:
        """Those at the places [start, stop) of the order."""
        x = self._mix(np.arange(start, stop, dtype=np.uint64))
        while len(outside := np.flatnonzero(x >= self.n)):
            x[outside] = self._mix(x[outside])
        found: list[int] = x.tolist()
        return found

    def _mix(self, x: Numbers) -> Numbers:
        a, b = np.uint64(self._a), np.uint64(self._b)
        r, l = np.divmod(x, a)  # noqa: E741
        for i in range(0, self.ROUNDS, 2):
            l = (l + _hash(r, self._keys[i])) % a  # noqa: E741
            r = (r + _hash(l, self._keys[i + 1])) % b
        return l + a * r


def _hash(x: Numbers, key: np.uint64) -> Numbers:
    """32 bits that all of x's and the key's bits have a part in: SplitMix64's last steps (Steele et al. 2014)."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)  # so that adding it to l or r does not overflow
