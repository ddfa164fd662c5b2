"""Dropout: masks from Philox4x32-10, a function of seed, step, layer, row and unit, as in csrc/dropout.inc."""

from __future__ import annotations

from .emit import Emitter, Value
from .records import OP

_LOW = 0xFFFFFFFF


def philox(e: Emitter, seed: Value, t: Value, index: Value, row: Value, i: Value, first: int) -> list[Value]:
    """The words of units 4 i .. 4 i + 3 of `lanes` rows from row + `first` on, in the lower halves of 64 bits."""
    n = e.lanes

    def fill(x: Value) -> Value:
        return e.broadcast_int(x, 64, n)

    x0, x1 = fill(i), e.lane_numbers(64, n, first) + fill(row)
    x2, x3 = fill(t & _LOW), fill((t >> 32) ^ (index << 24))
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        m0, m1 = (x0 & _LOW) * 0xD2511F53, (x2 & _LOW) * 0xCD9E8D57
        x0, x1 = (m1 >> 32) ^ x1 ^ fill(k0), m1
        x2, x3 = (m0 >> 32) ^ x3 ^ fill(k1), m0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return [x0, x1, x2, x3]


def dropout(derivative: str, e: Emitter, *arguments: Value) -> None:
    """A *= mask on n features of a block; mask is 0 or `scale`. `derivative`: "none"; "first", d = mask; "more",
    d *= mask. Row r of the block is row `row` + r of the mini-batch, feature j is unit `unit` + j, a multiple of 4.
    """
    op, t, row, unit0, a, d, n = arguments
    seed, index = e.field(OP, op, "seed"), e.field(OP, op, "index")
    scale, threshold = e.variable(e.field(OP, op, "scale")), e.variable(e.field(OP, op, "threshold"))
    rates = e.field(OP, op, "rates")
    with e.when(rates.compare("!=", 0)):
        p = e.load_as("f8", rates + (t - e.field(OP, op, "since")) * 8)
        threshold.set(e.as_integer(p * 4294967296.0))
        scale.set(1.0 / (1.0 - p))
    keep, limit = e.to_number(scale.get()), e.broadcast_int(threshold.get(), 32, e.lanes)
    with e.loop(0, n, 4) as unit:
        for first in (0, e.lanes):
            words = philox(e, seed, t, index, row, (unit0 + unit) // 4, first)
            for u, word in enumerate(words):
                with e.when(unit + u < n):
                    at = (unit + u) * e.rb + first
                    mask = e.select(e.unsigned_at_least(e.truncate(word, 32), limit), keep, 0.0)
                    e.store(e.load(a, at, e.lanes) * mask, a, at)
                    if derivative == "more":
                        mask = e.load(d, at, e.lanes) * mask
                    if derivative != "none":
                        e.store(mask, d, at)
