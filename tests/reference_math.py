"""What the elementwise kernels of csrc/ must compute, written a second time: with 50 digits (mpmath), or exactly.

Lists of names are in the order of the enums of csrc/fastmb.h: a name's place is the kernel's `kind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import mpmath
import numpy as np
from mpmath import mpf

mpmath.mp.dps = 50

ACTIVATIONS = [
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "gelu_tanh",
    "silu",
    "mish",
    "softplus",
    "tanh",
    "sigmoid",
]
LOSSES = ["cross_entropy", "bce_with_logits", "mse", "mae", "huber"]
UPDATES = [
    "gradient",
    "accumulate",
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "amsgrad",
    "rmsprop",
    "rmsprop_momentum",
    "rmsprop_centered",
    "rmsprop_centered_momentum",
    "adagrad",
    "nadam",
    "radam",
    "adamax",
    "adadelta",
    "lion",
]
STATES = dict(zip(UPDATES, (1, 1, 0, 1, 1, 2, 3, 1, 2, 2, 3, 1, 2, 2, 2, 2, 1), strict=True))


def ulps(got: np.ndarray, expected: Sequence[mpf], floor: float = 0.0) -> float:
    """The largest error, in units in the last place of the expected value or of `floor`, whichever is larger.

    Differences below 2^10 times the smallest normal number don't count: exp ends in 0 there.
    """
    info = np.finfo(got.dtype)
    worst = mpf(0)
    for g, e in zip(got.tolist(), expected, strict=True):
        error = abs(mpf(g) - e)
        if not error <= info.tiny * 1024:  # NaN counts
            size = got.dtype.type(max(abs(e), mpf(floor)))
            worst = max(worst, error / float(np.spacing(size))) if math.isfinite(g) else mpmath.inf
    return float(worst)


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def softplus(x: mpf) -> mpf:
    return max(x, mpf(0)) + mpmath.log1p(mpmath.exp(-abs(x)))


def activation(name: str, x: mpf, value: float) -> tuple[mpf, mpf]:
    """f(x) and f'(x)."""
    one, zero = mpf(1), mpf(0)
    match name:
        case "identity":
            return x, one
        case "relu":
            return (x, one) if x > 0 else (zero, zero)
        case "leaky_relu":
            return (x, one) if x > 0 else (value * x, mpf(value))
        case "elu":
            return (x, one) if x > 0 else (value * mpmath.expm1(x), value * mpmath.exp(x))
        case "selu":
            scale, alpha = mpf("1.0507009873554804934193349852946"), mpf("1.6732632423543772848170429916717")
            f, df = activation("elu", x, alpha)
            return scale * f, scale * df
        case "gelu":
            cdf = mpmath.erfc(-x / mpmath.sqrt(2)) / 2
            return x * cdf, cdf + x * mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)
        case "gelu_tanh":
            c = 2 * mpmath.sqrt(2 / mpmath.pi)
            s = sigmoid(c * (x + mpf("0.044715") * x**3))
            return x * s, s + x * s * (1 - s) * c * (1 + 3 * mpf("0.044715") * x**2)
        case "silu":
            s = sigmoid(x)
            return x * s, s + x * s * sigmoid(-x)
        case "mish":
            t = mpmath.tanh(softplus(x))
            return x * t, t + x * (1 - t * t) * sigmoid(x)
        case "softplus":
            return softplus(x), sigmoid(x)
        case "tanh":
            return mpmath.tanh(x), mpmath.sech(x) ** 2
        case "sigmoid":
            return sigmoid(x), sigmoid(x) * sigmoid(-x)
    raise ValueError(name)


def loss(
    name: str,
    z: Sequence[float],
    y: int | Sequence[float],
    smoothing: float = 0.0,
    delta: float = 1.0,
    weight: Sequence[float] | None = None,
) -> tuple[mpf, list[mpf]]:
    """The loss of one row and its gradient; `y` is a class index or the row of targets."""
    n = len(z)
    zs = [mpf(x) for x in z]
    w = [mpf(x) for x in (weight if weight is not None else [1.0] * n)]
    if name == "cross_entropy":
        t = [mpf(c == y) for c in range(n)] if isinstance(y, int) else [mpf(x) for x in y]
        q = [wc * ((1 - mpf(smoothing)) * tc + mpf(smoothing) / n) for wc, tc in zip(w, t, strict=True)]
        top = max(zs)
        lse = top + mpmath.log(sum(mpmath.exp(x - top) for x in zs))
        total = sum(q)
        gradient = [mpmath.exp(x - lse) * total - qc for x, qc in zip(zs, q, strict=True)]
        return -sum(qc * (x - lse) for qc, x in zip(q, zs, strict=True)), gradient
    terms, gradient = [], []
    for x, yc, p in zip(zs, (mpf(v) for v in y), w, strict=True):  # type: ignore[union-attr]
        d = x - yc
        if name == "bce_with_logits":
            terms.append((1 - yc) * x + (1 + (p - 1) * yc) * softplus(-x))
            gradient.append(sigmoid(x) * (1 - yc + p * yc) - p * yc)
        elif name == "mse":
            terms.append(d * d)
            gradient.append(2 * d)
        elif name == "mae":
            terms.append(abs(d))
            gradient.append(mpmath.sign(d))
        else:
            terms.append(d * d / 2 if abs(d) < delta else delta * (abs(d) - mpf(delta) / 2))
            gradient.append(max(-mpf(delta), min(d, mpf(delta))))
    return sum(terms) / n, [g / n for g in gradient]


def exact_fma(a: float, b: float, c: float) -> float:
    """a * b + c of float64, rounded once."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def plain_fma(a: float, b: float, c: float) -> float:
    return a * b + c


def update(
    name: str,
    c: Sequence[float],
    w: float,
    state: Sequence[float],
    g: float,
    fma: Callable[[float, float, float], float],
) -> tuple[float, list[float]]:
    """The optimiser's update of one float64 weight and its state, in the order of operations that is the contract."""
    if name == "gradient":
        return w, [g]
    if name == "accumulate":
        return w, [state[0] + g]
    g = fma(c[1], w, g)
    sqrt = math.sqrt
    match name, list(state):
        case "sgd", []:
            return fma(-c[0], g, w), []
        case "momentum", [m]:
            m = fma(c[2], m, c[3] * g)
            return fma(-c[0], m, w), [m]
        case "nesterov", [m]:
            m = fma(c[2], m, c[3] * g)
            return fma(-c[0], fma(c[2], m, g), w), [m]
        case "adam", [m, v]:
            m, v = fma(c[3], g - m, m), fma(c[5], g * g, c[4] * v)
            return fma(-c[0], m / (sqrt(v) + c[6]), w * c[2]), [m, v]
        case "amsgrad", [m, v, x]:
            m, v = fma(c[3], g - m, m), fma(c[5], g * g, c[4] * v)
            x = max(x, v)
            return fma(-c[0], m / (sqrt(x) + c[6]), w * c[2]), [m, v, x]
        case "rmsprop", [v]:
            v = fma(c[3], g * g, c[2] * v)
            return fma(-c[0], g / (sqrt(v) + c[4]), w), [v]
        case "rmsprop_momentum", [v, b]:
            v = fma(c[3], g * g, c[2] * v)
            b = fma(c[5], b, g / (sqrt(v) + c[4]))
            return fma(-c[0], b, w), [v, b]
        case "rmsprop_centered", [v, a]:
            v, a = fma(c[3], g * g, c[2] * v), fma(c[3], g - a, a)
            return fma(-c[0], g / (sqrt(fma(-a, a, v)) + c[4]), w), [v, a]
        case "rmsprop_centered_momentum", [v, a, b]:
            v, a = fma(c[3], g * g, c[2] * v), fma(c[3], g - a, a)
            b = fma(c[5], b, g / (sqrt(fma(-a, a, v)) + c[4]))
            return fma(-c[0], b, w), [v, a, b]
        case "adagrad", [s]:
            s = fma(g, g, s)
            return fma(-c[0], g / (sqrt(s) + c[2]), w), [s]
        case "nadam", [m, v]:
            m, v = fma(c[3], g - m, m), fma(c[5], g * g, c[4] * v)
            return w * c[2] - fma(c[7], g, c[0] * m) / (sqrt(v) + c[6]), [m, v]
        case "radam", [m, v]:
            m, v = fma(c[3], g - m, m), fma(c[5], g * g, c[4] * v)
            return fma(-c[0], m / fma(c[7], sqrt(v), c[6]), w * c[2]), [m, v]
        case "adamax", [m, u]:
            m, u = fma(c[3], g - m, m), max(c[4] * u, abs(g) + c[5])
            return fma(-c[0], m / u, w), [m, u]
        case "adadelta", [v, d]:
            v = fma(c[3], g * g, c[2] * v)
            step = sqrt(d + c[4]) / sqrt(v + c[4]) * g
            return fma(-c[0], step, w), [v, fma(c[3], step * step, c[2] * d)]
        case "lion", [m]:
            mixed = fma(c[3], g, c[4] * m)
            sign = (mixed > 0) - (mixed < 0)
            return fma(-c[0], sign, w * c[2]), [fma(c[5], g, c[6] * m)]
    raise ValueError(name)


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. 2011: four 32-bit words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ x3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def dropout_words(seed: int, t: int, index: int, row: int, n: int, rows: int) -> np.ndarray:
    """The random word of each unit and row: (n, rows), uint32."""
    low = 0xFFFFFFFF
    words = np.empty((-(-n // 4) * 4, rows), np.uint32)
    for r in range(rows):
        for i in range(0, n, 4):
            counter = (i // 4, row + r, t & low, (t >> 32) ^ (index << 24))
            words[i : i + 4, r] = philox(counter, (seed & low, seed >> 32))
    return words[:n]
