"""Memory of a plan that runs, one arena: inputs and output gradients of all stages, and every thread's scratch."""

from __future__ import annotations

import numpy as np

from .records import (
    ASK,
    ASKS,
    BATCH_NORM,
    CHUNK,
    FACTOR,
    GEMM,
    IDENTITY,
    INTO,
    LAYER_NORM,
    LINE,
    LINEAR,
    MINI,
    N_STATISTICS,
    ROWS,
    SOURCE,
    WORKER,
)
from .target import Target

SMALL_BLOCKS = 4


def _line(size: int) -> int:
    """Bytes of whole cache lines."""
    return (size + LINE - 1) // LINE * LINE


class Arena:
    """Room for mini-batches of `rows` rows (0: for inference) on `threads` threads; a first round counts the bytes.

    `engine` and `stages` are told where everything is.
    """

    def __init__(self, engine: np.ndarray, stages: np.ndarray, target: Target, rows: int, threads: int) -> None:
        self._engine, self._stages, self._target = engine[0], stages, target
        self._rows, self._threads = rows, threads
        # Blocks of small mini-batches may hold half the rows that they have room for.
        few = min(rows, SMALL_BLOCKS * threads * target.rb)
        self._blocks = max(-(-rows // target.rb), -(-few // target.lanes))
        self._memory = np.empty(0, np.uint8)
        self._base = self._at = 0
        self._assign()
        need = self._at
        try:
            self._memory = np.zeros(need + LINE, np.uint8)
        except MemoryError:
            raise MemoryError(f"a mini-batch of {rows} rows needs {need} bytes of buffers") from None
        self._base, self._at = self._memory.ctypes.data + -self._memory.ctypes.data % LINE, 0
        self._assign()
        self._fill()

    def _take(self, count: int) -> int:
        here = self._base + self._at
        self._at += _line(count)
        return here

    def _numbers(self, count: int) -> int:
        return self._take(int(count) * self._target.itemsize)

    def _assign(self) -> None:
        e, rb, blocks = self._engine, self._target.rb, self._blocks
        for s in self._stages:
            s["x"] = self._numbers(blocks * s["x_block"])
            s["panel_stride"] = blocks * rb * rb
            of_linear, of_others = s["panels"] * s["panel_stride"], blocks * s["n_out"] * rb
            s["dz"] = self._numbers({LINEAR: of_linear, IDENTITY: 0}.get(int(s["kind"]), of_others))
            by_feature = N_STATISTICS * s["n_in"] if self._rows else 0
            s["stats"] = self._numbers({BATCH_NORM: by_feature, LAYER_NORM: blocks * 2 * rb}.get(int(s["kind"]), 0))
        e["row_loss"], e["row_squares"] = self._take(blocks * rb * 8), self._take(blocks * rb * 8)
        e["chains"] = self._numbers(blocks * 4 * rb)
        e["tile_squares"] = self._numbers(4 * e["total_tiles"])
        e["chunk_squares"] = self._take(int(e["total_chunks"]) * 8)
        self._bytes = np.zeros(self._threads * WORKER.itemsize + LINE, np.uint8)
        start = -self._bytes.ctypes.data % LINE
        workers = self._bytes[start : start + self._threads * WORKER.itemsize].view(WORKER)
        self._addresses = np.zeros((self._threads, 3, len(self._stages)), np.int64)
        for i, (worker, addresses) in enumerate(zip(workers, self._addresses, strict=True)):
            worker["d"], worker["held"], worker["kept"] = (part.ctypes.data for part in addresses)
            self._assign_scratch(worker, addresses[2])
            if not self._rows:
                continue
            if not e["n_cuts"]:
                self._assign_gradients(worker, addresses, int(e["group"]))
            elif i == 0:
                for name in ("grad0", "grad1"):
                    worker[name] = self._numbers(blocks * (e["widest"] + 1) * rb)
                self._assign_gradients(worker, addresses, blocks)
            else:
                for name in ("grad0", "grad1", "d", "held", "squares", "d_input"):
                    worker[name] = workers[0][name]
        e["workers"] = workers.ctypes.data

    def _assign_scratch(self, worker: np.void, kept: np.ndarray) -> None:
        """A thread's own."""
        e, rb, size = self._engine, self._target.rb, self._target.itemsize
        block = _line(rb * size)
        wide = e["group"] * (e["widest"] + 1) * rb
        worker["da0"], worker["da1"] = self._numbers(wide), self._numbers(wide)
        worker["grad0"], worker["grad1"] = worker["da0"], worker["da1"]
        for i, s in enumerate(self._stages):
            if s["skip"] >= 0:
                kept[i] = self._numbers(e["group"] * s["n_out"] * rb)
        worker["tile"] = self._numbers((self._target.mr + 2) * rb)
        worker["s"], worker["loss"], worker["labels"] = self._take(block), self._take(block), self._take(rb * 4)
        worker["target"] = self._numbers(self._stages[-1]["n_out"] * rb)
        worker["stats"], worker["factors"] = self._take(4 * block), self._take(2 * block)
        worker["gemm"], worker["asks"] = self._take(GEMM.itemsize), self._take(ASKS * ASK.itemsize)
        worker["mini"] = self._take(MINI.itemsize + 4 * LINE)
        worker["coefficients"], worker["few"] = self._numbers(8 * e["groups"]), self._take(64 * 24)
        worker["into"], worker["all_rows"] = self._take(INTO.itemsize), self._take(ROWS.itemsize)
        worker["source"], worker["handed"] = self._take(SOURCE.itemsize), self._take(LINE)
        worker["bits"] = self._take(CHUNK * 4)

    def _assign_gradients(self, worker: np.void, addresses: np.ndarray, blocks: int) -> None:
        """What so many blocks keep from their way forward and back."""
        rb = self._target.rb
        for i, s in enumerate(self._stages):
            if s["derivative"] == FACTOR:
                addresses[0, i] = self._numbers(blocks * s["n_out"] * rb)
            if s["skip"] >= 0:
                addresses[1, i] = self._numbers(blocks * s["n_out"] * rb)
        worker["squares"] = self._take(blocks * _line(rb * self._target.itemsize))
        if self._engine["n_input_ops"]:
            worker["d_input"] = self._numbers(blocks * self._stages[0]["n_in"] * rb)

    def _fill(self) -> None:
        """Of every stage's input, the 1 that meets the bias."""
        dtype = np.dtype(f"f{self._target.itemsize}")
        for s in self._stages:
            start, count = int(s["x"]) - self._memory.ctypes.data, self._blocks * int(s["x_block"])
            x = self._memory[start : start + count * dtype.itemsize].view(dtype)
            x.reshape(self._blocks, int(s["n_in"]) + 1, self._target.rb)[:, -1] = 1.0
