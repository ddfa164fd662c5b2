"""Inference, as a thread does it: blocks of rows forward, taken from a counter; their losses too where asked for."""

from __future__ import annotations

from .blocks import apply, block_rows, class_weight, gather, sample_weight, targets
from .layers import layer
from .machine import (
    address,
    at,
    atomic_add,
    call,
    flush_denormals,
    get,
    item,
    jit,
    load_i8,
    put,
    restore_denormals,
    store_f8,
)
from .records import ENGINE, IDENTITY, MINI, RUN, SOURCE, STAGE, WORKER, offset

_COUNTER = offset(RUN, "counter")


@jit
def infer(engine, run_, tid, threads):
    old = flush_denormals()
    e, run = at(ENGINE, engine), at(RUN, run_)
    me = item(WORKER, e.workers, tid)
    mini = at(MINI, me.mini)
    mini.begin, mini.rows, mini.claim = 0, run.n, False
    mini.block_rows = block_rows(e, mini.rows, threads)
    mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows
    while True:
        first = atomic_add(address(run) + _COUNTER, e.group)
        if first >= mini.blocks:
            break
        _rows(e, run, mini, me, first, min(e.group, mini.blocks - first))
    restore_denormals(old)


@jit
def _rows(e, run, mini, me, first, blocks):
    block = (e.widest + 1) * e.rb
    here, there = me.da0, me.da1
    n_out = 0
    for i in range(e.n_stages):
        s = item(STAGE, e.stages, i)
        n_out = s.n_out
        for b in range(blocks):
            a = here + b * block * e.size
            if i == 0:
                row = (first + b) * mini.block_rows
                gather(run, at(SOURCE, run.x), row, min(mini.block_rows, mini.rows - row), a)
                apply(e.input_ops, e.n_input_ops, a, 0, 0, s.n_in, 0, 0, False)
            for r in range(e.rb):
                put(a, s.n_in * e.rb + r, 1.0, e.size)
            for j in range(i, e.n_stages if s.skipped else 0):
                if item(STAGE, e.stages, j).skip == i:
                    size = s.n_in * e.rb
                    call(e.k_copy, (size, a, 0, load_i8(me.kept + 8 * j) + b * size * e.size))
        if s.kind != IDENTITY:
            layer(e, s, mini, me, first, blocks, here, block, there, block, 0, n_out, False, 0, 1)
            here, there = there, here
        for b in range(blocks):
            a = here + b * block * e.size
            if s.skip >= 0:
                size = n_out * e.rb
                call(e.k_add, (size, load_i8(me.kept + 8 * i) + b * size * e.size, a))
            apply(s.ops, s.n_ops, a, 0, 0, n_out, 0, 0, False)
    for b in range(blocks):
        a = here + b * block * e.size
        row = (first + b) * mini.block_rows
        rows = min(mini.block_rows, mini.rows - row)
        call(e.scatter, (a, n_out, rows, run.result + row * n_out * e.size, n_out))
        if run.losses:
            targets(e, run, me, row, rows)
            for r in range(e.rb):
                put(me.s, r, 1.0, e.size)
            call(run.loss_kernel, (e.loss, rows, a, me.labels, me.target, me.s, 0, me.loss))
            for r in range(row, row + rows):
                weight = sample_weight(run, r)
                store_f8(run.losses + 8 * r, weight * get(me.loss, r - row, e.size))
                store_f8(run.weights + 8 * r, weight * class_weight(e, run, r))
