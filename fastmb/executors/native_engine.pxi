"""What a plan becomes in C: stages, workers, buffers; and what one call works on. Included by native.pyx."""


# ---- what the loops see --------------------------------------------------------------------------------------------

cdef struct Op:
    int kind            # an activation, DROPOUT, or CUSTOM
    int index
    double value
    uint32_t threshold
    double scale
    const double *rates     # a dropout's p at the updates since `since`, or NULL: always the same
    uint64_t since
    fmb_callback function   # of CUSTOM

cdef enum Derivative:
    NONE      # no operation
    FACTOR    # written by the forward pass, multiplied by the backward pass
    SIGN      # ReLU alone: the sign of the output

cdef enum Kind:         # of a stage, in the order of KINDS
    LINEAR, BATCH_NORM, LAYER_NORM, PRELU, IDENTITY

cdef struct Stage:
    Kind kind
    int64_t n_in, n_out, rows, columns
    char *w             # [rows][columns] in the flat vector
    int64_t offset      # of w in the flat vector, in elements
    Op *ops
    int n_ops
    Derivative derivative
    char *x             # its input: [block][n_in + 1][rb]
    int64_t x_block     # elements of a block of x
    char *dz            # its output gradient: [panel][row][rb]; if not LINEAR [block][n_out][rb]
    int64_t panels, panel_stride
    int64_t ahead       # rows of weights that are asked for before the forward product comes to them
    int packed          # several blocks' forward product copies the weights, a few columns at a time
    char *tiled         # the weights again, as tiles of the forward product read them: [n_out / mr][rows][mr], or NULL
    int64_t row_tiles, tiles, first_tile
    int side            # of the gradients that go back, the one in which its output's is
    int skip            # the stage whose input is added to what this one gives, or -1
    int skipped         # whether a later stage, or this one, adds this one's input
    double eps, momentum    # momentum -1: the mean over all mini-batches
    char *stats         # native_layers.pxi
    char *buffers       # BATCH_NORM: running mean [n], variance [n], mini-batches [1]
    char *running_rstd  # 1 / sqrt(running variance + eps)
    int group, last_group   # rows of coefficients: of matrix rows before `cut`, and of those from there on
    int64_t cut
    int64_t chunks, first_chunk     # of the matrix, where a gradient that is stored is applied

cdef struct Worker:
    int64_t next_block, last_block, next_tile, last_tile
    int64_t next_relayed, last_relayed  # tiles of the first stage, where that is relayed: the others are apart
    int64_t first_row, last_row         # of the first stage's matrix: the thread's own there
    char *da[2]         # gradients of a group's activations, or the activations in inference
    char *grad[2]       # the same gradients; with batch normalisation those of all blocks, for all threads
    char **d            # per stage: derivatives of a group (or of all blocks), [block][n_out][rb]
    char **held         # per stage with a skip: its output gradient, as large
    char **kept         # per stage with a skip: a group's values that are to be added, in inference
    char *stats         # of the rows of a block: mean, rstd, across, along
    char *tile
    char *packed        # columns of weights
    char *coef          # the step's coefficients, [group][8]
    char *s
    int32_t *labels
    char *target
    char *loss
    char *squares       # of a group's rows (or of all): the squared norms of their own gradients
    char *d_input       # as many: derivatives of the operations on the input
    char *factors       # of a block's rows: what squares are made of, and what rows are multiplied by
    uint32_t *bits      # random bits of a chunk
    fmb_source source       # what it gathers: all features, or those of its own rows of the matrix
    fmb_cursor expected     # rows of the next mini-batch, and how many cache lines of them to ask for with each tile
    int64_t expected_lines
    char before[64]         # cache lines of their own
    int32_t handed          # pieces of the first stage that the next thread may go on with
    char after[64]

cdef struct Batch:
    fmb_source X, y
    int has_y
    double scale
    const double *sample_weight
    const int64_t *order    # of the whole set, or NULL
    const int64_t *offsets  # mini-batch k is order[offsets[k]] .. order[offsets[k + 1]], or NULL: all of one size
    int64_t n               # rows of the set

cdef enum Want:             # what a row sweep is to do besides the step's own work
    NORMS = 1       # the norm of every row's own gradient
    CLIP = 2        # and shorten those that are longer than `clip`
    WHOLE = 4       # write every row's gradient out
    INPUTS = 8      # the gradient with respect to the input

cdef struct Rules:          # what a gradient goes through on its way to the update
    int64_t part_rows       # rows of a part of a mini-batch; 0: all
    double clip             # longest gradient of one row
    double noise            # deviation of the noise on the sum over the rows
    int secure              # the noise comes from the operating system's generator
    double max_norm, limit  # of the mean gradient, as a whole and of each number
    double divide           # what the sum is divided by; 0: by the sum of the weights

cdef struct Run:            # what one call works on
    Batch batch
    Rules rules
    int want
    int sweep               # make weight gradients at all
    int stored              # they are stored in `gradient`, as sums, and applied when the mini-batch is complete
    int applied             # not at all: the caller does that
    char *gradient
    int64_t row             # rows that the mini-batch had before this call
    int running             # move the running statistics
    double *stats           # five a mini-batch, see Executor.run, or NULL
    float *norms            # each row's norm, by its place in the set, or NULL
    char *norms_out         # the same in the plan's dtype, by its place in the call, or NULL
    char **whole            # per stage: where rows' gradients of weight and bias go
    char *inputs            # where gradients of the input go
    int failed
    int64_t first, steps, batch_size
    uint64_t t
    const double *coefficients  # a row of `columns` a step: 8 for each group, then the average's weight if there is one
    int64_t columns
    double *sums
    int update
    char *params
    char *state[3]
    char *average           # of the weights, or NULL
    double deadline
    int64_t check           # steps between two looks at the clock
    int64_t start, done     # updates made before this region, and by now
    int64_t stop            # the updates made when all threads end, or -1; one may be a step ahead of another's look
    int64_t bad
    int threads             # that were asked for; there may be fewer
    int64_t piece           # rows of a mini-batch that go through both sweeps before the next; 0 for all
    int64_t together        # rows of as many parts as go through before the next
    int far                 # parameters and state don't stay near: they are asked for ahead of their tile
    int claim               # other threads have read the parameters: they are taken from them ahead of their tile

cdef enum Work:             # what is done with a tile
    SUM = 1
    UPDATE = 2

cdef struct Into:           # where gradients go
    int kind                # of update
    char *coef              # [group][8]
    char *params
    char *state[3]          # `states` of them; the others are never looked at, and any address
    int states
    char *average
    double weight           # of the weights in their average
    int completes           # with a last part's tiles: `before` has the sum of the parts before it, or is NULL, and the
    char *before            # whole times `factor` is the mean
    double factor

cdef struct Mini:           # one mini-batch, or what goes through of it, worked out by every thread for itself
    int64_t step, begin, rows, block_rows, blocks
    int64_t part            # rows of a part, if there are several: their gradients are added one after the other
    int64_t row, batch_rows     # rows of the mini-batch before these, and in all
    int relay               # the first stage's product goes from thread to thread: each has rows of weights of its own
    int claim               # other threads have read what the rows left before: it is taken from them ahead of time
    int last                # these complete it
    double weight           # the sum that its mean is taken over
    int64_t place           # the first of its blocks in the arena
    int32_t turn            # where mini-batches go in pieces: those that a tile's sum has had when it comes to this one
    int64_t taken           # and those before this mini-batch that threads took, beyond their first ones

cdef struct Engine:         # a plan made ready to run
    const fmb_kernels *k
    int size, rb            # bytes of an element; rows of a block
    int n_stages
    Stage *stages
    int n_cuts
    int *cuts               # the stages that need statistics of all rows: there the row sweep is cut into phases
    Op *input_ops
    int n_input_ops
    int packs               # some stage is packed
    int tiles               # some stages' weights are kept as tiles too, in training
    int tiled               # and are what the weights are, in this region
    int largest_group, group    # blocks that go through a stage together: at most, and as there is room
    int64_t room            # blocks of a mini-batch
    int groups              # of parameters, each with its coefficients
    int64_t widest, total_tiles, total_chunks
    char *tile_squares      # of every tile's mean gradient, four parts each; and of every chunk's
    double *chunk_squares
    double *row_squares     # each row's squared norm, and norm, [block][rb]
    double *row_norms
    char *chains            # of the inputs' squares, on their way from thread to thread: [block][4][rb]
    Worker *workers
    double *row_loss        # each row's weighted loss, [block][rb]
    int64_t row_bytes       # of the arena that a row takes where all stages are linear, else 0
    int64_t weight_bytes    # of the parameters
    int pieced              # a mini-batch can go through in pieces
    char *pieces            # sums of weight gradients over the pieces so far, a tile each, and how many those are
    int64_t next_piece      # to be taken, of all that threads don't begin with
    double lanes[8]         # and of the rows' losses
    fmb_loss_spec loss
    fmb_barrier barrier
    uint64_t seed
    int dropout             # whether rows that come back are trained on


# ---- small things --------------------------------------------------------------------------------------------------

cdef inline int64_t _ceil(int64_t n, int64_t size) noexcept nogil:
    """How many of a size n takes."""
    return (n + size - 1) // size


cdef inline int64_t _line(int64_t size) noexcept nogil:
    """Bytes of whole cache lines."""
    return (size + 63) & ~<int64_t> 63


cdef inline int64_t _lines(int64_t stride) noexcept nogil:
    """Cache lines so many bytes apart that a first-level cache of 8 ways holds: those at the same place of a page share
    8. Where the stride is a power of two, there are few."""
    return 8 * max(<int64_t> 1, 4096 // max(<int64_t> 64, stride & -stride))


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
    source.type = _type(a.descr.kind, a.descr.itemsize)
    return 0


cdef int _type(char kind, int64_t size) except -1:
    """The numbers of a NumPy dtype, of those in `fastmb.data.DTYPES`."""
    cdef int log = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
    if kind == b"f":
        return FMB_H + log - 1
    return (FMB_I1 if kind == b"i" else FMB_U1) + log


# ---- memory --------------------------------------------------------------------------------------------------------

cdef int64_t _blocks(Engine *e, int64_t rows, int threads) noexcept:
    """Blocks of a mini-batch, as so many threads and as one thread cut it."""
    cdef int64_t block = min(_block_rows(e, rows, threads, rows), _block_rows(e, rows, 1, rows))
    return (rows + block - 1) // block


cdef int _group(Engine *e, int64_t blocks, int threads, int least) noexcept:
    """Blocks that go through a stage together: as many as a thread has, but at least so many; 0 for inference."""
    if blocks == 0:
        return e.largest_group
    return <int> min(<int64_t> e.largest_group, max(<int64_t> least, (blocks + threads - 1) // threads))


cdef int _tiles_pay(Engine *e, Stage *s) noexcept nogil:
    """Whether weights are kept as tiles: where a tile that walks down them waits for cache lines of which it reads
    little."""
    return s.kind == LINEAR and s.panels > 1 and s.rows * s.n_out * e.size > GROUP_BYTES


cdef inline int64_t _tile_bytes(Engine *e) noexcept nogil:
    """Of a tile of a weight gradient, and what a row that is narrower than its tile writes too much."""
    return _line((e.k.mr + 2) * e.rb * e.size)


cdef int64_t _piece(Engine *e, Run *run, int threads) noexcept nogil:
    """Rows of a mini-batch that go through the network, and into the weight gradients, before the next: as many as
    leave what stays near, and each thread its share of them; 0 for all, where those are few, or where threads would
    take more of the sums from each other than of what rows leave."""
    cdef int64_t most, rows
    if not e.pieced or run.stored or run.applied or run.want or not run.sweep or run.rules.part_rows:
        return 0
    most = (PIECE_BYTES // e.row_bytes // (4 * e.rb) + 1) * 4 * e.rb
    if threads == 1:
        return most if 2 * most <= run.batch_size else 0
    if run.batch_size * e.row_bytes < 2 * e.weight_bytes + e.total_tiles * TILE_BYTES:   # sums go on, and back
        return 0
    rows = _ceil(run.batch_size, threads * _ceil(run.batch_size, threads * most))
    rows = _ceil(rows, max(<int64_t> 8, e.k.lanes)) * max(<int64_t> 8, e.k.lanes)
    return rows if run.batch_size > (threads - 1) * rows else 0


cdef inline char *_sums(Engine *e, int64_t tile) noexcept nogil:
    """A tile of a weight gradient, summed over the pieces so far."""
    return e.pieces + tile * (_tile_bytes(e) + 64)


cdef inline int32_t *_added(Engine *e, int64_t tile) noexcept nogil:
    """How many pieces those are, since the region began."""
    return <int32_t *> (_sums(e, tile) + _tile_bytes(e))


cdef int64_t _together(Engine *e, Run *run) noexcept nogil:
    """Rows of the parts that go through the network together: in fewer rounds the threads wait less for each other, and
    what is little memory need not be spared."""
    cdef int64_t part = run.rules.part_rows
    if part == 0 or part % e.rb or e.row_bytes == 0 or run.applied:
        return part
    return max(part, TOGETHER_BYTES // e.row_bytes // part * part)


cdef inline int64_t _tiles_across(Engine *e, Stage *s) noexcept nogil:
    """Tiles across a stage's weights."""
    return (s.n_out + e.k.mr - 1) // e.k.mr


cdef int64_t _assign(Engine *e, char *base, int64_t rows, int threads) noexcept:
    """Hands out the arena from `base` on and returns its size; with NULL, the size alone."""
    cdef int64_t at = 0, blocks = e.room, panel_rows = blocks * e.rb, block, b, r
    cdef int i, w
    cdef Stage *s
    cdef Worker *worker
    cdef char *ones
    for i in range(e.n_stages):
        s = &e.stages[i]
        s.x = base + at
        at += _line(blocks * s.x_block * e.size)
        if base != NULL:
            for b in range(blocks):
                ones = s.x + (b * s.x_block + s.n_in * e.rb) * e.size
                for r in range(e.rb):
                    _put(ones, r, 1.0, e.size)
        s.dz = base + at
        s.panel_stride = panel_rows * e.rb
        if s.kind == LINEAR:
            at += _line(s.panels * s.panel_stride * e.size)
        elif s.kind != IDENTITY:
            at += _line(blocks * s.n_out * e.rb * e.size)
        s.stats = base + at
        if s.kind == BATCH_NORM and rows > 0:
            at += _line(N_STATISTICS * s.n_in * e.size)
        elif s.kind == LAYER_NORM:
            at += _line(blocks * 2 * e.rb * e.size)
        s.tiled = NULL
        if e.tiles and rows > 0 and _tiles_pay(e, s):
            s.tiled = base + at
            at += _line(_tiles_across(e, s) * s.rows * e.k.mr * e.size)
    e.row_loss = <double *> (base + at)
    at += _line(panel_rows * sizeof(double))
    e.row_squares = <double *> (base + at)
    at += _line(panel_rows * sizeof(double))
    e.row_norms = <double *> (base + at)
    at += _line(panel_rows * sizeof(double))
    e.chains = base + at
    at += _line(4 * panel_rows * e.size)
    e.tile_squares = base + at
    at += _line(4 * e.total_tiles * e.size)
    e.chunk_squares = <double *> (base + at)
    at += _line(e.total_chunks * sizeof(double))
    e.pieces = base + at
    if e.pieced and rows > 0:
        at += e.total_tiles * (_tile_bytes(e) + 64)
    block = _line(e.rb * e.size)
    for w in range(threads):
        worker = &e.workers[w]
        worker.d = (<char **> &e.workers[threads]) + 3 * w * e.n_stages
        worker.held, worker.kept = worker.d + e.n_stages, worker.d + 2 * e.n_stages
        for i in range(2):
            worker.da[i] = worker.grad[i] = base + at
            at += _line(e.group * (e.widest + 1) * e.rb * e.size)
        for i in range(e.n_stages):
            if e.stages[i].skip >= 0:
                worker.kept[i] = base + at
                at += _line(e.group * e.stages[i].n_out * e.rb * e.size)
        if rows > 0 and e.n_cuts == 0:
            at = _assign_gradients(e, worker, base, at, e.group)
        elif rows > 0 and w == 0:
            for i in range(2):
                worker.grad[i] = base + at
                at += _line(blocks * (e.widest + 1) * e.rb * e.size)
            at = _assign_gradients(e, worker, base, at, blocks)
        elif rows > 0:
            worker.grad, worker.d, worker.held = e.workers[0].grad, e.workers[0].d, e.workers[0].held
            worker.squares, worker.d_input = e.workers[0].squares, e.workers[0].d_input
        worker.stats = base + at
        at += 4 * block
        worker.tile = base + at
        at += _tile_bytes(e)
        worker.packed = base + at
        if e.packs:
            at += _line(KC * PANELS * e.k.mr * e.size)
        worker.coef = base + at
        at += _line(8 * e.groups * e.size)
        worker.s = base + at
        at += block
        worker.loss = base + at
        at += block
        worker.labels = <int32_t *> (base + at)
        at += _line(e.rb * sizeof(int32_t))
        worker.target = base + at
        at += _line(_plan_outputs(e) * e.rb * e.size)
        worker.factors = base + at
        at += 2 * block
        worker.bits = <uint32_t *> (base + at)
        at += _line(CHUNK * sizeof(uint32_t))
    return at


cdef int64_t _assign_gradients(Engine *e, Worker *worker, char *base, int64_t at, int64_t blocks) noexcept:
    """Room for what so many blocks keep from their way forward and back, and that only a thread's own blocks need."""
    cdef int i
    cdef int64_t size
    for i in range(e.n_stages):
        size = _line(blocks * e.stages[i].n_out * e.rb * e.size)
        worker.d[i] = worker.held[i] = NULL
        if e.stages[i].derivative == FACTOR:
            worker.d[i] = base + at
            at += size
        if e.stages[i].skip >= 0:
            worker.held[i] = base + at
            at += size
    worker.squares = base + at
    at += blocks * _line(e.rb * e.size)
    worker.d_input = base + at
    if e.n_input_ops > 0:
        at += _line(blocks * e.stages[0].n_in * e.rb * e.size)
    return at


cdef int64_t _plan_outputs(Engine *e) noexcept nogil:
    return e.stages[e.n_stages - 1].n_out
