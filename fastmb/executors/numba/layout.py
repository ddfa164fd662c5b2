"""Between rows, as the user and the weight gradient have them, and blocks [feature][rb]: gather, scatter, backward.

Transpositions of lanes x lanes elements in registers, with what is to be done done on the way, as in csrc/layout.inc.
"""

from __future__ import annotations

from .emit import Emitter, Value
from .records import SOURCE


def transpose(e: Emitter, v: list[Value]) -> list[Value]:
    """v[i][j] <-> v[j][i]: the off-diagonal quarters of blocks of 2 s are exchanged, s halving."""
    n, v = len(v), list(v)
    s = n // 2
    while s:
        low = [n + lane - s if lane & s else lane for lane in range(n)]
        high = [n + lane if lane & s else lane + s for lane in range(n)]
        for i in range(n):
            if not i & s:
                v[i], v[i + s] = e.shuffle(v[i], v[i + s], low), e.shuffle(v[i], v[i + s], high)
        s //= 2
    return v


def gather(type_: str, how: str, e: Emitter, *arguments: Value) -> None:
    """Rows of a user's array into a block: out[c * rb + r] = T(source(index[r], c)) * scale, r < rows; else 0.

    `index` 0 stands for first, first + 1, ... `how`: "plain", columns side by side, of T, scale 1; "dense", columns
    side by side; "strided".
    """
    source, index, first, rows, out = arguments
    data, row_stride, col_stride, columns = (
        e.field(SOURCE, source, name) for name in ("data", "row_stride", "col_stride", "columns")
    )
    scale, n, size = e.to_number(e.field(SOURCE, source, "scale")), e.lanes, int(type_[1:])
    addresses, converted = e.scratch_integers(n), e.scratch(n * n)

    def convert(x: Value) -> Value:
        x = e.convert(x, type_)
        return x if how == "plain" else x * scale

    def columns_at(c: Value, count: Value, live: Value, r0: int, whole: bool, full: bool) -> None:
        """`count` columns from `c` on of the rows from `r0` on; `whole`: as many columns, `full`: rows, as lanes."""
        direct = whole and how != "strided"
        if not direct:
            with e.loop(0, live) as r, e.loop(0, count) as j:
                at = e.load_as("i8", addresses + r * 8) + (c + j) * col_stride
                e.store(convert(e.load_as(type_, at)), converted, r * n + j)
        v = []
        for lane in range(n):
            if direct:
                x = convert(e.load_as(type_, e.load_as("i8", addresses + lane * 8) + c * size, n))
            else:
                x = e.load(converted, lane * n, n)
            v.append(x if full else e.select(e.integer(lane) < live, x, e.zeros(n)))
        for k, x in enumerate(transpose(e, v)):
            if whole:
                e.store(x, out, (c + k) * e.rb + r0)
            else:
                with e.when(count > k):
                    e.store(x, out, (c + k) * e.rb + r0)

    def rows_at(r0: int, live: Value, full: bool) -> None:
        with e.loop(0, n) as r:
            row = e.select(r < live, r + r0, e.integer(r0))  # a lane without a row reads another's
            number = e.variable(first + row)
            with e.when(index.compare("!=", 0)):
                number.set(e.load_as("i8", index + row * 8))
            e.store_integer(data + number.get() * row_stride, addresses + r * 8)
        whole = columns - columns % n
        with e.loop(0, whole, n) as c:
            columns_at(c, e.integer(n), live, r0, whole=True, full=full)
        with e.when(whole < columns):
            columns_at(whole, columns - whole, live, r0, whole=False, full=full)

    e.store(e.zeros(n * n), converted)
    for r0 in (0, n):
        live = e.minimum(rows - r0, n)
        with e.either(live >= n) as (yes, no):
            with yes:
                rows_at(r0, e.integer(n), full=True)
            with no, e.either(live > 0) as (some, none):
                with some:
                    rows_at(r0, live, full=False)
                with none, e.loop(0, columns) as c:
                    e.store(e.zeros(n), out, c * e.rb + r0)


def scatter(e: Emitter, *arguments: Value) -> None:
    """A block [n][rb] back to rows: out[r * stride + c], r < rows; the stride in elements."""
    block, n, rows, out, stride = arguments
    lanes = e.lanes
    with e.loop(0, rows, lanes) as r0:
        live, to = e.minimum(rows - r0, lanes), out + r0 * stride * e.target.itemsize
        whole = e.select(live >= lanes, n - n % lanes, e.integer(0))
        with e.loop(0, whole, lanes) as c:
            v = [e.load(block, (c + j) * e.rb + r0, lanes) for j in range(lanes)]
            for j, x in enumerate(transpose(e, v)):
                e.store(x, to, stride * j + c)
        with e.loop(whole, n) as c, e.loop(0, live) as r:
            e.store(e.load(block, c * e.rb + r0 + r), to, r * stride + c)


def backward(mode: str, keep: str, e: Emitter, *arguments: Value) -> None:
    """The gradient's way back through a stage's activation: dz = da * d, on [n][rb], and its transposition.

    `mode`: "none", dz = da; "factor", da * d; "sign", da where d > 0, else 0. dz replaces da with "keep", and goes in
    every case to `panels`: panel p holds features p * rb .., panels[p * stride + r * rb + j]; features beyond n are 0.
    """
    da, d, n, rows, panels, stride = arguments
    lanes = e.lanes

    def feature(at: Value) -> Value:
        x = e.load(da, at, lanes)
        if mode == "factor":
            x = x * e.load(d, at, lanes)
        if mode == "sign":
            x = e.select(e.load(d, at, lanes) > 0, x, 0.0)
        if mode != "none" and keep == "keep":
            e.store(x, da, at)
        return x

    def square(f: Value, r: Value, features: Value | None) -> None:
        v = []
        for j in range(lanes):
            at = (f + j) * e.rb + r
            if features is None:
                v.append(feature(at))
            else:
                held = e.variable(e.zeros(lanes))
                with e.when(features > j):
                    held.set(feature(at))
                v.append(held.get())
        for j, x in enumerate(transpose(e, v)):
            e.store(x, panels, f // e.rb * stride + f % e.rb + (r + j) * e.rb)

    whole = n - n % lanes
    with e.loop(0, whole, lanes) as f, e.loop(0, rows, lanes) as r:
        square(f, r, None)
    with e.when(whole < n), e.loop(0, rows, lanes) as r:
        square(whole, r, n - whole)
