"""From a plan to what the compiled loops read. Included by native.pyx."""


cdef class NativePlan:
    """A plan as C structures, with the arena that a run of it works in. A lock keeps calls apart."""

    cdef readonly object plan, training, isa, n_threads_asked
    cdef object params, buffers, weight, lock
    cdef list varying           # (place in `ops`, the plan's operation) of dropouts whose p is a schedule
    cdef list callbacks         # of users' own functions: here, so that they live as long as their addresses
    cdef Rules rules
    cdef Engine e
    cdef Op *ops
    cdef char *running_rstd     # of all batch normalisations
    cdef void *memory           # which the arena is in
    cdef char *arena            # all buffers; begins at a cache line
    cdef readonly int64_t arena_bytes
    cdef int64_t capacity       # rows of a mini-batch that it has room for
    cdef int arena_threads
    cdef int update

    def __cinit__(self):
        memset(&self.e, 0, sizeof(Engine))
        self.ops = NULL
        self.running_rstd = NULL
        self.arena = NULL

    def __init__(self, plan, params, training=None, n_threads=None, isa=None, *, buffers=None):
        self.plan = plan
        self.params = params
        self.buffers = np.zeros(plan.buffer_size, plan.dtype) if buffers is None else buffers
        self.lock = threading.Lock()
        self.callbacks = []
        self.training = training
        self.n_threads_asked = n_threads
        self.isa = isa if isa is not None else globals()["isa"]()
        self.e.k = _kernels(plan.dtype, self.isa)
        self.e.size = plan.dtype.itemsize
        self.e.rb = self.e.k.rb
        self.varying = []
        self._read_plan(plan)
        self._read_groups(plan, training)
        weights = plan.size * self.e.size
        self.e.largest_group = 1 if weights <= GROUP_BYTES else GROUP if not self.e.packs else PACKED_ROWS // self.e.rb
        # Where tiles are narrower than half a cache line: wider ones lose less than keeping the weights twice costs.
        self.e.tiles = training is not None and 2 * self.e.k.mr * self.e.size < 64 and weights <= TILED_BYTES
        self.update = FMB_GRADIENT
        self.e.loss.weight = NULL
        self.e.loss.kind = FMB_LINEAR
        self.e.loss.n = plan.n_outputs
        memset(&self.rules, 0, sizeof(Rules))
        self.rules.clip = self.rules.max_norm = self.rules.limit = INFINITY
        if training is not None:
            loss = training.loss
            self.e.loss.kind = LOSSES.index(loss.kind)
            self.e.loss.smoothing = loss.label_smoothing
            self.e.loss.delta = loss.delta
            if loss.function is not None:
                self.e.loss.function = self._callback(loss.function)
            self.weight = None if loss.weight is None else np.ascontiguousarray(loss.weight, plan.dtype)
            if self.weight is not None:
                self.e.loss.weight = cnp.PyArray_DATA(self.weight)
            self.update = UPDATES.index(training.optimizer.kind)
            self.e.dropout = 1
            self.e.seed = training.seed & 0xFFFFFFFFFFFFFFFF
            rules = training.rules
            self.rules.part_rows = rules.part_rows
            self.rules.clip = rules.clip_per_example
            self.rules.noise = rules.noise_multiplier * rules.clip_per_example if rules.noise_multiplier > 0 else 0.0
            self.rules.secure = rules.secure
            self.rules.max_norm = rules.max_grad_norm
            self.rules.limit = rules.clip_value
            self.rules.divide = rules.divide

    def __dealloc__(self):
        free(self.e.stages)
        free(self.e.cuts)
        free(self.ops)
        free(self.running_rstd)
        free(self.memory)
        free(self.e.workers)

    def _read_plan(self, plan):
        """The plan as C structures."""
        cdef int n_ops = len(plan.input_ops) + sum(len(stage.ops) for stage in plan.stages)
        cdef int i, j = 0
        cdef Stage *s
        self.e.n_stages = len(plan.stages)
        self.e.n_cuts = len(plan.batch_norms)
        self.e.stages = <Stage *> calloc(self.e.n_stages, sizeof(Stage))
        self.e.cuts = <int *> calloc(self.e.n_cuts + 1, sizeof(int))
        self.ops = <Op *> calloc(n_ops + 1, sizeof(Op))
        self.running_rstd = <char *> calloc(plan.buffer_size + 1, self.e.size)
        if self.e.stages == NULL or self.e.cuts == NULL or self.ops == NULL or self.running_rstd == NULL:
            raise MemoryError
        for i, j in enumerate(plan.batch_norms):
            self.e.cuts[i] = j
        j = 0
        self.e.input_ops = self.ops
        self.e.n_input_ops = len(plan.input_ops)
        for op in plan.input_ops:
            j = self._read_op(j, op)
        self.e.widest = plan.n_features
        self.e.total_tiles = self.e.total_chunks = 0
        for i, stage in enumerate(plan.stages):
            s = &self.e.stages[i]
            s.kind = <Kind> <int> KINDS.index(stage.kind)
            s.n_in = stage.n_in
            s.n_out = stage.n_out
            s.rows = stage.rows
            s.columns = stage.columns
            s.eps = stage.eps
            s.momentum = -1 if stage.momentum is None else stage.momentum
            s.skip = -1 if stage.skip is None else stage.skip
            if s.skip >= 0:
                self.e.stages[s.skip].skipped = 1
            s.buffers = <char *> cnp.PyArray_DATA(self.buffers) + <int64_t> stage.buffer_offset * self.e.size
            s.running_rstd = self.running_rstd + <int64_t> stage.buffer_offset * self.e.size
            s.offset = stage.offset
            s.w = <char *> cnp.PyArray_DATA(self.params) + s.offset * self.e.size
            s.ops = self.ops + j
            s.n_ops = len(stage.ops)
            kinds = [op.kind for op in stage.ops]
            s.derivative = NONE if not kinds else SIGN if kinds == ["relu"] and i + 1 < self.e.n_stages else FACTOR
            for op in stage.ops:
                j = self._read_op(j, op)
            s.x_block = (s.n_in + 1) * self.e.rb
            s.ahead = min(AHEAD, _lines(s.n_out * self.e.size) // 4)
            s.packed = s.kind == LINEAR and s.rows * s.columns * self.e.size > PACKED_BYTES
            self.e.packs |= s.packed
            s.panels = (s.columns + self.e.rb - 1) // self.e.rb
            s.row_tiles = (s.rows + self.e.k.mr - 1) // self.e.k.mr
            s.tiles = s.row_tiles * s.panels
            s.first_tile = self.e.total_tiles
            self.e.total_tiles += s.tiles
            s.chunks = (s.rows * s.columns + CHUNK - 1) // CHUNK
            s.first_chunk = self.e.total_chunks
            self.e.total_chunks += s.chunks
            self.e.widest = max(self.e.widest, s.n_out)
        self.e.row_bytes = 0
        if self.e.n_cuts == 0 and all(stage.kind == "linear" for stage in plan.stages):
            for i in range(self.e.n_stages):
                s = &self.e.stages[i]
                self.e.row_bytes += (s.n_in + 1 + s.panels * self.e.rb) * self.e.size
        self.e.weight_bytes = plan.size * self.e.size
        self.e.pieced = self.e.row_bytes > 0 and self.e.total_tiles * _tile_bytes(&self.e) <= PIECED_BYTES
        for i in range(self.e.n_stages - 1, 0, -1):
            s = &self.e.stages[i]
            self.e.stages[i - 1].side = 1 - s.side if s.kind == LINEAR else s.side

    def _read_groups(self, plan, training):
        """Which row of coefficients the weight and the bias of each stage take."""
        cdef Stage *s
        names = [f"{stage.name}.{what}" for stage in plan.stages for what, _ in stage.shapes]
        group = training.optimizer.parameter_groups(names) if training is not None else {}
        self.e.groups = 1 if training is None else training.optimizer.n_groups
        for i, stage in enumerate(plan.stages):
            s = &self.e.stages[i]
            s.group = s.last_group = group.get(stage.name + ".weight", 0)
            s.cut = s.rows
            if stage.bias and group.get(stage.name + ".bias", 0) != s.group:
                s.last_group = group.get(stage.name + ".bias", 0)
                s.cut = s.rows - 1

    cdef int _read_op(self, int j, object op) except -1:
        self.ops[j].value = op.value
        if op.kind == "dropout":
            self.ops[j].kind = DROPOUT
            self.ops[j].index = op.index
            self.ops[j].threshold = <uint32_t> int(op.value * 4294967296.0)
            self.ops[j].scale = 1.0 / (1.0 - op.value)
            if op.schedule is not None:
                self.varying.append((j, op))
        elif op.kind == "custom":
            self.ops[j].kind = CUSTOM
            self.ops[j].function = self._callback(op.function)
        else:
            self.ops[j].kind = ACTIVATIONS.index(op.kind)
        return j + 1

    cdef fmb_callback _callback(self, object function) except NULL:
        """The address of a user's own function, compiled for the plan's dtype."""
        callback = function.compiled(self.plan.dtype)
        self.callbacks.append(callback)
        return <fmb_callback> <size_t> callback.address

    # ---- memory ---------------------------------------------------------------------------------------------------

    cdef int _reserve(self, int64_t rows, int threads) except -1:
        """Room for mini-batches of `rows` rows on `threads` threads; rows 0 for inference."""
        cdef int64_t need
        cdef void *memory
        cdef int least = min(GROUP if rows == 0 else SMALL_GROUP, self.e.largest_group)
        if self.arena != NULL and rows <= self.capacity and threads <= self.arena_threads and least <= self.e.group:
            return 0
        rows = max(rows, self.capacity)
        threads = max(threads, self.arena_threads)
        self.e.room = _blocks(&self.e, rows, threads)
        self.e.group = _group(&self.e, self.e.room, threads, max(least, min(GROUP, self.e.group)))
        free(self.e.workers)
        self.e.workers = NULL
        self.e.workers = <Worker *> calloc(threads, sizeof(Worker) + 3 * self.e.n_stages * sizeof(void *))
        need = _assign(&self.e, NULL, rows, threads)
        memory = calloc(need + 64, 1)   # zeros that a large arena has only where, and by whom, it is used
        if self.e.workers == NULL or memory == NULL:
            free(memory)
            self.capacity = self.arena_threads = 0
            free(self.memory)
            self.arena = NULL
            self.memory = NULL
            raise MemoryError(f"a mini-batch of {rows} rows needs {need} bytes of buffers")
        free(self.memory)
        self.memory = memory
        self.arena = <char *> memory + (-<int64_t> memory & 63)
        _assign(&self.e, self.arena, rows, threads)
        self.capacity = rows
        self.arena_threads = threads
        self.arena_bytes = need
        return 0
