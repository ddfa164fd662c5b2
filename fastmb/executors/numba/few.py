"""The data gradient of a handful of rows: dx[i][r] = sum over o of w[i][o] dz[o][r].

A tile product has its vectors along the rows of a block, most of which are empty then. Here they run along the
features: lanes x lanes weights are transposed in registers, so that each output's are a vector, and an element's chain
is the one that it has in a tile product.
"""

from __future__ import annotations

from .emit import Emitter, Value, Variable
from .layout import transpose


def few_rows(lanes: int) -> int:
    """Up to how many rows that is faster than a tile product."""
    return 3 * lanes // 8


def few(e: Emitter, *arguments: Value) -> None:
    """For n features, a multiple of `lanes`, of the rows of a block; dx and dz are blocks [.][rb]."""
    w, stride, n, k, rows, dz, dx = arguments
    size = e.target.itemsize
    with e.choice(rows) as case:
        for count in range(1, few_rows(e.lanes) + 1):
            with case(count), e.loop(0, n, e.lanes) as i:
                _features(count, e, w + i * stride * size, stride, k, dz, dx + i * e.rb * size)


def _features(rows: int, e: Emitter, w: Value, stride: Value, k: Value, dz: Value, dx: Value) -> None:
    """A vector of features."""
    lanes = e.lanes
    chains = [e.variable(e.zeros(lanes)) for _ in range(rows)]

    def output(v: Value, o: Value, chains: list[Variable]) -> None:
        for r, chain in enumerate(chains):
            chain.set(e.fma(v, e.fill(e.load(dz, o * e.rb + r), lanes), chain.get()))

    whole = k - k % lanes
    with e.loop(0, whole, lanes, unroll=False) as o:
        for j, v in enumerate(transpose(e, [e.load(w, stride * i + o, lanes) for i in range(lanes)])):
            output(v, o + j, chains)
    rest = e.scratch(lanes)
    with e.loop(whole, k) as o:
        for i in range(lanes):
            e.store(e.load(w, stride * i + o), rest, i)
        output(e.load(rest, 0, lanes), o, chains)
    empty = [e.zeros(lanes)] * (lanes - rows)
    for i, x in enumerate(transpose(e, [chain.get() for chain in chains] + empty)):
        e.store(x, dx, i * e.rb)
