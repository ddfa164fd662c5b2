"""Losses of a block's rows and their gradients: the expressions of csrc/losses.inc.

Lanes are rows. A sum over outputs is one chain per row, in the order of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit import Emitter, Value
from .mathematics import exp, log, log1p
from .records import LOSS

_OUTPUTS = 16  # that a user's own loss is given at a time


class Block:
    """A loss kernel's arguments, and what all of them do with them.

    z and dz are [n][rb] (dz may be z), target too; labels int32 [rb]; s and loss [rb].
    """

    def __init__(self, e: Emitter, train: bool, *arguments: Value) -> None:
        self.spec, self.rows, self.z, self.labels, self.target, self.s, self.dz, self.loss = arguments[:8]
        self.e, self.train = e, train
        self.n = self.field("n")

    def field(self, name: str) -> Value:
        return self.e.field(LOSS, self.spec, name)

    def row(self, block: Value, c: Value) -> Value:
        """Output c of all rows."""
        return self.e.load(block, c * self.e.rb, self.e.rb)

    def set_dz(self, c: Value, value: Value) -> None:
        self.e.store(value, self.dz, c * self.e.rb)

    def largest(self) -> Value:
        e = self.e
        largest = e.variable(self.row(self.z, e.integer(0)))
        with e.loop(1, self.n) as c:
            z = self.row(self.z, c)
            largest.set(e.select(z > largest.get(), z, largest.get()))
        return largest.get()

    def clear(self) -> None:
        """Lanes beyond the block's rows become 0."""
        e = self.e
        with e.loop(self.rows, e.rb) as r:
            e.store(0.0, self.loss, r)
            if self.train:
                with e.loop(0, self.n) as c:
                    e.store(0.0, self.dz, c * e.rb + r)


def cross_entropy(b: Block, weighted: bool) -> None:
    """Against class indices alone: log(sum) - (z_label - largest); dz = s (softmax - onehot)."""
    e = b.e
    own = e.scratch(e.rb)
    e.store(e.zeros(e.rb), own)
    with e.loop(0, b.rows) as r:
        e.store(e.load(b.z, e.label(b.labels, r) * e.rb + r), own, r)
    largest, total = b.largest(), e.variable(e.zeros(e.rb))
    with e.loop(0, b.n) as c:
        term = exp(e, b.row(b.z, c) - largest)
        total.set(total.get() + term)
        if b.train:
            b.set_dz(c, term)
    e.store(log(e, total.get()) - (e.load(own, 0, e.rb) - largest), b.loss)
    if b.train:
        share = e.load(b.s, 0, e.rb) / total.get()
        with e.loop(0, b.n) as c:
            b.set_dz(c, b.row(b.dz, c) * share)
        with e.loop(0, b.rows) as r:
            at = e.label(b.labels, r) * e.rb + r
            e.store(e.load(b.dz, at) - e.load(b.s, r), b.dz, at)


def cross_entropy_rows(b: Block, weighted: bool, indices: bool = False) -> None:
    """Against any q_c = w_c ((1 - smoothing) t_c + smoothing / n): (sum q) log(sum) - sum q_c (z_c - largest).

    Where q_c is 0 nothing is added, z_c = -inf included.
    """
    e = b.e
    smoothing = b.field("smoothing")
    keep = e.to_number(1.0 - smoothing)
    spread = e.to_number(smoothing / e.as_double(b.n))

    def q(c: Value) -> Value:
        if indices:
            chosen = e.load_as("i4", b.labels, e.rb).equals(e.broadcast_int(c, 32, e.rb))
            value = e.select(chosen, keep + spread, spread)
        else:
            value = e.fma(keep, b.row(b.target, c), spread)
        return (e.load(b.field("weight"), c) if weighted else e.number(1)) * value

    largest = b.largest()
    total, q_sum, q_z = (e.variable(e.zeros(e.rb)) for _ in range(3))
    with e.loop(0, b.n) as c:
        weight, x = q(c), b.row(b.z, c) - largest
        q_sum.set(q_sum.get() + weight)
        q_z.set(e.fma(weight, e.select(weight.equals(0.0), 0.0, x), q_z.get()))
        term = exp(e, x)
        total.set(total.get() + term)
        if b.train:
            b.set_dz(c, term)
    e.store(e.fma(q_sum.get(), log(e, total.get()), -q_z.get()), b.loss)
    if b.train:
        s = e.load(b.s, 0, e.rb)
        share = s * q_sum.get() / total.get()
        with e.loop(0, b.n) as c:
            b.set_dz(c, e.fma(b.row(b.dz, c), share, -(s * q(c))))


def cross_entropy_labels(b: Block, weighted: bool) -> None:
    cross_entropy_rows(b, weighted, indices=True)


def _mean(one: Callable[[Emitter, Value, Value, Value], tuple[Value, Value]]) -> Callable[[Block, bool], None]:
    """The mean over outputs of a loss of each: one(e, z, y, x) is it and its derivative."""

    def each(b: Block, weighted: bool) -> None:
        e = b.e
        n = e.to_number(b.n)
        total = e.variable(e.zeros(e.rb))
        part = e.load(b.s, 0, e.rb) / n
        delta = e.to_number(b.field("delta"))
        with e.loop(0, b.n) as c:
            x = e.load(b.field("weight"), c) if weighted else delta
            value, slope = one(e, b.row(b.z, c), b.row(b.target, c), x)
            total.set(total.get() + value)
            if b.train:
                b.set_dz(c, part * slope)
        e.store(total.get() / n, b.loss)

    return each


def linear(b: Block, weighted: bool) -> None:
    """A gradient that comes from outside: the loss whose gradient it is, sum_c z_c target_c."""
    e = b.e
    total, s = e.variable(e.zeros(e.rb)), e.load(b.s, 0, e.rb)
    with e.loop(0, b.n) as c:
        target = b.row(b.target, c)
        total.set(e.fma(b.row(b.z, c), target, total.get()))
        if b.train:
            b.set_dz(c, s * target)
    e.store(total.get(), b.loss)


def custom(b: Block, weighted: bool) -> None:
    """The mean over outputs of a user's own loss of each, which works in place: on copies of an output's rows."""
    e = b.e
    n = e.to_number(b.n)
    total, part = e.variable(e.zeros(e.rb)), e.load(b.s, 0, e.rb) / n
    slope, value = e.scratch(_OUTPUTS * e.rb), e.scratch(_OUTPUTS * e.rb)
    with e.loop(0, b.n, _OUTPUTS) as first:
        outputs = e.minimum(b.n - first, _OUTPUTS)
        with e.loop(0, outputs) as c:
            e.store(b.row(b.z, first + c), slope, c * e.rb)
            e.store(b.row(b.target, first + c), value, c * e.rb)
        e.call_back(b.field("function"), slope, value, outputs * e.rb, 1 if b.train else 0)
        with e.loop(0, outputs) as c:
            total.set(total.get() + e.load(value, c * e.rb, e.rb))
            if b.train:
                b.set_dz(first + c, part * e.load(slope, c * e.rb, e.rb))
    e.store(total.get() / n, b.loss)


def _bce_with_logits(e: Emitter, z: Value, y: Value, x: Value) -> tuple[Value, Value]:
    """|z| (p y below 0, 1 - y above) + (1 - y + p y) log(1 + exp(-|z|)), p = x"""
    u = exp(e, -e.abs(z))
    near = 1 / (1 + u)
    far, yes, no = u * near, x * y, 1 - y
    slope = e.select(z < 0, e.fma(far, no, -(near * yes)), e.fma(near, no, -(far * yes)))
    return e.fma(e.abs(z), e.select(z < 0, yes, no), (no + yes) * log1p(e, u)), slope


def _mse(e: Emitter, z: Value, y: Value, x: Value) -> tuple[Value, Value]:
    difference = z - y
    return difference * difference, 2 * difference


def _mae(e: Emitter, z: Value, y: Value, x: Value) -> tuple[Value, Value]:
    difference = z - y
    return e.abs(difference), e.select(difference > 0, 1.0, 0.0) - e.select(difference < 0, 1.0, 0.0)


def _huber(e: Emitter, z: Value, y: Value, x: Value) -> tuple[Value, Value]:
    difference = z - y
    size = e.abs(difference)
    value = e.select(size < x, 0.5 * difference * difference, x * e.fma(-0.5, x, size))
    return value, e.at_least(e.at_most(difference, x), -x)


LOSSES: dict[str, Callable[[Block, bool], None]] = {
    "cross_entropy": cross_entropy,
    "cross_entropy_labels": cross_entropy_labels,
    "cross_entropy_rows": cross_entropy_rows,
    "bce_with_logits": _mean(_bce_with_logits),
    "mse": _mean(_mse),
    "mae": _mean(_mae),
    "huber": _mean(_huber),
    "linear": linear,
    "custom": custom,
}


def loss(kind: str, weighted: str, mode: str, e: Emitter, *arguments: Value) -> None:
    """The loss of `rows` rows, and with "train" its gradient s dl/dz; "weighted": by class or positive weights."""
    block = Block(e, mode == "train", *arguments)
    LOSSES[kind](block, weighted == "weighted")
    block.clear()
