"""Activations: f(z) and f'(z), the expressions of csrc/activations.inc, which says why they are written so."""

from __future__ import annotations

from .emit import Emitter, Value
from .mathematics import exp, exp_parts, log1p, normal_tail
from .records import OP

Pair = tuple[Value, Value]


def identity(e: Emitter, z: Value, value: Value) -> Pair:
    return z, e.fill(1.0, e.rb)


def relu(e: Emitter, z: Value, value: Value) -> Pair:
    return e.at_least(z, 0), e.select(z > 0, 1.0, 0.0)


def leaky_relu(e: Emitter, z: Value, slope: Value) -> Pair:
    return e.select(z > 0, z, z * slope), e.select(z > 0, 1.0, slope)


def elu(e: Emitter, z: Value, alpha: Value) -> Pair:
    return _exponential_unit(e, z, e.number(1), alpha)


def selu(e: Emitter, z: Value, value: Value) -> Pair:
    return _exponential_unit(e, z, e.number(1.0507009873554804934), e.number(1.7580993408473768599))


def _exponential_unit(e: Emitter, z: Value, positive: Value, negative: Value) -> Pair:
    """Z > 0 ? positive * z : negative * expm1(z)."""
    p, s = exp_parts(e, z)
    d = e.select(z > 0, positive, negative * e.fma(s, p, s))
    return e.select(z > 0, positive * z, negative * e.fma(s, p, s - 1)), d


def _gated(e: Emitter, z: Value, x: Value, tail: Value, density: Value) -> Pair:
    """Z F(z) of a distribution symmetric about 0, from x = |z|, the tail F(-x) and the density F'(x)."""
    below = e.fma(-x, density, tail)
    return e.fma(-x, tail, e.at_least(z, 0)), e.select(z < 0, below, 1 - below)


def gelu(e: Emitter, z: Value, value: Value) -> Pair:
    x = e.at_most(e.abs(z), e.number(14, 38.5))
    tail, g = normal_tail(e, x)
    return _gated(e, z, x, tail, g * e.number(0.39894228040143267794))


def _logistic_tail(e: Emitter, x: Value) -> Value:
    """logistic(-x), x >= 0."""
    u = exp(e, -x)
    return u / (1 + u)


def sigmoid(e: Emitter, z: Value, value: Value) -> Pair:
    tail = _logistic_tail(e, e.abs(z))
    return e.select(z < 0, tail, 1 - tail), e.fma(-tail, tail, tail)


def silu(e: Emitter, z: Value, value: Value) -> Pair:
    x = e.at_most(e.abs(z), e.number(88, 710))
    tail = _logistic_tail(e, x)
    return _gated(e, z, x, tail, e.fma(-tail, tail, tail))


def gelu_tanh(e: Emitter, z: Value, value: Value) -> Pair:
    c1, c3 = e.number(1.5957691216057307117), e.number(0.071354816272600248)
    x = e.at_most(e.abs(z), e.number(11, 22))
    x2 = x * x
    tail = _logistic_tail(e, x * e.fma(c3, x2, c1))
    return _gated(e, z, x, tail, e.fma(-tail, tail, tail) * e.fma(3 * c3, x2, c1))


def mish(e: Emitter, z: Value, value: Value) -> Pair:
    far = e.number(88, 710)
    x = e.at_most(e.abs(z), far)
    u = exp(e, -x)
    n = e.select(z < 0, e.fma(u, u, 2 * u), e.fma(2, u, 1))
    k = e.select(z < 0, 1.0, u * u)
    m = e.fma(2, k, n)
    r = 1 / m
    slope = 4 * (1 + u) * (r * r) * e.select(z < 0, u, k)
    return e.at_least(z, -far) * (n * r), e.fma(e.copysign(x, z), slope, n * r)


def softplus(e: Emitter, z: Value, value: Value) -> Pair:
    u = exp(e, -e.abs(z))
    tail = u / (1 + u)
    return e.at_least(z, 0) + log1p(e, u), e.select(z < 0, tail, 1 - tail)


def tanh(e: Emitter, z: Value, value: Value) -> Pair:
    p, s = exp_parts(e, -2 * e.abs(z))
    u, t = e.fma(s, p, s), e.fma(-s, p, 1 - s) / e.fma(s, p, 1 + s)
    return e.copysign(t, z), u * ((1 + t) * (1 + t))


_MODES = {"none": 0, "first": 1, "more": 2}  # as users' functions know them


def custom(derivative: str, e: Emitter, *arguments: Value) -> None:
    """A user's own function on n features of a block, as `activation`."""
    op, _, _, _, a, d, n = arguments
    e.call_back(e.field(OP, op, "function"), a, d, n * e.rb, _MODES[derivative])


ACTIVATIONS = {
    f.__name__: f for f in (identity, relu, leaky_relu, elu, selu, gelu, gelu_tanh, silu, mish, softplus, tanh, sigmoid)
}


def activation(kind: str, derivative: str, e: Emitter, *arguments: Value) -> None:
    """Z -> f(z) in place on n features of a block; `derivative`: "none"; "first", d = f'(z); "more", d *= f'(z)."""
    op, _, _, _, a, d, n = arguments
    value = e.to_number(e.field(OP, op, "value"))
    with e.loop(0, n * e.rb, e.rb) as i:
        result, slope = ACTIVATIONS[kind](e, e.load(a, i, e.rb), value)
        e.store(result, a, i)
        if derivative == "more":
            slope = e.load(d, i, e.rb) * slope
        if derivative != "none":
            e.store(slope, d, i)
