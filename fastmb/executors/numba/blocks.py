"""What training and inference do to a block of rows alike: gather, the forward product, operations, targets."""

from __future__ import annotations

from .machine import (
    address,
    at,
    call,
    get,
    item,
    jit,
    load_f4,
    load_f8,
    load_i4,
    load_i8,
    load_u1,
    load_u2,
    put,
    store_f4,
    store_f8,
    store_i4,
)
from .places import clear_tile
from .records import GEMM, LINE, LOSS, OP, SOURCE, STAGE

KC = 512  # products of a chain before the next rows are looked at, where several blocks share weights
SMALL_BLOCKS = 4  # blocks a thread up to which blocks of one vector of rows are thought of


@jit
def block_rows(e, rows, threads):
    """Rows of a block, one vector of them or two, whichever keeps the threads busy for the shorter time."""
    one, two = _rounds(e, e.lanes, 1.1, rows, threads), _rounds(e, e.rb, 2.0, rows, threads)
    if rows <= SMALL_BLOCKS * threads * e.rb and one < two:
        return e.lanes
    return e.rb


@jit
def _rounds(e, size, cost, rows, threads):
    """Time of a row sweep in blocks of `size` rows that cost so much each, a vector of rows being about 1."""
    whole, rest = rows // size, rows % size
    last = 0.0
    if rest > 0 and whole % threads == 0:  # else it falls to a thread that has nothing else to do
        last = 0.4 if rest <= e.mr // 2 else 1.1 if rest <= e.lanes else 2.0
    return (whole + threads - 1) // threads * cost + last


@jit
def vectors(e, mini, block):
    """Vectors that the rows of a block fill."""
    return 2 if min(mini.block_rows, mini.rows - block * mini.block_rows) > e.lanes else 1


# ---- the user's rows -----------------------------------------------------------------------------------------------


@jit
def _row(run, position):
    return load_i8(run.order + 8 * position) if run.order else position


@jit
def sample_weight(run, position):
    return load_f8(run.sample_weight + 8 * _row(run, position)) if run.sample_weight else 1.0


@jit
def _label(y, row):
    """The class index of a row; it is never negative."""
    where = y.data + row * y.row_stride
    if y.label_size == 1:
        return load_u1(where)
    if y.label_size == 2:
        return load_u2(where)
    return load_i4(where) if y.label_size == 4 else load_i8(where)


@jit
def class_weight(e, run, position):
    weight = at(LOSS, e.loss).weight
    if not run.indices or not weight:
        return 1.0
    return get(weight, _label(at(SOURCE, run.y), _row(run, position)), e.size)


@jit
def gather(run, source, position, rows, out):
    """`rows` rows from a place in the order on, as a block."""
    index = run.order + 8 * position if run.order else 0
    call(source.gather, (address(source), index, position, rows, out))


@jit
def targets(e, run, me, position, rows):
    """Labels or targets of a block."""
    y = at(SOURCE, run.y)
    if run.indices:
        for r in range(e.rb):
            store_i4(me.labels + 4 * r, _label(y, _row(run, position + r)) if r < rows else 0)
    else:
        gather(run, y, position, rows, me.target)


# ---- forward -------------------------------------------------------------------------------------------------------


@jit
def apply(ops, n_ops, a, d, unit, n, t, row, training):
    """A stage's operations on features `unit` .. of one block [n][rb], in place; `d` receives the product of their
    derivatives.
    """
    for i in range(n_ops):
        op = item(OP, ops, i)
        kernel = op.train if training else op.infer
        if kernel:
            call(kernel, (address(op), t, row, unit, a, d, n))


@jit
def forward(e, s, mini, me, first, blocks, x, x_block, out, out_block, start, end, low, high):
    """out[o][row] = sum over i of w[i][o] x[i][row], low <= o < high, for each block; weights are looked at once for
    all of them. Rows `start` .. `end` - 1 of the matrix: if `start` isn't 0, the sum goes on from what is there.
    """
    g = at(GEMM, me.gemm)
    depth = s.rows if blocks == 1 else KC
    rows = min(mini.block_rows, mini.rows - first * mini.block_rows)
    if blocks == 1 and rows <= e.mr // 2:
        low = _forward_few(e, s, me, rows, x, out, start, end, low, high)
    g.a_m, g.a_k, g.a_block = 1, s.n_out, 0
    ahead = s.ahead if e.group > 1 or end - start == s.rows else 0  # relayed and near: the next are another thread's
    g.ask_step = s.n_out * e.size if ahead > 0 else 0
    g.b_k, g.b_block, g.c_m, g.blocks, g.squares, g.asks = e.rb, 0, e.rb, 1, 0, 0
    for k in range(start, end, depth):
        g.k = g.k_last = min(depth, end - k)
        for m in range(low, high, e.mr):
            w = s.w + (k * s.n_out + m) * e.size
            g.ask = w + ahead * s.n_out * e.size
            if mini.claim and k == 0:
                _claim(e, s, mini, first, blocks, m, min(m + e.mr, high), out + m * e.rb * e.size, out_block)
            for b in range(blocks):
                tile, width = min(e.mr, high - m), vectors(e, mini, first + b)
                from_, to = x + (b * x_block + k * e.rb) * e.size, out + (b * out_block + m * e.rb) * e.size
                call(e.gemm, (me.gemm, tile, width, k > 0, w, from_, to))


@jit
def _claim(e, s, mini, first, blocks, low, high, out, out_block):
    """Takes the lines that outputs low .. high are going to, and after the last stage their gradients."""
    for b in range(blocks):
        width = vectors(e, mini, first + b) * e.lanes * e.size
        clear_tile(out + b * out_block * e.size, high - low, width, e.rb * e.size)
    if address(s) == address(item(STAGE, e.stages, e.n_stages - 1)):
        claim_gradients(e, s, first, blocks, low, high)


@jit
def claim_gradients(e, s, first, blocks, low, high):
    """Of a stage's output gradients in panels, the lines that begin with features low .. high."""
    width = min(e.rb, LINE // e.size)
    for o in range((low + width - 1) // width * width, high, width):
        place = o // e.rb * s.panel_stride + first * e.rb * e.rb + o % e.rb
        clear_tile(s.dz + place * e.size, blocks * e.rb, 1, e.rb * e.size)


@jit
def _forward_few(e, s, me, rows, x, out, k, end, o, high):
    """The same for few rows: vectors run over outputs, as many as fill them. Returns the first that is left."""
    g = at(GEMM, me.gemm)
    g.a_m, g.a_k, g.a_block = 1, e.rb, 0
    g.ask, g.ask_step, g.asks = x, 0, 0
    g.b_k, g.b_block, g.blocks, g.squares = s.n_out, 0, 1, 0
    g.k = g.k_last = end - k
    while high - o >= e.lanes:
        vectors = 8 if 4 * rows <= e.mr else 4
        while vectors * e.lanes > high - o:
            vectors //= 2
        width = vectors * e.lanes
        g.c_m = width
        for j in range(width if k > 0 else 0):
            for r in range(rows):
                put(me.few, r * width + j, get(out, (o + j) * e.rb + r, e.size), e.size)
        w = s.w + (k * s.n_out + o) * e.size
        call(e.gemm, (me.gemm, rows, vectors, k > 0, x + k * e.rb * e.size, w, me.few))
        for j in range(width):
            for r in range(rows):
                to, from_ = (o + j) * e.rb + r, r * width + j
                if e.size == 8:
                    store_f8(out + 8 * to, load_f8(me.few + 8 * from_))
                else:
                    store_f4(out + 4 * to, load_f4(me.few + 4 * from_))
        o += width
    return o
