"""What is wanted of rows' own gradients: norms, shortening, themselves."""

from __future__ import annotations

import math

from .applied import limit
from .machine import call, get, item, jit, load_i8, put, store_f4, store_f8
from .records import CLIP, INPUTS, LINE, STAGE, WHOLE


@jit
def loss_scale(run, mini):
    """What a row's weight is multiplied by on its way to the gradient: stored gradients are sums."""
    if run.stored:
        return 1.0
    return 1.0 / mini.weight if mini.weight > 0 else 0.0


@jit
def _width(e):
    return (e.rb * e.size + LINE - 1) // LINE * LINE


@jit
def row_squares(e, s, home, first, blocks, dz, block, start):
    """Adds to the squared norms of the blocks' rows what a stage has: its weight's gradient by one row is the product
    of the row's input and output gradient, so its norm is the product of theirs (Goodfellow 2015).
    """
    width = _width(e)
    x = home.squares + e.group * width
    for b in range(blocks):
        total = home.squares + b * width
        call(e.k_row_squares, (s.x + (first + b) * s.x_block * e.size, s.rows, x))
        call(e.k_row_squares, (dz + b * block * e.size, s.n_out, x + width))
        for r in range(e.rb):
            before = 0.0 if start else get(total, r, e.size)
            # Of floats, the product is exact in double; it is rounded by itself, and then the sum.
            put(x, r, get(x, r, e.size) * get(x + width, r, e.size), e.size)
            put(total, r, before + get(x, r, e.size), e.size)


@jit
def each_row(e, run, mini, home, me, first, blocks, dx, block):
    """What is wanted of the blocks' rows, now that their gradients are there."""
    width = _width(e)
    scale = loss_scale(run, mini)
    scale = 1.0 / scale if scale > 0 else 0.0
    factor = home.squares + e.group * width
    n_in = item(STAGE, e.stages, 0).n_in
    for b in range(blocks):
        row = (first + b) * mini.block_rows
        rows = min(mini.block_rows, mini.rows - row)
        shorter = False
        for r in range(rows):
            square = get(home.squares + b * width, r, e.size) * scale * scale
            norm = math.sqrt(square)
            place = mini.begin + row + r
            store_f8(e.row_squares + 8 * ((first + b) * e.rb + r), square)
            if run.norms_out:
                put(run.norms_out, place, norm, e.size)
            if run.norms:
                store_f4(run.norms + 4 * (load_i8(run.order + 8 * place) if run.order else place), norm)
            shorter = shorter or norm > run.clip
            put(factor, r, run.clip / norm if norm > run.clip else 1.0, e.size)
        for i in range(e.n_stages):
            s = item(STAGE, e.stages, i)
            dz = s.dz + (first + b) * e.rb * e.rb * e.size
            if run.want & CLIP and shorter:
                call(e.k_scale_rows, (dz, s.panels, s.panel_stride, rows, factor))
            if run.want & WHOLE:
                for r in range(rows):
                    x = s.x + ((first + b) * s.x_block + r) * e.size
                    _whole(e, run, s, i, x, dz + r * e.rb * e.size, mini.begin + row + r)
        if run.want & INPUTS:
            here = dx + b * block * e.size
            if e.n_input_ops > 0:
                for i in range(n_in * e.rb):
                    slope = get(home.d_input, b * n_in * e.rb + i, e.size)
                    put(here, i, get(here, i, e.size) * slope, e.size)
            out = run.inputs + (mini.begin + row) * n_in * e.size
            call(e.scatter, (here, n_in, rows, out, n_in))
            limit(e, me, out, rows * n_in, run.input_scale, math.inf)


@jit
def _whole(e, run, s, i, x, dz, place):
    """A row's own gradient of a stage's weight and bias, where the caller wants it."""
    weight = load_i8(run.whole + 16 * i) + place * s.n_in * s.n_out * e.size
    call(e.k_outer, (x, s.n_in, dz, s.n_out, s.panel_stride, weight))
    if s.rows > s.n_in:
        bias = load_i8(run.whole + 16 * i + 8) + place * s.n_out * e.size
        call(e.k_outer, (x + s.n_in * e.rb * e.size, 1, dz, s.n_out, s.panel_stride, bias))
