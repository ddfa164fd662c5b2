"""Normalisations and PReLU of a block [n][rb]: the formulas of csrc/norms.inc, which says what they mean.

`by`: what a normalisation's mean and rstd belong to, "feature" or "row". An address 0 of its weight stands for 1, of
its bias for 0.
"""

from __future__ import annotations

from .emit import Emitter, Value


def _number(e: Emitter, array: Value, f: Value, otherwise: float) -> Value:
    """Number f of an array that may not be there."""
    found = e.variable(e.number(otherwise))
    with e.when(array.compare("!=", 0)):
        found.set(e.load(array, f))
    return found.get()


def statistic(e: Emitter, by: str, array: Value, f: Value) -> Value:
    """What feature f, or every row of the block, has of a mean or the like."""
    return e.load(array, 0, e.rb) if by == "row" else e.fill(e.load(array, f), e.rb)


def _xhat(e: Emitter, by: str, x: Value, mean: Value, rstd: Value, f: Value) -> Value:
    return (e.load(x, f * e.rb, e.rb) - statistic(e, by, mean, f)) * statistic(e, by, rstd, f)


def normalize(by: str, e: Emitter, *arguments: Value) -> None:
    """Out = xhat weight + bias, features low .. high."""
    mean, rstd, weight, bias, low, high, x, out = arguments
    with e.loop(low, high) as f:
        xhat = _xhat(e, by, x, mean, rstd, f)
        e.store(e.fma(xhat, _number(e, weight, f, 1), _number(e, bias, f, 0)), out, f * e.rb)


def normalize_backward(by: str, e: Emitter, *arguments: Value) -> None:
    """Dx = rstd (dz weight - across - xhat along), features low .. high; dx may be dz."""
    mean, rstd, weight, across, along, low, high, x, dz, dx = arguments
    with e.loop(low, high) as f:
        xhat, g = _xhat(e, by, x, mean, rstd, f), e.load(dz, f * e.rb, e.rb)
        rest = e.fma(g, _number(e, weight, f, 1), -statistic(e, by, across, f))
        e.store(e.fma(-xhat, statistic(e, by, along, f), rest) * statistic(e, by, rstd, f), dx, f * e.rb)


def row_moments(e: Emitter, *arguments: Value) -> None:
    """Every row's mean and 1 / sqrt(variance + eps) over n features; eps is a double."""
    n, eps, x, mean, rstd = arguments
    total, count = e.variable(e.zeros(e.rb)), e.to_number(n)
    with e.loop(0, n) as f:
        total.set(total.get() + e.load(x, f * e.rb, e.rb))
    m = total.get() / count
    total.set(e.zeros(e.rb))
    with e.loop(0, n) as f:
        d = e.load(x, f * e.rb, e.rb) - m
        total.set(e.fma(d, d, total.get()))
    e.store(m, mean)
    e.store(1 / e.sqrt(total.get() / count + e.to_number(e.load_as("f8", eps))), rstd)


def row_means(e: Emitter, *arguments: Value) -> None:
    """Every row's means over n features of dz weight and of dz weight xhat."""
    mean, rstd, weight, n, x, dz, across, along = arguments
    a, c, count = e.variable(e.zeros(e.rb)), e.variable(e.zeros(e.rb)), e.to_number(n)
    with e.loop(0, n) as f:
        g = e.load(dz, f * e.rb, e.rb) * _number(e, weight, f, 1)
        a.set(a.get() + g)
        c.set(e.fma(g, _xhat(e, "row", x, mean, rstd, f), c.get()))
    e.store(a.get() / count, across)
    e.store(c.get() / count, along)


def row_terms(by: str, e: Emitter, *arguments: Value) -> None:
    """Each row's own gradient of a weight: dz xhat, or with `by` "slope" PReLU's, dz min(x, 0)."""
    mean, rstd, n, x, dz, out = arguments
    with e.loop(0, n) as f:
        a = below(e, e.load(x, f * e.rb, e.rb)) if by == "slope" else _xhat(e, by, x, mean, rstd, f)
        e.store(a * e.load(dz, f * e.rb, e.rb), out, f * e.rb)


def below(e: Emitter, x: Value) -> Value:
    """What PReLU's weight meets: x where it isn't above 0."""
    return e.select(x > 0, 0.0, x)


def prelu(e: Emitter, *arguments: Value) -> None:
    """X where x > 0, else weight x; `step` 0: one weight for all features."""
    weight, step, low, high, x, out = arguments
    with e.loop(low, high) as f:
        a = e.load(x, f * e.rb, e.rb)
        e.store(e.select(a > 0, a, a * e.load(weight, f * step)), out, f * e.rb)


def prelu_backward(e: Emitter, *arguments: Value) -> None:
    """Its way back; dx may be dz."""
    weight, step, low, high, x, dz, dx = arguments
    with e.loop(low, high) as f:
        g = e.load(dz, f * e.rb, e.rb)
        e.store(e.select(e.load(x, f * e.rb, e.rb) > 0, g, g * e.load(weight, f * step)), dx, f * e.rb)


# ---- spans of n numbers --------------------------------------------------------------------------------------------


def add(e: Emitter, *arguments: Value) -> None:
    """Out += x."""
    n, x, out = arguments
    e.spans(n, lambda at, count: e.store(e.load(out, at, count) + e.load(x, at, count), out, at))


def multiply(mode: str, e: Emitter, *arguments: Value) -> None:
    """Dz = da * d as `backward` understands it: "none", da; "factor", da * d; "sign", da where d > 0. dz may be da."""
    n, da, d, dz = arguments

    def each(at: Value, count: int) -> None:
        x = e.load(da, at, count)
        if mode == "factor":
            x = x * e.load(d, at, count)
        if mode == "sign":
            x = e.select(e.load(d, at, count) > 0, x, 0.0)
        e.store(x, dz, at)

    e.spans(n, each)
