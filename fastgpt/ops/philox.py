"""The random numbers of attention's dropout, in plain torch: Philox4x32 (Salmon, Moraes, Dror, Shaw 2011, "Parallel
random numbers: as easy as 1, 2, 3").

A counter of four 32-bit words and a key of two give four random words; no state is kept, so backward makes the mask of
forward again. One round, with M0 = 0xD2511F53 and M1 = 0xCD9E8D57:

    c0, c1, c2, c3 = hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)
    k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85

7 rounds are the fewest that pass all of BigCrush. Key: the 64 bits of the seed. Counter: (column // 8, row, head, 0),
head counted over the batch. The four words are cut into eight numbers of 16 bits, low half first, one for each of the
eight columns; a column is kept if its number is at least `threshold(p)`. So p is a multiple of 2^-16.
"""

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """How many of 65,536 numbers drop an element; not all of them, so that what is left can be scaled up."""
    return min(round(p * 65536), 65535)


def inverse_keep(p: float) -> float:
    """What an element that is kept is multiplied by: 1 / (1 - p), for the p that there is."""
    return 65536 / (65536 - threshold(p))


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a * b, for 32-bit words in int64: in two parts, since int64 has no room for the product."""
    low = (a & 0xFFFF) * b  # below 2^48
    high = (a >> 16) * b + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words from a counter, as int64 tensors that broadcast; `seed` is one int64."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        high1, low1 = _multiply(0xCD9E8D57, c2)
        high0, low0 = _multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, heads: int, rows: int, columns: int, p: float) -> Tensor:
    """Which of (heads, rows, columns) dropout keeps: a bool tensor on seed's device."""

    def count(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    octets = count((columns + 7) // 8)[None, None, :]
    words = philox(seed.reshape(()), octets, count(rows)[None, :, None], count(heads)[:, None, None], octets * 0)
    numbers = torch.stack([part for w in words for part in (w & 0xFFFF, w >> 16)], -1)  # (heads, rows, octets, 8)
    return numbers.flatten(-2)[..., :columns] >= threshold(p)
