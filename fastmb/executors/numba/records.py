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

#: One layer and its operations.
STAGE = _record(
    *("kind", "n_in", "n_out", "rows", "columns", "offset", "w"),  # w: [rows][columns], `offset` into the flat vector
    *("ops", "n_ops", "derivative"),
    *("x", "x_block"),  # its input, [block][n_in + 1][rb], and the elements of a block
    "ahead",  # rows of weights that are asked for before the forward product comes to them
    *("dz", "panels", "panel_stride"),  # its output gradient, [panel][row][rb]; if not LINEAR [block][n_out][rb]
    *("backward", "forth", "back", "sums", "terms"),  # kernels; all but the first are of other layers, see `layers`
    "side",  # of the gradients that go back, the one in which its output's is
    *("skip", "skipped"),  # the stage whose input is added to what this one gives, or -1; whether this one's is
    *("f8 eps", "f8 momentum"),  # momentum -1: the mean over all mini-batches
    *("stats", "buffers", "running_rstd"),  # buffers: running mean [n], variance [n], mini-batches [1]
    *("row_tiles", "tiles", "first_tile"),
    *("group", "last_group", "cut"),  # rows of coefficients: of matrix rows before `cut`, and of those from there on
    *("chunks", "first_chunk"),  # of the matrix, where a gradient that is stored is applied
)
KINDS = ("linear", "batch_norm", "layer_norm", "prelu", "identity")
LINEAR, BATCH_NORM, LAYER_NORM, PRELU, IDENTITY = range(5)
#: Of a stage's operations:
NONE, FACTOR, SIGN = 0, 1, 2  # no operation; written by the forward pass; ReLU alone: the sign of the output

#: The statistics of a batch normalisation, [n] each; DWEIGHT and DBIAS are the sums over rows of dz xhat and dz.
MEAN, RSTD, VARIANCE, DWEIGHT, DBIAS, ACROSS, ALONG, N_STATISTICS = range(8)

#: A thread's scratch, and its range of each sweep. Where the first stage is relayed, its tiles are apart from the
#: others, a thread has rows `first_row` .. of that stage's matrix, and gathers their features alone, as `source` has
#: them; `handed`: the address of a counter, the pieces that the next thread may go on with.
WORKER = _record(
    *("next_block", "last_block", "next_tile", "last_tile", "next_relayed", "last_relayed"),
    *("first_row", "last_row", "source", "handed"),
    *("da0", "da1"),  # activations in inference
    *("grad0", "grad1"),  # gradients of a group's activations; with batch normalisation of all blocks, for all threads
    *("d", "held", "kept"),  # addresses, one a stage: derivatives; output gradients and, in inference, inputs to add
    *("tile", "s", "labels", "target", "loss", "stats"),  # stats: a block's mean, rstd, across, along
    *("gemm", "asks", "mini", "coefficients", "few", "all_rows"),
    *("squares", "d_input", "factors", "bits", "into"),  # of rows: squared norms, and what they are made of
    *("expected_first", "expected_last", "expected_at", "expected_lines"),
    size=5 * LINE,
)

#: Where an array of the user's lies; strides in bytes. `gather`, `label`: the kernels that read it.
SOURCE = _record("data", "row_stride", "col_stride", "columns", "f8 scale", "gather", "label_size")

#: The loss: what its kernel needs of it.
LOSS = _record("n", "f8 smoothing", "f8 delta", "weight", "function")

#: Where gradients go: the update's kernel, the optimiser's states, the weight of the parameters in their average.
#: `completes`: with a last part's tiles; `before` has the sum of the parts before it, or is 0, and the whole times
#: `factor` is the mean.
INTO = _record("update", "state0", "state1", "state2", "f8 weight", "completes", "before", "f8 factor")

#: A product of tiles, see `gemm`. What is going to be needed soon is asked for on its way: with each k a cache line,
#: `ask_step` bytes after the one before; in the next block as the record ASK at `asks` says, if that isn't 0.
GEMM = _record(
    *("a_m", "a_k", "a_block", "b_k", "b_block", "c_m", "blocks", "k", "k_last", "ask", "ask_step", "asks", "squares")
)
ASK = _record("at", "step", "next")
ASKS = 8  # things at the most that a tile's product asks for one after the other

#: The rows of a mini-batch in blocks: where the next block of x, of dz and of rows' statistics is, in elements; rows of
#: a block, and of all blocks together.
ROWS = _record("x_block", "dz_block", "stats_block", "block_rows", "rows")

#: A plan made ready to run. `cuts`: the stages that need statistics of all rows, where the row sweep is cut into
#: phases; `trained`: whether rows that come back are trained on.
ENGINE = _record(
    *("size", "lanes", "rb", "mr", "n_stages", "stages", "input_ops", "n_input_ops"),
    *("group", "widest", "total_tiles", "workers", "row_loss", "loss", "barrier", "gemm", "scatter", "trained"),
    *("few", "few_rows"),
    *("n_cuts", "cuts"),
    *("total_chunks", "tile_squares", "chunk_squares", "row_squares", "chains"),
    *(
        "k_row_squares",
        "k_squares",
        "k_total",
        "k_average",
        "groups",
        "k_scale_rows",
        "k_limit",
        "k_outer",
        "k_noise",
        "k_add",
        "k_copy",
        "k_multiply",
        "k_row_moments",
        "k_row_means",
        "k_column_moments",
    ),  # kernels
)

#: What one call works on. `x`, `y`: SOURCE; `order`, `sample_weight`: addresses or 0; `row_weights`: whether a
#: mini-batch's weight isn't its number of rows; `running`: whether running statistics move.
RUN = _record(
    *("x", "y", "order", "sample_weight", "n", "loss_kernel", "indices", "row_weights"),
    *("first", "steps", "batch_size", "t", "coefficients", "sums", "update", "params", "state0", "state1", "state2"),
    *("f8 deadline", "check", "start", "done", "stop", "bad", "far", "claim"),
    *("result", "losses", "weights", "counter"),  # inference
    *("offsets", "part_rows", "f8 clip", "f8 noise", "secure", "f8 max_norm", "f8 limit", "f8 divide"),  # `Rules`
    *("want", "sweep", "stored", "applied", "gradient", "row", "stats", "norms", "norms_out", "whole", "inputs"),
    *("failed", "store", "accumulate", "seed", "f8 input_scale", "columns", "average", "running"),
)
#: What a row sweep is to do besides the step's own work: the norm of every row's own gradient; shorten those that are
#: longer than `clip`; write every row's gradient out; the gradient with respect to the input.
NORMS, CLIP, WHOLE, INPUTS = 1, 2, 4, 8
CHUNK = 4096  # numbers of a stored gradient that are applied together

#: One mini-batch, or a part of one, worked out by every thread for itself: `row`, `batch_rows`, rows of the
#: mini-batch before this part, and in all; `last`, the part that completes it; `relay`, whether the first stage's
#: product goes from thread to thread; `claim`, whether lines are taken from other threads before they are written.
MINI = _record(
    *("step", "begin", "rows", "block_rows", "blocks", "row", "batch_rows", "last", "f8 weight", "relay", "claim"),
    size=2 * LINE,
)

#: A thread's place in a team: what it is to do. On its second line it sleeps, see `sync`.
SEAT = _record("state", "function", "engine", "run", "tid", "threads", size=2 * LINE)

#: See `sync`: arrived and generation on a line each; where each thread was when it last arrived; two sets of
#: processors a thread.
MAX_THREADS = 256
BARRIER_BYTES = 2 * LINE + (8 + 2 * 128) * MAX_THREADS


def offset(record: Record, name: str) -> int:
    """Where a field stands in its record, in bytes."""
    assert record.fields is not None
    return record.fields[name][1]
