"""What is wanted of rows' own gradients: norms, shortening, themselves."""

from __future__ import annotations

import math

from .applied import limit
from .blocks import sample_weight
from .layers import layer_shorten, layer_squares, layer_whole
from .machine import at, call, get, item, jit, load_i8, put, store_f4, store_f8
from .places import chains, d_input, gradient, input_side, squares, width
from .records import CLIP, INPUTS, LINEAR, NORMS, STAGE, WHOLE


@jit
def loss_scale(run, mini):
    """What a row's weight is multiplied by on its way to the gradient: stored gradients are sums."""
    if run.stored:
        return 1.0
    return 1.0 / mini.weight if mini.weight > 0 else 0.0


@jit
def row_squares(e, s, mini, home, first, blocks, start):
    """Adds to the squared norms of the blocks' rows what a stage has: a weight's gradient by one row is the product
    of the row's input and output gradient, so its norm is the product of theirs (Goodfellow 2015).
    """
    x, dz = home.factors, home.factors + width(e)
    for b in range(blocks):
        total = squares(e, home, first, b)
        if start:
            for r in range(e.rb):
                put(total, r, 0.0, e.size)
        if s.kind != LINEAR:
            layer_squares(e, s, home, first + b, gradient(e, home, 1 - s.side, first, b), total)
            continue
        if mini.relay and s.first_tile == 0:  # they have been added up on the way
            call(e.k_row_squares, (0, 0, chains(e, first + b), x))
        else:
            call(e.k_row_squares, (s.x + (first + b) * s.x_block * e.size, s.rows, 0, x))
        call(e.k_row_squares, (gradient(e, home, s.side, first, b), s.n_out, 0, dz))
        for r in range(e.rb):
            # Of floats, the product is exact in double; it is rounded by itself, and then the sum.
            put(x, r, get(x, r, e.size) * get(dz, r, e.size), e.size)
            put(total, r, get(total, r, e.size) + get(x, r, e.size), e.size)


@jit
def each_row(e, run, mini, home, me, first, blocks):
    """What is wanted of the blocks' rows, now that their gradients are there."""
    side = input_side(at(STAGE, e.stages))
    for b in range(blocks):
        row = (first + b) * mini.block_rows
        rows = min(mini.block_rows, mini.rows - row)
        shorter = False
        if run.want & NORMS:
            shorter = _norms(e, run, mini, home, first, b, row, rows)
        scratch = gradient(e, home, 1 - side, first, b)
        for i in range(e.n_stages):
            s = item(STAGE, e.stages, i)
            dz = s.dz + (first + b) * e.rb * e.rb * e.size
            if run.want & CLIP and shorter:
                if s.kind == LINEAR:
                    call(e.k_scale_rows, (dz, s.panels, s.panel_stride, rows, home.factors))
                else:
                    layer_shorten(e, s, first + b, home.factors)
            if run.want & WHOLE and s.kind != LINEAR:
                layer_whole(e, run, s, i, first + b, rows, mini.begin + row, scratch)
            elif run.want & WHOLE:
                for r in range(rows):
                    x = s.x + ((first + b) * s.x_block + r) * e.size
                    _whole(e, run, s, i, x, dz + r * e.rb * e.size, mini.begin + row + r)
        if run.want & INPUTS:
            _inputs(e, run, home, me, first, b, mini.begin + row, rows, gradient(e, home, side, first, b))


@jit
def _norms(e, run, mini, home, first, b, row, rows):
    """The norms of a block's rows, and the factors that shorten them; whether any is too long. A row's own gradient is
    without its sample weight; what statistics are made of has it.
    """
    scale = loss_scale(run, mini)
    scale = 1.0 / scale if scale > 0 else 0.0
    shorter = False
    for r in range(rows):
        square = get(squares(e, home, first, b), r, e.size) * scale * scale
        norm = math.sqrt(square)
        place = mini.begin + row + r
        store_f8(e.row_squares + 8 * ((first + b) * e.rb + r), square)
        if run.norms_out:
            put(run.norms_out, place, norm, e.size)
        if run.sample_weight:
            weight = sample_weight(run, place)
            norm = norm / weight if weight > 0 else 0.0
        if run.norms:
            store_f4(run.norms + 4 * (load_i8(run.order + 8 * place) if run.order else place), norm)
        shorter = shorter or norm > run.clip
        put(home.factors, r, run.clip / norm if norm > run.clip else 1.0, e.size)
    return shorter


@jit
def _inputs(e, run, home, me, first, b, place, rows, dx):
    """A block's gradient with respect to the user's input."""
    n_in = at(STAGE, e.stages).n_in
    if e.n_input_ops > 0:
        slopes = d_input(e, home, first, b)
        for i in range(n_in * e.rb):
            put(dx, i, get(dx, i, e.size) * get(slopes, i, e.size), e.size)
    out = run.inputs + place * n_in * e.size
    call(e.scatter, (dx, n_in, rows, out, n_in))
    limit(e, me, out, rows * n_in, run.input_scale, math.inf)


@jit
def _whole(e, run, s, i, x, dz, place):
    """A row's own gradient of a stage's weight and bias, where the caller wants it."""
    weight = load_i8(run.whole + 16 * i) + place * s.n_in * s.n_out * e.size
    call(e.k_outer, (x, s.n_in, dz, s.n_out, s.panel_stride, weight))
    if s.rows > s.n_in:
        bias = load_i8(run.whole + 16 * i + 8) + place * s.n_out * e.size
        call(e.k_outer, (x + s.n_in * e.rb * e.size, 1, dz, s.n_out, s.panel_stride, bias))
