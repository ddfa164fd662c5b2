"""The tile product: C[m][v] (+)= sum over blocks, over k, of A[m][k] * B[k][v], vectors over v.

The record GEMM says where: A is read element by element at a[m * a_m + k * a_k], B vector by vector at b[k * b_k + v],
block i of the sum starts at a + i * a_block and b + i * b_block; strides in elements. Each element of C is one chain of
fused multiply-adds in the order of k, whatever the tile's size. `rows` x `vectors` accumulators stay in registers.
"""

from __future__ import annotations

from .emit import Emitter, Value
from .records import ASK, GEMM


def tiles(mr: int) -> list[tuple[int, int]]:
    """(rows, vectors) of the tiles that there are."""
    return (
        [(rows, vectors) for rows in range(1, mr + 1) for vectors in (1, 2)]
        + [(rows, 4) for rows in range(1, mr // 2 + 1)]
        + [(rows, 8) for rows in range(1, mr // 4 + 1)]
    )


def gemm(e: Emitter, *arguments: Value) -> None:
    """All tiles, chosen by `rows` and `vectors`."""
    g, rows, vectors, load, a, b, c = arguments
    with e.choice(rows * 16 + vectors) as case:
        for m, v in tiles(e.mr):
            with case(m * 16 + v):
                _tile(m, v, e, g, load, a, b, c)


def _tile(rows: int, vectors: int, e: Emitter, *arguments: Value) -> None:
    """One tile. With `load` the chain goes on from what C holds, else it starts at 0."""
    g, load, a, b, c = arguments
    a_m, a_k, a_block, b_k, b_block, c_m = (
        e.field(GEMM, g, name) for name in ("a_m", "a_k", "a_block", "b_k", "b_block", "c_m")
    )
    blocks, k, k_last = (e.field(GEMM, g, name) for name in ("blocks", "k", "k_last"))
    ask, ask_step, asks = (e.variable(e.field(GEMM, g, name)) for name in ("ask", "ask_step", "asks"))
    acc = [[e.variable(e.zeros(e.lanes)) for _ in range(vectors)] for _ in range(rows)]
    with e.when(load.compare("!=", 0)):
        for m in range(rows):
            for v in range(vectors):
                acc[m][v].set(e.load(c, c_m * m + v * e.lanes, e.lanes))
    size = e.target.itemsize
    with e.loop(0, blocks) as block:
        # Three rows a pointer: p, p + s, p + 2 s are addresses that the processor adds up itself.
        pa = [e.variable(a + (block * a_block + a_m * (3 * i)) * size) for i in range((rows + 2) // 3)]
        pb = e.variable(b + block * b_block * size)
        # Unrolled, its addresses would not fit the registers.
        with e.loop(0, e.select((blocks - block).equals(1), k_last, k), unroll=False):
            x = [e.load(pb.get(), v * e.lanes, e.lanes) for v in range(vectors)]
            e.prefetch(ask.get())
            ask.set(ask.get() + ask_step.get())
            for m in range(rows):
                y = e.fill(e.load(pa[m // 3].get(), a_m * (m % 3)), e.lanes)
                for v in range(vectors):
                    acc[m][v].set(e.fma(y, x[v], acc[m][v].get()))
            for p in pa:
                p.set(p.get() + a_k * size)
            pb.set(pb.get() + b_k * size)
        with e.when(asks.get().compare("!=", 0)):
            for variable, name in ((ask, "at"), (ask_step, "step"), (asks, "next")):
                following = e.field(ASK, asks.get(), name)
                variable.set(following)
    # In ascending order: rows closer together than a tile is wide overwrite what the row before wrote too much.
    for m in range(rows):
        for v in range(vectors):
            e.store(acc[m][v].get(), c, c_m * m + v * e.lanes)
    if vectors <= 2:
        wanted = e.field(GEMM, g, "squares")
        with e.when(wanted > 0):
            _squares([[x.get() for x in row] for row in acc], e, wanted)


def _squares(tile: list[list[Value]], e: Emitter, out: Value) -> None:
    """Four numbers that add up to the sum of the squares; rows take turns with two pairs of chains."""
    chains = [[e.zeros(e.lanes) for _ in range(2)] for _ in range(2)]
    for m, row in enumerate(tile):
        for v, x in enumerate(row):
            chains[m & 1][v] = e.fma(x, x, chains[m & 1][v])
    low, high = (chains[0][v] + chains[1][v] for v in range(2))
    if e.lanes == 2:
        e.store(low, out)
        e.store(high, out, 2)
        return
    four, count = low + high, e.lanes // 2
    while count >= 4:
        four = e.shuffle(four, four, range(count)) + e.shuffle(four, four, range(count, 2 * count))
        count //= 2
    e.store(four, out)
