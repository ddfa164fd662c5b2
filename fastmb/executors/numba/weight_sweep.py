"""The weight sweep: tiles of the weight gradients, sums over all rows, and the update of the weights under them."""

from __future__ import annotations

from .applied import complete, destination, read_coefficients, update
from .blocks import vectors
from .layers import layer_gradient, move_statistics
from .machine import (
    address,
    at,
    atomic_add,
    atomic_load,
    call,
    item,
    jit,
    load_f8,
    load_i8,
    prefetch_rows,
    put,
    store_i8,
)
from .places import ask_for_tile, claim_tile
from .records import ASK, ASKS, GEMM, LINE, LINEAR, SOURCE, STAGE, WORKER, offset
from .row_sweep import RELAYED_ROWS

MANY_TILES = 16  # of a thread, from which on they are taken in larger numbers
ASKED_ROWS = 128  # from which on a tile takes so long that asking for the next one's weights pays
ACROSS_BYTES = 1 << 18  # output gradients up to here stay near: tiles go along rows of weights
_SOURCE_BYTES, _ASK_BYTES = SOURCE.itemsize, ASK.itemsize
_NEXT_TILE, _NEXT_RELAYED = offset(WORKER, "next_tile"), offset(WORKER, "next_relayed")


@jit
def share_tiles(e, run, mini, me, tid, threads):
    """A thread's own tiles, and what it gathers. Where the first stage is relayed, its rows of that stage's matrix, and
    these features; and in any case its share of the other tiles.
    """
    s, source = at(STAGE, e.stages), at(SOURCE, me.source)
    for i in range(0, _SOURCE_BYTES, 8):
        store_i8(me.source + i, load_i8(run.x + i))
    me.first_row = relayed = 0
    if mini.relay:
        relayed, pieces = s.tiles, s.rows // RELAYED_ROWS
        me.first_row = tid * pieces // threads * RELAYED_ROWS
        me.last_row = (tid + 1) * pieces // threads * RELAYED_ROWS if tid < threads - 1 else s.rows
        me.next_relayed = me.first_row // e.mr * s.panels
        me.last_relayed = (me.last_row + e.mr - 1) // e.mr * s.panels
        source.data += me.first_row * source.col_stride
        source.columns = min(me.last_row, s.n_in) - me.first_row
    tiles = e.total_tiles - relayed
    me.next_tile, me.last_tile = relayed + tid * tiles // threads, relayed + (tid + 1) * tiles // threads


@jit
def weight_sweep(e, run, mini, me, tid, threads):
    """Tiles of the weight gradients: this thread's own, then what is left of the others'."""
    least = 1 + 64 // max(1, mini.rows) if threads > 1 else e.total_tiles
    read_coefficients(e, run, me, mini.step)
    _expect(e, run, mini, me, tid, threads)
    if run.running and tid == threads - 1:
        move_statistics(e, mini)
    for i in range(threads):
        owner = item(WORKER, e.workers, (tid + i) % threads)
        if mini.relay:
            _take_tiles(
                e, run, mini, me, owner, address(owner) + _NEXT_RELAYED, owner.last_relayed, least, tid, threads
            )
        _take_tiles(e, run, mini, me, owner, address(owner) + _NEXT_TILE, owner.last_tile, least, tid, threads)


@jit
def _take_tiles(e, run, mini, me, owner, counter, last, least, tid, threads):
    """What is left of an owner's tiles; of a thread's own, half at a time as long as there are many."""
    count = least
    while True:
        if address(owner) == address(me):  # to look at another's takes a while
            left = last - atomic_load(counter)
            count = max(least, left // 2) if left >= MANY_TILES else least
        tile = atomic_add(counter, count)
        if tile >= last:
            break
        _tiles(e, run, mini, me, owner, tile, min(tile + count, last), tid, threads)


@jit
def _expect(e, run, mini, me, tid, threads):
    """The rows that this thread is going to gather in the next mini-batch: asked for little by little, with each tile
    a few cache lines, since all at once they would be waited for.
    """
    x = at(SOURCE, me.source)
    following = mini.begin + mini.rows
    rows = min(mini.rows, run.n - following)
    me.expected_first = me.expected_last = me.expected_at = 0
    more = mini.step + 1 < run.steps or not mini.last
    if more and not run.offsets and rows > 0 and x.col_stride > 0:
        me.expected_first, me.expected_last = following, following + rows
        if not mini.relay:
            blocks = (rows + mini.block_rows - 1) // mini.block_rows
            me.expected_first = following + min(rows, tid * blocks // threads * mini.block_rows)
            me.expected_last = following + min(rows, (tid + 1) * blocks // threads * mini.block_rows)
        lines = (me.expected_last - me.expected_first) * ((x.columns * x.col_stride + LINE - 1) // LINE)
        me.expected_lines = 1 + lines * threads // e.total_tiles


@jit
def _ask_for_rows(run, me):
    x = at(SOURCE, me.source)
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
def _squares_of(e, sums, rows, columns, stride, four):
    """As the tile product leaves them: four numbers that add up to the sum of the squares."""
    total = 0.0
    for row in range(rows):
        call(e.k_squares, (sums + row * stride * e.size, columns, four))
        total += load_f8(four)
    put(four, 0, total, e.size)
    for i in range(1, 4):
        put(four, i, 0.0, e.size)


@jit
def _arrays_ahead(e, mini, into):
    """How many arrays' shares the product of a tile has the time to ask for, see `_ask_ahead`."""
    blocks, share = min(mini.rows // mini.block_rows, ASKS - 1), e.mr * e.rb * e.size // LINE
    states = (into.state0 != 0) + (into.state1 != 0) + (into.state2 != 0)
    return min(1 + states, blocks // ((share + mini.block_rows - 1) // mini.block_rows))


@jit
def _ask_ahead(e, run, s, mini, me, into, g, arrays, m, rows, p):
    """What the product of tile `p` of a row of tiles asks for on its way: its share of the weights under the next row,
    which are `rows` whole rows of the matrix from `m` on, and of their states. An array's share takes a block of the
    product, or two. Asked for at once, they would be waited for.
    """
    share, i = e.mr * e.rb * e.size, 0
    start = (s.offset + m * s.columns) * e.size + p * share
    for array in (run.params, into.state0, into.state1, into.state2):
        if arrays > 0 and rows > 0:
            for part in range(0, share, LINE * mini.block_rows):
                entry = item(ASK, me.asks, i)
                i += 1
                entry.at, entry.step, entry.next = array + start + part, LINE, me.asks + i * _ASK_BYTES
        arrays -= 1
    entry = item(ASK, me.asks, i)
    entry.at, entry.step, entry.next = s.x, 0, 0
    entry = item(ASK, me.asks, 0)
    g.ask, g.ask_step, g.asks = entry.at, entry.step, entry.next


@jit
def _ask_for_weights(e, run, s, m, panel, bottom):
    """The weights under the next tile, which others have read: so that to claim them takes no waiting."""
    where = run.params + (s.offset + m * s.columns + panel * e.rb) * e.size
    ask_for_tile(where, min(e.mr, bottom - m), min(e.rb, s.columns - panel * e.rb) * e.size, s.columns * e.size)


@jit
def _ask_for_inputs(e, s, mini, x, features, tid, threads):
    """A row of tiles' inputs, `features` from x on, as far as others have made them: nobody else reads them here."""
    for b in range(mini.blocks):
        if not tid * mini.blocks // threads <= b < (tid + 1) * mini.blocks // threads:
            ask_for_tile(x + b * s.x_block * e.size, features, vectors(e, mini, b) * e.lanes * e.size, e.rb * e.size)


@jit
def _tiles(e, run, mini, me, owner, tile, end, tid, threads):
    """An owner's tiles `tile` .. `end`: dw[i][o] = sum over rows of x[i][row] dz[row][o], or what another layer's
    gradient is, and the update of w.
    """
    g = at(GEMM, me.gemm)
    into = destination(run, mini, me)
    wanted = run.stats != 0 and not run.stored
    i = 0
    while tile < end:
        s = item(STAGE, e.stages, i)
        i += 1
        if tile >= s.first_tile + s.tiles:
            continue
        g.a_m, g.a_k, g.a_block = e.rb, 1, s.x_block
        g.ask, g.ask_step, g.asks = s.x, 0, 0
        g.b_k, g.b_block = e.rb, e.rb * e.rb
        g.c_m = s.columns if s.panels == 1 else e.rb
        g.blocks = mini.blocks
        g.k, g.k_last = mini.block_rows, mini.rows - (mini.blocks - 1) * mini.block_rows
        m, first, across, height = tile - s.first_tile, 0, s.panels, s.row_tiles
        top, bottom = 0, s.rows
        relayed = mini.relay and s.first_tile == 0  # nobody else has read these weights, or made these inputs
        claim = run.claim and not relayed
        if relayed:
            top, bottom = owner.first_row, owner.last_row
            m -= top // e.mr * s.panels
            height = (bottom - top + e.mr - 1) // e.mr
        # Tiles go along rows of weights as far as the panels of output gradients under them stay near; then down.
        if across * mini.rows * e.rb * e.size > ACROSS_BYTES:
            across = max(1, ACROSS_BYTES // (mini.rows * e.rb * e.size))
            first = m // (height * across) * across
            m -= first * height
        width = min(across, s.panels - first)
        p, m = m % width, top + m // width * e.mr
        last = min(end, s.first_tile + s.tiles)
        own = end  # the tile up to which they are this thread's
        if address(owner) == address(me):
            own = me.last_relayed if relayed else me.last_tile
        ahead = _arrays_ahead(e, mini, into) if run.far and width == s.panels else 0  # arrays, a row of tiles ahead
        asked = -1  # the first row of weights of the row of tiles for which that has been done
        while tile < last:
            panel = first + p
            rows = min(e.mr, bottom - m)
            columns = min(e.rb, s.columns - panel * e.rb)
            tall, wide = rows, columns
            if s.panels == 1:  # whole rows of weights, and so of gradients: one span
                columns *= rows
                rows = 1
            start, stride = m * s.columns + panel * e.rb, s.columns * e.size
            if run.far:
                for number, array in enumerate((run.params, into.state0, into.state1, into.state2)):
                    if array and (asked != m or number >= ahead):
                        ask_for_tile(array + (s.offset + start) * e.size, rows, columns * e.size, stride)
                if ahead > 0:
                    below = min(e.mr, bottom - m - e.mr) if tile + 2 * width - p <= own else 0
                    _ask_ahead(e, run, s, mini, me, into, g, ahead, m + e.mr, below, p)
                if into.weight != 0:
                    ask_for_tile(run.average + (s.offset + start) * e.size, rows, columns * e.size, stride)
            if me.expected_first < me.expected_last:
                _ask_for_rows(run, me)
            if claim:
                claim_tile(run.params + (s.offset + start) * e.size, rows, columns * e.size, stride)
                if mini.rows >= ASKED_ROWS and asked != m and p + 1 < width:
                    _ask_for_weights(e, run, s, m, panel + 1, bottom)
                elif mini.rows >= ASKED_ROWS and asked != m:
                    _ask_for_weights(e, run, s, m + e.mr, first, bottom)
            squares = e.tile_squares + 4 * (s.first_tile + m // e.mr * s.panels + panel) * e.size
            g.squares = squares if wanted else 0
            if mini.rows > 0 and s.kind != LINEAR:
                layer_gradient(e, s, mini, me, panel * e.rb, wide, g.c_m, me.tile)
                if wanted:
                    _squares_of(e, me.tile, rows, columns, g.c_m, squares)
            elif mini.rows > 0:
                x, dz = s.x + m * e.rb * e.size, s.dz + panel * s.panel_stride * e.size
                if mini.claim and p == 0 and not relayed:
                    _ask_for_inputs(e, s, mini, x, tall, tid, threads)
                call(e.gemm, (me.gemm, tall, 2 if wide > e.lanes else 1, 0, x, dz, me.tile))
            else:
                for j in range((e.mr + 2) * e.rb):
                    put(me.tile, j, 0.0, e.size)
                for j in range(4 if wanted else 0):
                    put(squares, j, 0.0, e.size)
            if into.completes:
                complete(e, run, me, into, (s.offset + start) * e.size, rows, columns, s.columns, me.tile)
            update(e, run, me, s, into, start, rows, columns, me.tile, e.rb)
            tile += 1
            p += 1
            if p == width:
                p = 0
                m += e.mr
                asked = m if ahead > 0 and tile + width <= own else -1
                if m >= bottom:
                    m = top
                    first += width
                    width = min(across, s.panels - first)
