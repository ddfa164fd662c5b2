# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The native executor: the loops and the threads over the C kernels of csrc/.

A step of a mini-batch is two sweeps with a barrier after each. In the row sweep a thread takes blocks of rows: it
gathers them, takes them forward through all stages, computes the loss, and takes the gradient backward to the first
stage. In the weight sweep a thread takes tiles of the weight gradients, each a sum over all rows of the mini-batch in
their order, and updates the weights under the tile while it is in the cache. One OpenMP region runs many steps.

A small network takes a mini-batch of many rows in pieces, each through both sweeps by one thread, so that activations
stay in its cache: a piece goes on from the sums over those before it, and the threads update when all are in.

Who takes a block or a tile changes no bit, so they are taken from counters: every thread has a range of its own, the
same each step, which keeps its weights in its cache, and helps the others when that is done.

Buffers live in one arena: the input of every stage, [block][feature][rb] with one more feature that is 1 and meets the
bias; the output gradient of every stage as panels [panel][row][rb features]; and each thread's scratch.

This file is the executor as Python sees it. What the loops work on is in native_engine.pxi, how a plan becomes that in
native_plan.pxi, the sweeps themselves in native_sweeps.pxi, layers that are no product in native_layers.pxi, the
module's other functions in native_functions.pxi.
"""

import os
import threading

import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange
from libc.math cimport INFINITY, log2, sqrt
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from .kernels cimport *

from .. import threads as _threads
from .._errors import unknown_name

cnp.import_array()

# ---- names of C's enumerations -----------------------------------------------------------------------------------

ISAS = ("v2", "v3", "v4", "neon")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "tanh",
               "sigmoid")
KINDS = ("linear", "batch_norm", "layer_norm", "prelu", "identity")
LOSSES = ("cross_entropy", "bce_with_logits", "mse", "mae", "huber", "linear", "custom")
UPDATES = ("gradient", "accumulate", "sgd", "momentum", "nesterov", "adam", "amsgrad", "rmsprop", "rmsprop_momentum",
           "rmsprop_centered", "rmsprop_centered_momentum", "adagrad", "nadam", "radam", "adamax", "adadelta", "lion")

cdef int DROPOUT = -1
cdef int CUSTOM = -2
cdef int64_t KC = 512    # products of a chain before the next rows are looked at, where several blocks share weights
cdef int GROUP = 4       # blocks that go through a stage together when the weights don't fit the second-level cache
cdef int SMALL_GROUP = 2  # in training, where a thread has no more: scratch grows with them
cdef int64_t GROUP_BYTES = 1 << 19
cdef int64_t TILED_BYTES = 1 << 22  # of a network, up to which large weights are kept as tiles too
cdef int64_t TILED_STEPS = 4     # at least, for that to pay
cdef int64_t TOGETHER = 3        # tiles of a gradient after which weights go to their tiles: mostly to whole ones
cdef int64_t MANY_TILES = 16     # of a thread, from which on they are taken in larger numbers
cdef int64_t CLAIMED_BYTES = 1 << 22    # of a network, up to which weights are near enough to be claimed
cdef int64_t ASKED_ROWS = 128    # from which on a tile takes so long that asking for the next one's weights pays
cdef enum:
    ASKS = 8                     # things at the most that a tile's product asks for one after the other
cdef int64_t PACKED_BYTES = 1 << 21     # weights of a stage that are packed: walked down, they'd leave every cache
cdef int PACKED_ROWS = 256       # that go through a stage together where some are packed
cdef int64_t RELAYED_ROWS = 12   # threads' rows of a relayed stage begin at multiples: whole tiles, and groups of 4
cdef int64_t PANELS = 8          # panels of columns that are packed at a time
cdef int64_t SMALL_BLOCKS = 4   # blocks a thread up to which blocks of one vector of rows are thought of
cdef int64_t AHEAD = 16         # rows of weights that are asked for before the forward product comes to them, at most
cdef int64_t ACROSS_BYTES = 1 << 18    # output gradients up to here stay near: tiles go along rows of weights
cdef int64_t SQUARED = 128     # features that are gathered before their squares are added up: a multiple of 4
cdef int64_t PIECE_BYTES = 1 << 18     # of the arena that the rows of a piece of a mini-batch take
cdef int64_t TILE_BYTES = 1300   # of what rows leave, that it takes as long to read as to hand on a tile of sums
cdef int64_t TOGETHER_BYTES = 1 << 21  # of the arena that parts of a mini-batch take together, at the most
cdef int64_t PIECED_BYTES = 1 << 17    # of weight gradients at the most, for their sums to be kept from piece to piece
cdef int64_t CHUNK = 4096        # numbers of a stored gradient that are applied together
cdef int64_t PART_ROWS = 256     # rows that go through the network together where their own gradients alone are wanted
cdef int64_t REGION_FLOPS = 400_000     # work for a thread that makes it worth entering a parallel region
cdef double TRIAL = 0.002       # seconds that one thread, or all, are tried for; which is faster depends on more than
cdef double PROVEN = 0.25       # the work: on caches shared or not, on other processes. Seconds between two trials
cdef double REMEMBERED = 0.05   # seconds that readings count for: one that was disturbed doesn't decide
cdef double WORTH = 0.97        # of one thread's time: what all may take at the most to be preferred
cdef double TRIAL_FLOPS = 1e9   # a step of so much work is never faster on one thread


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


include "native_engine.pxi"
include "native_layers.pxi"
include "native_sweeps.pxi"
include "native_plan.pxi"


cdef struct Tried:          # how long work of some kind takes one thread, and all
    double seconds[2]       # that it took; what is long ago counts less and less
    double steps[2]         # made in these
    double busy             # seconds in all: the clock here
    double settled, end     # of a trial: threads that slept are awake, and it is over
    double next             # trial
    int team, fresh         # that is tried; whether what was found before doesn't count any more
    int threads             # all of them


cdef int _faster(Tried *tried) noexcept:
    """Whether all threads are preferred."""
    return tried.seconds[1] * tried.steps[0] <= WORTH * tried.seconds[0] * tried.steps[1]


cdef void _begin_trial(Tried *tried) noexcept:
    """First of all threads, then of one; later of what isn't in use."""
    cdef int first = tried.steps[0] == 0
    tried.team = tried.steps[1] == 0 if first else not _faster(tried)
    tried.fresh = 1
    tried.settled = tried.busy + TRIAL * tried.team
    tried.end = tried.settled + TRIAL
    tried.next = tried.end if first and tried.team else tried.busy + PROVEN


cdef double _until(Tried *tried) noexcept:
    """When the next reading ends."""
    if tried.busy < tried.settled:
        return tried.settled
    return tried.end if tried.busy < tried.end else tried.next


cdef void _note(Tried *tried, int team, double seconds, double steps) noexcept:
    """A reading. In a trial the first since the threads are awake counts alone, and so do those before."""
    cdef double kept = REMEMBERED / (REMEMBERED + seconds)
    if tried.busy < tried.end and tried.fresh:
        kept = 0
        tried.fresh = tried.busy < tried.settled
    tried.seconds[team] = kept * tried.seconds[team] + seconds
    tried.steps[team] = kept * tried.steps[team] + steps
    tried.busy += seconds


cdef class NativeExecutor(NativePlan):
    """Runs a plan in compiled code on all cores; see `fastmb.executors.Executor` for its methods."""

    cdef object gradient        # that is stored before it is applied, once one was
    cdef readonly int64_t made  # by all calls so far
    cdef readonly int64_t piece_rows    # of the pieces in which the last run took its mini-batches; 0: whole
    cdef list rates             # of dropouts whose p is a schedule
    cdef Tried tried[128]       # by about how much work it is, whether more is wanted, and whether it is a single step

    cdef int _batch(self, Batch *b, object batches) except -1:
        _source(batches.X, &b.X)
        b.scale = batches.scale
        b.n = batches.X.shape[0]
        y = batches.y
        b.has_y = y is not None
        if b.has_y:
            _source(y, &b.y)
            self.e.loss.indices = self.e.loss.kind == FMB_CROSS_ENTROPY and y.ndim == 1
        weights = batches.sample_weight
        b.sample_weight = <const double *> cnp.PyArray_DATA(weights) if weights is not None else NULL
        order = batches.order
        b.order = <const int64_t *> cnp.PyArray_DATA(order) if order is not None else NULL
        offsets = batches.offsets
        b.offsets = <const int64_t *> cnp.PyArray_DATA(offsets) if offsets is not None else NULL
        if order is not None:
            b.n = order.shape[0]
        return 0

    cdef int _vary(self, uint64_t t, int64_t steps) except -1:
        """The dropouts' p at the steps to come, where it isn't always the same."""
        cdef int j
        cdef cnp.ndarray rates
        self.rates = []     # owns the arrays
        for j, op in self.varying:
            rates = op.values(t, steps)
            self.rates.append(rates)
            self.ops[j].rates = <const double *> cnp.PyArray_DATA(rates)
            self.ops[j].since = t
        return 0

    cdef int _begin(self, Run *run, object batches, int64_t steps, uint64_t t, cnp.ndarray sums) except -1:
        """A run over `steps` mini-batches, the first of them 0, with nothing made of the gradients yet."""
        memset(run, 0, sizeof(Run))
        self._batch(&run.batch, batches)
        run.steps = steps
        run.batch_size = min(<int64_t> batches.batch_size, run.batch.n)
        run.t = t
        run.sums = <double *> cnp.PyArray_DATA(sums)
        run.update = FMB_GRADIENT
        run.params = <char *> cnp.PyArray_DATA(self.params)
        run.rules = self.rules
        return 0

    cdef int _noisy(self, Run *run) except -1:
        """Before an update with noise: whether the operating system gives random numbers, if they are its own."""
        cdef char byte
        if run.rules.noise > 0 and run.rules.secure and getentropy(&byte, 1) != 0:
            raise OSError("the operating system gave no random numbers for the noise")
        return 0

    cdef int _state(self, Run *run, object state) except -1:
        """The arrays that an update changes beside the parameters."""
        cdef int i
        cdef int64_t n_states = state.shape[0]
        for i in range(min(n_states, 3)):
            run.state[i] = <char *> cnp.PyArray_DATA(state) + i * self.plan_size() * self.e.size
        run.far = run.batch_size >= self.e.k.lanes and (1 + n_states) * self.plan_size() * self.e.size > GROUP_BYTES
        return 0

    cdef int _optimize(self, Run *run, cnp.ndarray coefficients) except -1:
        """Gradients go into the optimiser's update, and the weights into their average, if there is one."""
        cdef object average = self.training.average
        run.coefficients = <const double *> cnp.PyArray_DATA(coefficients)
        run.columns = coefficients.shape[1]
        run.update = self.update
        if average is not None:
            run.average = <char *> cnp.PyArray_DATA(average)
        return self._state(run, self.training.state)

    cdef int _store(self, Run *run) except -1:
        """Gradients are stored before they are applied, in an array of this executor's."""
        if self.gradient is None:
            self.gradient = np.zeros(self.plan_size(), self.plan.dtype)
        run.stored = 1
        run.gradient = <char *> cnp.PyArray_DATA(self.gradient)
        return 0

    cdef int64_t _train(self, Run *run, double seconds) except -1:
        """The steps of a run on as many threads as pay."""
        cdef int threads, kind
        cdef int64_t rows = run.batch_size
        cdef double flops = self._flops() * rows
        if run.batch.offsets != NULL:
            rows = _longest(run)
        run.together = _together(&self.e, run)
        if run.together > 0:
            rows = min(rows, run.together)
        run.check = 1 + <int64_t> (1e6 / (flops + 1e4))
        with self.lock:
            if self.varying:
                self._vary(run.t, run.steps)
            threads = self._threads_for(flops, run.steps)
            # Room for all threads' pieces is room for what one thread takes, too: a larger piece, or the whole.
            self._reserve(threads * _ceil(_piece(&self.e, run, threads), self.e.rb) * self.e.rb or rows, threads)
            if threads > 1 and self.n_threads_asked is None and flops < TRIAL_FLOPS:
                kind = <int> log2(flops) + 32 * (run.want != 0) + 64 * (run.steps == 1)
                self._try_out(run, threads, &self.tried[kind], fmb_now() + seconds)
            else:
                run.deadline = fmb_now() + seconds
                self._start(run, threads)
            self.made += run.done
        if run.failed:
            raise OSError("the operating system gave no random numbers for the noise")
        return run.done

    cdef int _threads_for(self, double flops, int64_t steps) except -1:
        """The threads for `steps` steps of `flops` operations."""
        cdef int threads = _threads.resolve(self.n_threads_asked, flops)
        if threads > 1 and self.n_threads_asked is None:
            threads = <int> max(1.0, min(<double> threads, flops * steps / REGION_FLOPS))
        return threads

    cdef int _try_out(self, Run *run, int threads, Tried *tried, double deadline) except -1:
        """Runs with all threads or with one, whichever has been faster; the other is tried from time to time."""
        cdef double now = fmb_now(), start
        cdef int64_t done
        cdef int team
        if tried.threads != threads:
            memset(tried, 0, sizeof(Tried))
            tried.threads = threads
        while run.done < run.steps and not run.bad and (run.done == 0 or now < deadline):
            if tried.busy >= tried.next:
                _begin_trial(tried)
            team = tried.team if tried.busy < tried.end else _faster(tried)
            run.deadline = min(deadline, now + _until(tried) - tried.busy)
            done, start = run.done, now
            self._start(run, threads if team else 1)
            now = fmb_now()
            _note(tried, team, now - start, run.done - done)
        return 0

    cdef int _start(self, Run *run, int threads) except -1:
        """Steps `run.done` .. of a run, until its deadline, on so many threads."""
        run.stop = -1
        run.threads = threads
        run.start = run.done
        run.piece = self.piece_rows = _piece(&self.e, run, threads)
        run.claim = (threads > 1 and run.batch_size >= self.e.k.lanes and self.e.weight_bytes <= CLAIMED_BYTES
                     and run.coefficients != NULL and not run.stored)
        self.e.tiled = (self.e.tiles and not run.stored and run.steps - run.done >= TILED_STEPS
                        and run.batch_size > self.e.rb)
        _prepare(&self.e, run)
        with nogil:
            if threads == 1:
                _work(&self.e, run, 0, 1)
            else:
                with parallel(num_threads=threads):
                    _work(&self.e, run, omp_get_thread_num(), omp_get_num_threads())
        self.e.tiled = 0    # whoever comes next may change the weights
        return 0

    cdef int64_t plan_size(self) noexcept:
        return (<cnp.ndarray> self.params).shape[0]

    cdef double _flops(self) noexcept:
        """Floating-point operations of a training step, a row."""
        cdef double total = 0
        cdef int i
        for i in range(self.e.n_stages):
            if self.e.stages[i].kind == LINEAR:
                total += (4.0 if i == 0 else 6.0) * self.e.stages[i].n_in * self.e.stages[i].n_out
        return total

    def run(self, batches, int64_t first, uint64_t t, cnp.ndarray coefficients, cnp.ndarray sums, double seconds,
            double[:, ::1] stats=None, float[::1] norms=None):
        cdef Run run
        self._begin(&run, batches, coefficients.shape[0], t, sums)
        run.first = first
        run.sweep = run.running = 1
        self._noisy(&run)
        self._optimize(&run, coefficients)
        if self.training.rules.stored:
            self._store(&run)
        if run.rules.clip < INFINITY:
            run.want |= NORMS | CLIP
        if stats is not None:
            run.want |= NORMS
            run.stats = &stats[0, 0]
        if norms is not None:
            run.want |= NORMS
            run.norms = &norms[0]
        return self._train(&run, seconds)

    def gradients(self, batches, uint64_t t, out, cnp.ndarray sums):
        cdef Run run
        out[:] = 0
        self._begin(&run, batches, 1, t, sums)
        run.rules.part_rows = 0
        run.sweep = 1
        self._state(&run, out.reshape(1, -1))
        return self._train(&run, 1e9) == 1

    def accumulate(self, batches, uint64_t t, int64_t row, out, cnp.ndarray sums, inputs=None):
        cdef Run run
        self._begin(&run, batches, 1, t, sums)
        run.rules.part_rows = 0
        run.sweep = run.running = 1
        run.row = row
        run.stored = 1
        run.gradient = <char *> cnp.PyArray_DATA(out)
        run.applied = 1
        if run.rules.clip < INFINITY:
            run.want |= NORMS | CLIP
        if inputs is not None:
            run.want |= INPUTS
            run.inputs = <char *> cnp.PyArray_DATA(inputs)
        return self._train(&run, 1e9) == 1

    def apply(self, gradient, double weight, uint64_t t, cnp.ndarray coefficients):
        cdef Run run
        cdef int threads
        memset(&run, 0, sizeof(Run))
        run.t = t
        run.params = <char *> cnp.PyArray_DATA(self.params)
        run.rules = self.rules
        run.rules.divide = 0
        run.gradient = <char *> cnp.PyArray_DATA(gradient)
        self._noisy(&run)
        self._optimize(&run, coefficients)
        with self.lock:
            threads = _threads.resolve(self.n_threads_asked, 20.0 * self.plan_size())
            self._reserve(1, threads)
            with nogil:
                if threads == 1:
                    _apply_work(&self.e, &run, weight, 0, 1)
                else:
                    with parallel(num_threads=threads):
                        _apply_work(&self.e, &run, weight, omp_get_thread_num(), omp_get_num_threads())
            self.made += 1
        if run.failed:
            raise OSError("the operating system gave no random numbers for the noise")

    def per_example(self, batches, uint64_t t, cnp.ndarray sums, norms=None, gradients=None, inputs=None):
        cdef Run run
        cdef list whole = [] if gradients is None else gradients
        cdef char **places = <char **> calloc(len(whole) + 1, sizeof(char *))
        cdef int i
        if places == NULL:
            raise MemoryError
        try:
            self._begin(&run, batches, 1, t, sums)
            run.stored = run.applied = 1    # sums: nothing is divided by the weights
            run.rules.part_rows = PART_ROWS
            if norms is not None:
                run.want |= NORMS
                run.norms_out = <char *> cnp.PyArray_DATA(norms)
            if gradients is not None:
                run.want |= WHOLE
                for i in range(len(whole)):
                    places[i] = <char *> cnp.PyArray_DATA(whole[i]) if whole[i] is not None else NULL
                run.whole = places
            if inputs is not None:
                run.want |= INPUTS
                run.inputs = <char *> cnp.PyArray_DATA(inputs)
            return self._train(&run, 1e9) == 1
        finally:
            free(places)

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
        batch.order = NULL
        batch.n = batch.X.columns and batches.X.shape[0]
        self._infer(&batch, out, &losses[0], &weights[0])

    cdef int _infer(self, Batch *batch, object out, double *losses, double *weights) except -1:
        cdef int threads = _threads.resolve(self.n_threads_asked, self._flops() / 3 * batch.n)
        cdef char *result = <char *> cnp.PyArray_DATA(out)
        cdef int64_t counter = 0
        with self.lock:
            self._reserve(0, threads)
            _infer_statistics(&self.e)
            with nogil:
                if threads == 1:
                    _infer_work(&self.e, batch, result, losses, weights, &counter, 0, 1)
                else:
                    with parallel(num_threads=threads):
                        _infer_work(&self.e, batch, result, losses, weights, &counter, omp_get_thread_num(),
                                    omp_get_num_threads())
        return 0


include "native_functions.pxi"
