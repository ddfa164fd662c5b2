"""The reference executor: float64, plain, slow. It defines what the other executors must compute.

A mini-batch goes forward stage by stage, ``a = ops(f(x) + skip)``, and keeps, of each stage, its input x, what f's way
back needs (`fastmb.executors.reference_layers`), and the derivative `d` of `ops`. The loss gives the gradient with
respect to the last output; on the way back ``dz = da * d`` goes through f, and to the input that was skipped from. Then
the optimiser updates the flat vector elementwise. Arithmetic is in float64 throughout; what the plan keeps in its own
dtype (parameters, state, coefficients, the value of a dropout mask) is rounded to that dtype whenever it is written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._progress import undisturbed
from ..plan import Op, Plan, Stage, buffer_views, views
from ..rng import dropout_mask, noise_words, normal
from . import Training
from .reference_layers import KINDS, Arrays, BatchNorm

if TYPE_CHECKING:
    from ..data import Batches
    from ..losses import Loss

ROWS = 1024  # rows taken at a time where no mini-batch says how many

Drop = Callable[[Op, int, int], np.ndarray] | None  # (op, rows, units) -> mask; None: no dropout

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a loss may overflow: the caller looks at it


class Tape(NamedTuple):
    """What a forward pass leaves for the way back."""

    d_input: np.ndarray  # derivative of the operations on the input
    stages: list[tuple[np.ndarray, Any, np.ndarray]]  # each stage's input, what f needs, the operations' derivative


class NumpyExecutor:
    """See `fastmb.executors.Executor`. `n_threads` is not looked at."""

    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        training: Training | None = None,
        n_threads: int | None = None,  # noqa: ARG002
        *,
        buffers: np.ndarray | None = None,
    ) -> None:
        self.plan = plan
        self.params = params
        self.buffers = np.zeros(plan.buffer_size, plan.dtype) if buffers is None else buffers
        self.training = training
        self.made = 0
        if training is not None:
            optimizer = training.optimizer
            groups = optimizer.parameter_groups(views(params, plan))
            places = views(np.arange(plan.size), plan)
            self._groups = [  # the places of each group's parameters in the flat vector
                np.concatenate([np.zeros(0, int), *(places[name].ravel() for name in groups if groups[name] == i)])
                for i in range(optimizer.n_groups)
            ]

    @undisturbed()
    def run(
        self,
        batches: Batches,
        first: int,
        t: int,
        coefficients: np.ndarray,
        sums: np.ndarray,
        seconds: float,
        stats: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> int:
        deadline = time.perf_counter() + seconds
        assert self.training is not None
        rules = self.training.rules
        for step, row in enumerate(coefficients):
            rows = _rows_of(batches, first + step)
            *others, last = self._parts(rows)
            total, before = np.zeros(self.plan.size), np.zeros(2)
            tapes: list[Tape] = []
            for part in others:
                da, tape = self._examples(batches, part, t + step, len(others[0]) * len(tapes), sums[step])
                total, before = total + self._backward(da, tape), before + sums[step]
                tapes.append(tape)
            da, tape = self._examples(batches, last, t + step, len(rows) - len(last), sums[step])
            sums[step] += before
            if not np.isfinite(sums[step, 0]):
                return step
            weight = sums[step, 1]
            if rules.clip_per_example < math.inf or stats is not None or norms is not None:
                size = self._norms(da, tape)
                own = _without_weight(size, batches, last)
                if norms is not None:
                    norms[last] = own
                da = da * shorten(own, rules.clip_per_example)[:, None]
            gradient = self._mean(total + self._backward(da, tape), rules.divide or weight, t + step)
            if stats is not None:
                size = size * len(rows) / weight if weight > 0 else np.zeros(len(rows))
                mean = (gradient**2).sum()
                stats[step] = (size**2).sum(), (size**2).max(initial=0), mean, len(rows), size.sum()
            self._update(row, self._limited(gradient))
            for each in (*tapes, tape):
                self._update_buffers(each)
            self.made += 1
            if time.perf_counter() >= deadline:
                return step + 1
        return len(coefficients)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows that go through the network together: parts of a mini-batch matter where statistics are taken."""
        assert self.training is not None
        size = self.training.rules.part_rows if self.plan.batch_norms else 0
        return [rows[i : i + size] for i in range(0, len(rows), size)] if size else [rows]

    def gradients(self, batches: Batches, t: int, out: np.ndarray, sums: np.ndarray) -> bool:
        da, tape = self._examples(batches, _rows_of(batches, 0), t, 0, sums[0])
        weight = sums[0, 1]
        out[:] = self._backward(da, tape) / weight if weight > 0 else 0
        return bool(np.isfinite(sums[0, 0]))

    @undisturbed()
    def accumulate(
        self,
        batches: Batches,
        t: int,
        row: int,
        out: np.ndarray,
        sums: np.ndarray,
        inputs: np.ndarray | None = None,
    ) -> bool:
        da, tape = self._examples(batches, _rows_of(batches, 0), t, row, sums[0])
        if not np.isfinite(sums[0, 0]):
            return False
        if inputs is not None:
            inputs[:] = self._to_input(da, tape) * batches.scale
        if self.training is not None:
            own = _without_weight(self._norms(da, tape), batches, _rows_of(batches, 0))
            da = da * shorten(own, self.training.rules.clip_per_example)[:, None]
        gradient = self._backward(da, tape)
        out[:] = gradient if row == 0 else out + gradient
        self._update_buffers(tape)
        self.made += 1
        return True

    @undisturbed()
    def apply(self, gradient: np.ndarray, weight: float, t: int, coefficients: np.ndarray) -> None:
        self._update(coefficients[0], self._limited(self._mean(_float64(gradient), weight, t)))
        self.made += 1

    def per_example(
        self,
        batches: Batches,
        t: int,
        sums: np.ndarray,
        norms: np.ndarray | None = None,
        gradients: list[np.ndarray | None] | None = None,
        inputs: np.ndarray | None = None,
    ) -> bool:
        da, tape = self._examples(batches, _rows_of(batches, 0), t, 0, sums[0])
        if norms is not None:
            norms[:] = self._norms(da, tape)
        if inputs is not None:
            inputs[:] = self._to_input(da, tape) * batches.scale
        if gradients is not None:
            each = (array for pair in self._each(da, tape) for array in pair)
            for out, array in zip(gradients, each, strict=True):
                if out is not None and array.size:
                    out[:] = array
        return bool(np.isfinite(sums[0, 0]))

    @_quiet
    def forward(self, X: np.ndarray, scale: float, out: np.ndarray) -> None:
        for rows in _blocks(len(X)):
            out[rows] = self._forward(_float64(X[rows]) * scale, None)[0]

    @_quiet
    def evaluate(self, batches: Batches, out: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        assert self.training is not None
        assert batches.y is not None
        for rows in _blocks(len(batches.X)):
            z, _ = self._forward(_float64(batches.X[rows]) * batches.scale, None)
            row_loss, _, row_weight = loss_and_gradient(self.training.loss, z, np.asarray(batches.y[rows]))
            s = 1.0 if batches.sample_weight is None else batches.sample_weight[rows]
            out[rows], losses[rows], weights[rows] = z, s * row_loss, s * row_weight

    @_quiet
    def _examples(
        self, batches: Batches, rows: np.ndarray, t: int, row: int, sums: np.ndarray
    ) -> tuple[np.ndarray, Tape]:
        """The gradient of each row's weighted loss with respect to its output, and the way there.

        The rows' weighted loss and their weight go into `sums`. `row` counts the rows that the mini-batch had before.
        """
        training = self.training
        assert batches.y is not None
        x, y = _float64(batches.X[rows]) * batches.scale, np.asarray(batches.y[rows])
        s = np.ones(len(x)) if batches.sample_weight is None else batches.sample_weight[rows]

        def drop(op: Op, rows: int, units: int) -> np.ndarray:
            assert training is not None
            p = op.values(t, 1).item()
            return dropout_mask(training.seed, t, op.index, row + rows, units, p, self.plan.dtype)[row:]

        z, tape = self._forward(x, drop if training is not None else None)
        if training is None:  # y is the gradient
            sums[:] = (z * y).sum(), len(x)
            return _float64(y), tape
        row_loss, dz, row_weight = loss_and_gradient(training.loss, z, y)
        sums[:] = (s * row_loss).sum(), (s * row_weight).sum()
        return s[:, None] * dz, tape

    def _mean(self, gradient: np.ndarray, divide: float, t: int) -> np.ndarray:
        """A sum of gradients, divided, with noise: see `fastmb.executors.Rules`."""
        assert self.training is not None
        rules = self.training.rules
        factor = 1 / divide if divide > 0 else 0.0
        gradient = gradient * factor
        if rules.noise_multiplier > 0:
            deviation = rules.noise_multiplier * rules.clip_per_example * factor
            for i, stage in enumerate(self.plan.stages):
                matrix = slice(stage.offset, stage.offset + stage.size)
                bits = np.frombuffer(os.urandom(4 * noise_words(stage.size)), np.uint32) if rules.secure else None
                gradient[matrix] += deviation * normal(self.training.seed, t, i, stage.size, bits)
        return gradient

    def _limited(self, gradient: np.ndarray) -> np.ndarray:
        """A mean gradient within the limits of `fastmb.executors.Rules`."""
        assert self.training is not None
        rules = self.training.rules
        norm = math.sqrt((gradient**2).sum())
        if not norm + 1e-6 <= rules.max_grad_norm:
            gradient = gradient * (rules.max_grad_norm / (norm + 1e-6))
        return np.clip(gradient, -rules.clip_value, rules.clip_value)

    def _forward(self, x: np.ndarray, drop: Drop) -> tuple[np.ndarray, Tape]:
        """The raw output of rows `x`, and what it takes to come back."""
        numbers = self._numbers()
        a, d_input = _elementwise(self.plan.input_ops, x, drop)
        tape = Tape(d_input, [])
        for stage in self.plan.stages:
            x = a
            z, saved = KINDS[stage.kind].forward(stage, x, _of(stage, numbers), drop is not None)
            if stage.skip is not None:
                z = z + (tape.stages[stage.skip][0] if stage.skip < len(tape.stages) else x)
            a, d = _elementwise(stage.ops, z, drop)
            tape.stages.append((x, saved, d))
        return a, tape

    def _way_back(self, da: np.ndarray, tape: Tape) -> tuple[np.ndarray, list[tuple[np.ndarray, Arrays]]]:
        """The gradient with respect to the input; for each stage that of f(x), and those of its parameters."""
        numbers = self._numbers()
        skipped = [np.zeros(1)] * len(tape.stages)  # what reaches a stage's input directly
        found = []
        for i, stage in reversed(list(enumerate(self.plan.stages))):
            _, saved, d = tape.stages[i]
            dz = da * d
            if stage.skip is not None:
                skipped[stage.skip] = skipped[stage.skip] + dz
            da, parts = KINDS[stage.kind].backward(stage, dz, _of(stage, numbers), saved)
            da = da + skipped[i]
            found.append((dz, parts))
        return da * tape.d_input, found[::-1]

    def _backward(self, da: np.ndarray, tape: Tape) -> np.ndarray:
        """The gradient with respect to all parameters, summed over rows, flat, from the rows' output gradients."""
        flat = np.zeros(self.plan.size)
        gradient = views(flat, self.plan)
        for stage, (_, parts) in zip(self.plan.stages, self._way_back(da, tape)[1], strict=True):
            for name, _ in stage.shapes:
                gradient[f"{stage.name}.{name}"][:] = parts[name]
        return flat

    def _to_input(self, da: np.ndarray, tape: Tape) -> np.ndarray:
        """Each row's gradient with respect to its input."""
        return self._way_back(da, tape)[0]

    def _each(self, da: np.ndarray, tape: Tape) -> list[tuple[np.ndarray, ...]]:
        """Each row's own gradient of every stage's weight and bias; of what isn't there, nothing."""
        found = []
        for stage, (dz, _), (_, saved, _) in zip(
            self.plan.stages, self._way_back(da, tape)[1], tape.stages, strict=True
        ):
            each = KINDS[stage.kind].each_row(stage, dz, saved)
            have = dict(stage.shapes)
            found.append(tuple(each[name] if name in have else np.zeros(0) for name in ("weight", "bias")))
        return found

    def _norms(self, da: np.ndarray, tape: Tape) -> np.ndarray:
        """The norm of each row's own gradient."""
        squares = np.zeros(len(da))
        for array in (array for pair in self._each(da, tape) for array in pair if array.size):
            squares += (array**2).reshape(len(da), -1).sum(axis=1)
        return np.sqrt(squares)

    def _numbers(self) -> Arrays:
        """Parameters and buffers by name, as they are now, in float64."""
        return views(_float64(self.params), self.plan) | buffer_views(_float64(self.buffers), self.plan)

    @_quiet
    def _update_buffers(self, tape: Tape) -> None:
        found = buffer_views(self.buffers, self.plan)
        for i in self.plan.batch_norms:
            x, saved, _ = tape.stages[i]
            BatchNorm.update_buffers(self.plan.stages[i], _of(self.plan.stages[i], found), saved, len(x))

    @_quiet
    def _update(self, row: np.ndarray, gradient: np.ndarray) -> None:
        assert self.training is not None
        coefficients = _float64(row.astype(self.plan.dtype)).tolist()
        average = self.training.average
        for i, places in enumerate(self._groups):
            w, states = _float64(self.params[places]), _float64(self.training.state[:, places])
            update(self.training.optimizer.kind, coefficients[8 * i : 8 * i + 8], w, gradient[places], states)
            self.params[places], self.training.state[:, places] = w, states
            if average is not None:
                a = _float64(average[places])
                average[places] = a + coefficients[-1] * (_float64(self.params[places]) - a)


def _of(stage: Stage, numbers: Arrays) -> Arrays:
    """A stage's own, without its name."""
    names = [name for name, _ in stage.shapes + stage.buffer_shapes]
    return {name: numbers[key] for name in names if (key := f"{stage.name}.{name}") in numbers}


def _without_weight(norms: np.ndarray, batches: Batches, rows: np.ndarray) -> np.ndarray:
    """Of the rows' own gradients, from those of their weighted losses; 0 where the weight is."""
    if batches.sample_weight is None:
        return norms
    s = batches.sample_weight[rows]
    return np.divide(norms, s, out=np.zeros(len(s)), where=s > 0)


def shorten(norms: np.ndarray, clip: float) -> np.ndarray:
    """What gradients of these norms are multiplied by, to be no longer than `clip`."""
    return np.where(norms > clip, clip / np.maximum(norms, 1e-300), 1.0)


def _rows_of(batches: Batches, k: int) -> np.ndarray:
    """The rows of mini-batch `k`."""
    order = np.arange(len(batches.X)) if batches.order is None else batches.order
    if batches.offsets is not None:
        return order[batches.offsets[k] : batches.offsets[k + 1]]
    return order[k * batches.batch_size : (k + 1) * batches.batch_size]


def update(kind: str, c: list[float], w: np.ndarray, g: np.ndarray, states: np.ndarray) -> None:
    """The update of weights `w` with gradient `g`, elementwise; `w` and `states`, (n_states, n), change in place."""
    g = g + c[1] * w
    if kind == "gradient":
        states[0] = g
    elif kind == "sgd":
        w -= c[0] * g
    elif kind in ("momentum", "nesterov"):
        (m,) = states
        m[:] = c[2] * m + c[3] * g
        w -= c[0] * (m if kind == "momentum" else g + c[2] * m)
    elif kind in ("adam", "amsgrad"):
        m, v = states[:2]
        w *= c[2]
        m += c[3] * (g - m)
        v[:] = c[4] * v + c[5] * g**2
        if kind == "amsgrad":
            states[2] = np.maximum(states[2], v)
        w -= c[0] * m / (np.sqrt(states[-1]) + c[6])
    elif kind.startswith("rmsprop"):
        v = states[0]
        v[:] = c[2] * v + c[3] * g**2
        variance = v
        if "centered" in kind:
            a = states[1]
            a += c[3] * (g - a)
            variance = np.maximum(v - a**2, 0)  # rounding can take it below 0 when the gradient stays the same
        direction = g / (np.sqrt(variance) + c[4])
        if kind.endswith("momentum"):
            b = states[-1]
            b[:] = c[5] * b + direction
            direction = b
        w -= c[0] * direction
    elif kind == "adagrad":
        (s,) = states
        s += g**2
        w -= c[0] * g / (np.sqrt(s) + c[2])
    elif kind in ("nadam", "radam"):
        m, v = states
        w *= c[2]
        m += c[3] * (g - m)
        v[:] = c[4] * v + c[5] * g**2
        if kind == "nadam":
            w -= (c[7] * g + c[0] * m) / (np.sqrt(v) + c[6])
        else:
            w -= c[0] * m / (c[7] * np.sqrt(v) + c[6])
    elif kind == "adamax":
        m, u = states
        m += c[3] * (g - m)
        u[:] = np.maximum(c[4] * u, np.abs(g) + c[5])
        w -= c[0] * m / u
    elif kind == "adadelta":
        v, d = states
        v[:] = c[2] * v + c[3] * g**2
        step = np.sqrt(d + c[4]) / np.sqrt(v + c[4]) * g
        d[:] = c[2] * d + c[3] * step**2
        w -= c[0] * step
    elif kind == "lion":
        (m,) = states
        w *= c[2]
        w -= c[0] * np.sign(c[3] * g + c[4] * m)
        m[:] = c[5] * g + c[6] * m
    else:
        raise ValueError(f"no such update: {kind!r}")


def loss_and_gradient(loss: Loss, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's loss l, (n,), its gradient dl/dz, (n, C), and its weight u, (n,), for raw outputs `z`, (n, C)."""
    n, C = z.shape
    u = np.ones(n)
    if loss.kind == "cross_entropy":
        w = np.ones(C) if loss.weight is None else loss.weight
        if y.ndim == 1:
            label = y.astype(np.int64)
            target, u = np.eye(C)[label], w[label]
        else:
            target = _float64(y)
        q = w * ((1 - loss.label_smoothing) * target + loss.label_smoothing / C)
        shifted = z - z.max(axis=1, keepdims=True)
        logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        terms = np.multiply(q, logp, out=np.zeros_like(q), where=q != 0)  # logp may be -inf where q is 0
        return -terms.sum(axis=1), np.exp(logp) * q.sum(axis=1, keepdims=True) - q, u
    y = _float64(y).reshape(n, C)
    if loss.kind == "bce_with_logits":
        p = np.ones(C) if loss.weight is None else loss.weight
        each = (1 - y) * z + (1 + (p - 1) * y) * np.logaddexp(0, -z)
        slope = _sigmoid(z) * (1 - y + p * y) - p * y
    elif loss.kind == "linear":
        return (z * y).sum(axis=1), y, u
    elif loss.kind == "mse":
        each, slope = (z - y) ** 2, 2 * (z - y)
    elif loss.kind == "mae":
        each, slope = np.abs(z - y), np.sign(z - y)
    elif loss.function is not None:
        each = loss.function.value(z, y)
        slope = loss.function.slope(z, y, value=each)
    elif loss.kind == "huber":
        d, delta = z - y, loss.delta
        each = np.where(np.abs(d) <= delta, d**2 / 2, delta * (np.abs(d) - delta / 2))
        slope = np.clip(d, -delta, delta)
    else:
        raise ValueError(f"no such loss: {loss.kind!r}")
    return each.mean(axis=1), slope / C, u


def _elementwise(ops: tuple[Op, ...], z: np.ndarray, drop: Drop) -> tuple[np.ndarray, np.ndarray]:
    """The operations one after the other: the output, and its derivative with respect to `z`."""
    a, d = z, np.ones_like(z)
    for op in ops:
        if op.kind == "dropout":
            mask = np.ones_like(a) if drop is None else drop(op, *a.shape)
            a, d = a * mask, d * mask
        elif op.function is not None:
            value = op.function.value(a)
            a, d = value, d * op.function.slope(a, value=value)
        else:
            a, slope = ACTIVATIONS[op.kind](a, op.value)
            d = d * slope
    return a, d


def _sigmoid(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))
    s: np.ndarray = np.where(z >= 0, 1, e) / (1 + e)
    return s


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _relu(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(z, 0), (z > 0) * 1.0


def _leaky_relu(z: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    d = np.where(z > 0, 1, slope)
    return z * d, d


def _elu(z: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    below = np.minimum(z, 0)
    return np.where(z > 0, z, alpha * np.expm1(below)), np.where(z > 0, 1, alpha * np.exp(below))


def _selu(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    scale = 1.0507009873554804934193349852946
    a, d = _elu(z, 1.6732632423543772848170429916717)
    return scale * a, scale * d


def _gelu(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    cdf = _erfc(-z / math.sqrt(2)) / 2  # of the normal distribution; 1 + erf would cancel
    return z * cdf, cdf + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    u, du = (2 * math.sqrt(2 / math.pi) * v for v in (z + 0.044715 * z**3, 1 + 3 * 0.044715 * z**2))
    cdf = _sigmoid(u)  # (1 + tanh(u / 2)) / 2
    return z * cdf, cdf + z * cdf * _sigmoid(-u) * du


def _silu(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    s = _sigmoid(z)
    return z * s, s * (1 + z * _sigmoid(-z))


def _mish(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    t = np.tanh(np.logaddexp(0, z))
    return z * t, t + z * _sigmoid(z) * (1 - t**2)


def _softplus(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    return np.logaddexp(0, z), _sigmoid(z)


def _tanh(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    a = np.tanh(z)
    return a, 1 - a**2


def _sigmoid_op(z: np.ndarray, _: float) -> tuple[np.ndarray, np.ndarray]:
    return _sigmoid(z), _sigmoid(z) * _sigmoid(-z)


ACTIVATIONS: dict[str, Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]] = {
    "identity": lambda z, _: (z, np.ones_like(z)),  # (z, value) -> output and derivative
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": _selu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "softplus": _softplus,
    "tanh": _tanh,
    "sigmoid": _sigmoid_op,
}


def _float64(array: np.ndarray) -> np.ndarray:
    """A float64 copy."""
    return np.array(array, dtype=np.float64)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))
