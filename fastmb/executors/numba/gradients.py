"""Rows' own gradients, through their norms or as a whole, and what a stored gradient goes through before the update.

The arithmetic of csrc/gradients.inc.
"""

from __future__ import annotations

from .dropout import philox
from .emit import Emitter, Value
from .mathematics import log

_NOISE = 255  # the purpose of these random numbers
_SINE = (  # 1/17!, -1/15!, ...; those that float needs are the last five
    (2.7557319223985893e-06,),
    (
        2.8114572543455206e-15,
        -7.647163731819816e-13,
        1.6059043836821613e-10,
        -2.505210838544172e-08,
        2.7557319223985893e-06,
    ),
)
_COSINE = (
    (2.48015873015873e-05,),
    (
        4.779477332387385e-14,
        -1.1470745597729725e-11,
        2.08767569878681e-09,
        -2.755731922398589e-07,
        2.48015873015873e-05,
    ),
)


def row_squares(e: Emitter, *arguments: Value) -> None:
    """out[r] = the sum of a[j][r]^2 over features j < n of a block: four chains, j modulo 4, then a tree. The chains go
    on from those that are given, and are left there.
    """
    a, n, chains, out = arguments
    chain = [e.variable(e.zeros(e.rb)) for _ in range(4)]
    with e.when(chains > 0):
        for c in range(4):
            chain[c].set(e.load(chains, c * e.rb, e.rb))

    def add(j: Value, c: int) -> None:
        x = e.load(a, j * e.rb, e.rb)
        chain[c].set(e.fma(x, x, chain[c].get()))

    whole = n - n % 4
    with e.loop(0, whole, 4) as j:
        for c in range(4):
            add(j + c, c)
    for c in range(3):
        with e.when(whole + c < n):
            add(whole + c, c)
    sums = [c.get() for c in chain]
    with e.when(chains > 0):
        for c in range(4):
            e.store(sums[c], chains, c * e.rb)
    with e.when(out > 0):
        e.store((sums[0] + sums[2]) + (sums[1] + sums[3]), out)


def total(e: Emitter, *arguments: Value) -> None:
    """The sum of n numbers, as a double: sixteen chains, then a tree."""
    a, n, out = arguments
    sums, whole = e.variable(e.doubles(0.0, 16)), n - n % 16
    with e.loop(0, whole, 16) as j:
        sums.set(sums.get() + e.widen(e.load(a, j, 16)))
    _tree(e, sums.get(), a, whole, n, out, squared=False)


def squares(e: Emitter, *arguments: Value) -> None:
    """The sum of squares of n numbers, as a double: four times as many chains."""
    g, n, out = arguments
    sums = [e.variable(e.doubles(0.0, 16)) for _ in range(4)]
    whole = n - n % 64
    with e.loop(0, whole, 64) as j:
        for i, part in enumerate(sums):
            x = e.widen(e.load(g, j + 16 * i, 16))
            part.set(part.get() + x * x)
    a, b, c, d = (part.get() for part in sums)
    _tree(e, (a + c) + (b + d), g, whole, n, out, squared=True)


def _tree(e: Emitter, chains: Value, numbers: Value, whole: Value, n: Value, out: Value, *, squared: bool) -> None:
    """The sixteen chains go on with numbers `whole` .. n - 1, or their squares, and are added up."""
    chain = e.scratch(16 * 8 // e.target.itemsize)
    e.store_doubles(chains, chain)
    with e.loop(whole, n) as j:
        place = chain + ((j - whole) & 15) * 8
        y = e.widen(e.load(numbers, j))
        e.store_doubles(e.load_as("f8", place) + (y * y if squared else y), place)
    tree = e.load_as("f8", chain, 16)
    for step in (8, 4, 2):
        tree = e.shuffle(tree, tree, range(step)) + e.shuffle(tree, tree, range(step, 2 * step))
    e.store_doubles(e.lane(tree, 0) + e.lane(tree, 1), out)


def scale_rows(e: Emitter, *arguments: Value) -> None:
    """Row r of `rows` of every panel times f[r]."""
    panels, count, stride, rows, f = arguments
    with e.loop(0, count) as p, e.loop(0, rows) as r:
        at = p * stride + r * e.rb
        e.store(e.load(panels, at, e.rb) * e.load(f, r), panels, at)


def limit(e: Emitter, *arguments: Value) -> None:
    """G = g * factor, then within -limit .. limit; both are doubles, one after the other."""
    g, n, doubles = arguments
    factor, most = (e.to_number(e.load_as("f8", doubles + at)) for at in (0, 8))

    def each(at: Value, count: int) -> None:
        e.store(e.at_least(e.at_most(e.load(g, at, count) * factor, most), -most), g, at)

    e.spans(n, each)


def outer(e: Emitter, *arguments: Value) -> None:
    """out[i * n_out + o] = x_i dz_o of one row, its gradient of a weight matrix: x_i is at x[i * rb], dz in panels."""
    x, n_in, dz, n_out, stride, out = arguments
    with e.loop(0, n_in) as i:
        factor = e.load(x, i * e.rb)
        whole = n_out - n_out % e.rb
        with e.loop(0, whole, e.rb) as o:
            e.store(factor * e.load(dz, o // e.rb * stride, e.rb), out, i * n_out + o)
        rest = whole // e.rb * stride

        def each(at: Value, count: int) -> None:
            e.store(factor * e.load(dz, rest + at, count), out, i * n_out + whole + at)

        e.spans(n_out - whole, each, most=e.rb // 2)


def _sin_cos(e: Emitter, k: Value) -> tuple[Value, Value]:
    """Of 2 pi k / 2^32: k is taken apart into quarters and a rest of an eighth either way, for which Taylor's series is
    long enough.
    """
    quarter = (k + 0x20000000) >> 30
    x = e.from_int32(k - (quarter << 30)) * e.number(1.4629180792671596e-09)
    x2 = x * x
    first_s, *more_s = _SINE[e.double]
    first_c, *more_c = _COSINE[e.double]
    s: Value | float = e.number(first_s)
    c: Value | float = e.number(first_c)
    for term in (*more_s, -0.0001984126984126984, 0.008333333333333333, -0.16666666666666666):
        s = e.fma(s, x2, term)
    for term in (*more_c, -0.001388888888888889, 0.041666666666666664, -0.5, 1.0):
        c = e.fma(c, x2, term)
    s = e.fma(x * x2, s, x)
    assert isinstance(c, Value)
    odd = (quarter & 1).compare("!=", 0)
    sine, cosine = e.select(odd, c, s), e.select(odd, s, c)
    lower, left = (quarter & 2).compare("!=", 0), ((quarter + 1) & 2).compare("!=", 0)
    return e.select(lower, -sine, sine), e.select(left, -cosine, cosine)


def noise(e: Emitter, *arguments: Value) -> None:
    """g[i] += deviation * normal number `at` + i of (seed, t, matrix), Box and Muller (1958), from Philox's words or
    from `bits`; `at` is a multiple of 128. `fastmb.rng.normal` says which word makes which number.
    """
    seed, t, matrix, bits, deviation, g, at, n = arguments
    size = e.to_number(e.load_as("f8", deviation))
    lanes = e.lanes
    words = [e.scratch(lanes * 8 // e.target.itemsize) for _ in range(4)]  # 32 bits each
    part = e.scratch(lanes)
    with e.loop(0, n, 128) as block, e.loop(0, 32, lanes) as c:
        with e.either(bits.compare("!=", 0)) as (given, drawn):
            with given:
                for u, place in enumerate(words):
                    e.store_words(e.load_as("i4", bits + (block + c + 32 * u) * 4, lanes), place)
            with drawn:
                row = (at + block) // 4 + c
                for word, place in zip(philox(e, seed, t, e.integer(_NOISE), row, matrix, 0), words, strict=True):
                    e.store_words(e.truncate(word, 32), place)
        for u in (0, 2):
            first, second = (e.load_as("i4", words[u + i], lanes) for i in range(2))
            share = (e.from_int32(first >> 1) + 0.5) * 4.656612873077393e-10
            radius = e.sqrt(2 * log(e, 1 / share))
            sine, cosine = _sin_cos(e, second)
            for i, normal in enumerate((radius * cosine, radius * sine)):
                place = block + c + 32 * (u + i)
                e.store(normal, part)

                def each(j: Value, count: int, place: Value = place) -> None:
                    e.store(e.fma(size, e.load(part, j, count), e.load(g, place + j, count)), g, place + j)

                left = e.select(n > place, n - place, e.integer(0))
                e.spans(e.select(left < lanes, left, e.integer(lanes)), each, most=lanes)
