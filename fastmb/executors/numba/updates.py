"""The optimisers' updates: the formulas of csrc/update.inc, one function each.

A function takes the coefficients c of the step, a weight, its gradient and its states, and returns the new weight
(None: it stays) and the new states. `c` holds what the optimiser's `coefficients` in fastmb.optim lays out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .emit import Emitter, Value

COEFFICIENTS = 8
STATES = 3
New = tuple[Value | None, ...]


def _decayed(e: Emitter, c: Sequence[Value], w: Value, g: Value) -> Value:
    return e.fma(c[1], w, g)


def gradient(e: Emitter, c: Sequence[Value], w: Value, g: Value, s: Value) -> New:
    return None, g


def accumulate(e: Emitter, c: Sequence[Value], w: Value, g: Value, s: Value) -> New:
    return None, s + g


def sgd(e: Emitter, c: Sequence[Value], w: Value, g: Value) -> New:
    return (e.fma(-c[0], _decayed(e, c, w, g), w),)


def momentum(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value) -> New:
    m = e.fma(c[2], m, c[3] * _decayed(e, c, w, g))
    return e.fma(-c[0], m, w), m


def nesterov(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value) -> New:
    g = _decayed(e, c, w, g)
    m = e.fma(c[2], m, c[3] * g)
    return e.fma(-c[0], e.fma(c[2], m, g), w), m


def adam(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value, v: Value) -> New:
    g = _decayed(e, c, w, g)
    m = e.fma(c[3], g - m, m)
    v = e.fma(c[5], g * g, c[4] * v)
    return e.fma(-c[0], m / (e.sqrt(v) + c[6]), w * c[2]), m, v


def amsgrad(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value, v: Value, x: Value) -> New:
    g = _decayed(e, c, w, g)
    m = e.fma(c[3], g - m, m)
    v = e.fma(c[5], g * g, c[4] * v)
    x = e.select(x > v, x, v)
    return e.fma(-c[0], m / (e.sqrt(x) + c[6]), w * c[2]), m, v, x


def rmsprop(e: Emitter, c: Sequence[Value], w: Value, g: Value, v: Value) -> New:
    g = _decayed(e, c, w, g)
    v = e.fma(c[3], g * g, c[2] * v)
    return e.fma(-c[0], g / (e.sqrt(v) + c[4]), w), v


def rmsprop_momentum(e: Emitter, c: Sequence[Value], w: Value, g: Value, v: Value, b: Value) -> New:
    g = _decayed(e, c, w, g)
    v = e.fma(c[3], g * g, c[2] * v)
    b = e.fma(c[5], b, g / (e.sqrt(v) + c[4]))
    return e.fma(-c[0], b, w), v, b


def _centered(e: Emitter, c: Sequence[Value], g: Value, v: Value, a: Value) -> tuple[Value, Value, Value]:
    """The new mean square and mean, and the gradient over its deviation, whose square is no less than 0."""
    v = e.fma(c[3], g * g, c[2] * v)
    a = e.fma(c[3], g - a, a)
    return v, a, g / (e.sqrt(e.at_least(e.fma(-a, a, v), 0)) + c[4])


def rmsprop_centered(e: Emitter, c: Sequence[Value], w: Value, g: Value, v: Value, a: Value) -> New:
    v, a, direction = _centered(e, c, _decayed(e, c, w, g), v, a)
    return e.fma(-c[0], direction, w), v, a


def rmsprop_centered_momentum(e: Emitter, c: Sequence[Value], w: Value, g: Value, v: Value, a: Value, b: Value) -> New:
    v, a, direction = _centered(e, c, _decayed(e, c, w, g), v, a)
    b = e.fma(c[5], b, direction)
    return e.fma(-c[0], b, w), v, a, b


def adagrad(e: Emitter, c: Sequence[Value], w: Value, g: Value, s: Value) -> New:
    g = _decayed(e, c, w, g)
    s = e.fma(g, g, s)
    return e.fma(-c[0], g / (e.sqrt(s) + c[2]), w), s


def nadam(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value, v: Value) -> New:
    g = _decayed(e, c, w, g)
    m = e.fma(c[3], g - m, m)
    v = e.fma(c[5], g * g, c[4] * v)
    return w * c[2] - e.fma(c[7], g, c[0] * m) / (e.sqrt(v) + c[6]), m, v


def radam(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value, v: Value) -> New:
    """c7 is 1, or 0 where the variance isn't known yet."""
    g = _decayed(e, c, w, g)
    m = e.fma(c[3], g - m, m)
    v = e.fma(c[5], g * g, c[4] * v)
    return e.fma(-c[0], m / e.fma(c[7], e.sqrt(v), c[6]), w * c[2]), m, v


def adamax(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value, u: Value) -> New:
    g = _decayed(e, c, w, g)
    m = e.fma(c[3], g - m, m)
    old, new = c[4] * u, e.abs(g) + c[5]
    u = e.select(old > new, old, new)
    return e.fma(-c[0], m / u, w), m, u


def adadelta(e: Emitter, c: Sequence[Value], w: Value, g: Value, v: Value, d: Value) -> New:
    g = _decayed(e, c, w, g)
    v = e.fma(c[3], g * g, c[2] * v)
    step = e.sqrt(d + c[4]) / e.sqrt(v + c[4]) * g
    d = e.fma(c[3], step * step, c[2] * d)
    return e.fma(-c[0], step, w), v, d


def lion(e: Emitter, c: Sequence[Value], w: Value, g: Value, m: Value) -> New:
    g = _decayed(e, c, w, g)
    mixed = e.fma(c[3], g, c[4] * m)
    sign = e.select(mixed > 0, 1.0, e.select(mixed < 0, -1.0, mixed))  # NaN stays
    return e.fma(-c[0], sign, w * c[2]), e.fma(c[5], g, c[6] * m)


UPDATES: dict[str, Callable[..., New]] = {
    f.__name__: f
    for f in (
        gradient,
        accumulate,
        sgd,
        momentum,
        nesterov,
        adam,
        amsgrad,
        rmsprop,
        rmsprop_momentum,
        rmsprop_centered,
        rmsprop_centered_momentum,
        adagrad,
        nadam,
        radam,
        adamax,
        adadelta,
        lion,
    )
}


def update(kind: str, e: Emitter, *arguments: Value) -> None:
    """Rows x n weights, a row every `stride` elements (of the states too), the gradients' every `g_stride`.

    A row goes by vectors of rb numbers, then of half as many, and so on to one.
    """
    coefficients, w, s0, s1, s2, g, rows, n, stride, g_stride = arguments
    rule = UPDATES[kind]
    states = (s0, s1, s2)[: rule.__code__.co_argcount - 4]
    c = [e.load(coefficients, i) for i in range(COEFFICIENTS)]

    def span(at: Value, from_: Value, count: int) -> None:
        old = [e.load(s, at, count) for s in states]
        new_w, *new = rule(e, c, e.load(w, at, count), e.load(g, from_, count), *old)
        if new_w is not None:
            e.store(new_w, w, at)
        for value, s in zip(new, states, strict=True):
            assert value is not None
            e.store(value, s, at)

    with e.either(n.equals(e.rb)) as (whole, ragged):
        with whole, e.loop(0, rows) as r:
            span(r * stride, r * g_stride, e.rb)
        with ragged, e.loop(0, rows) as r:
            at, from_ = r * stride, r * g_stride

            def each(i: Value, count: int) -> None:
                span(at + i, from_ + i, count)

            e.spans(n, each)


def average(e: Emitter, *arguments: Value) -> None:
    """A running average a of rows x n weights w, a row of both every `stride`: a += weight (w - a)."""
    weight, w, a, rows, n, stride = arguments
    c = e.to_number(e.load_as("f8", weight))
    with e.loop(0, rows) as r:
        at = r * stride

        def each(i: Value, count: int) -> None:
            old = e.load(a, at + i, count)
            e.store(e.fma(c, e.load(w, at + i, count) - old, old), a, at + i)

        e.spans(n, each)
