"""The one gate before the kernels: what may come in, and one error for what may not, before anything is written.

Each function returns the arguments of the public function of its name as backends want them: arrays of one dtype,
products transposed and broadcast (as views), outputs there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _checks, modules
from .._errors import unknown_name
from ..optim import Optimizer

FROM_OUTPUT = ("identity", "relu", "leaky_relu", "elu", "selu", "softplus", "tanh", "sigmoid")
MATMUL_NAMES = ("a", "b", "bias")

Array = np.ndarray
_MOST = 2**53  # steps
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def plain(name: str, x: object) -> Array:
    """`x`, if it is an array, and of no class (masked, a matrix) that makes something else of its numbers."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array; got {type(x).__name__}")
    if type(x) is not np.ndarray and not isinstance(x, np.memmap):
        raise TypeError(f"{name} must be a plain NumPy array or a memmap; got {type(x).__name__}")
    return x


def array(name: str, x: object, dtype: np.dtype | None = None) -> Array:
    """`x`, if it is an array of float32 or float64, and of `dtype` if that is given."""
    x = plain(name, x)
    if x.dtype not in _FLOATS or not x.dtype.isnative:
        raise TypeError(f"{name} must be float32 or float64; got {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as the other arrays are; got {x.dtype}")
    return x


def shape(name: str, x: Array, expected: tuple[int, ...], why: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, {why}; got {x.shape}")


def overlap(x: Array, y: Array) -> bool:
    """Whether an element of one lies in the other's memory."""
    if not np.may_share_memory(x, y):
        return False
    work: Any = 100_000  # to decide it; where that isn't enough, the answer is yes
    try:
        return np.shares_memory(x, y, max_work=work)
    except np.exceptions.TooHardError:
        return True


def same_place(x: Array, y: Array) -> bool:
    """Whether two arrays of one shape and dtype are the same elements in the same order."""
    return x.__array_interface__["data"] == y.__array_interface__["data"] and all(
        s == t for n, s, t in zip(x.shape, x.strides, y.strides, strict=True) if n > 1
    )


def output(
    out: object,
    expected: tuple[int, ...],
    dtype: np.dtype,
    inputs: dict[str, Array],
    in_place: Sequence[str] = (),
    name: str = "out",
) -> Array:
    """`out`, or a new array. It may overlap no input; those named by `in_place` it may be itself."""
    if out is None:
        return np.empty(expected, dtype)
    out = writable(name, array(name, out, dtype))
    shape(name, out, expected, "that of the result")
    for other, x in inputs.items():
        if overlap(out, x) and not (other in in_place and x.shape == out.shape and same_place(out, x)):
            besides = f"; it may be {other} itself, not a part of it" if other in in_place else ""
            raise ValueError(f"{name} overlaps {other} in memory{besides}")
    return out


def writable(name: str, x: Array) -> Array:
    """`x`, if it can be written and no element of it stands for two."""
    if not x.flags.writeable:
        raise ValueError(f"{name} is read-only")
    if x.size > 1 and not x.flags.forc and _folded(x):
        raise ValueError(f"{name} overlaps itself in memory: several of its elements are one; got strides {x.strides}")
    return x


def _folded(x: Array) -> bool:
    """Whether elements of x may share memory: sorted by stride, each dimension must step over all before it."""
    reach = x.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def activation(activation: object) -> tuple[str, float]:
    """Kind and value of an activation: None, a name, or a module such as ``LeakyReLU(0.1)``."""
    if activation is None:
        return "identity", 0.0
    if isinstance(activation, str):
        if activation == "identity":
            return "identity", 0.0
        if activation not in modules.ACTIVATIONS:
            raise unknown_name("activation", activation, modules.ACTIVATIONS)
        activation = modules.ACTIVATIONS[activation]()
    if not isinstance(activation, modules.Activation):
        raise TypeError(f"activation must be a name or a module such as LeakyReLU(0.1); got {activation!r}")
    op = activation.op
    if op.kind not in modules.ACTIVATIONS:  # the backends have kernels of these
        expected = "built in, such as 'tanh' or LeakyReLU(0.1), and no function of your own"
        raise ValueError(f"activation must be {expected}; got {activation!r}")
    return op.kind, op.value


def matmul(
    a: Any,
    b: Any,
    transpose_a: bool,
    transpose_b: bool,
    bias: Any,
    act: object,
    alpha: float,
    beta: float,
    out: Any,
    names: tuple[str, str, str] = MATMUL_NAMES,
) -> tuple[Array, Array, Array | None, str, float, float, float, Array]:
    a_name, b_name, bias_name = names
    array(a_name, a)
    array(b_name, b, a.dtype)
    transpose_a = _checks.boolean("transpose_a", transpose_a)
    transpose_b = _checks.boolean("transpose_b", transpose_b)
    for name, x in ((a_name, a), (b_name, b)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least two dimensions; got shape {x.shape}")
    given = {a_name: a, b_name: b}
    a_shape, b_shape = a.shape, b.shape
    a, b = (a.swapaxes(-1, -2) if transpose_a else a), (b.swapaxes(-1, -2) if transpose_b else b)
    m, k = a.shape[-2:]
    n = b.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(
            f"{b_name} must have {k} {'columns' if transpose_b else 'rows'}, as many as {a_name} has "
            f"{'rows' if transpose_a else 'columns'}; got shapes {a_shape} and {b_shape}"
        )
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"the leading dimensions of {a_name} and {b_name} must broadcast; got shapes {a_shape} and {b_shape}"
        ) from None
    kind, value = activation(act)
    alpha, beta = (_checks.number(name, x, "(-inf, inf)") for name, x in (("alpha", alpha), ("beta", beta)))
    if bias is not None:
        array(bias_name, bias, a.dtype)
        given[bias_name] = bias
        try:
            bias = np.broadcast_to(bias, (*batch, m, n))
        except ValueError:
            raise ValueError(
                f"{bias_name} must broadcast to the result's shape {(*batch, m, n)}; got {bias.shape}"
            ) from None
    if beta != 0 and out is None:
        raise ValueError(f"beta={beta} needs an out that holds what is to be added")
    out = output(out, (*batch, m, n), a.dtype, given)
    return (
        np.broadcast_to(a, (*batch, m, k)),
        np.broadcast_to(b, (*batch, k, n)),
        bias,
        kind,
        value,
        alpha,
        beta,
        out,
    )


def activation_forward(z: Any, act: object, out: Any) -> tuple[Array, str, float, Array]:
    array("z", z)
    kind, value = activation(act)
    return z, kind, value, output(out, z.shape, z.dtype, {"z": z}, ("z",))


def activation_backward(da: Any, act: object, z: Any, a: Any, out: Any) -> tuple[Array, str, float, Array, bool, Array]:
    """da, kind, value, z or a, which of them, out."""
    array("da", da)
    kind, value = activation(act)
    if (z is None) == (a is None):
        raise TypeError(
            f"give either z, the activation's input, or a, its output; got {'both' if a is not None else 'neither'}"
        )
    if z is None and (kind not in FROM_OUTPUT or (kind == "leaky_relu" and value < 0)):
        raise ValueError(f"a, the output, does not tell the derivative of {act!r}: give z, the input")
    name, x = ("a", a) if z is None else ("z", z)
    array(name, x, da.dtype)
    shape(name, x, da.shape, "that of da")
    return da, kind, value, x, z is None, output(out, da.shape, da.dtype, {"da": da, name: x}, ("da", name))


def softmax_cross_entropy(
    z: Any, y: Any, sample_weight: Any, class_weight: Any, label_smoothing: float, out: Any
) -> tuple[Array, Array, Array, Array | None, float, float, Array]:
    """z; y; float64 sample weights, or ones; float64 class weights or None; the smoothing; the sum of weights; out."""
    array("z", z)
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"z must have shape (n, C) with C >= 1; got {z.shape}")
    n, C = z.shape
    y = plain("y", y)
    weights = _weights("class_weight", class_weight, C, "one per class")
    if y.dtype.kind in "iu" and y.dtype.isnative:
        shape("y", y, (n,), "a class index for each row of z")
        if n and not (y.min() >= 0 and y.max() < C):
            row = int(np.argmax((y < 0) | (y >= C)))
            raise ValueError(f"y must be class indices from 0 to {C - 1}; got {y[row]} at position {row}")
    else:
        array("y", y, z.dtype)
        shape("y", y, z.shape, "that of z, a probability for each class")
    label_smoothing = _checks.number("label_smoothing", label_smoothing, "[0, 1]")
    s = _weights("sample_weight", sample_weight, n, "one per row of z")
    s = np.ones(n) if s is None else s
    total = float((s if weights is None or y.ndim == 2 else s * weights[y]).sum())
    out = output(out, z.shape, z.dtype, {"z": z, "y": y}, ("z",))
    return z, y, s, weights, label_smoothing, total, out


def _weights(name: str, x: Any, n: int, why: str) -> Array | None:
    if x is None:
        return None
    if plain(name, x).dtype.kind not in "fiu":
        raise TypeError(f"{name} must be an array of numbers; got {x.dtype}")
    shape(name, x, (n,), why)
    x = x.astype(np.float64)
    if not (np.isfinite(x) & (x >= 0)).all():
        raise ValueError(f"{name} must be finite and >= 0; got {x[~(np.isfinite(x) & (x >= 0))][0]}")
    return np.ascontiguousarray(x)


def rows_first(name: str, x: Any) -> Array:
    """``(..., B, out)`` as ``(B, ..., out)``; what is so already is left to `reduce_gradients`, which is faster."""
    if type(x) is np.ndarray and x.ndim == 2:
        return x
    if array(name, x).ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"{name} must have shape (..., B, out), B >= 1; got {x.shape}")
    return np.moveaxis(x, -2, 0)


def reduce_gradients(
    stack: Any, weights: Any, mean: bool, out: Any, name: str = "stack"
) -> tuple[Array, Array | None, float, Array]:
    """The stack, weights of its dtype or None, what the sum is divided by, out."""
    array(name, stack)
    if stack.ndim == 0 or len(stack) == 0:
        raise ValueError(f"{name} must have at least one row, (S, ...) with S >= 1; got shape {stack.shape}")
    if weights is not None:
        array("weights", weights, stack.dtype)
        shape("weights", weights, stack.shape[:1], "one for each gradient of the stack")
        if not np.isfinite(weights).all():
            raise ValueError(f"weights must be finite; got {weights[~np.isfinite(weights)][0]}")
        weights = np.ascontiguousarray(weights)
    divisor = 1.0
    if _checks.boolean("mean", mean):
        divisor = float(len(stack)) if weights is None else sum(weights.tolist())
        if divisor == 0:
            raise ValueError("the weights of a mean must not sum to 0")
    given = {name: stack} | ({} if weights is None else {"weights": weights})
    return stack, weights, divisor, output(out, stack.shape[1:], stack.dtype, given)


def optimizer_update(
    optimizer: Any, w: Any, g: Any, state: Any, t: Any, out: Any
) -> tuple[str, Array, Array, Array, Array, Array]:
    """The update's kind, its coefficients in float64, w, g, state, out."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one such as Adam(lr=1e-3); got {optimizer!r}")
    array("w", w)
    most = optimizer.most_dimensions
    if most is not None and w.ndim > most:
        raise ValueError(f"w must have no more than {most} dimensions for {optimizer.kind}; got shape {w.shape}")
    array("g", g, w.dtype)
    shape("g", g, w.shape, "that of w")
    array("state", state, w.dtype)
    shape("state", state, (optimizer.n_states, *w.shape), f"{optimizer.n_states} arrays like w for {optimizer.kind}")
    writable("state", state)
    t = _checks.integer("t", t, 0, _MOST)
    given = {"g": g, "state": state}
    for name, x in (("w", w), ("g", g)):
        if overlap(state, x):
            raise ValueError(f"state overlaps {name} in memory")
    out = output(w if out is None else out, w.shape, w.dtype, given, name="w" if out is None else "out")
    if out is not w and overlap(out, w) and not same_place(out, w):
        raise ValueError("out overlaps w in memory; it may be w itself, not a part of it")
    row = optimizer.coefficients(t, 1, optimizer.learning_rates(t, 1))[0]
    coefficients = np.array(optimizer.of_group(row, 0))  # arrays have no names: no pattern of `groups` matches
    return optimizer.kind, coefficients, w, g, state, out


def clip_by_global_norm(grads: Any, max_norm: Any, out: Any) -> tuple[list[Array], float, list[Array], bool]:
    """Gradients, the norm, outputs, and whether a list came."""
    many = isinstance(grads, (list, tuple))
    arrays = list(grads) if many else [grads]
    outs = [None] * len(arrays) if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    names = [f"grads[{i}]" if many else "grads" for i in range(len(arrays))]
    for name, g in zip(names, arrays, strict=True):
        array(name, g)
    if len(outs) != len(arrays):
        raise ValueError(f"out must have {len(arrays)} arrays, as grads has; got {len(outs)}")
    given = dict(zip(names, arrays, strict=True))
    made: list[Array] = []
    for name, g, o in zip(names, arrays, outs, strict=True):
        out_name = name.replace("grads", "out")
        made.append(output(o, g.shape, g.dtype, given, (name,), out_name))
        for other in made[:-1]:
            if o is not None and overlap(made[-1], other):
                raise ValueError(f"{out_name} overlaps another out in memory")
    return arrays, _checks.number("max_norm", max_norm, "(0, inf)"), made, many


def factors(norm: float, max_norm: float, dtype: np.dtype) -> tuple[float, ...]:
    """What gradients of this norm are multiplied by, one after the other; two where their product would be denormal."""
    if norm <= max_norm:
        return (1.0,)
    factor = max_norm / norm if math.isfinite(norm) else math.nan
    return (math.sqrt(max_norm) / math.sqrt(norm),) * 2 if factor < np.finfo(dtype).tiny else (factor,)
