"""Stages that are no product: BatchNorm, LayerNorm, PReLU, identity. The loops of native_layers.pxi.

Such a stage keeps its input in `x`, [block][feature + 1][rb], and its output gradient in `dz`, [block][feature][rb]; a
normalisation its statistics in `stats`: of each row [block][mean, rstd][rb], or of each feature, the rows that
`records` names. From these, xhat = (x - mean) rstd is worked out again where it is wanted.

Of a stage's kernels, `forth` makes its output and `back` its input's gradient; `sums` and `terms` are the gradients of
its weight, over all rows and of each.
"""

from __future__ import annotations

import math

from .blocks import forward
from .machine import address, at, call, get, item, jit, load_i8, put
from .records import (
    ACROSS,
    ALONG,
    BATCH_NORM,
    DBIAS,
    DWEIGHT,
    IDENTITY,
    LAYER_NORM,
    LINEAR,
    MEAN,
    PRELU,
    ROWS,
    RSTD,
    STAGE,
    VARIANCE,
    offset,
)
from .sync import wait

_EPS = offset(STAGE, "eps")


@jit
def _statistic(e, s, which):
    return s.stats + which * s.n_in * e.size


@jit
def _row_statistics(e, s, block):
    """Mean and rstd of a block's rows."""
    mean = s.stats + block * 2 * e.rb * e.size
    return mean, mean + e.rb * e.size


@jit
def _affine(e, s):
    """Weight and bias of a normalisation, where there are such."""
    return s.w if s.rows > 0 else 0, s.w + s.n_in * e.size if s.rows > 1 else 0


@jit
def layer(e, s, mini, me, first, blocks, x, x_block, out, out_block, low, high, training, part, parts):
    """Features low .. high of out = f(x), for each block."""
    if s.kind == LINEAR:
        forward(e, s, mini, me, first, blocks, x, x_block, out, out_block, 0, s.rows, low, high)
        return
    weight, bias = _affine(e, s)
    span = low * e.rb * e.size
    for b in range(blocks):
        if s.kind == LAYER_NORM:
            mean, rstd = _row_statistics(e, s, first + b) if training else (me.stats, me.stats + e.rb * e.size)
            if part == 0:
                call(e.k_row_moments, (s.n_in, address(s) + _EPS, x, mean, rstd))
            wait(e.barrier, part, parts)
            call(s.forth, (mean, rstd, weight, bias, low, high, x, out))
        elif s.kind == BATCH_NORM:
            mean, rstd = s.buffers, s.running_rstd
            if training:
                mean, rstd = _statistic(e, s, MEAN), _statistic(e, s, RSTD)
            call(s.forth, (mean, rstd, weight, bias, low, high, x, out))
        elif s.kind == PRELU:
            call(s.forth, (s.w, s.columns > 1, low, high, x, out))
        else:
            call(e.k_copy, ((high - low) * e.rb, x + span, 0, out + span))
        x += x_block * e.size
        out += out_block * e.size


@jit
def layer_dz(e, s, block, da, d, low, high):
    """A block's output gradient, features low .. high, from the one behind the operations: to `dz`, or in place."""
    dz = da if s.kind == IDENTITY else s.dz + (block * s.n_out + low) * e.rb * e.size
    if dz != da or d:
        call(s.backward, ((high - low) * e.rb, da, d, dz))


@jit
def layer_dx(e, s, home, block, dx, low, high, part, parts):
    """A block's input gradient, features low .. high of dx."""
    x, dz = s.x + block * s.x_block * e.size, s.dz + block * s.n_out * e.rb * e.size
    weight, _ = _affine(e, s)
    if s.kind == LAYER_NORM:
        mean, rstd = _row_statistics(e, s, block)
        across, along = home.stats + 2 * e.rb * e.size, home.stats + 3 * e.rb * e.size
        if part == 0:
            call(e.k_row_means, (mean, rstd, weight, s.n_in, x, dz, across, along))
        wait(e.barrier, part, parts)
        call(s.back, (mean, rstd, weight, across, along, low, high, x, dz, dx))
    elif s.kind == BATCH_NORM:
        mean, rstd = _statistic(e, s, MEAN), _statistic(e, s, RSTD)
        across, along = _statistic(e, s, ACROSS), _statistic(e, s, ALONG)
        call(s.back, (mean, rstd, weight, across, along, low, high, x, dz, dx))
    elif s.kind == PRELU:
        call(s.back, (s.w, s.columns > 1, low, high, x, dz, dx))


# ---- the whole mini-batch ------------------------------------------------------------------------------------------


@jit
def _all_rows(e, s, mini, me):
    """The address of the record of the mini-batch's rows."""
    rows = at(ROWS, me.all_rows)
    rows.x_block, rows.dz_block, rows.stats_block = s.x_block, s.n_out * e.rb, 2 * e.rb
    rows.block_rows, rows.rows = mini.block_rows, mini.rows
    return me.all_rows


@jit
def prepare(e, s, mini, me, going_forward, low, high):
    """What a batch normalisation needs of all rows before they go on, forward or back: its features low .. high."""
    mean, rstd = _statistic(e, s, MEAN), _statistic(e, s, RSTD)
    across, along = _statistic(e, s, ACROSS), _statistic(e, s, ALONG)
    dweight, dbias = _statistic(e, s, DWEIGHT), _statistic(e, s, DBIAS)
    if not e.trained:  # as in inference, where the rows don't depend on each other
        for f in range(low, high):
            put(mean, f, get(s.buffers, f, e.size), e.size)
            put(rstd, f, 1 / math.sqrt(get(s.buffers, s.n_in + f, e.size) + s.eps), e.size)
            put(across, f, 0.0, e.size)
            put(along, f, 0.0, e.size)
    elif going_forward:
        rows = _all_rows(e, s, mini, me)
        variance = _statistic(e, s, VARIANCE)
        call(e.k_column_moments, (rows, address(s) + _EPS, low, high, s.x, mean, variance, rstd))
    else:
        rows, start = _all_rows(e, s, mini, me), low * e.size
        call(s.sums, (rows, mean, rstd, low, high, s.x, s.dz, dweight + start, dbias + start))
        for f in range(low, high):
            weight = (get(s.w, f, e.size) if s.rows > 0 else 1.0) / mini.rows
            put(across, f, weight * get(dbias, f, e.size), e.size)
            put(along, f, weight * get(dweight, f, e.size), e.size)


@jit
def layer_gradient(e, s, mini, me, f, columns, stride, out):
    """The gradients of a stage's parameters, columns f .. f + columns of its matrix, a row every `stride`."""
    bias = out + stride * e.size if s.rows > 1 else 0
    if s.kind == BATCH_NORM:
        here = f * e.size
        call(e.k_copy, (columns, _statistic(e, s, DWEIGHT) + here, 0, out))
        call(e.k_copy, (columns, _statistic(e, s, DBIAS) + here, 0, bias))
        return
    rows, (mean, rstd) = _all_rows(e, s, mini, me), _row_statistics(e, s, 0)
    if s.columns == s.n_out:
        call(s.sums, (rows, mean, rstd, f, f + columns, s.x, s.dz, out, bias))
        return
    total = 0.0
    while f < s.n_out:  # one weight for all features
        n = min(e.rb, s.n_out - f)
        call(s.sums, (rows, 0, 0, f, f + n, s.x, s.dz, out, 0))
        for i in range(n):
            total += get(out, i, e.size)
        f += n
    put(out, 0, total, e.size)


@jit
def move_statistics(e, mini):
    """Moves the running statistics towards the mini-batch's."""
    unbiased = mini.rows / (mini.rows - 1.0)
    for i in range(e.n_cuts):
        s = item(STAGE, e.stages, load_i8(e.cuts + 8 * i))
        mean, variance = s.buffers, s.buffers + s.n_in * e.size
        share = get(variance, s.n_in, e.size) + 1
        put(variance, s.n_in, share, e.size)
        share = s.momentum if s.momentum >= 0 else 1 / share
        for f in range(s.n_in):
            new = get(_statistic(e, s, MEAN), f, e.size)
            put(mean, f, (1 - share) * get(mean, f, e.size) + share * new, e.size)
            new = get(_statistic(e, s, VARIANCE), f, e.size)
            put(variance, f, (1 - share) * get(variance, f, e.size) + share * unbiased * new, e.size)


# ---- rows' own gradients -------------------------------------------------------------------------------------------


@jit
def _terms(e, s, block, terms):
    """Each row's own gradient of a stage's weight, [columns][rb]."""
    mean, rstd = _row_statistics(e, s, block)
    if s.kind == BATCH_NORM:
        mean, rstd = _statistic(e, s, MEAN), _statistic(e, s, RSTD)
    x, dz = s.x + block * s.x_block * e.size, s.dz + block * s.n_out * e.rb * e.size
    call(s.terms, (mean, rstd, s.n_in, x, dz, terms))
    if s.columns == 1:  # one weight for all features
        for f in range(1, s.n_in):
            call(e.k_add, (e.rb, terms + f * e.rb * e.size, terms))


@jit
def layer_squares(e, s, home, block, terms, total):
    """Adds the squares of each row's own gradient to `total`, [rb]."""
    if s.rows == 0:
        return
    _terms(e, s, block, terms)
    call(e.k_row_squares, (terms, s.columns, 0, home.factors))
    call(e.k_add, (e.rb, home.factors, total))
    if s.rows > 1:
        call(e.k_row_squares, (s.dz + block * s.n_out * e.rb * e.size, s.n_out, 0, home.factors))
        call(e.k_add, (e.rb, home.factors, total))


@jit
def layer_shorten(e, s, block, factor):
    """A block's rows of dz times their factors."""
    dz = s.dz + block * s.n_out * e.rb * e.size
    for f in range(s.n_out if s.rows > 0 else 0):
        call(e.k_multiply, (e.rb, dz + f * e.rb * e.size, factor, dz + f * e.rb * e.size))


@jit
def layer_whole(e, run, s, i, block, rows, place, terms):
    """Rows' own gradients of a stage's weight and bias, where the caller wants them."""
    if s.rows == 0:
        return
    _terms(e, s, block, terms)
    weight = load_i8(run.whole + 16 * i) + place * s.columns * e.size
    call(e.scatter, (terms, s.columns, rows, weight, s.columns))
    if s.rows > 1:
        dz = s.dz + block * s.n_out * e.rb * e.size
        bias = load_i8(run.whole + 16 * i + 8) + place * s.n_out * e.size
        call(e.scatter, (dz, s.n_out, rows, bias, s.n_out))
