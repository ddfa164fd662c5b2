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
from .records import CHUNK, ENGINE, MINI, RUN, STAGE, WORKER
from .sync import wait

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
    """The optimiser's coefficients of a step, in the dtype of the weights."""
    for i in range(8):
        put(me.coefficients, i, load_f8(run.coefficients + 8 * (8 * step + i)), e.size)


@jit
def mean_squares(e, run, mini):
    """The squared norm of the mean gradient, in the tiles' or the chunks' order."""
    parts, n = (e.chunk_squares, e.total_chunks) if run.stored else (e.tile_squares, e.total_tiles)
    lanes = clear_lanes(mini, 0)
    for i in range(n):
        add_to_lane(lanes, i, load_f8(parts + 8 * i))
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
    divide = run.divide if run.divide > 0 else weight
    first, last = tid * e.total_chunks // threads, (tid + 1) * e.total_chunks // threads
    measured = run.max_norm < math.inf or run.stats != 0
    mini = at(MINI, me.mini)
    scale = 1.0
    read_coefficients(e, run, me, step)
    if measured:
        for c in range(first, last):
            _mean(e, run, me, step, divide, c)
            g, n = _chunk(e, run, c)
            call(e.k_squares, (g, 1, n, n, e.chunk_squares + 8 * c))
        wait(e.barrier, tid, threads)
        lanes = clear_lanes(mini, 0)
        for c in range(e.total_chunks):
            add_to_lane(lanes, c, load_f8(e.chunk_squares + 8 * c))
        norm = math.sqrt(tree(lanes))
        if run.max_norm < math.inf and not norm + 1e-6 <= run.max_norm:
            scale = run.max_norm / (norm + 1e-6)
    for c in range(first, last):
        if not measured:
            _mean(e, run, me, step, divide, c)
        g, n = _chunk(e, run, c)
        if scale != 1.0 or run.limit < math.inf:
            limit(e, me, g, n, scale, run.limit)
        where = g - run.gradient
        s0 = run.state0 + where if run.state0 else 0
        s1 = run.state1 + where if run.state1 else 0
        s2 = run.state2 + where if run.state2 else 0
        call(run.update, (me.coefficients, run.params + where, s0, s1, s2, g, 1, n, n, n))


@jit
def limit(e, me, g, n, factor, most):
    """g = g * factor, then cut to -most .. most."""
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
    return run.gradient + (s.offset + start) * e.size, min(CHUNK, s.rows * s.n_out - start)


@jit
def _mean(e, run, me, step, divide, c):
    """A chunk of the sum divided, and the noise added."""
    g, n = _chunk(e, run, c)
    factor = 1.0 / divide if divide > 0 else 0.0
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
