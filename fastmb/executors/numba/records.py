"""What the sweeps work on: records in memory that Python fills and compiled code reads by address.

Addresses are int64. Fields that several threads write stand on cache lines of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Record = np.dtype[Any]
LINE = 64
ARGUMENTS = 10  # int64, of every kernel and entry


def _record(*fields: str, size: int = 0) -> Record:
    """int64 fields, or "f8 name"; `size` bytes in all, if more than they take."""
    pairs = [field.split() if " " in field else ("i8", field) for field in fields]
    names, formats = [name for _, name in pairs], [format_ for format_, _ in pairs]
    offsets = [8 * i for i in range(len(names))]
    itemsize = max(size, -(-8 * len(names) // LINE) * LINE)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}, align=True)


#: One elementwise operation. `train` and `infer` are its kernels (0: it does nothing). `rates`: a dropout's p at the
#: updates since `since`, or 0: always the same. `function`: a user's own.
OP = _record("train", "infer", "f8 value", "seed", "index", "threshold", "f8 scale", "rates", "since", "function")

#: One `Linear` and its operations. `derivative`: see `DERIVATIVES`.
STAGE = _record(
    *("n_in", "n_out", "rows", "offset", "w"),  # w: [rows][n_out], `offset` elements into the flat vector
    *("ops", "n_ops", "derivative", "backward"),  # backward: the kernel
    *("x", "x_block"),  # its input, [block][n_in + 1][rb], and the elements of a block
    *("dz", "panels", "panel_stride"),  # its output gradient, [panel][row][rb]
    *("row_tiles", "tiles", "first_tile"),
    *("group", "last_group", "cut"),  # rows of coefficients: of matrix rows before `cut`, and of those from there on
    *("chunks", "first_chunk"),  # of the matrix, where a gradient that is stored is applied
)
NONE, FACTOR, SIGN = 0, 1, 2  # no operation; written by the forward pass; ReLU alone: the sign of the output

#: A thread's scratch, and its range of each sweep.
WORKER = _record(
    *("next_block", "last_block", "next_tile", "last_tile"),
    *("da0", "da1", "d", "tile", "s", "labels", "target", "loss"),  # d: addresses, one a stage
    *("gemm", "mini", "coefficients", "few"),
    *("squares", "d_input", "bits", "into"),  # of a group's rows: squared norms, and what they are made of
    *("expected_first", "expected_last", "expected_at", "expected_lines"),
    size=4 * LINE,
)

#: Where an array of the user's lies; strides in bytes. `gather`, `label`: the kernels that read it.
SOURCE = _record("data", "row_stride", "col_stride", "columns", "f8 scale", "gather", "label_size")

#: The loss: what its kernel needs of it.
LOSS = _record("n", "f8 smoothing", "f8 delta", "weight", "function")

#: Where gradients go: the update's kernel, the optimiser's states, the weight of the parameters in their average.
INTO = _record("update", "state0", "state1", "state2", "f8 weight")

#: A product of tiles, see `gemm`.
GEMM = _record("a_m", "a_k", "a_block", "b_k", "b_block", "c_m", "blocks", "k", "k_last", "ahead")

#: A plan made ready to run.
ENGINE = _record(
    *("size", "lanes", "rb", "mr", "n_stages", "stages", "input_ops", "n_input_ops"),
    *("group", "widest", "total_tiles", "workers", "row_loss", "loss", "barrier", "gemm", "scatter", "dropout"),
    *("total_chunks", "tile_squares", "chunk_squares", "row_squares"),
    *(
        "k_row_squares",
        "k_squares",
        "k_tile_squares",
        "k_average",
        "groups",
        "k_scale_rows",
        "k_limit",
        "k_outer",
        "k_noise",
    ),  # kernels
)

#: What one call works on. `x`, `y`: SOURCE; `order`, `sample_weight`: addresses or 0; `row_weights`: whether a
#: mini-batch's weight isn't its number of rows.
RUN = _record(
    *("x", "y", "order", "sample_weight", "n", "loss_kernel", "indices", "row_weights"),
    *("first", "steps", "batch_size", "t", "coefficients", "sums", "update", "params", "state0", "state1", "state2"),
    *("f8 deadline", "check", "start", "done", "stop", "bad", "far"),
    *("result", "losses", "weights", "counter"),  # inference
    *("offsets", "part_rows", "f8 clip", "f8 noise", "secure", "f8 max_norm", "f8 limit", "f8 divide"),  # `Rules`
    *("want", "sweep", "stored", "applied", "gradient", "row", "stats", "norms", "norms_out", "whole", "inputs"),
    *("failed", "store", "accumulate", "seed", "f8 input_scale", "columns", "average"),
)
#: What a row sweep is to do besides the step's own work: the norm of every row's own gradient; shorten those that are
#: longer than `clip`; write every row's gradient out; the gradient with respect to the input.
NORMS, CLIP, WHOLE, INPUTS = 1, 2, 4, 8
CHUNK = 4096  # numbers of a stored gradient that are applied together

#: One mini-batch, or a part of one, worked out by every thread for itself: `row`, `batch_rows`, rows of the
#: mini-batch before this part, and in all; `last`, the part that completes it.
MINI = _record(
    *("step", "begin", "rows", "block_rows", "blocks", "row", "batch_rows", "last", "f8 weight"), size=2 * LINE
)

#: A thread's place in a team: what it is to do.
SEAT = _record("state", "was", "function", "engine", "run", "tid", "threads", size=2 * LINE)

#: See `sync`: arrived and generation on a line each; where each thread was when it last arrived; two sets of
#: processors a thread.
MAX_THREADS = 256
BARRIER_BYTES = 2 * LINE + (8 + 2 * 128) * MAX_THREADS


def offset(record: Record, name: str) -> int:
    """Where a field stands in its record, in bytes."""
    assert record.fields is not None
    return record.fields[name][1]
