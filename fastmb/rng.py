"""Random numbers as functions of a counter, the same on every machine and for every thread.

Nothing here has a state that a thread could advance: what is drawn depends only on the seed and on what it is for.
Shuffles come from SplitMix64 (Steele, Lea, Flood 2014), dropout masks from Philox4x32-10 (Salmon, Moraes, Dror, Shaw
2011), initial weights from NumPy's Philox4x64 and arithmetic that is the same everywhere (`fastmb._arithmetic`). The
compiled executors compute the same numbers in their own code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._arithmetic import cospi, log
from ._extension import compiled

_GOLDEN = 0x9E3779B97F4A7C15
_64 = 2**64 - 1
_32 = 2**32 - 1


def splitmix64(x: int) -> int:
    """The 64-bit mix of `x` + 0x9E3779B97F4A7C15: the output of SplitMix64 whose state is `x`."""
    x = (x + _GOLDEN) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` rows in an epoch: a Fisher-Yates shuffle, int64 ``(n,)``, a function of its arguments alone."""
    key = splitmix64(splitmix64(seed) ^ epoch)
    order: np.ndarray = (compiled("permutation") or _permutation)(n, key)
    return order


def _permutation(n: int, key: int) -> np.ndarray:
    """`permutation` without the compiled one, n up to 2^32: place i is swapped with floor(u_i (i + 1) / 2^64)."""
    i = np.arange(n - 1, 0, -1, dtype=np.uint64)
    x: np.ndarray = np.uint64(key) + i * np.uint64(_GOLDEN)  # wraps modulo 2^64; then SplitMix64, vectorised
    x += np.uint64(_GOLDEN)
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    u = x ^ (x >> 31)
    j = _multiply_high(u, i + np.uint64(1))
    order = list(range(n))
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        order[a], order[b] = order[b], order[a]
    return np.array(order, dtype=np.int64)


def _multiply_high(u: np.ndarray, m: np.ndarray) -> np.ndarray:
    """floor(u m / 2^64) of uint64 arrays, m at most 2^32."""
    high: np.ndarray = ((u >> 32) * m + ((u & np.uint64(_32)) * m >> 32)) >> 32
    return high


def philox4x32(counter: tuple[np.ndarray | int, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four 32-bit words (in uint64 arrays) for a counter of four words, each an int or an array."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    low, half = np.uint64(_32), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> half) ^ c1 ^ np.uint64(k0), (p0 >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & _32, (k1 + 0xBB67AE85) & _32
    return c0, c1, c2, c3


def dropout_mask(seed: int, t: int, index: int, rows: int, units: int, p: float, dtype: np.dtype) -> np.ndarray:
    """What dropout `index` multiplies a mini-batch by, ``(rows, units)`` float64: 0, or 1 / (1 - p) rounded to `dtype`.

    `t` is the number of updates made before; a unit is kept where its 32-bit word is at least floor(p 2^32).
    """
    quads = np.arange(-(-units // 4))[None, :]
    purpose = ((t >> 32) ^ (index << 24)) & _32
    words = philox4x32((quads, np.arange(rows)[:, None], t & _32, purpose), (seed & _32, seed >> 32))
    word = np.stack(words, axis=-1).reshape(rows, 4 * quads.size)[:, :units]
    return np.where(word >= int(p * 2**32), float(dtype.type(1 / (1 - p))), 0.0)


def noise_words(n: int) -> int:
    """Random words that `n` normal numbers take."""
    return -(-n // 128) * 128


def normal(seed: int, t: int, matrix: int, n: int, bits: np.ndarray | None = None) -> np.ndarray:
    """The first `n` normal numbers of a matrix in update `t` + 1, float64: the noise of private training.

    Box and Muller (1958) of pairs of 32-bit words, u in (0, 1) from the upper 31 bits of the first. Number 128 b + 32 u
    + c comes from word u of Philox's counter (matrix, 32 b + c), or is number 128 b + 32 u + c of `bits`. The compiled
    executors compute them in the dtype of the parameters.
    """
    if bits is None:
        row = np.arange(noise_words(n) // 4)
        purpose = ((t >> 32) ^ (255 << 24)) & _32
        words = philox4x32((matrix, row, t & _32, purpose), (seed & _32, seed >> 32))
        word = np.stack([w.reshape(-1, 32) for w in words], axis=1)
    else:
        word = bits.astype(np.uint64).reshape(-1, 4, 32)
    share = ((word >> np.uint64(1)) + 0.5) * 2.0**-31
    radius, angle = np.sqrt(-2 * np.log(share[:, ::2])), 2 * np.pi * 2.0**-32 * word[:, 1::2]
    numbers = np.empty(word.shape)
    numbers[:, ::2], numbers[:, 1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return numbers.ravel()[:n]


def poisson_batches(
    n: int, steps: int, q: float, uniform: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mini-batches that take each of `n` rows with probability `q`, independently: (order, offsets), both int64.

    Mini-batch k is ``order[offsets[k] : offsets[k + 1]]``. All steps' rows are one line of ``steps * n`` places, along
    which geometric distances lead from one that is taken to the next. `uniform` gives so many numbers in [0, 1).
    """
    longest = 1 << 12  # distances are told in pieces of this length
    still = np.cumprod(np.full(longest, 1.0 - q))  # probability that none of the next 1, 2, ... places is taken
    places, last, end = [], -1, steps * n
    while last < end:
        u = uniform(1024 + int(1.1 * q * (end - last)))
        distance = np.searchsorted(-still, u - 1.0, side="right")  # `longest`: none in this piece
        position = last + np.cumsum(np.where(distance == longest, longest, distance + 1))
        places.append(position[(distance < longest) & (position < end)])
        last = int(position[-1])
    taken = np.concatenate(places)
    return taken % n, np.searchsorted(taken, np.arange(steps + 1) * n)


class Stream:
    """One sequence of numbers, for the initial weights of one network."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def uniform(self, n: int) -> np.ndarray:
        """`n` numbers in [0, 1), multiples of 2^-53."""
        raw: np.ndarray = self._bits.random_raw(n)
        return (raw >> 11) * 2.0**-53

    def normal(self, n: int) -> np.ndarray:
        """`n` standard normal numbers (Box and Muller 1958)."""
        u = self.uniform(2 * n)
        radius: np.ndarray = np.sqrt(-2 * log(1 - u[:n]))
        return radius * cospi(2 * u[n:])
