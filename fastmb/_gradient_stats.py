"""What a fit tells of its gradients: norms of the rows', norm of their mean, and the gradient noise scale.

For a mini-batch of B rows, with m the mean of the rows' squared norms and n the squared norm of their mean, the
unbiased estimators of McCandlish, Kaplan, Amodei et al. (2018, "An empirical model of large-batch training", appendix
A) are ``|G|^2 = (B n - m) / (B - 1)`` for the true gradient's squared norm and ``tr S = B (m - n) / (B - 1)`` for the
variance of a row's gradient. Both are averaged over an epoch's mini-batches, apart, and then divided: ``B_simple = tr
S / |G|^2``, since the mean of quotients would be biased.
"""

from __future__ import annotations

import math

import numpy as np

COLUMNS = 5  # of a mini-batch: sum and maximum of squared norms, the mean's squared norm, rows, sum of norms
MOMENTS = 11
NORMS = ("example_norm_mean", "example_norm_max", "grad_norm", "grad_variance")
NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")
FIGURES = NORMS + NOISE  # the columns of the history
_Z = 1.959964  # of a normal distribution, 95 % lie within


def moments(stats: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What an epoch keeps of its mini-batches: sums over the rows of `stats`, (steps, 5), added to those `before`.

    Mini-batches, rows, sum of norms, largest squared norm, sum of n; and of those with two rows or more: their number,
    the sums of |G|^2 and tr S, of their squares and of their product.
    """
    rows = stats[:, 3]
    usual = rows.min(initial=2.0) > 1  # not by chance, not at an epoch's end, not broken off
    counted, several = (stats, stats) if usual else (stats[rows > 0], stats[rows > 1])
    found = np.zeros(MOMENTS)
    _, _, found[4], found[1], found[2] = counted.sum(axis=0)
    found[0], found[3] = len(counted), counted[:, 1].max(initial=0.0)
    squares, _, n, B, _ = several.T
    m, (a, b, aa, bb, ab) = squares / B, (terms := np.empty((5, len(several))))
    a[:], b[:] = (B * n - m) / (B - 1), B * (m - n) / (B - 1)
    aa[:], bb[:], ab[:] = a * a, b * b, a * b
    found[5], found[6:] = len(several), terms.sum(axis=1)
    total: np.ndarray = found + before
    total[3] = max(found[3], before[3])
    return total


def noise_scale(found: np.ndarray) -> tuple[float, float, float, float]:
    """Tr S, B_simple, and the 95 % interval of B_simple by the delta method; infinity where |G|^2 may be 0."""
    k, a, b, aa, bb, ab = found[5:].tolist()
    if not k:
        return (math.nan,) * 4
    a, b = a / k, b / k
    if a <= 0:
        return b, math.inf, math.nan, math.inf
    ratio = b / a
    if k < 2:
        return b, ratio, math.nan, math.nan
    variance = (bb / k - b * b) - 2 * ratio * (ab / k - a * b) + ratio**2 * (aa / k - a * a)
    error = math.sqrt(max(variance, 0.0) / (k - 1)) / a
    return b, ratio, max(0.0, ratio - _Z * error), ratio + _Z * error


def figures(found: np.ndarray) -> dict[str, float]:
    """The columns of the history."""
    steps, rows, norms, most, n = found[:5].tolist()
    of_rows, of_means = norms / rows if rows else math.nan, math.sqrt(n / steps) if steps else math.nan
    return dict(zip(FIGURES, (of_rows, math.sqrt(most), of_means, *noise_scale(found)), strict=True))
