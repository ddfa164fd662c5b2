"""A feature's sums over all rows of a mini-batch, which lie in blocks: as in csrc/norms.inc.

A sum has 32 lanes for every width of vectors and blocks, row r in lane r modulo 32, each a chain in the order of the
rows; and one tree over the lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .emit import Emitter, Value, Variable
from .norms import below
from .records import ROWS

SUM_LANES = 32
Sums = Sequence[Variable]
Live = Callable[[Value], Value]  # makes rows that aren't there 0
#: Adds the terms of some rows, from their x, the address of their dz, mean and rstd, to the lanes of one sum or two.
Terms = Callable[[Emitter, Value, Value, Value, Value, Sums, Live], None]


def _value(e: Emitter, x: Value, dz: Value, mean: Value, rstd: Value, sums: Sums, live: Live) -> None:
    sums[0].set(sums[0].get() + live(x))


def _square(e: Emitter, x: Value, dz: Value, mean: Value, rstd: Value, sums: Sums, live: Live) -> None:
    d = live(x - mean)
    sums[0].set(e.fma(d, d, sums[0].get()))


def _gradients(e: Emitter, x: Value, dz: Value, mean: Value, rstd: Value, sums: Sums, live: Live) -> None:
    g = live(e.load(dz, 0, e.lanes))
    sums[0].set(e.fma(g, live((x - mean) * rstd), sums[0].get()))
    sums[1].set(sums[1].get() + g)


def _slope(e: Emitter, x: Value, dz: Value, mean: Value, rstd: Value, sums: Sums, live: Live) -> None:
    g = live(e.load(dz, 0, e.lanes))
    sums[0].set(e.fma(g, live(below(e, x)), sums[0].get()))


def _all(value: Value) -> Value:
    return value


def _first(e: Emitter, n: Value) -> Live:
    """The first n rows of a vector."""
    there = e.lane_numbers(64, e.lanes) < n
    return lambda value: e.select(there, value, 0.0)


def _sum(e: Emitter, terms: Terms, by: str, rows: Value, *places: Value, n_sums: int = 1) -> list[Value]:
    """The sums of the feature whose rows in the first block are at x and dz. mean and rstd: the feature's own, or with
    `by` "row" where those of the first block's rows are.
    """
    x, dz, mean, rstd = places
    names = ("x_block", "dz_block", "stats_block")
    strides = [e.field(ROWS, rows, name) * e.target.itemsize for name in names]
    n, wide = e.field(ROWS, rows, "rows"), e.lanes
    lanes = [[e.variable(e.zeros(wide)) for _ in range(n_sums)] for _ in range(SUM_LANES // wide)]

    def add(v: int, size: int, start: Value, live: Live) -> None:
        """Vector v of 32 rows, the first of which begin block `start`; `size`: rows of a block."""
        block, at = start + v * wide // size, v * wide % size * e.target.itemsize
        to_x, to_dz, to_row = (block * stride + at for stride in strides)
        m, s = mean, rstd
        if by == "row":
            m, s = e.load(mean + to_row, 0, wide), e.load(rstd + to_row, 0, wide)
        terms(e, e.load(x + to_x, 0, wide), dz + to_dz, m, s, lanes[v], live)

    def all_rows(size: int) -> None:
        whole = n - n % SUM_LANES
        with e.loop(0, whole, SUM_LANES) as row:
            for v in range(SUM_LANES // wide):
                add(v, size, row // size, _all)
        for v in range(SUM_LANES // wide):
            left = n - whole - v * wide
            with e.when(left > 0):
                add(v, size, whole // size, _first(e, left))

    with e.either(e.field(ROWS, rows, "block_rows").equals(e.rb)) as (two, one):
        with two:
            all_rows(e.rb)
        with one:
            all_rows(wide)
    return [_tree(e, [own[i].get() for own in lanes]) for i in range(n_sums)]


def _tree(e: Emitter, lanes: list[Value]) -> Value:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[v] + lanes[v + half] for v in range(half)]
    total, half = lanes[0], e.lanes // 2
    while half > 1:
        total = e.shuffle(total, total, range(half)) + e.shuffle(total, total, range(half, 2 * half))
        half //= 2
    return e.lane(total, 0) + e.lane(total, 1)


def column_moments(e: Emitter, *arguments: Value) -> None:
    """The means, variances and 1 / sqrt(variance + eps) of features low .. high; eps is a double."""
    rows, eps, low, high, x, mean, variance, rstd = arguments
    n, zero = e.to_number(e.field(ROWS, rows, "rows")), e.number(0)
    with e.loop(low, high) as f:
        place = x + f * (e.rb * e.target.itemsize)
        m = _sum(e, _value, "feature", rows, place, place, zero, zero)[0] / n
        v = _sum(e, _square, "feature", rows, place, place, m, zero)[0] / n
        e.store(m, mean, f)
        e.store(v, variance, f)
        e.store(1 / e.sqrt(v + e.to_number(e.load_as("f8", eps))), rstd, f)


def column_sums(by: str, e: Emitter, *arguments: Value) -> None:
    """The gradients of features low .. high, the first of them at `dweight` and `dbias`: the sums of dz xhat and of dz
    (dbias 0: that isn't stored). With `by` "slope" those of PReLU, the sums of dz min(x, 0).
    """
    rows, mean, rstd, low, high, x, dz, dweight, dbias = arguments
    with e.loop(low, high) as f:
        places = [array + f * (e.rb * e.target.itemsize) for array in (x, dz)]
        if by == "slope":
            sums = _sum(e, _slope, by, rows, *places, e.number(0), e.number(0))
        elif by == "row":
            sums = _sum(e, _gradients, by, rows, *places, mean, rstd, n_sums=2)
        else:
            sums = _sum(e, _gradients, by, rows, *places, e.load(mean, f), e.load(rstd, f), n_sums=2)
        e.store(sums[0], dweight, f - low)
        if by != "slope":
            with e.when(dbias.compare("!=", 0)):
                e.store(sums[1], dbias, f - low)
