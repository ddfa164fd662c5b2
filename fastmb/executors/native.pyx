# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The native executor: the loops and the threads over the C kernels of csrc/.

A step of a mini-batch is two sweeps with a barrier after each. In the row sweep a thread takes blocks of rows: it
gathers them, takes them forward through all stages, computes the loss, and takes the gradient backward to the first
stage. In the weight sweep a thread takes tiles of the weight gradients, each a sum over all rows of the mini-batch in
their order, and updates the weights under the tile while it is in the cache. One OpenMP region runs many steps.

Who takes a piece changes no bit, so pieces are taken from counters: every thread has a range of its own, the same each
step, which keeps its weights in its cache, and helps the others when that is done.

Buffers live in one arena: the input of every stage, [block][feature][rb] with one more feature that is 1 and meets the
bias; the output gradient of every stage as panels [panel][row][rb features]; and each thread's scratch.
"""

import os
import threading

import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .kernels cimport *

from .. import threads as _threads
from .._errors import unknown_name

cnp.import_array()

# ---- names of C's enumerations -----------------------------------------------------------------------------------

ISAS = ("v2", "v3", "v4")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "tanh",
               "sigmoid")
LOSSES = ("cross_entropy", "bce_with_logits", "mse", "mae", "huber")
UPDATES = ("gradient", "sgd", "momentum", "nesterov", "adam", "amsgrad", "rmsprop", "rmsprop_momentum",
           "rmsprop_centered", "rmsprop_centered_momentum", "adagrad")
cdef dict TYPES = {"b1": 4, "i1": 0, "i2": 1, "i4": 2, "i8": 3, "u1": 4, "u2": 5, "u4": 6, "u8": 7, "f2": 8, "f4": 9,
                   "f8": 10}

cdef int DROPOUT = -1
cdef int64_t KC = 512    # products of a chain before the next rows are looked at, where several blocks share weights
cdef int GROUP = 4       # blocks that go through a stage together when the weights don't fit the second-level cache
cdef int64_t GROUP_BYTES = 1 << 19
cdef int64_t SMALL_BLOCKS = 4   # blocks a thread up to which blocks of one vector of rows are thought of
cdef int64_t AHEAD = 32         # rows of weights that are asked for before the forward product comes to them
cdef int64_t ACROSS_BYTES = 1 << 18    # output gradients up to here stay near: tiles go along rows of weights
cdef int64_t REGION_FLOPS = 400_000     # work for a thread that makes it worth entering a parallel region
cdef double TRIAL = 0.002       # seconds that one thread, or all, are tried for; which is faster depends on more than
cdef double PROVEN = 0.25       # the work: on caches shared or not, on other processes. Seconds between two trials
cdef double TRIAL_FLOPS = 1e9   # a step of so much work is never faster on one thread

cdef int64_t regions = 0        # parallel regions that run now, in all Python threads


def available_isas():
    """Names of the instruction sets that this CPU has and this build has kernels for, the widest last."""
    return [name for i, name in enumerate(ISAS) if fmb_kernels_for(i, FMB_F32) != NULL]


def isa():
    """Name of the instruction set in use: the widest, or the one that the environment's FASTMB_ISA names."""
    return _threads.choose_isa(available_isas())


cdef const fmb_kernels *_kernels(object dtype, object name=None) except NULL:
    cdef const fmb_kernels *found
    name = isa() if name is None else name
    if name not in available_isas():
        raise unknown_name("isa", name, available_isas())
    found = fmb_kernels_for(ISAS.index(name), FMB_F64 if np.dtype(dtype).itemsize == 8 else FMB_F32)
    return found


def max_threads():
    """What OpenMP would use in this thread now: OMP_NUM_THREADS and live limits are in it."""
    return omp_get_max_threads()


# ---- what the loops see ------------------------------------------------------------------------------------------

cdef struct Op:
    int kind            # an activation, or DROPOUT
    int index
    double value
    uint32_t threshold
    double scale

cdef enum Derivative:
    NONE      # no operation
    FACTOR    # written by the forward pass, multiplied by the backward pass
    SIGN      # ReLU alone: the sign of the output

cdef struct Stage:
    int64_t n_in, n_out, rows
    char *w             # [rows][n_out] in the flat vector
    int64_t offset      # of w in the flat vector, in elements
    Op *ops
    int n_ops
    Derivative derivative
    char *x             # its input: [block][n_in + 1][rb]
    int64_t x_block     # elements of a block of x
    char *dz            # its output gradient: [panel][row][rb]
    int64_t panels, panel_stride
    int64_t row_tiles, tiles, first_tile

cdef struct Worker:
    int64_t next_block, last_block, next_tile, last_tile
    char *da[2]         # gradients of a group's activations, or the activations in inference
    char **d            # per stage: derivatives of a group, [block][n_out][rb]
    char *tile
    char *s
    int32_t *labels
    char *target
    char *loss
    fmb_cursor expected     # rows of the next mini-batch, and how many cache lines of them to ask for with each tile
    int64_t expected_lines
    char pad[64]

cdef struct Batch:
    fmb_source X, y
    int has_y
    double scale
    const double *sample_weight
    const int64_t *order    # of the whole set, or NULL
    int64_t n               # rows of the set

cdef struct Run:            # what one call works on
    Batch batch
    int64_t first, steps, batch_size
    uint64_t t
    const double *coefficients
    double *sums
    int update
    char *params
    char *state[3]
    double deadline
    int64_t check           # steps between two looks at the clock
    int64_t start, done     # updates made before this region, and by now
    int stop, bad
    int far                 # parameters and state are worth asking for ahead of their tile

cdef struct Mini:           # one mini-batch, worked out by every thread for itself
    int64_t step, begin, rows, block_rows, blocks
    double weight           # the sum that its mean is taken over


cdef class NativeExecutor:
    """Runs a plan in compiled code on all cores; see `fastmb.executors.Executor` for its methods."""

    cdef const fmb_kernels *k
    cdef readonly object plan, training, isa
    cdef object params, weight, lock
    cdef readonly object n_threads_asked
    cdef int size, rb, n_stages, threads, group
    cdef int64_t capacity       # rows of a mini-batch that the arena has room for
    cdef int arena_threads
    cdef int64_t widest, total_tiles
    cdef readonly int64_t arena_bytes
    cdef Stage *stages
    cdef Op *ops
    cdef Op *input_ops
    cdef int n_input_ops
    cdef char *arena
    cdef Worker *workers
    cdef double *row_loss
    cdef fmb_loss_spec loss
    cdef fmb_barrier barrier
    cdef int update
    cdef uint64_t seed
    cdef double cost[2]         # seconds a step, of one thread and of all
    cdef double try_at
    cdef int64_t tried_rows, tried_threads

    def __cinit__(self):
        self.stages = NULL
        self.ops = NULL
        self.arena = NULL
        self.workers = NULL

    def __init__(self, plan, params, training=None, n_threads=None, isa=None):
        self.plan = plan
        self.params = params
        self.lock = threading.Lock()
        self.training = training
        self.n_threads_asked = n_threads
        self.isa = isa if isa is not None else globals()["isa"]()
        self.k = _kernels(plan.dtype, self.isa)
        self.size = plan.dtype.itemsize
        self.rb = self.k.rb
        self._read_plan(plan)
        weights = plan.size * self.size
        self.group = GROUP if weights > GROUP_BYTES else 1
        self.update = FMB_GRADIENT
        self.loss.weight = NULL
        if training is not None:
            loss = training.loss
            self.loss.kind = LOSSES.index(loss.kind)
            self.loss.n = plan.n_outputs
            self.loss.smoothing = loss.label_smoothing
            self.loss.delta = loss.delta
            self.weight = None if loss.weight is None else np.ascontiguousarray(loss.weight, plan.dtype)
            if self.weight is not None:
                self.loss.weight = cnp.PyArray_DATA(self.weight)
            self.update = UPDATES.index(training.optimizer.kind)
            self.seed = training.seed & 0xFFFFFFFFFFFFFFFF

    def __dealloc__(self):
        free(self.stages)
        free(self.ops)
        free(self.arena)
        free(self.workers)

    def _read_plan(self, plan):
        """The plan as C structures."""
        cdef int n_ops = len(plan.input_ops) + sum(len(stage.ops) for stage in plan.stages)
        cdef int i, j = 0
        cdef Stage *s
        self.n_stages = len(plan.stages)
        self.stages = <Stage *> calloc(self.n_stages, sizeof(Stage))
        self.ops = <Op *> calloc(n_ops + 1, sizeof(Op))
        if self.stages == NULL or self.ops == NULL:
            raise MemoryError
        self.input_ops = self.ops
        self.n_input_ops = len(plan.input_ops)
        for op in plan.input_ops:
            j = self._read_op(j, op)
        self.widest = plan.n_features
        self.total_tiles = 0
        for i, stage in enumerate(plan.stages):
            s = &self.stages[i]
            s.n_in = stage.n_in
            s.n_out = stage.n_out
            s.rows = stage.rows
            s.offset = stage.offset
            s.w = <char *> cnp.PyArray_DATA(self.params) + s.offset * self.size
            s.ops = self.ops + j
            s.n_ops = len(stage.ops)
            kinds = [op.kind for op in stage.ops]
            s.derivative = NONE if not kinds else SIGN if kinds == ["relu"] and i + 1 < self.n_stages else FACTOR
            for op in stage.ops:
                j = self._read_op(j, op)
            s.x_block = (s.n_in + 1) * self.rb
            s.panels = (s.n_out + self.rb - 1) // self.rb
            s.row_tiles = (s.rows + self.k.mr - 1) // self.k.mr
            s.tiles = s.row_tiles * s.panels
            s.first_tile = self.total_tiles
            self.total_tiles += s.tiles
            self.widest = max(self.widest, s.n_out)

    cdef int _read_op(self, int j, object op) except -1:
        self.ops[j].value = op.value
        if op.kind == "dropout":
            self.ops[j].kind = DROPOUT
            self.ops[j].index = op.index
            self.ops[j].threshold = <uint32_t> int(op.value * 4294967296.0)
            self.ops[j].scale = 1.0 / (1.0 - op.value)
        else:
            self.ops[j].kind = ACTIVATIONS.index(op.kind)
        return j + 1

    # ---- memory ---------------------------------------------------------------------------------------------------

    cdef int _reserve(self, int64_t rows, int threads) except -1:
        """Room for mini-batches of `rows` rows on `threads` threads; rows 0 for inference."""
        if self.arena != NULL and rows <= self.capacity and threads <= self.arena_threads:
            return 0
        cdef int64_t need
        cdef void *arena = NULL
        rows = max(rows, self.capacity)
        threads = max(threads, self.arena_threads)
        free(self.workers)
        self.workers = NULL
        self.workers = <Worker *> calloc(threads, sizeof(Worker) + self.n_stages * sizeof(void *))
        need = self._assign(NULL, rows, threads)
        if self.workers == NULL or posix_memalign(&arena, 64, need) != 0:
            self.capacity = self.arena_threads = 0
            free(self.arena)
            self.arena = NULL
            raise MemoryError(f"a mini-batch of {rows} rows needs {need} bytes of buffers")
        memset(arena, 0, need)
        free(self.arena)
        self.arena = <char *> arena
        self._assign(self.arena, rows, threads)
        self.capacity = rows
        self.arena_threads = threads
        self.arena_bytes = need
        return 0

    cdef int64_t _assign(self, char *base, int64_t rows, int threads) noexcept:
        """Hands out the arena from `base` on and returns its size; with NULL, the size alone."""
        cdef int64_t at = 0, blocks, panel_rows, block, b, r
        cdef int i, w
        cdef Stage *s
        cdef Worker *worker
        cdef char *ones
        # Blocks of small mini-batches may hold half the rows that they have room for.
        blocks = min(rows, SMALL_BLOCKS * threads * self.rb)
        blocks = max((rows + self.rb - 1) // self.rb, (blocks + self.k.lanes - 1) // self.k.lanes)
        panel_rows = blocks * self.rb
        for i in range(self.n_stages):
            s = &self.stages[i]
            s.x = base + at
            at += _line(blocks * s.x_block * self.size)
            if base != NULL:
                for b in range(blocks):
                    ones = s.x + (b * s.x_block + s.n_in * self.rb) * self.size
                    for r in range(self.rb):
                        _put(ones, r, 1.0, self.size)
            s.dz = base + at
            s.panel_stride = panel_rows * self.rb
            at += _line(s.panels * s.panel_stride * self.size)
        self.row_loss = <double *> (base + at)
        at += _line(panel_rows * sizeof(double))
        block = _line(self.rb * self.size)
        for w in range(threads):
            worker = &self.workers[w]
            worker.d = (<char **> &self.workers[threads]) + w * self.n_stages
            for i in range(2):
                worker.da[i] = base + at
                at += _line(self.group * (self.widest + 1) * self.rb * self.size)
            for i in range(self.n_stages):
                worker.d[i] = NULL
                if rows > 0 and self.stages[i].derivative == FACTOR:
                    worker.d[i] = base + at
                    at += _line(self.group * self.stages[i].n_out * self.rb * self.size)
            worker.tile = base + at
            at += _line((self.k.mr + 2) * self.rb * self.size)
            worker.s = base + at
            at += block
            worker.loss = base + at
            at += block
            worker.labels = <int32_t *> (base + at)
            at += _line(self.rb * sizeof(int32_t))
            worker.target = base + at
            at += _line(self.plan_outputs() * self.rb * self.size)
        return at

    cdef int64_t plan_outputs(self) noexcept nogil:
        return self.stages[self.n_stages - 1].n_out

    # ---- calls ----------------------------------------------------------------------------------------------------

    cdef int _batch(self, Batch *b, object batches) except -1:
        _source(batches.X, &b.X)
        b.scale = batches.scale
        b.n = batches.X.shape[0]
        y = batches.y
        b.has_y = y is not None
        if b.has_y:
            _source(y, &b.y)
            self.loss.indices = self.loss.kind == FMB_CROSS_ENTROPY and y.ndim == 1
        weights = batches.sample_weight
        b.sample_weight = <const double *> cnp.PyArray_DATA(weights) if weights is not None else NULL
        order = batches.order
        b.order = <const int64_t *> cnp.PyArray_DATA(order) if order is not None else NULL
        if order is not None:
            b.n = order.shape[0]
        return 0

    cdef int64_t _train(self, object batches, int64_t first, int64_t steps, uint64_t t, const double *coefficients,
                        double *sums, double seconds, int update, object state) except -1:
        cdef Run run
        cdef int i, threads
        cdef int64_t n_states
        cdef double flops
        memset(&run, 0, sizeof(Run))
        self._batch(&run.batch, batches)
        run.first = first
        run.steps = steps
        run.batch_size = min(<int64_t> batches.batch_size, run.batch.n)
        run.t = t
        run.coefficients = coefficients
        run.sums = sums
        run.update = update
        run.params = <char *> cnp.PyArray_DATA(self.params)
        n_states = state.shape[0]
        for i in range(min(n_states, 3)):
            run.state[i] = <char *> cnp.PyArray_DATA(state) + i * self.plan_size() * self.size
        flops = self._flops() * run.batch_size
        run.far = run.batch_size >= self.k.lanes and (1 + n_states) * self.plan_size() * self.size > GROUP_BYTES
        run.check = 1 + <int64_t> (1e6 / (flops + 1e4))
        with self.lock:
            threads = self._threads_for(flops, steps)
            self._reserve(run.batch_size, threads)
            if threads > 1 and self.n_threads_asked is None and steps > 1 and flops < TRIAL_FLOPS:
                self._try_out(&run, threads, fmb_now() + seconds)
            else:
                run.deadline = fmb_now() + seconds
                self._start(&run, threads)
        return run.done

    cdef int _threads_for(self, double flops, int64_t steps) except -1:
        """The threads for `steps` steps of `flops` operations."""
        cdef int threads = _threads.resolve(self.n_threads_asked, flops)
        if threads > 1 and self.n_threads_asked is None:
            threads = <int> max(1.0, min(<double> threads, flops * steps / REGION_FLOPS))
        return threads

    cdef int _try_out(self, Run *run, int threads, double deadline) except -1:
        """Runs with all threads or with one, whichever has been faster; the other is tried from time to time."""
        cdef double now = fmb_now(), start
        cdef int64_t done
        cdef int team
        if self.tried_rows != run.batch_size or self.tried_threads != threads:
            self.tried_rows, self.tried_threads = run.batch_size, threads
            self.cost[0] = self.cost[1] = 0
            self.try_at = 0
        while run.done < run.steps and not run.bad and (run.done == 0 or now < deadline):
            team = self.cost[1] <= self.cost[0]
            run.deadline = min(deadline, self.try_at)
            if now >= self.try_at:  # first all, then one; later the one that isn't in use
                team = 1 - team if self.cost[0] > 0 else self.cost[1] == 0
                run.deadline = min(deadline, now + TRIAL)
                if self.cost[1] > 0:
                    self.try_at = now + PROVEN
            done, start = run.done, fmb_now()
            self._start(run, threads if team else 1)
            now = fmb_now()
            if run.done > done:
                self.cost[team] = (now - start) / (run.done - done)
        return 0

    cdef int _start(self, Run *run, int threads) except -1:
        """Steps `run.done` .. of a run, until its deadline, on so many threads."""
        run.stop = 0
        run.start = run.done
        with nogil:
            if threads == 1:
                self._work(run, 0, 1)
            else:
                fmb_take(&regions, 1)
                with parallel(num_threads=threads):
                    self._work(run, omp_get_thread_num(), omp_get_num_threads())
                fmb_take(&regions, -1)
        return 0

    cdef int64_t plan_size(self) noexcept:
        return (<cnp.ndarray> self.params).shape[0]

    cdef double _flops(self) noexcept:
        """Floating-point operations of a training step, a row."""
        cdef double total = 0
        cdef int i
        for i in range(self.n_stages):
            total += (4.0 if i == 0 else 6.0) * self.stages[i].n_in * self.stages[i].n_out
        return total

    def run(self, batches, int64_t first, uint64_t t, const double[:, ::1] coefficients, double[:, ::1] sums,
            double seconds):
        return self._train(batches, first, coefficients.shape[0], t, &coefficients[0, 0], &sums[0, 0], seconds,
                           self.update, self.training.state)

    def gradients(self, batches, uint64_t t, out, double[::1] sums):
        cdef double coefficients[8]
        memset(coefficients, 0, sizeof(coefficients))
        out[:] = 0
        self._train(batches, 0, 1, t, coefficients, &sums[0], 1e9, FMB_GRADIENT, out.reshape(1, -1))

    def forward(self, X, double scale, out):
        cdef Batch batch
        memset(&batch, 0, sizeof(Batch))
        _source(X, &batch.X)
        batch.scale = scale
        batch.n = X.shape[0]
        self._infer(&batch, out, NULL, NULL)

    def evaluate(self, batches, out, double[::1] losses, double[::1] weights):
        cdef Batch batch
        memset(&batch, 0, sizeof(Batch))
        self._batch(&batch, batches)
        batch.n = batch.X.columns and batches.X.shape[0]
        self._infer(&batch, out, &losses[0], &weights[0])

    cdef int _infer(self, Batch *batch, object out, double *losses, double *weights) except -1:
        cdef int threads = _threads.resolve(self.n_threads_asked, self._flops() / 3 * batch.n)
        cdef char *result = <char *> cnp.PyArray_DATA(out)
        cdef int64_t counter = 0
        with self.lock:
            self._reserve(0, threads)
            with nogil:
                if threads == 1:
                    self._infer_work(batch, result, losses, weights, &counter, 0, 1)
                else:
                    fmb_take(&regions, 1)
                    with parallel(num_threads=threads):
                        self._infer_work(batch, result, losses, weights, &counter, omp_get_thread_num(),
                                         omp_get_num_threads())
                    fmb_take(&regions, -1)
        return 0

    # ---- training: a thread's work -------------------------------------------------------------------------------

    cdef void _work(self, Run *run, int tid, int threads) noexcept nogil:
        """All steps of a run, as thread `tid` of `threads`."""
        cdef uint64_t fp = fmb_fp_enter()
        cdef Worker *me = &self.workers[tid]
        cdef Mini mini
        self._mini_batch(run, run.start, threads, &mini)
        _share(&me.next_block, &me.last_block, mini.blocks, tid, threads)
        while True:
            _share(&me.next_tile, &me.last_tile, self.total_tiles, tid, threads)
            if mini.step == run.start:
                fmb_barrier_wait(&self.barrier, tid, threads)
            self._row_sweep(run, &mini, tid, threads)
            fmb_barrier_wait(&self.barrier, tid, threads)
            if run.bad:
                if tid == 0:
                    self._sum(run, &mini)
                break
            self._weight_sweep(run, &mini, tid, threads)
            if tid == 0:
                self._sum(run, &mini)
                run.done = mini.step + 1
                if run.done == run.steps or (run.done % run.check == 0 and fmb_now() > run.deadline):
                    run.stop = 1
            if mini.step + 1 < run.steps:
                self._mini_batch(run, mini.step + 1, threads, &mini)
                _share(&me.next_block, &me.last_block, mini.blocks, tid, threads)
            fmb_barrier_wait(&self.barrier, tid, threads)
            if run.stop:
                break
        fmb_fp_leave(fp)

    cdef void _mini_batch(self, Run *run, int64_t step, int threads, Mini *mini) noexcept nogil:
        """Which rows are mini-batch `step` of the run, and how they are cut into blocks."""
        cdef int64_t i
        cdef double lanes[8]
        cdef Batch *batch = &run.batch
        mini.step = step
        mini.begin = (run.first + step) * run.batch_size
        mini.rows = min(run.batch_size, batch.n - mini.begin)
        mini.block_rows = self._block_rows(mini.rows, threads)
        mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows
        mini.weight = mini.rows
        if batch.sample_weight != NULL or (self.loss.indices and self.loss.weight != NULL):
            memset(lanes, 0, sizeof(lanes))
            for i in range(mini.rows):
                lanes[i & 7] += self._sample_weight(batch, mini.begin + i) * self._class_weight(batch, mini.begin + i)
            mini.weight = _tree(lanes)

    cdef int64_t _block_rows(self, int64_t rows, int threads) noexcept nogil:
        """Rows of a block, one vector of them or two, whichever keeps the threads busy for the shorter time."""
        if rows <= SMALL_BLOCKS * threads * self.rb and self._rounds(self.k.lanes, 1.1, rows, threads) < self._rounds(
                self.rb, 2.0, rows, threads):
            return self.k.lanes
        return self.rb

    cdef double _rounds(self, int64_t size, double cost, int64_t rows, int threads) noexcept nogil:
        """Time of a row sweep in blocks of `size` rows that cost so much each, a vector of rows being about 1."""
        cdef int64_t whole = rows // size, rest = rows % size
        cdef double last = 0
        if rest > 0 and whole % threads == 0:   # else it falls to a thread that has nothing else to do
            last = 0.4 if rest <= self.k.mr // 2 else 1.1 if rest <= self.k.lanes else 2.0
        return (whole + threads - 1) // threads * cost + last

    cdef double _sample_weight(self, Batch *batch, int64_t position) noexcept nogil:
        if batch.sample_weight == NULL:
            return 1.0
        return batch.sample_weight[batch.order[position] if batch.order != NULL else position]

    cdef double _class_weight(self, Batch *batch, int64_t position) noexcept nogil:
        cdef int32_t label
        if not self.loss.indices or self.loss.weight == NULL:
            return 1.0
        label = fmb_label(&batch.y, batch.order[position] if batch.order != NULL else position)
        return _get(self.loss.weight, label, self.size)

    cdef void _sum(self, Run *run, Mini *mini) noexcept nogil:
        """The mini-batch's loss sum and weight: eight lanes over the rows, then a tree."""
        cdef double lanes[8]
        cdef int64_t block, r, i = 0
        memset(lanes, 0, sizeof(lanes))
        for block in range(mini.blocks):
            for r in range(min(mini.block_rows, mini.rows - i)):
                lanes[i & 7] += self.row_loss[block * self.rb + r]
                i += 1
        run.sums[2 * mini.step] = _tree(lanes)
        run.sums[2 * mini.step + 1] = mini.weight

    # ---- the row sweep --------------------------------------------------------------------------------------------

    cdef void _row_sweep(self, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
        """Blocks of rows: this thread's own, then what is left of the others'. Where there are fewer blocks than
        threads, all threads work on every block, each on a part of the features of every stage."""
        cdef int i
        cdef int64_t block
        cdef Worker *owner
        if mini.blocks < threads:
            for block in range(mini.blocks):
                self._rows(run, mini, &self.workers[0], block, 1, tid, threads)
            return
        for i in range(threads):
            owner = &self.workers[(tid + i) % threads]
            while True:
                block = fmb_take(&owner.next_block, self.group)
                if block >= owner.last_block:
                    break
                self._rows(run, mini, &self.workers[tid], block, min(<int64_t> self.group, owner.last_block - block),
                           0, 1)

    cdef void _rows(self, Run *run, Mini *mini, Worker *home, int64_t first, int64_t blocks, int part,
                    int parts) noexcept nogil:
        """Blocks `first` .. of the mini-batch: gathered, forward, loss, backward. Does part `part` of `parts`, each a
        range of features in whole panels, which meet where one needs what another has made."""
        cdef int64_t b, row, block, low, high
        cdef int i, rows, current = 0
        cdef Stage *s
        cdef char *out
        cdef char *d
        cdef Batch *batch = &run.batch

        if part == 0:
            for b in range(blocks):
                row = (first + b) * mini.block_rows
                rows = <int> min(mini.block_rows, mini.rows - row)
                out = self.stages[0].x + (first + b) * self.stages[0].x_block * self.size
                self._gather(&batch.X, batch, mini.begin + row, rows, batch.scale, out)
                self._apply(self.input_ops, self.n_input_ops, out, NULL, 0, self.stages[0].n_in, run.t + mini.step,
                            row, 1)
        fmb_barrier_wait(&self.barrier, part, parts)

        for i in range(self.n_stages):
            s = &self.stages[i]
            if i + 1 < self.n_stages:
                block = self.stages[i + 1].x_block
                out = self.stages[i + 1].x + first * block * self.size
            else:
                block = (self.widest + 1) * self.rb
                out = home.da[0]
            _panels(&low, &high, s.n_out, self.rb, part, parts)
            self._forward(s, mini, first, blocks, s.x + first * s.x_block * self.size, s.x_block, out, block, low, high)
            for b in range(blocks):
                d = NULL if s.derivative != FACTOR else home.d[i] + (b * s.n_out + low) * self.rb * self.size
                self._apply(s.ops, s.n_ops, out + (b * block + low * self.rb) * self.size, d, low, high - low,
                            run.t + mini.step, (first + b) * mini.block_rows, 1)
            fmb_barrier_wait(&self.barrier, part, parts)

        block = (self.widest + 1) * self.rb
        if part == 0:
            for b in range(blocks):
                self._loss(run, mini, home, first + b, home.da[0] + b * block * self.size)
        fmb_barrier_wait(&self.barrier, part, parts)

        for i in range(self.n_stages - 1, -1, -1):
            s = &self.stages[i]
            _panels(&low, &high, s.n_out, self.rb, part, parts)
            for b in range(blocks):
                rows = <int> min(mini.block_rows, mini.rows - (first + b) * mini.block_rows)
                d = NULL
                if s.derivative == FACTOR:
                    d = home.d[i] + (b * s.n_out + low) * self.rb * self.size
                elif s.derivative == SIGN:
                    d = self.stages[i + 1].x + ((first + b) * self.stages[i + 1].x_block + low * self.rb) * self.size
                self.k.backward(home.da[current] + (b * block + low * self.rb) * self.size, d, s.derivative == SIGN,
                                i > 0, high - low, rows,
                                s.dz + (low // self.rb * s.panel_stride + (first + b) * self.rb * self.rb) * self.size,
                                s.panel_stride)
            if i > 0:
                fmb_barrier_wait(&self.barrier, part, parts)
                _panels(&low, &high, s.n_in, self.rb, part, parts)
                self._backward(s, mini, first, blocks, home.da[current], home.da[1 - current], block, low, high)
                fmb_barrier_wait(&self.barrier, part, parts)
                current = 1 - current

    cdef void _gather(self, fmb_source *source, Batch *batch, int64_t position, int rows, double scale,
                      void *out) noexcept nogil:
        self.k.gather(source, batch.order + position if batch.order != NULL else NULL, position, rows, scale, out)

    cdef void _apply(self, Op *ops, int n_ops, char *a, char *d, int64_t unit, int64_t n, uint64_t t, int64_t row,
                     int training) noexcept nogil:
        """A stage's operations on features `unit` .. of one block [n][rb], in place; `d` receives the product of their
        derivatives."""
        cdef int i, first = 1
        for i in range(n_ops):
            if ops[i].kind != DROPOUT:
                self.k.activation(ops[i].kind, ops[i].value, a, d, n * self.rb, first)
            elif training:
                self.k.dropout(self.seed, t, ops[i].index, row, unit, ops[i].threshold, ops[i].scale, a, d, n, first)
            else:
                continue
            first = 0

    cdef void _forward(self, Stage *s, Mini *mini, int64_t first, int64_t blocks, char *x, int64_t x_block, char *out,
                       int64_t out_block, int64_t low, int64_t high) noexcept nogil:
        """out[o][row] = sum over i of w[i][o] x[i][row], low <= o < high, for each block; weights are looked at once
        for all of them."""
        cdef fmb_gemm g
        cdef int64_t k, m, b, depth = s.rows if blocks == 1 else KC
        cdef int rows = <int> min(mini.block_rows, mini.rows - first * mini.block_rows)
        if blocks == 1 and rows <= self.k.mr // 2:
            low = self._forward_few(s, rows, x, out, low, high)
        g.a_m, g.a_k, g.a_block, g.ahead = 1, s.n_out, 0, AHEAD
        g.b_k, g.b_block, g.c_m, g.blocks = self.rb, 0, self.rb, 1
        k = 0
        while k < s.rows:
            g.k = g.k_last = min(depth, s.rows - k)
            m = low
            while m < high:
                for b in range(blocks):
                    self.k.gemm(&g, <int> min(<int64_t> self.k.mr, high - m), self._vectors(mini, first + b), k > 0,
                                s.w + (k * s.n_out + m) * self.size, x + (b * x_block + k * self.rb) * self.size,
                                out + (b * out_block + m * self.rb) * self.size)
                m += self.k.mr
            k += depth

    cdef int64_t _forward_few(self, Stage *s, int rows, char *x, char *out, int64_t o, int64_t high) noexcept nogil:
        """The same for few rows: vectors run over outputs, as many as fill them. Returns the first that is left."""
        cdef fmb_gemm g
        cdef char buffer[64 * 24]
        cdef int64_t j
        cdef int r, vectors, width
        g.a_m, g.a_k, g.a_block, g.ahead = 1, self.rb, 0, 0
        g.b_k, g.b_block, g.blocks = s.n_out, 0, 1
        g.k = g.k_last = s.rows
        while high - o >= self.k.lanes:
            vectors = 8 if 4 * rows <= self.k.mr else 4
            while vectors * self.k.lanes > high - o:
                vectors //= 2
            width = vectors * self.k.lanes
            g.c_m = width
            self.k.gemm(&g, rows, vectors, 0, x, s.w + o * self.size, buffer)
            for j in range(width):
                for r in range(rows):
                    if self.size == 8:
                        (<double *> out)[(o + j) * self.rb + r] = (<double *> buffer)[r * width + j]
                    else:
                        (<float *> out)[(o + j) * self.rb + r] = (<float *> buffer)[r * width + j]
            o += width
        return o

    cdef void _backward(self, Stage *s, Mini *mini, int64_t first, int64_t blocks, char *dz, char *dx,
                        int64_t block, int64_t low, int64_t high) noexcept nogil:
        """dx[i][row] = sum over o of w[i][o] dz[o][row], low <= i < high, for each block."""
        cdef fmb_gemm g
        cdef int64_t k, m, b, depth = s.n_out if blocks == 1 else KC
        g.a_m, g.a_k, g.a_block, g.ahead = s.n_out, 1, 0, 0
        g.b_k, g.b_block, g.c_m, g.blocks = self.rb, 0, self.rb, 1
        k = 0
        while k < s.n_out:
            g.k = g.k_last = min(depth, s.n_out - k)
            m = low
            while m < high:
                for b in range(blocks):
                    self.k.gemm(&g, <int> min(<int64_t> self.k.mr, high - m), self._vectors(mini, first + b), k > 0,
                                s.w + (m * s.n_out + k) * self.size, dz + (b * block + k * self.rb) * self.size,
                                dx + (b * block + m * self.rb) * self.size)
                m += self.k.mr
            k += depth

    cdef int _vectors(self, Mini *mini, int64_t block) noexcept nogil:
        """Vectors that the rows of a block fill."""
        return 2 if min(mini.block_rows, mini.rows - block * mini.block_rows) > self.k.lanes else 1

    cdef void _loss(self, Run *run, Mini *mini, Worker *me, int64_t block, char *z) noexcept nogil:
        """The block's row losses, and its output gradient in place of the outputs."""
        cdef int64_t row = block * mini.block_rows
        cdef int64_t position = mini.begin + row
        cdef int r, rows = <int> min(mini.block_rows, mini.rows - row)
        cdef double weight, value, scale = 1.0 / mini.weight if mini.weight > 0 else 0.0
        cdef double *row_loss = self.row_loss + block * self.rb
        for r in range(self.rb):
            weight = self._sample_weight(&run.batch, position + r) if r < rows else 0.0
            _put(me.s, r, weight * scale, self.size)
            row_loss[r] = weight
        self._targets(&run.batch, me, position, rows)
        self.k.loss(&self.loss, rows, z, me.labels, me.target, me.s, z, me.loss)
        for r in range(rows):
            value = row_loss[r] * _get(me.loss, r, self.size)
            row_loss[r] = value
            if value - value != 0:
                run.bad = 1

    cdef void _targets(self, Batch *batch, Worker *me, int64_t position, int rows) noexcept nogil:
        cdef int r
        if self.loss.indices:
            for r in range(rows):
                me.labels[r] = fmb_label(&batch.y, batch.order[position + r] if batch.order != NULL else position + r)
            for r in range(rows, self.rb):
                me.labels[r] = 0
        else:
            self._gather(&batch.y, batch, position, rows, 1.0, me.target)

    # ---- the weight sweep -----------------------------------------------------------------------------------------

    cdef void _weight_sweep(self, Run *run, Mini *mini, int tid, int threads) noexcept nogil:
        """Tiles of the weight gradients: this thread's own, then what is left of the others'."""
        cdef int i
        cdef int64_t tile, chunk = 1 + 64 // mini.rows
        cdef Worker *me = &self.workers[tid]
        cdef Worker *owner
        cdef double coef64[8]
        cdef float coef32[8]
        for i in range(8):
            coef64[i] = run.coefficients[8 * mini.step + i]
            coef32[i] = <float> coef64[i]
        self._expect(run, mini, me, tid, threads)
        for i in range(threads):
            owner = &self.workers[(tid + i) % threads]
            while True:
                tile = fmb_take(&owner.next_tile, chunk)
                if tile >= owner.last_tile:
                    break
                self._tiles(run, mini, me, tile, min(tile + chunk, owner.last_tile),
                            <void *> coef64 if self.size == 8 else <void *> coef32)

    cdef void _expect(self, Run *run, Mini *mini, Worker *me, int tid, int threads) noexcept nogil:
        """The rows that this thread is going to gather in the next mini-batch: asked for little by little, with each
        tile a few cache lines, since all at once they would be waited for."""
        cdef Batch *batch = &run.batch
        cdef int64_t next = mini.begin + run.batch_size, blocks, lines
        cdef int64_t rows = min(run.batch_size, batch.n - next)
        me.expected.first = me.expected.last = me.expected.at = 0
        if mini.step + 1 < run.steps and rows > 0 and batch.X.col_stride > 0:
            blocks = (rows + mini.block_rows - 1) // mini.block_rows
            me.expected.first = next + min(rows, tid * blocks // threads * mini.block_rows)
            me.expected.last = next + min(rows, (tid + 1) * blocks // threads * mini.block_rows)
            lines = (me.expected.last - me.expected.first) * ((batch.X.columns * batch.X.col_stride + 63) // 64)
            me.expected_lines = 1 + lines * threads // self.total_tiles

    cdef void _tiles(self, Run *run, Mini *mini, Worker *me, int64_t tile, int64_t end,
                     const void *coef) noexcept nogil:
        """Tiles `tile` .. `end`: dw[i][o] = sum over rows of x[i][row] dz[row][o], and the update of w."""
        cdef int i = 0, j, rows, columns
        cdef int64_t panel, m, at
        cdef Stage *s
        cdef fmb_gemm g
        while tile >= self.stages[i].first_tile + self.stages[i].tiles:
            i += 1
        while tile < end:
            s = &self.stages[i]
            g.a_m, g.a_k, g.a_block, g.ahead = self.rb, 1, s.x_block, 0
            g.b_k, g.b_block = self.rb, self.rb * self.rb
            g.c_m = s.n_out if s.panels == 1 else self.rb
            g.blocks = mini.blocks
            g.k, g.k_last = mini.block_rows, mini.rows - (mini.blocks - 1) * mini.block_rows
            while tile < end and tile < s.first_tile + s.tiles:
                m = tile - s.first_tile
                if s.n_out * mini.rows * self.size <= ACROSS_BYTES:
                    panel = m % s.panels
                    m = m // s.panels * self.k.mr
                else:
                    panel = m // s.row_tiles
                    m = m % s.row_tiles * self.k.mr
                rows = <int> min(<int64_t> self.k.mr, s.rows - m)
                columns = <int> min(<int64_t> self.rb, s.n_out - panel * self.rb)
                at = (s.offset + m * s.n_out + panel * self.rb) * self.size
                if run.far:
                    fmb_prefetch_tile(run.params + at, rows, columns * self.size, s.n_out * self.size)
                    for j in range(3):
                        if run.state[j] != NULL:
                            fmb_prefetch_tile(run.state[j] + at, rows, columns * self.size, s.n_out * self.size)
                if me.expected.first < me.expected.last:
                    fmb_prefetch_rows(&run.batch.X, run.batch.order, &me.expected, me.expected_lines)
                self.k.gemm(&g, rows, 2 if columns > self.k.lanes else 1, 0, s.x + m * self.rb * self.size,
                            s.dz + panel * s.panel_stride * self.size, me.tile)
                if s.panels == 1:   # whole rows of weights, and so of gradients: one span
                    columns *= rows
                    rows = 1
                self.k.update(run.update, coef, run.params + at, run.state[0] + at if run.state[0] != NULL else NULL,
                              run.state[1] + at if run.state[1] != NULL else NULL,
                              run.state[2] + at if run.state[2] != NULL else NULL, me.tile, rows, columns, s.n_out,
                              self.rb)
                tile += 1
            i += 1

    # ---- inference: a thread's work -------------------------------------------------------------------------------

    cdef void _infer_work(self, Batch *batch, char *result, double *losses, double *weights, int64_t *counter,
                          int tid, int threads) noexcept nogil:
        """Blocks of rows forward, taken from `counter`; their losses too where `losses` is not NULL."""
        cdef uint64_t fp = fmb_fp_enter()
        cdef Worker *me = &self.workers[tid]
        cdef Mini mini
        cdef int64_t first
        mini.begin = 0
        mini.rows = batch.n
        mini.block_rows = self._block_rows(mini.rows, threads)
        mini.blocks = (mini.rows + mini.block_rows - 1) // mini.block_rows
        while True:
            first = fmb_take(counter, self.group)
            if first >= mini.blocks:
                break
            self._infer_rows(batch, &mini, me, first, min(<int64_t> self.group, mini.blocks - first), result, losses,
                             weights)
        fmb_fp_leave(fp)

    cdef void _infer_rows(self, Batch *batch, Mini *mini, Worker *me, int64_t first, int64_t blocks, char *result,
                          double *losses, double *weights) noexcept nogil:
        cdef int64_t b, row, r, block = (self.widest + 1) * self.rb, n_out = self.plan_outputs()
        cdef int i, rows, current = 0
        cdef Stage *s
        cdef char *a
        for i in range(self.n_stages):
            s = &self.stages[i]
            for b in range(blocks):
                a = me.da[current] + b * block * self.size
                if i == 0:
                    row = (first + b) * mini.block_rows
                    self._gather(&batch.X, batch, row, <int> min(mini.block_rows, mini.rows - row), batch.scale, a)
                    self._apply(self.input_ops, self.n_input_ops, a, NULL, 0, s.n_in, 0, 0, 0)
                for r in range(self.rb):
                    _put(a, s.n_in * self.rb + r, 1.0, self.size)
            self._forward(s, mini, first, blocks, me.da[current], block, me.da[1 - current], block, 0, s.n_out)
            current = 1 - current
            for b in range(blocks):
                self._apply(s.ops, s.n_ops, me.da[current] + b * block * self.size, NULL, 0, s.n_out, 0, 0, 0)
        for b in range(blocks):
            a = me.da[current] + b * block * self.size
            row = (first + b) * mini.block_rows
            rows = <int> min(mini.block_rows, mini.rows - row)
            self.k.scatter(a, n_out, rows, result + row * n_out * self.size, n_out)
            if losses != NULL:
                self._targets(batch, me, row, rows)
                for r in range(self.rb):
                    _put(me.s, r, 1.0, self.size)
                self.k.loss(&self.loss, rows, a, me.labels, me.target, me.s, NULL, me.loss)
                for r in range(rows):
                    losses[row + r] = self._sample_weight(batch, row + r) * _get(me.loss, r, self.size)
                    weights[row + r] = self._sample_weight(batch, row + r) * self._class_weight(batch, row + r)


# ---- small things ------------------------------------------------------------------------------------------------

cdef inline int64_t _line(int64_t size) noexcept nogil:
    """Bytes of whole cache lines."""
    return (size + 63) & ~<int64_t> 63


cdef inline void _put(void *p, int64_t i, double value, int size) noexcept nogil:
    if size == 8:
        (<double *> p)[i] = value
    else:
        (<float *> p)[i] = <float> value


cdef inline double _get(const void *p, int64_t i, int size) noexcept nogil:
    return (<const double *> p)[i] if size == 8 else (<const float *> p)[i]


cdef inline double _tree(double *lanes) noexcept nogil:
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))


cdef inline void _share(int64_t *first, int64_t *last, int64_t pieces, int tid, int threads) noexcept nogil:
    """A thread's own range of the pieces of a sweep."""
    first[0] = tid * pieces // threads
    last[0] = (tid + 1) * pieces // threads


cdef inline void _panels(int64_t *low, int64_t *high, int64_t n, int64_t width, int part, int parts) noexcept nogil:
    """A part of n features, in whole panels."""
    cdef int64_t panels = (n + width - 1) // width
    low[0] = min(n, part * panels // parts * width)
    high[0] = min(n, (part + 1) * panels // parts * width)


cdef int _source(cnp.ndarray a, fmb_source *source) except -1:
    """Where a user's array lies, one column or many."""
    source.data = <const char *> cnp.PyArray_DATA(a)
    source.row_stride = a.strides[0]
    source.col_stride = a.strides[1] if a.ndim == 2 else 0
    source.columns = a.shape[1] if a.ndim == 2 else 1
    source.type = TYPES[chr(a.descr.kind) + str(a.descr.itemsize)]
    return 0


include "native_functions.pxi"
