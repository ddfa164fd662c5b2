"""The row sweep: blocks of rows through all stages, the loss, and back.

Each batch normalisation needs sums over all rows, and cuts the way forward and the way back into phases. Then what a
block keeps on its way has room for all blocks and belongs to all threads.
"""

from __future__ import annotations

from .blocks import apply, claim_gradients, forward, gather, sample_weight, targets, vectors
from .layers import layer, layer_dx, layer_dz, prepare
from .machine import address, at, atomic_add, atomic_store, call, get, item, jit, load_f8, load_i8, put, store_f8
from .places import chains, d_input, gradient, input_side, own
from .records import FACTOR, GEMM, IDENTITY, INPUTS, LINEAR, NORMS, SIGN, SOURCE, STAGE, WORKER, offset
from .rows import each_row, loss_scale, row_squares
from .sync import wait, wait_past

RELAYED_ROWS = 12  # threads' rows of a relayed stage begin at multiples: whole tiles, and groups of 4
KC = 512  # products of a chain before the next rows are looked at, where several blocks share weights
_NEXT_BLOCK = offset(WORKER, "next_block")


@jit
def row_sweep(e, run, mini, me, tid, threads):
    """All blocks forward and back."""
    if mini.relay:
        _relay(e, run, mini, me, tid, threads)
    for phase in range(2 * e.n_cuts + 1):
        if phase > 0:
            _meet(e, mini, me, phase, tid, threads)
        _phase(e, run, mini, me, phase, tid, threads)


@jit
def relays(e, run, mini, threads):
    """Whether the first stage's product goes from thread to thread, so that its weights stay where they are: where more
    of them would move than of its inputs and outputs, and there are enough pieces for all threads to be at work.
    """
    s = at(STAGE, e.stages)
    if threads == 1 or s.kind != LINEAR or e.n_stages == 1 or run.want & INPUTS:
        return False
    if s.n_in <= 2 * mini.rows or s.n_in < 8 * RELAYED_ROWS * threads:
        return False
    groups = (mini.blocks + e.group - 1) // e.group
    return groups * ((s.n_out - 1) // _relayed_columns(e, mini) + 1) >= 4 * (threads - 1)


@jit
def _relayed_columns(e, mini):
    """Columns of weights that a thread hands on at a time."""
    return e.rb if mini.blocks == 1 and mini.rows <= e.mr // 2 else e.mr


@jit
def _relay(e, run, mini, me, tid, threads):
    """The first stage's product, by a thread that has rows of its weights for itself: it gathers these features, of all
    rows; and the sum over them, of a few outputs at a time, goes on from what the thread before has handed over. Before
    that their squares, where they are wanted: the thread after adds its own while it waits for the first outputs.
    """
    s, following = at(STAGE, e.stages), item(STAGE, e.stages, 1)
    columns = _relayed_columns(e, mini)
    for block in range(mini.blocks):
        _rows_in(e, run, mini, me, me, block, 0)
        if run.want & NORMS and tid == 0:
            _add_squares(e, s, me, block, True)
    if run.want & NORMS:
        handed = load_i8(me.handed)
        if tid > 0:
            wait_past(e.barrier, tid, threads, item(WORKER, e.workers, tid - 1).handed, handed)
            for block in range(mini.blocks):
                _add_squares(e, s, me, block, False)
        atomic_store(me.handed, handed + 1)
    for first in range(0, mini.blocks, e.group):
        blocks = min(e.group, mini.blocks - first)
        x, out = s.x + first * s.x_block * e.size, following.x + first * following.x_block * e.size
        for m in range(0, s.n_out, columns):
            handed = load_i8(me.handed)
            if tid > 0:
                wait_past(e.barrier, tid, threads, item(WORKER, e.workers, tid - 1).handed, handed)
            end = min(m + columns, s.n_out)
            forward(
                *(e, s, mini, me, first, blocks, x, s.x_block, out, following.x_block),
                *(me.first_row, me.last_row, m, end),
            )
            atomic_store(me.handed, handed + 1)
    wait(e.barrier, tid, threads)


@jit
def _add_squares(e, s, me, block, begin):
    """Those of the block's inputs, features that are the thread's own."""
    place = chains(e, block)
    for i in range(4 * e.rb if begin else 0):
        put(place, i, 0.0, e.size)
    x = s.x + (block * s.x_block + me.first_row * e.rb) * e.size
    call(e.k_row_squares, (x, me.last_row - me.first_row, place, 0))


@jit
def _meet(e, mini, me, phase, tid, threads):
    """Between two phases: what a batch normalisation needs of all rows, each thread for some features; and the blocks
    are there to be taken again.
    """
    forward = phase <= e.n_cuts
    cut = load_i8(e.cuts + 8 * (phase - 1 if forward else 2 * e.n_cuts - phase))
    s = item(STAGE, e.stages, cut)
    wait(e.barrier, tid, threads)
    me.next_block, me.last_block = tid * mini.blocks // threads, (tid + 1) * mini.blocks // threads
    low, high = _panels(s.n_in, e.rb, tid, threads)
    prepare(e, s, mini, me, forward, low, high)
    wait(e.barrier, tid, threads)


@jit
def _phase(e, run, mini, me, phase, tid, threads):
    """Blocks of rows: this thread's own, then what is left of the others'. Where there are fewer blocks than threads,
    all threads work on every block, each on a part of the features of every stage.
    """
    if mini.blocks < threads:
        for block in range(mini.blocks):
            _rows(e, run, mini, at(WORKER, e.workers), me, block, 1, phase, tid, threads)
        return
    for i in range(threads):
        owner = item(WORKER, e.workers, (tid + i) % threads)
        while True:
            block = atomic_add(address(owner) + _NEXT_BLOCK, e.group)
            if block >= owner.last_block:
                break
            _rows(e, run, mini, me, me, block, min(e.group, owner.last_block - block), phase, 0, 1)


@jit
def _rows(e, run, mini, home, me, first, blocks, phase, part, parts):
    """Blocks `first` .. of the mini-batch: gathered, forward, loss, backward, or of these what belongs to `phase`. Does
    part `part` of `parts`, each a range of features in whole panels, which meet where one needs what another has made.
    """
    back = 2 * e.n_cuts - phase  # phases left
    if phase <= e.n_cuts:
        start = load_i8(e.cuts + 8 * (phase - 1)) if phase > 0 else 0
        end = load_i8(e.cuts + 8 * phase) if phase < e.n_cuts else e.n_stages
        _forth(e, run, mini, home, me, first, blocks, start, end, part, parts)
    if phase == e.n_cuts:
        if part == 0:
            for b in range(blocks):
                _loss(e, run, mini, home, first + b, gradient(e, home, 0, first, b))
        wait(e.barrier, part, parts)
    if phase >= e.n_cuts:
        top = load_i8(e.cuts + 8 * back) if phase > e.n_cuts else -1
        bottom = load_i8(e.cuts + 8 * (back - 1)) if back > 0 else -1
        _back(e, run, mini, home, me, first, blocks, top, bottom, part, parts)
    if run.want and part == 0 and back == 0:
        each_row(e, run, mini, home, me, first, blocks)


@jit
def _forth(e, run, mini, home, me, first, blocks, start, end, part, parts):
    """Stages `start` .. `end` - 1."""
    begun = start == 0 and mini.relay
    if part == 0 and start == 0 and not begun:
        for b in range(blocks):
            _rows_in(e, run, mini, home, me, first, b)
    wait(e.barrier, part, parts)

    for i in range(start, end):
        s = item(STAGE, e.stages, i)
        block = (e.widest + 1) * e.rb
        out = gradient(e, home, 0, first, 0)
        if i + 1 < e.n_stages:
            following = item(STAGE, e.stages, (i + 1))
            block = following.x_block
            out = following.x + first * block * e.size
        low, high = _panels(s.n_out, e.rb, part, parts)
        x = s.x + first * s.x_block * e.size
        if i > 0 or not begun:
            layer(e, s, mini, me, first, blocks, x, s.x_block, out, block, low, high, True, part, parts)
        for b in range(blocks):
            a = out + (b * block + low * e.rb) * e.size
            if s.skip >= 0:
                source = item(STAGE, e.stages, s.skip)
                skipped = source.x + ((first + b) * source.x_block + low * e.rb) * e.size
                call(e.k_add, ((high - low) * e.rb, skipped, a))
            d = own(e, home.d, i, first, b, low) if s.derivative == FACTOR else 0
            place = run.row + mini.row + (first + b) * mini.block_rows
            apply(s.ops, s.n_ops, a, d, low, high - low, run.t + mini.step, place, True)
        wait(e.barrier, part, parts)


@jit
def _rows_in(e, run, mini, home, me, first, b):
    """Block `first` + b, or those of its features that are the thread's own: gathered, and the operations on input."""
    s, source = at(STAGE, e.stages), at(SOURCE, me.source)
    row = (first + b) * mini.block_rows
    rows = min(mini.block_rows, mini.rows - row)
    out = s.x + ((first + b) * s.x_block + me.first_row * e.rb) * e.size
    gather(run, source, mini.begin + row, rows, out)
    d = d_input(e, home, first, b) if e.n_input_ops > 0 and run.want & INPUTS else 0
    place = run.row + mini.row + row
    apply(e.input_ops, e.n_input_ops, out, d, me.first_row, source.columns, run.t + mini.step, place, True)


@jit
def _back(e, run, mini, home, me, first, blocks, top, bottom, part, parts):
    """From the last stage to the first. Or, where phases meet in a stage, from the input gradient of stage `top` to the
    output gradient of stage `bottom`; -1 where they don't.
    """
    for i in range(top if top >= 0 else e.n_stages - 1, max(bottom, 0) - 1, -1):
        s = item(STAGE, e.stages, i)
        if i != top:
            low, high = _panels(s.n_out, e.rb, part, parts)
            for b in range(blocks):
                _output_gradient(e, run, mini, home, s, i, first, b, low, high)
        if i > 0 or run.want:
            wait(e.barrier, part, parts)
        if run.want & NORMS and part == 0 and i != top:
            row_squares(e, s, mini, home, first, blocks, i + 1 == e.n_stages)
        if i == bottom or (i == 0 and not run.want & INPUTS):
            continue
        low, high = _panels(s.n_in, e.rb, part, parts)
        if s.kind == LINEAR:
            dz, dx = gradient(e, home, s.side, first, 0), gradient(e, home, 1 - s.side, first, 0)
            _backward(e, s, i, mini, me, first, blocks, dz, dx, (e.widest + 1) * e.rb, low, high)
        for b in range(blocks):
            dx = gradient(e, home, input_side(s), first, b)
            if s.kind != LINEAR:
                layer_dx(e, s, home, first + b, dx, low, high, part, parts)
            for j in range(i, e.n_stages if s.skipped else 0):
                if item(STAGE, e.stages, j).skip == i:
                    here = dx + low * e.rb * e.size
                    call(e.k_add, ((high - low) * e.rb, own(e, home.held, j, first, b, low), here))
        wait(e.barrier, part, parts)


@jit
def _output_gradient(e, run, mini, home, s, i, first, b, low, high):
    """Features low .. high of a block's gradient from behind stage i's operations to before them."""
    block = first + b
    rows = min(mini.block_rows, mini.rows - block * mini.block_rows)
    da = gradient(e, home, s.side, first, b) + low * e.rb * e.size
    d = 0
    if s.derivative == FACTOR:
        d = own(e, home.d, i, first, b, low)
    elif s.derivative == SIGN:
        following = item(STAGE, e.stages, (i + 1))
        d = following.x + (block * following.x_block + low * e.rb) * e.size
    if s.kind == LINEAR:
        panels = s.dz + (low // e.rb * s.panel_stride + block * e.rb * e.rb) * e.size
        call(s.backward, (da, d, high - low, rows, panels, s.panel_stride))
    else:
        layer_dz(e, s, block, da, d, low, high)
    if s.skip > 0 or (s.skip == 0 and run.want & INPUTS):
        if s.kind != LINEAR and s.kind != IDENTITY:
            da = s.dz + (block * s.n_out + low) * e.rb * e.size
        call(e.k_copy, ((high - low) * e.rb, da, 0, own(e, home.held, i, first, b, low)))


@jit
def _panels(n, width, part, parts):
    """A part of n features, in whole panels."""
    panels = (n + width - 1) // width
    return min(n, part * panels // parts * width), min(n, (part + 1) * panels // parts * width)


@jit
def _backward(e, s, i, mini, me, first, blocks, dz, dx, block, low, high):
    """dx[i][row] = sum over o of w[i][o] dz[o][row], low <= i < high, for each block."""
    g = at(GEMM, me.gemm)
    depth = s.n_out if blocks == 1 else KC
    rows = min(mini.block_rows, mini.rows - first * mini.block_rows)
    if blocks == 1 and rows <= e.few_rows:
        n = (high - low) // e.lanes * e.lanes
        call(e.few, (s.w + low * s.n_out * e.size, s.n_out, n, s.n_out, rows, dz, dx + low * e.rb * e.size))
        low += n
    g.a_m, g.a_k, g.a_block = s.n_out, 1, 0
    g.b_k, g.b_block, g.c_m, g.blocks, g.squares, g.asks = e.rb, 0, e.rb, 1, 0, 0
    for k in range(0, s.n_out, depth):
        g.k = g.k_last = min(depth, s.n_out - k)
        g.ask_step = e.mr * e.rb * e.size // g.k + 1  # the next tile's sums, as long as this one's product takes
        for m in range(low, high, e.mr):
            if mini.claim and k == 0 and i > 0 and item(STAGE, e.stages, i - 1).kind == LINEAR:
                claim_gradients(e, item(STAGE, e.stages, i - 1), first, blocks, m, min(m + e.mr, high))
            for b in range(blocks):
                g.ask = dx + ((b + 1) * block + m * e.rb if b + 1 < blocks else (m + e.mr) * e.rb) * e.size
                tile, width = min(e.mr, high - m), vectors(e, mini, first + b)
                w = s.w + (m * s.n_out + k) * e.size
                from_, to = dz + (b * block + k * e.rb) * e.size, dx + (b * block + m * e.rb) * e.size
                call(e.gemm, (me.gemm, tile, width, k > 0, w, from_, to))


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
