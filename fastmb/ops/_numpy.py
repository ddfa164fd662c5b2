"""The reference backend: float64, plain, slow. It defines what the others must compute."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..executors.reference import ACTIVATIONS, loss_and_gradient, update
from ..losses import CrossEntropy
from . import _check

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")


def _float64(x: np.ndarray) -> np.ndarray:
    """A float64 copy in C order: a sum's order must not depend on the strides."""
    return np.array(x, dtype=np.float64, order="C")


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
    z = alpha * np.matmul(_float64(a), _float64(b))
    if beta != 0:
        z += beta * _float64(out)
    if bias is not None:
        z += bias
    out[...] = ACTIVATIONS[kind](z, value)[0]
    return out


@_quiet
def activation_forward(z: Any, activation: Any, out: Any) -> np.ndarray:
    z, kind, value, out = _check.activation_forward(z, activation, out)
    out[...] = ACTIVATIONS[kind](_float64(z), value)[0]
    return out


def slope_from_output(kind: str, value: float, a: np.ndarray) -> np.ndarray:
    """f'(z) from a = f(z)."""
    if kind == "tanh":
        return 1 - a**2
    if kind == "sigmoid":
        return a * (1 - a)
    if kind == "softplus":
        return -np.expm1(-a)
    scale, below = {
        "identity": (1.0, np.ones_like(a)),
        "relu": (1.0, np.zeros_like(a)),
        "leaky_relu": (1.0, np.full_like(a, value)),
        "elu": (1.0, a + value),
        "selu": (1.0507009873554805, a + 1.7580993408473766),
    }[kind]
    return np.where(a > 0, scale, below)


@_quiet
def activation_backward(da: Any, activation: Any, z: Any, a: Any, out: Any) -> np.ndarray:
    da, kind, value, x, from_output, out = _check.activation_backward(da, activation, z, a, out)
    x = _float64(x)
    out[...] = da * (slope_from_output(kind, value, x) if from_output else ACTIVATIONS[kind](x, value)[1])
    return out


@_quiet
def softmax_cross_entropy(
    z: Any, y: Any, sample_weight: Any, class_weight: Any, label_smoothing: float, out: Any
) -> tuple[float, np.ndarray]:
    z, y, s, weights, label_smoothing, total, out = _check.softmax_cross_entropy(
        z, y, sample_weight, class_weight, label_smoothing, out
    )
    if total == 0:
        out[...] = 0
        return 0.0, out
    losses, dz, _ = loss_and_gradient(CrossEntropy(label_smoothing, weights), _float64(z), y)
    out[...] = dz * (s / total)[:, None]
    return float((s * losses).sum() / total), out


@_quiet
def reduce_gradients(stack: Any, weights: Any, mean: bool, out: Any, name: str = "stack") -> np.ndarray:
    stack, weights, divisor, out = _check.reduce_gradients(stack, weights, mean, out, name)
    total = np.zeros(out.shape)
    for s, gradient in enumerate(stack):
        total += _float64(gradient) * (1.0 if weights is None else float(weights[s]))
    out[...] = total / divisor
    return out


@_quiet
def optimizer_update(optimizer: Any, w: Any, g: Any, state: Any, t: int, out: Any) -> np.ndarray:
    kind, coefficients, w, g, state, out = _check.optimizer_update(optimizer, w, g, state, t, out)
    # one that needs whole matrices takes them in their own dtype, as in a trainer; a weight alone is one of one
    shape, dtype = w.shape or (1,), np.float64 if optimizer.fused else w.dtype
    new, gradient = (np.array(x, dtype, order="C").reshape(shape) for x in (w, g))
    states = np.array(state, dtype, order="C").reshape(len(state), *shape)
    if optimizer.fused:
        c = _float64(coefficients.astype(w.dtype)).tolist()
        update(kind, c, new, gradient, states)
    elif w.size:
        optimizer.update("", coefficients.tolist(), new, gradient, states)
    out[...], state[...] = new.reshape(w.shape), states.reshape(state.shape)
    return out


@_quiet
def clip_by_global_norm(grads: Any, max_norm: float, out: Any) -> tuple[Any, float]:
    grads, max_norm, outs, many = _check.clip_by_global_norm(grads, max_norm, out)
    norm = float(np.sqrt(sum(float((_float64(g) ** 2).sum()) for g in grads)))
    for g, o in zip(grads, outs, strict=True):
        o[...] = g
        for factor in _check.factors(norm, max_norm, g.dtype):
            o *= g.dtype.type(factor)
    return (outs if many else outs[0]), norm
