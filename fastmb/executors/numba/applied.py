"""A gradient that was stored, on its way to the update: mean, noise, limits, in chunks of the matrices."""

from __future__ import annotations

import math

from .machine import (
    address,
    at,
    call,
    entropy,
    flush_denormals,
    item,
    jit,
    load_f8,
    put,
    restore_denormals,
    store_f8,
)
from .records import CHUNK, ENGINE, INTO, MINI, RUN, STAGE, WORKER, offset
from .sync import wait

_WEIGHT = offset(INTO, "weight")
_LANES, _DOUBLES = MINI.itemsize, MINI.itemsize + 3 * 64  # scratch behind a thread's MINI


@jit
def clear_lanes(mini, which):
    """The address of eight doubles, now 0; there are three such places."""
    lanes = address(mini) + _LANES + 64 * which
    for i in range(8):
        store_f8(lanes + 8 * i, 0.0)
    return lanes


@jit
def add_to_lane(lanes, i, value):
    """Term i of a sum in eight lanes."""
    lane = lanes + 8 * (i & 7)
    store_f8(lane, load_f8(lane) + value)


@jit
def tree(lanes):
    """The sum of the eight."""
    a, b = load_f8(lanes) + load_f8(lanes + 32), load_f8(lanes + 16) + load_f8(lanes + 48)
    c, d = load_f8(lanes + 8) + load_f8(lanes + 40), load_f8(lanes + 24) + load_f8(lanes + 56)
    return (a + b) + (c + d)


@jit
def read_coefficients(e, run, me, step):
    """The step's coefficients in the dtype of the weights. There are none where gradients are only stored."""
    if run.coefficients:
        for i in range(8 * e.groups):
            put(me.coefficients, i, load_f8(run.coefficients + 8 * (run.columns * step + i)), e.size)


@jit
def to_update(run, me, step):
    """The record of where gradients go: into the update."""
    into = at(INTO, me.into)
    into.update, into.state0, into.state1, into.state2 = run.update, run.state0, run.state1, run.state2
    into.weight = load_f8(run.coefficients + 8 * (run.columns * (step + 1) - 1)) if run.average else 0.0
    into.completes = into.before = 0
    return into


@jit
def to_array(run, me, adding):
    """The same: into the array that stores them."""
    into = at(INTO, me.into)
    into.update = run.accumulate if adding else run.store
    into.state0, into.state1, into.state2 = run.gradient, 0, 0
    into.weight = 0.0
    into.completes = into.before = 0
    return into


@jit
def at_once(run):
    """Whether the last part's tiles complete a stored gradient and go into the update: nobody has to know it as a
    whole, or as chunks, before; and arrays that are far come faster in a row than tile by tile.
    """
    return not run.far and run.noise == 0 and run.max_norm == math.inf and not run.stats


@jit
def destination(run, mini, me):
    """The record of where a weight sweep's gradients go."""
    if not run.stored:
        return to_update(run, me, mini.step)
    if not (mini.last and not run.applied and at_once(run)):
        return to_array(run, me, run.row + mini.row > 0)
    into = to_update(run, me, mini.step)
    into.completes, into.factor = 1, _factor(run, mini.weight)
    into.before = run.gradient if mini.row > 0 else 0
    return into


@jit
def complete(e, run, me, into, place, rows, columns, stride, g):
    """A tile of the last part's gradient becomes that of the mini-batch: the parts before added, mean, limit."""
    if into.before:
        c, w, before = me.coefficients, run.params + place, into.before + place
        call(run.accumulate, (c, w, g, 0, 0, before, rows, columns, e.rb, stride))
    if into.factor != 1.0 or run.limit < math.inf:
        limit(e, me, g, columns if rows == 1 else rows * e.rb, into.factor, run.limit)


@jit
def _factor(run, weight):
    """What makes the mean of the sum of gradients."""
    divide = run.divide if run.divide > 0 else weight
    return 1.0 / divide if divide > 0 else 0.0


@jit
def update(e, run, me, s, into, first, rows, columns, g, g_stride):
    """The update of rows x columns weights, from number `first` of the stage's matrix on, by their gradients. At
    `s.cut` another group of parameters begins.
    """
    if s.cut == s.rows:
        _update_group(e, run, me, s, into, s.group, first, rows, columns, g, g_stride)
    elif rows == 1:
        head = max(0, min(columns, s.cut * s.columns - first))
        _update_group(e, run, me, s, into, s.group, first, 1, head, g, g_stride)
        rest = g + head * e.size
        _update_group(e, run, me, s, into, s.last_group, first + head, 1, columns - head, rest, g_stride)
    else:
        head = max(0, min(rows, s.cut - first // s.columns))
        _update_group(e, run, me, s, into, s.group, first, head, columns, g, g_stride)
        after, rest = first + head * s.columns, g + head * g_stride * e.size
        _update_group(e, run, me, s, into, s.last_group, after, rows - head, columns, rest, g_stride)


@jit
def _update_group(e, run, me, s, into, group, first, rows, columns, g, g_stride):
    if rows <= 0 or columns <= 0:
        return
    where = (s.offset + first) * e.size
    s0 = into.state0 + where if into.state0 else 0
    s1 = into.state1 + where if into.state1 else 0
    s2 = into.state2 + where if into.state2 else 0
    c = me.coefficients + 8 * group * e.size
    call(into.update, (c, run.params + where, s0, s1, s2, g, rows, columns, s.columns, g_stride))
    if into.weight != 0:
        w, average = run.params + where, run.average + where
        call(e.k_average, (address(into) + _WEIGHT, w, average, rows, columns, s.columns))


@jit
def mean_squares(e, run, mini):
    """The squared norm of the mean gradient, in the tiles' or the chunks' order."""
    lanes = clear_lanes(mini, 0)
    if not run.stored:
        call(e.k_total, (e.tile_squares, 4 * e.total_tiles, lanes))
        return load_f8(lanes)
    for c in range(e.total_chunks):
        add_to_lane(lanes, c, load_f8(e.chunk_squares + 8 * c))
    return tree(lanes)


@jit
def apply_stored(engine, run_, tid, threads):
    """A gradient that the caller has, applied; `run.divide` is what it is divided by."""
    old = flush_denormals()
    e, run = at(ENGINE, engine), at(RUN, run_)
    apply_gradient(e, run, item(WORKER, e.workers, tid), 0, 0.0, tid, threads)
    restore_denormals(old)


@jit
def apply_gradient(e, run, me, step, weight, tid, threads):
    """From the sum of gradients to the update."""
    factor = _factor(run, weight)
    first, last = tid * e.total_chunks // threads, (tid + 1) * e.total_chunks // threads
    measured = run.max_norm < math.inf or run.stats != 0
    mini = at(MINI, me.mini)
    scale = 1.0
    read_coefficients(e, run, me, step)
    into = to_update(run, me, step)
    if measured:
        for c in range(first, last):
            _mean(e, run, me, step, factor, c)
            g, n = _chunk(e, run, c)
            call(e.k_squares, (g, n, e.chunk_squares + 8 * c))
        wait(e.barrier, tid, threads)
        lanes = clear_lanes(mini, 0)
        for c in range(e.total_chunks):
            add_to_lane(lanes, c, load_f8(e.chunk_squares + 8 * c))
        norm = math.sqrt(tree(lanes))
        if run.max_norm < math.inf and not norm + 1e-6 <= run.max_norm:
            scale = run.max_norm / (norm + 1e-6)
    for c in range(first, last):
        if not measured:
            _mean(e, run, me, step, factor, c)
        g, n = _chunk(e, run, c)
        if scale != 1.0 or run.limit < math.inf:
            limit(e, me, g, n, scale, run.limit)
        s = item(STAGE, e.stages, _stage_of(e, c))
        update(e, run, me, s, into, (c - s.first_chunk) * CHUNK, 1, n, g, n)


@jit
def limit(e, me, g, n, factor, most):
    """G = g * factor, then cut to -most .. most."""
    doubles = me.mini + _DOUBLES
    store_f8(doubles, factor)
    store_f8(doubles + 8, most)
    call(e.k_limit, (g, n, doubles))


@jit
def _stage_of(e, c):
    i = 0
    s = at(STAGE, e.stages)
    while c >= s.first_chunk + s.chunks:
        i += 1
        s = item(STAGE, e.stages, i)
    return i


@jit
def _chunk(e, run, c):
    """Chunk `c` of the stored gradient: where it is, and its numbers."""
    s = item(STAGE, e.stages, _stage_of(e, c))
    start = (c - s.first_chunk) * CHUNK
    return run.gradient + (s.offset + start) * e.size, min(CHUNK, s.rows * s.columns - start)


@jit
def _mean(e, run, me, step, factor, c):
    """A chunk of the sum divided, and the noise added."""
    g, n = _chunk(e, run, c)
    if factor != 1.0:
        limit(e, me, g, n, factor, math.inf)
    if run.noise > 0:
        bits = 0
        if run.secure:
            bits = me.bits
            for i in range(0, (n + 127) // 128 * 512, 256):
                if entropy(bits + i, 256) != 0:
                    run.failed = 1
        doubles = me.mini + _DOUBLES
        store_f8(doubles, run.noise * factor)
        matrix = _stage_of(e, c)
        start = (c - item(STAGE, e.stages, matrix).first_chunk) * CHUNK
        call(e.k_noise, (run.seed, run.t + step, matrix, bits, doubles, g, start, n))
