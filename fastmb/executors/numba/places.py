"""Where blocks keep what they need on their way back: a group of blocks in a thread's memory, or, where batch
normalisations cut the way into phases, all blocks in the memory of all threads.
"""

from __future__ import annotations

from .machine import at, claim_line, clear_line, item, jit, load_i8, prefetch_write
from .records import LINE, LINEAR, STAGE


@jit
def _slot(e, first, b):
    return b + (first if e.n_cuts > 0 else 0)


@jit
def gradient(e, home, side, first, b):
    """The gradient of block `first` + b, and before that the network's output."""
    return (home.grad1 if side else home.grad0) + _slot(e, first, b) * (e.widest + 1) * e.rb * e.size


@jit
def own(e, of_stages, i, first, b, low):
    """What stage i keeps of feature `low` of block `first` + b; `of_stages`: `d` or `held`."""
    n_out = item(STAGE, e.stages, i).n_out
    return load_i8(of_stages + 8 * i) + (_slot(e, first, b) * n_out + low) * e.rb * e.size


@jit
def d_input(e, home, first, b):
    """The derivatives of the operations on a block's input."""
    return home.d_input + _slot(e, first, b) * at(STAGE, e.stages).n_in * e.rb * e.size


@jit
def width(e):
    """Bytes of a number for each row of a block, in whole cache lines."""
    return (e.rb * e.size + LINE - 1) // LINE * LINE


@jit
def squares(e, home, first, b):
    """The squared norms of a block's rows' own gradients."""
    return home.squares + _slot(e, first, b) * width(e)


@jit
def input_side(s):
    """In which of the gradients that go back that of a stage's input is."""
    return 1 - s.side if s.kind == LINEAR else s.side


@jit
def chains(e, block):
    """The sums of the inputs' squares, on their way from thread to thread."""
    return e.chains + 4 * block * e.rb * e.size


@jit
def claim_tile(where, rows, size, stride):
    """Takes the lines of `rows` rows of `size` bytes, `stride` bytes apart, that are going to be written."""
    for r in range(rows):
        for i in range(0, size, LINE):
            claim_line(where + r * stride + i)


@jit
def clear_tile(where, rows, size, stride):
    """The same where nothing that is there counts any more."""
    for r in range(rows):
        for i in range(0, size, LINE):
            clear_line(where + r * stride + i)


@jit
def ask_for_tile(where, rows, size, stride):
    """Asks for the same lines, so that they are near by then."""
    for r in range(rows):
        for i in range(0, size, LINE):
            prefetch_write(where + r * stride + i)
