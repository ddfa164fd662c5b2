"""The numba backend: compiled for this machine when a function is first called, and kept in numba's cache.

Products and reductions have the order of operations of the native backend, fused multiply-adds included; functions and
updates are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from .._cached import cached
from . import _check, _numpy

KINDS = (
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
)
UPDATES = ("sgd", "momentum", "nesterov", "adam", "amsgrad", "rmsprop", "adagrad")
COLUMNS = 64  # of B that are packed at a time

_quiet = np.errstate(all="ignore")  # as a decorator


@intrinsic
def fma(typing_context, a, b, c):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """A b + c, rounded once."""
    if a != b or a != c or not isinstance(a, types.Float):
        return None

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return builder.fma(*args)

    return a(a, b, c), emit


# ---- products ----------------------------------------------------------------------------------------------------


@cached(numba.njit, nogil=True)
def _products(a, b, c, bias, has_bias, alpha, beta):  # type: ignore[no-untyped-def]
    """C = alpha a b + beta c + bias for a stack of matrices; B is packed a panel of columns at a time."""
    count, m, k = a.shape
    n = b.shape[2]
    panel = np.empty((k, COLUMNS), b.dtype)
    acc = np.empty(COLUMNS, b.dtype)
    for p in range(count):
        for j0 in range(0, n, COLUMNS):
            width = min(COLUMNS, n - j0)
            for l in range(k):  # noqa: E741
                for j in range(width):
                    panel[l, j] = b[p, l, j0 + j]
                for j in range(width, COLUMNS):
                    panel[l, j] = 0
            for i in range(m):
                acc[:] = 0
                for l in range(k):  # noqa: E741
                    x = a[p, i, l]
                    for j in range(COLUMNS):
                        acc[j] = fma(x, panel[l, j], acc[j])
                for j in range(width):
                    z = alpha * acc[j]
                    if beta != 0:
                        z = fma(beta, c[p, i, j0 + j], z)
                    if has_bias:
                        z += bias[p, i, j0 + j]
                    c[p, i, j0 + j] = z


@_quiet
def matmul(
    a: Any,
    b: Any,
    transpose_a: bool,
    transpose_b: bool,
    bias: Any,
    activation: Any,
    alpha: float,
    beta: float,
    out: Any,
    names: tuple[str, str, str] = _check.MATMUL_NAMES,
) -> np.ndarray:
    a, b, bias, kind, value, alpha, beta, out = _check.matmul(
        a, b, transpose_a, transpose_b, bias, activation, alpha, beta, out, names
    )
    scalar = out.dtype.type
    has_bias = bias is not None
    c = out[None] if out.ndim == 2 else out
    views = [x[None] if x.ndim == 2 else x for x in (a, b, out if bias is None else bias)]
    for index in np.ndindex(c.shape[:-3]):
        x, y, z = (view[index] for view in views)
        _products(_read_only(x), _read_only(y), c[index], _read_only(z), has_bias, scalar(alpha), scalar(beta))
    if kind != "identity":
        _forward(out, KINDS.index(kind), value, out=out)
    return out


def _read_only(x: np.ndarray) -> np.ndarray:
    """The same array with one type for numba: any strides, not to be written."""
    view = x[:, :, :]
    view.flags.writeable = False
    return view


# ---- elementwise -------------------------------------------------------------------------------------------------


@cached(numba.njit)
def _sigmoid(z):  # type: ignore[no-untyped-def]
    e = math.exp(-abs(z))
    return (1.0 if z >= 0 else e) / (1.0 + e)


@cached(numba.njit)
def _gated(z, tail, density):  # type: ignore[no-untyped-def]
    """Z F(z) and its derivative, from x = |z|, F(-x) and F'(x); x density and x tail are 0 where x is infinite."""
    x = abs(z)
    below = tail - (x * density if density > 0 else 0.0)
    value = max(z, 0.0) - (x * tail if tail > 0 else 0.0)
    return (value, below) if z < 0 else (value, 1.0 - below)


@cached(numba.njit)
def _both(kind, value, z):  # type: ignore[no-untyped-def]
    """f(z) and f'(z)."""
    if z != z:
        return z, z
    if kind == 1:
        return (z, 1.0) if z > 0 else (0.0, 0.0)
    if kind == 2:
        return (z, 1.0) if z > 0 else (value * z, value)
    if kind == 3:
        return (z, 1.0) if z > 0 else (value * math.expm1(z), value * math.exp(z))
    if kind == 4:
        scale, alpha = 1.0507009873554804934, 1.7580993408473768599
        return (scale * z, scale) if z > 0 else (alpha * math.expm1(z), alpha * math.exp(z))
    if kind == 5:
        return _gated(z, 0.5 * math.erfc(abs(z) / math.sqrt(2.0)), 0.3989422804014327 * math.exp(-0.5 * z * z))
    if kind == 6:
        x = min(abs(z), 30.0)
        tail = _sigmoid(-x * (1.5957691216057308 + 0.0713548162726002 * x * x))
        return _gated(z, tail, tail * (1 - tail) * (1.5957691216057308 + 3 * 0.0713548162726002 * x * x))
    if kind == 7:
        tail = _sigmoid(-abs(z))
        return _gated(z, tail, tail * (1 - tail))
    if kind == 8:
        e = math.exp(-abs(z))
        below = z < 0
        n = e * e + 2 * e if below else 1 + 2 * e
        k = 1.0 if below else e * e
        m = n + 2 * k
        slope = 4 * (1 + e) / m**2 * (e if below else k)
        x = max(min(z, 750.0), -750.0)
        return max(z, -750.0) * (n / m), n / m + x * slope
    if kind == 9:
        return max(z, 0.0) + math.log1p(math.exp(-abs(z))), _sigmoid(z)
    if kind == 10:
        t = math.tanh(z)
        e = math.exp(-2 * abs(z))
        return t, 4 * e / (1 + e) ** 2
    if kind == 11:
        s = _sigmoid(z)
        return s, s * _sigmoid(-z)
    return z, 1.0


@cached(numba.njit)
def _slope_from_output(kind, value, a):  # type: ignore[no-untyped-def]
    if kind == 10:
        return (1 - a) * (1 + a)
    if kind == 11:
        return a * (1 - a)
    if kind == 9:
        return -math.expm1(-a)
    if kind == 0 or (a > 0 and kind != 4):
        return 1.0
    if kind == 1:
        return 0.0
    if kind == 2:
        return value
    if kind == 3:
        return a + value
    return 1.0507009873554804934 if a > 0 else a + 1.7580993408473768599


@cached(numba.vectorize, ["float32(float32, int64, float64)", "float64(float64, int64, float64)"])
def _forward(z, kind, value):  # type: ignore[no-untyped-def]
    return _both(kind, value, np.float64(z))[0]


@cached(
    numba.vectorize,
    ["float32(float32, float32, int64, float64, boolean)", "float64(float64, float64, int64, float64, boolean)"],
)
def _backward(da, x, kind, value, from_output):  # type: ignore[no-untyped-def]
    x = np.float64(x)
    return da * (_slope_from_output(kind, value, x) if from_output else _both(kind, value, x)[1])


@_quiet
def activation_forward(z: Any, activation: Any, out: Any) -> np.ndarray:
    z, kind, value, out = _check.activation_forward(z, activation, out)
    _forward(z, KINDS.index(kind), value, out=out)
    return out


@_quiet
def activation_backward(da: Any, activation: Any, z: Any, a: Any, out: Any) -> np.ndarray:
    da, kind, value, x, from_output, out = _check.activation_backward(da, activation, z, a, out)
    _backward(da, x, KINDS.index(kind), value, from_output, out=out)
    return out


# ---- loss --------------------------------------------------------------------------------------------------------


@cached(numba.njit, nogil=True)
def _softmax(z, target, indices, s, weights, smoothing, total, out):  # type: ignore[no-untyped-def]
    """The weighted mean loss; its gradient into out. With `indices`, column 0 of target is the class index."""
    n, C = z.shape
    loss = 0.0
    q = np.empty(C)
    e = np.empty(C)
    for i in range(n):
        top = -np.inf
        for c in range(C):
            top = max(top, np.float64(z[i, c]))
            t = (1.0 if target[i, 0] == c else 0.0) if indices else np.float64(target[i, c])
            q[c] = weights[c] * ((1 - smoothing) * t + smoothing / C)
        norm, mass, own = 0.0, 0.0, 0.0
        for c in range(C):
            x = np.float64(z[i, c]) - top
            e[c] = math.exp(x)
            norm += e[c]
            mass += q[c]
            if q[c] != 0:
                own += q[c] * x
        loss += s[i] * (mass * math.log(norm) - own)
        for c in range(C):
            out[i, c] = s[i] / total * (e[c] / norm * mass - q[c])
    return loss / total


def softmax_cross_entropy(
    z: Any, y: Any, sample_weight: Any, class_weight: Any, label_smoothing: float, out: Any
) -> tuple[float, np.ndarray]:
    z, y, s, weights, label_smoothing, total, out = _check.softmax_cross_entropy(
        z, y, sample_weight, class_weight, label_smoothing, out
    )
    if total == 0:
        out[...] = 0
        return 0.0, out
    weights = np.ones(z.shape[1]) if weights is None else weights
    indices = y.ndim == 1
    target = y[:, None].astype(np.int64) if indices else y
    return float(_softmax(z, target, indices, s, weights, label_smoothing, total, out)), out


# ---- reductions and updates --------------------------------------------------------------------------------------


@cached(numba.vectorize, ["float32(float32, float32, float32)", "float64(float64, float64, float64)"])
def _add(total, w, g):  # type: ignore[no-untyped-def]
    return fma(w, g, total)


@_quiet
def reduce_gradients(stack: Any, weights: Any, mean: bool, out: Any, name: str = "stack") -> np.ndarray:
    stack, weights, divisor, out = _check.reduce_gradients(stack, weights, mean, out, name)
    scalar = out.dtype.type
    out[...] = 0
    for s, gradient in enumerate(stack):
        _add(out, scalar(1) if weights is None else weights[s], gradient, out=out)
    if divisor != 1:
        np.divide(out, scalar(divisor), out=out)
    return out


@cached(numba.njit, nogil=True)
def _update(kind, momentum, centered, c, w, g, s):  # type: ignore[no-untyped-def]
    """The formulas of fastmb.optim on flat arrays; s is (n_states, n)."""
    for i in range(w.size):
        x = np.float64(w[i])
        d = np.float64(g[i]) + c[1] * x
        if kind == 0:
            x -= c[0] * d
        elif kind == 1 or kind == 2:
            m = c[2] * s[0, i] + c[3] * d
            s[0, i] = m
            x -= c[0] * (m if kind == 1 else d + c[2] * m)
        elif kind == 3 or kind == 4:
            m = s[0, i] + c[3] * (d - s[0, i])
            v = c[4] * s[1, i] + c[5] * d * d
            s[0, i], s[1, i] = m, v
            if kind == 4:
                v = max(v, np.float64(s[2, i]))
                s[2, i] = v
            x = x * c[2] - c[0] * (m / (math.sqrt(v) + c[6]))
        elif kind == 5:
            v = c[2] * s[0, i] + c[3] * d * d
            s[0, i] = v
            if centered:
                mean = s[1, i] + c[3] * (d - s[1, i])
                s[1, i] = mean
                v = max(v - mean * mean, 0.0)
            d /= math.sqrt(v) + c[4]
            if momentum:
                last = s.shape[0] - 1
                d += c[5] * s[last, i]
                s[last, i] = d
            x -= c[0] * d
        else:
            v = s[0, i] + d * d
            s[0, i] = v
            x -= c[0] * d / (math.sqrt(v) + c[2])
        w[i] = x


def optimizer_update(optimizer: Any, w: Any, g: Any, state: Any, t: int, out: Any) -> np.ndarray:
    family = optimizer.kind.split("_")[0] if isinstance(getattr(optimizer, "kind", None), str) else ""
    if family not in UPDATES or not optimizer.fused:  # written in NumPy alone
        return _numpy.optimizer_update(optimizer, w, g, state, t, out)
    kind, coefficients, w, g, state, out = _check.optimizer_update(optimizer, w, g, state, t, out)
    c = coefficients.astype(w.dtype).astype(np.float64)
    new, states = w.flatten(), state.reshape(len(state), w.size).copy()
    _update(UPDATES.index(family), "momentum" in kind, "centered" in kind, c, new, g.ravel(), states)
    out[...], state[...] = new.reshape(w.shape), states.reshape(state.shape)
    return out


@cached(numba.njit, nogil=True)
def _squares(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for value in x.flat:
        total += np.float64(value) * np.float64(value)
    return total


@_quiet
def clip_by_global_norm(grads: Any, max_norm: float, out: Any) -> tuple[Any, float]:
    grads, max_norm, outs, many = _check.clip_by_global_norm(grads, max_norm, out)
    norm = math.sqrt(sum(_squares(g) for g in grads))
    for g, o in zip(grads, outs, strict=True):
        first, *second = _check.factors(norm, max_norm, g.dtype)
        np.multiply(g, g.dtype.type(first), out=o)
        for factor in second:
            np.multiply(o, g.dtype.type(factor), out=o)
    return (outs if many else outs[0]), norm
