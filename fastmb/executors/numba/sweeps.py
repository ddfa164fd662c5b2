"""Training, as a thread does it: two sweeps a mini-batch, with a barrier after each. The loops of native_sweeps.pxi.

In the row sweep a thread takes blocks of rows through all stages, the loss, and back. In the weight sweep it takes
tiles of the weight gradients and updates the weights under them. Kernels are called by address.
"""

from __future__ import annotations

import math

from .applied import (
    add_to_lane,
    apply_gradient,
    clear_lanes,
    mean_squares,
    read_coefficients,
    to_array,
    to_update,
    tree,
    update,
)
from .blocks import apply, block_rows, class_weight, forward, gather, sample_weight, targets, vectors
from .machine import (
    address,
    at,
    atomic_add,
    call,
    flush_denormals,
    get,
    item,
    jit,
    load_f8,
    load_i8,
    now,
    prefetch_rows,
    prefetch_write,
    put,
    restore_denormals,
    store_f8,
)
from .records import ENGINE, FACTOR, GEMM, INPUTS, LINE, MINI, RUN, SIGN, SOURCE, STAGE, WORKER, offset
from .rows import each_row, loss_scale, row_squares
from .sync import wait

KC = 512  # products of a chain before the next rows are looked at, where several blocks share weights
ACROSS_BYTES = 1 << 18  # output gradients up to here stay near: tiles go along rows of weights
_NEXT_BLOCK, _NEXT_TILE = offset(WORKER, "next_block"), offset(WORKER, "next_tile")


@jit
def train(engine, run_, tid, threads):
    """All steps of a run, as thread `tid` of `threads`."""
    old = flush_denormals()
    e, run = at(ENGINE, engine), at(RUN, run_)
    me = item(WORKER, e.workers, tid)
    mini = at(MINI, me.mini)
    _mini_batch(e, run, run.start, threads, mini)
    me.next_block, me.last_block = tid * mini.blocks // threads, (tid + 1) * mini.blocks // threads
    wait(e.barrier, tid, threads)
    while True:
        me.next_tile, me.last_tile = tid * e.total_tiles // threads, (tid + 1) * e.total_tiles // threads
        _row_sweep(e, run, mini, me, tid, threads)
        wait(e.barrier, tid, threads)
        if run.bad:
            if tid == 0:
                _sum(e, run, mini)
            break
        if run.sweep:
            _weight_sweep(e, run, mini, me, tid, threads)
        if run.stored and mini.last and not run.applied:
            wait(e.barrier, tid, threads)
            apply_gradient(e, run, me, mini.step, mini.weight, tid, threads)
        if tid == 0:
            _sum(e, run, mini)
            run.done = mini.step + mini.last
            look = mini.last and (run.done % run.check == 0 or run.done == run.start + 1)
            if run.done == run.steps or (look and now() > run.deadline):
                run.stop = 1
        step = mini.step
        _next(e, run, threads, mini)
        me.next_block, me.last_block = tid * mini.blocks // threads, (tid + 1) * mini.blocks // threads
        wait(e.barrier, tid, threads)
        if tid == 0 and run.stats:
            store_f8(run.stats + 8 * (5 * step + 2), mean_squares(e, run, mini))
        if run.stop:
            break
    restore_denormals(old)


@jit
def _mini_batch(e, run, step, threads, mini):
    """Which rows are mini-batch `step` of the run, and how they are cut into parts and blocks."""
    mini.step = step
    mini.row = 0
    if run.offsets:
        mini.begin = load_i8(run.offsets + 8 * (run.first + step))
        mini.batch_rows = load_i8(run.offsets + 8 * (run.first + step + 1)) - mini.begin
    else:
        mini.begin = (run.first + step) * run.batch_size
        mini.batch_rows = min(run.batch_size, run.n - mini.begin)
    mini.weight = float(mini.batch_rows)
    if run.row_weights:
        lanes = clear_lanes(mini, 0)
        for i in range(mini.batch_rows):
            weight = sample_weight(run, mini.begin + i) * class_weight(e, run, mini.begin + i)
            add_to_lane(lanes, i, weight)
        mini.weight = tree(lanes)
    _part(e, run, threads, mini)


@jit
def _part(e, run, threads, mini):
    """The part of the mini-batch that begins at `mini.row`."""
    mini.rows = mini.batch_rows - mini.row
    if run.part_rows > 0:
        mini.rows = min(mini.rows, run.part_rows)
    mini.last = mini.row + mini.rows == mini.batch_rows
    mini.block_rows = block_rows(e, mini.rows, threads)
    mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows


@jit
def _next(e, run, threads, mini):
    """From one part to the next, or from one mini-batch to the next, if there is one."""
    if not mini.last:
        mini.row += mini.rows
        mini.begin += mini.rows
        _part(e, run, threads, mini)
    elif mini.step + 1 < run.steps:
        _mini_batch(e, run, mini.step + 1, threads, mini)


@jit
def _sum(e, run, mini):
    """The part's loss sum, and the mini-batch's weight: eight lanes over the rows, then a tree."""
    lanes, squares, norms = clear_lanes(mini, 0), clear_lanes(mini, 1), clear_lanes(mini, 2)
    largest = 0.0
    i = 0
    for block in range(mini.blocks):
        for r in range(min(mini.block_rows, mini.rows - i)):
            place = 8 * (block * e.rb + r)
            add_to_lane(lanes, i, load_f8(e.row_loss + place))
            if run.stats:
                square = load_f8(e.row_squares + place)
                add_to_lane(squares, i, square)
                add_to_lane(norms, i, math.sqrt(square))
                largest = max(largest, square)
            i += 1
    sums = run.sums + 16 * mini.step
    store_f8(sums, (load_f8(sums) if mini.row else 0.0) + tree(lanes))
    store_f8(sums + 8, mini.weight)
    if run.stats:  # of rows' gradients so scaled that their plain mean is the step's
        stats = run.stats + 40 * mini.step
        scale = mini.batch_rows / mini.weight if mini.weight > 0 else 0.0
        if mini.row == 0:
            store_f8(stats, 0.0)
            store_f8(stats + 8, 0.0)
            store_f8(stats + 32, 0.0)
        store_f8(stats, load_f8(stats) + scale * scale * tree(squares))
        store_f8(stats + 8, max(load_f8(stats + 8), scale * scale * largest))
        store_f8(stats + 24, float(mini.batch_rows))
        store_f8(stats + 32, load_f8(stats + 32) + scale * tree(norms))


# ---- the row sweep -------------------------------------------------------------------------------------------------


@jit
def _row_sweep(e, run, mini, me, tid, threads):
    """Blocks of rows: this thread's own, then what is left of the others'. Where there are fewer blocks than threads,
    all threads work on every block, each on a part of the features of every stage.
    """
    if mini.blocks < threads:
        for block in range(mini.blocks):
            _rows(e, run, mini, at(WORKER, e.workers), me, block, 1, tid, threads)
        return
    for i in range(threads):
        owner = item(WORKER, e.workers, (tid + i) % threads)
        while True:
            block = atomic_add(address(owner) + _NEXT_BLOCK, e.group)
            if block >= owner.last_block:
                break
            _rows(e, run, mini, me, me, block, min(e.group, owner.last_block - block), 0, 1)


@jit
def _rows(e, run, mini, home, me, first, blocks, part, parts):
    """Blocks `first` .. of the mini-batch: gathered, forward, loss, backward. Does part `part` of `parts`, each a
    range of features in whole panels, which meet where one needs what another has made.
    """
    stage = at(STAGE, e.stages)
    if part == 0:
        for b in range(blocks):
            row = (first + b) * mini.block_rows
            rows = min(mini.block_rows, mini.rows - row)
            out = stage.x + (first + b) * stage.x_block * e.size
            gather(run, at(SOURCE, run.x), mini.begin + row, rows, out)
            d = 0
            if e.n_input_ops > 0 and run.want & INPUTS:
                d = home.d_input + b * stage.n_in * e.rb * e.size
            place = run.row + mini.row + row
            apply(e.input_ops, e.n_input_ops, out, d, 0, stage.n_in, run.t + mini.step, place, True)
    wait(e.barrier, part, parts)

    for i in range(e.n_stages):
        s = item(STAGE, e.stages, i)
        block = (e.widest + 1) * e.rb
        out = home.da0
        if i + 1 < e.n_stages:
            following = item(STAGE, e.stages, (i + 1))
            block = following.x_block
            out = following.x + first * block * e.size
        low, high = _panels(s.n_out, e.rb, part, parts)
        forward(e, s, mini, me, first, blocks, s.x + first * s.x_block * e.size, s.x_block, out, block, low, high)
        for b in range(blocks):
            d = 0
            if s.derivative == FACTOR:
                d = load_i8(home.d + 8 * i) + (b * s.n_out + low) * e.rb * e.size
            a = out + (b * block + low * e.rb) * e.size
            place = run.row + mini.row + (first + b) * mini.block_rows
            apply(s.ops, s.n_ops, a, d, low, high - low, run.t + mini.step, place, True)
        wait(e.barrier, part, parts)

    block = (e.widest + 1) * e.rb
    if part == 0:
        for b in range(blocks):
            _loss(e, run, mini, home, first + b, home.da0 + b * block * e.size)
    wait(e.barrier, part, parts)

    da, other = home.da0, home.da1
    for i in range(e.n_stages - 1, -1, -1):
        s = item(STAGE, e.stages, i)
        low, high = _panels(s.n_out, e.rb, part, parts)
        for b in range(blocks):
            rows = min(mini.block_rows, mini.rows - (first + b) * mini.block_rows)
            d = 0
            if s.derivative == FACTOR:
                d = load_i8(home.d + 8 * i) + (b * s.n_out + low) * e.rb * e.size
            elif s.derivative == SIGN:
                following = item(STAGE, e.stages, (i + 1))
                d = following.x + ((first + b) * following.x_block + low * e.rb) * e.size
            panels = s.dz + (low // e.rb * s.panel_stride + (first + b) * e.rb * e.rb) * e.size
            call(s.backward, (da + (b * block + low * e.rb) * e.size, d, high - low, rows, panels, s.panel_stride))
        if i > 0 or run.want:
            wait(e.barrier, part, parts)
        if run.want and part == 0:
            row_squares(e, s, home, first, blocks, da, block, i + 1 == e.n_stages)
        if i > 0 or run.want & INPUTS:
            low, high = _panels(s.n_in, e.rb, part, parts)
            _backward(e, s, mini, me, first, blocks, da, other, block, low, high)
            wait(e.barrier, part, parts)
            da, other = other, da
    if run.want and part == 0:
        each_row(e, run, mini, home, me, first, blocks, da, block)


@jit
def _panels(n, width, part, parts):
    """A part of n features, in whole panels."""
    panels = (n + width - 1) // width
    return min(n, part * panels // parts * width), min(n, (part + 1) * panels // parts * width)


@jit
def _backward(e, s, mini, me, first, blocks, dz, dx, block, low, high):
    """dx[i][row] = sum over o of w[i][o] dz[o][row], low <= i < high, for each block."""
    g = at(GEMM, me.gemm)
    depth = s.n_out if blocks == 1 else KC
    g.a_m, g.a_k, g.a_block, g.ahead = s.n_out, 1, 0, 0
    g.b_k, g.b_block, g.c_m, g.blocks = e.rb, 0, e.rb, 1
    for k in range(0, s.n_out, depth):
        g.k = g.k_last = min(depth, s.n_out - k)
        for m in range(low, high, e.mr):
            for b in range(blocks):
                rows, width = min(e.mr, high - m), vectors(e, mini, first + b)
                w = s.w + (m * s.n_out + k) * e.size
                from_, to = dz + (b * block + k * e.rb) * e.size, dx + (b * block + m * e.rb) * e.size
                call(e.gemm, (me.gemm, rows, width, k > 0, w, from_, to))


@jit
def _loss(e, run, mini, me, block, z):
    """The block's row losses, and its output gradient in place of the outputs."""
    row = block * mini.block_rows
    position = mini.begin + row
    rows = min(mini.block_rows, mini.rows - row)
    scale = loss_scale(run, mini)
    row_loss = e.row_loss + 8 * block * e.rb
    for r in range(e.rb):
        weight = sample_weight(run, position + r) if r < rows else 0.0
        put(me.s, r, weight * scale, e.size)
        store_f8(row_loss + 8 * r, weight)
    targets(e, run, me, position, rows)
    call(run.loss_kernel, (e.loss, rows, z, me.labels, me.target, me.s, z, me.loss))
    for r in range(rows):
        value = load_f8(row_loss + 8 * r) * get(me.loss, r, e.size)
        store_f8(row_loss + 8 * r, value)
        if value - value != 0:
            run.bad = 1


# ---- the weight sweep ----------------------------------------------------------------------------------------------


@jit
def _weight_sweep(e, run, mini, me, tid, threads):
    """Tiles of the weight gradients: this thread's own, then what is left of the others'."""
    chunk = 1 + 64 // max(1, mini.rows)
    read_coefficients(e, run, me, mini.step)
    _expect(e, run, mini, me, tid, threads)
    for i in range(threads):
        owner = item(WORKER, e.workers, (tid + i) % threads)
        while True:
            tile = atomic_add(address(owner) + _NEXT_TILE, chunk)
            if tile >= owner.last_tile:
                break
            _tiles(e, run, mini, me, tile, min(tile + chunk, owner.last_tile))


@jit
def _expect(e, run, mini, me, tid, threads):
    """The rows that this thread is going to gather in the next mini-batch: asked for little by little, with each tile
    a few cache lines, since all at once they would be waited for.
    """
    x = at(SOURCE, run.x)
    following = mini.begin + mini.rows
    rows = min(mini.rows, run.n - following)
    me.expected_first = me.expected_last = me.expected_at = 0
    more = mini.step + 1 < run.steps or not mini.last
    if more and not run.offsets and rows > 0 and x.col_stride > 0:
        blocks = (rows + mini.block_rows - 1) // mini.block_rows
        me.expected_first = following + min(rows, tid * blocks // threads * mini.block_rows)
        me.expected_last = following + min(rows, (tid + 1) * blocks // threads * mini.block_rows)
        lines = (me.expected_last - me.expected_first) * ((x.columns * x.col_stride + LINE - 1) // LINE)
        me.expected_lines = 1 + lines * threads // e.total_tiles


@jit
def _ask_for_rows(run, me):
    x = at(SOURCE, run.x)
    lines = me.expected_lines
    while lines > 0 and me.expected_first < me.expected_last:
        row = me.expected_first
        if run.order:
            row = load_i8(run.order + 8 * row)
        prefetch_rows(x.data + row * x.row_stride + me.expected_at)
        me.expected_at += LINE
        if me.expected_at >= x.columns * x.col_stride:
            me.expected_at = 0
            me.expected_first += 1
        lines -= 1


@jit
def _ask_for_tile(where, rows, size, stride):
    """Asks for `rows` rows of `size` bytes that will be written, `stride` bytes apart."""
    for r in range(rows):
        for i in range(0, size, LINE):
            prefetch_write(where + r * stride + i)


@jit
def _tiles(e, run, mini, me, tile, end):
    """Tiles `tile` .. `end`: dw[i][o] = sum over rows of x[i][row] dz[row][o], and the update of w."""
    g = at(GEMM, me.gemm)
    into = to_array(run, me, run.row + mini.row > 0) if run.stored else to_update(run, me, mini.step)
    i = 0
    s = at(STAGE, e.stages)
    while tile >= s.first_tile + s.tiles:
        i += 1
        s = item(STAGE, e.stages, i)
    while tile < end:
        s = item(STAGE, e.stages, i)
        g.a_m, g.a_k, g.a_block, g.ahead = e.rb, 1, s.x_block, 0
        g.b_k, g.b_block = e.rb, e.rb * e.rb
        g.c_m = s.n_out if s.panels == 1 else e.rb
        g.blocks = mini.blocks
        g.k, g.k_last = mini.block_rows, mini.rows - (mini.blocks - 1) * mini.block_rows
        across = s.n_out * mini.rows * e.size <= ACROSS_BYTES
        while tile < end and tile < s.first_tile + s.tiles:
            m = tile - s.first_tile
            if across:
                panel, m = m % s.panels, m // s.panels * e.mr
            else:
                panel, m = m // s.row_tiles, m % s.row_tiles * e.mr
            rows = min(e.mr, s.rows - m)
            columns = min(e.rb, s.n_out - panel * e.rb)
            start = m * s.n_out + panel * e.rb
            if run.far:
                for array in (run.params, into.state0, into.state1, into.state2):
                    if array:
                        _ask_for_tile(array + (s.offset + start) * e.size, rows, columns * e.size, s.n_out * e.size)
            if into.weight != 0:
                _ask_for_tile(run.average + (s.offset + start) * e.size, rows, columns * e.size, s.n_out * e.size)
            if me.expected_first < me.expected_last:
                _ask_for_rows(run, me)
            if mini.rows > 0:
                x, dz = s.x + m * e.rb * e.size, s.dz + panel * s.panel_stride * e.size
                call(e.gemm, (me.gemm, rows, 2 if columns > e.lanes else 1, 0, x, dz, me.tile))
            else:
                for j in range((e.mr + 2) * e.rb):
                    put(me.tile, j, 0.0, e.size)
            if s.panels == 1:  # whole rows of weights, and so of gradients: one span
                columns *= rows
                rows = 1
            if run.stats and not run.stored:
                call(e.k_tile_squares, (me.tile, rows, columns, e.rb, e.tile_squares + 8 * tile))
            update(e, run, me, s, into, start, rows, columns, me.tile, e.rb)
            tile += 1
        i += 1
