"""Training, as a thread does it: two sweeps a mini-batch, with a barrier after each. The loops of native_sweeps.pxi.

In the row sweep a thread takes blocks of rows through all stages, the loss, and back. In the weight sweep it takes
tiles of the weight gradients and updates the weights under them. Kernels are called by address.
"""

from __future__ import annotations

import math

from .applied import add_to_lane, apply_gradient, at_once, clear_lanes, mean_squares, tree
from .blocks import block_rows, class_weight, sample_weight
from .machine import at, flush_denormals, item, jit, load_f8, load_i8, now, restore_denormals, store_f8, store_i8
from .records import ENGINE, MINI, RUN, WORKER
from .row_sweep import relays, row_sweep
from .sync import wait
from .weight_sweep import share_tiles, weight_sweep


@jit
def train(engine, run_, tid, threads):
    """All steps of a run, as thread `tid` of `threads`."""
    old = flush_denormals()
    e, run = at(ENGINE, engine), at(RUN, run_)
    me = item(WORKER, e.workers, tid)
    mini = at(MINI, me.mini)
    done = run.start
    store_i8(me.handed, 0)
    _mini_batch(e, run, run.start, threads, mini)
    me.next_block, me.last_block = tid * mini.blocks // threads, (tid + 1) * mini.blocks // threads
    wait(e.barrier, tid, threads)
    while True:
        share_tiles(e, run, mini, me, tid, threads)
        row_sweep(e, run, mini, me, tid, threads)
        wait(e.barrier, tid, threads)
        if tid == threads - 1:  # whose tiles are often smaller; meanwhile others take them
            _sum(e, run, mini)
        if run.bad:
            break
        if run.sweep:
            weight_sweep(e, run, mini, me, tid, threads)
        if run.stored and mini.last and not run.applied and not at_once(run):
            wait(e.barrier, tid, threads)
            apply_gradient(e, run, me, mini.step, mini.weight, tid, threads)
        done = mini.step + mini.last
        if tid == 0:
            look = mini.last and (done % run.check == 0 or done == run.start + 1)
            if done == run.steps or (look and now() > run.deadline):
                run.stop = 1
        if mini.last and mini.step + 1 == run.steps and not run.stats:
            break  # who leads waits for all
        step = mini.step
        _next(e, run, threads, mini)
        me.next_block, me.last_block = tid * mini.blocks // threads, (tid + 1) * mini.blocks // threads
        wait(e.barrier, tid, threads)
        if tid == threads - 1 and run.stats:
            store_f8(run.stats + 8 * (5 * step + 2), mean_squares(e, run, mini))
        if run.stop:
            break
    if tid == 0:  # once: others read what stands beside it
        run.done = done
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
    mini.relay = relays(e, run, mini, threads)
    mini.claim = threads > 1 and mini.rows >= e.lanes


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
