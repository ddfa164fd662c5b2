"""A plan as the records that compiled code reads, with its kernels and its memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._errors import unknown_name
from ...losses import FromOutside
from .. import Rules
from . import library, records
from .arena import Arena
from .few import few_rows
from .records import (
    BARRIER_BYTES,
    BATCH_NORM,
    CHUNK,
    CLIP,
    ENGINE,
    FACTOR,
    IDENTITY,
    INPUTS,
    KINDS,
    LAYER_NORM,
    LINE,
    LINEAR,
    LOSS,
    NONE,
    NORMS,
    OP,
    PRELU,
    SIGN,
    STAGE,
    WHOLE,
)
from .target import Target, available_isas, isa

if TYPE_CHECKING:
    from ...functions import Function
    from ...plan import Op, Plan
    from .. import Training

GROUP = 4  # blocks that go through a stage together when the weights don't fit the second-level cache
GROUP_BYTES = 1 << 19
AHEAD = 16  # rows of weights that are asked for before the forward product comes to them, at most


def one(record: records.Record) -> np.ndarray:
    """A record of zeros."""
    return np.zeros(1, record)


class NumbaPlan:
    """A plan made ready to run: records, kernels that are compiled when they are first needed, an arena."""

    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        training: Training | None = None,
        n_threads: int | None = None,
        isa: str | None = None,
        *,
        buffers: np.ndarray | None = None,
    ) -> None:
        self.plan, self.params, self.training = plan, params, training
        self.buffers = np.zeros(plan.buffer_size, plan.dtype) if buffers is None else buffers
        self.n_threads_asked = n_threads
        self.isa = _isa(isa)
        self.target = Target(self.isa, plan.dtype.itemsize)
        self._lock = threading.Lock()
        self._capacity = self._arena_threads = -1
        self._flops = float(plan.flops(1))
        self._ready = ("", 0)
        self._engine, self._loss = one(ENGINE), one(LOSS)
        self._barrier = np.zeros(BARRIER_BYTES + LINE, np.uint8)
        self._objective = FromOutside() if training is None else training.loss
        self._rules = Rules() if training is None else training.rules
        self._seed = 0 if training is None else int(np.uint64(training.seed & 2**64 - 1).astype(np.int64))
        self._varying: list[tuple[Any, Op]] = []  # dropouts whose p is a schedule, and their records
        self._callbacks: list[Any] = []  # of users' own functions: here, so that they live as long as their addresses
        self._read_plan()
        self._read_groups()
        self._read_loss()

    # ---- the plan as records --------------------------------------------------------------------------------------

    def _read_plan(self) -> None:
        plan, target, e = self.plan, self.target, self._engine
        self._stages = np.zeros(len(plan.stages), STAGE)
        chains = [plan.input_ops, *(stage.ops for stage in plan.stages)]
        self._ops = np.zeros(1 + sum(map(len, chains)), OP)
        places, at = [], 0
        for chain in chains:
            places.append(self._ops[at:].ctypes.data)
            for op in chain:
                self._read_op(self._ops[at], op)
                at += 1
        self._cuts = np.array(plan.batch_norms, np.int64)
        self._running_rstd = np.zeros(plan.buffer_size, plan.dtype)
        first_tile = first_chunk = 0
        for stage, s, ops in zip(plan.stages, self._stages, places[1:], strict=True):
            kinds = [op.kind for op in stage.ops]
            last = stage is plan.stages[-1]
            s["kind"], s["eps"] = KINDS.index(stage.kind), stage.eps
            s["momentum"] = -1 if stage.momentum is None else stage.momentum
            s["n_in"], s["n_out"], s["offset"] = stage.n_in, stage.n_out, stage.offset
            s["rows"], s["columns"] = stage.rows, stage.columns
            s["skip"] = -1 if stage.skip is None else stage.skip
            if stage.skip is not None:
                self._stages[stage.skip]["skipped"] = 1
            s["buffers"] = self.buffers.ctypes.data + stage.buffer_offset * target.itemsize
            s["running_rstd"] = self._running_rstd.ctypes.data + stage.buffer_offset * target.itemsize
            s["w"] = self.params.ctypes.data + stage.offset * target.itemsize
            s["ops"], s["n_ops"] = ops, len(kinds)
            s["derivative"] = NONE if not kinds else SIGN if kinds == ["relu"] and not last else FACTOR
            s["x_block"] = (stage.n_in + 1) * target.rb
            s["ahead"] = min(AHEAD, _lines(stage.n_out * target.itemsize) // 4)
            s["panels"] = -(-stage.columns // target.rb)
            s["row_tiles"] = -(-stage.rows // target.mr)
            s["tiles"] = s["row_tiles"] * s["panels"]
            s["first_tile"] = first_tile
            first_tile += s["tiles"]
            s["chunks"], s["first_chunk"] = -(-stage.size // CHUNK), first_chunk
            first_chunk += s["chunks"]
        for i in range(len(plan.stages) - 1, 0, -1):
            turns = plan.stages[i].kind == "linear"
            self._stages[i - 1]["side"] = 1 - self._stages[i]["side"] if turns else self._stages[i]["side"]
        e["size"], e["lanes"], e["rb"], e["mr"] = target.itemsize, target.lanes, target.rb, target.mr
        e["n_cuts"], e["cuts"], e["trained"] = len(self._cuts), self._cuts.ctypes.data, self.training is not None
        e["n_stages"], e["stages"] = len(plan.stages), self._stages.ctypes.data
        e["input_ops"], e["n_input_ops"] = places[0], len(plan.input_ops)
        e["group"] = GROUP if plan.size * target.itemsize > GROUP_BYTES else 1
        e["widest"] = max(plan.n_features, *(stage.n_out for stage in plan.stages))
        e["total_tiles"], e["total_chunks"], e["loss"] = first_tile, first_chunk, self._loss.ctypes.data
        e["barrier"] = self._barrier.ctypes.data + -self._barrier.ctypes.data % LINE

    def _read_op(self, record: Any, op: Op) -> None:
        record["value"] = op.value
        if op.kind == "dropout":
            record["seed"], record["index"], record["threshold"] = self._seed, op.index, int(op.value * 2**32)
            record["scale"] = 1.0 / (1.0 - op.value)
            if op.schedule is not None:
                self._varying.append((record, op))
        elif op.kind == "custom":
            assert op.function is not None
            record["function"] = self._callback(op.function)

    def _callback(self, function: Function) -> int:
        """The address of a user's own function, compiled for the plan's dtype."""
        callback = function.compiled(self.plan.dtype)
        self._callbacks.append(callback)
        return callback.address

    def _read_groups(self) -> None:
        """Which row of coefficients the weight and the bias of each stage take."""
        optimizer = None if self.training is None else self.training.optimizer
        stages = self.plan.stages
        names = [f"{stage.name}.{what}" for stage in stages for what, _ in stage.shapes]
        group = {} if optimizer is None else optimizer.parameter_groups(names)
        self._engine["groups"] = 1 if optimizer is None else optimizer.n_groups
        for stage, s in zip(stages, self._stages, strict=True):
            weight, bias = group.get(stage.name + ".weight", 0), group.get(stage.name + ".bias", 0)
            s["group"] = s["last_group"] = weight
            s["cut"] = stage.rows
            if stage.bias and bias != weight:
                s["last_group"], s["cut"] = bias, stage.rows - 1

    def _read_loss(self) -> None:
        loss, record = self._objective, self._loss
        record["n"], record["smoothing"] = self.plan.n_outputs, loss.label_smoothing
        if loss.function is not None:
            record["function"] = self._callback(loss.function)
        record["delta"] = loss.delta if loss.kind == "huber" else 1.0
        if loss.weight is not None:
            self._weight = np.ascontiguousarray(loss.weight, self.plan.dtype)
            record["weight"] = self._weight.ctypes.data

    # ---- kernels --------------------------------------------------------------------------------------------------

    def _kernel(self, words: str) -> int:
        return library.kernel(words, self.target)

    def _prepare(self, what: str, want: int = 0) -> int:
        """Compiles, or loads, the kernels of "train", "infer" or "apply", with all that is wanted of rows' gradients;
        the address of its entry. Called with the lock held: what is wanted decides some kernels.
        """
        if (what, want) != self._ready:
            e, self._ready = self._engine, ("", 0)  # until all are there
            if what != "apply":
                e["gemm"], e["scatter"] = self._kernel("gemm"), self._kernel("scatter")
                if what == "train":
                    e["few"], e["few_rows"] = self._kernel("few"), few_rows(self.target.lanes)
                at = 0
                for i, chain in enumerate([self.plan.input_ops, *(stage.ops for stage in self.plan.stages)]):
                    factor = want & INPUTS if i == 0 else self._stages[i - 1]["derivative"] == FACTOR
                    self._prepare_chain(chain, self._ops[at : at + len(chain)], what, bool(factor))
                    at += len(chain)
            for i, s in enumerate(self._stages if what != "apply" else ()):
                self._prepare_layer(i, s, what, want)
            needed = {
                "row_squares": want & NORMS,
                "scale_rows": want & CLIP,
                "outer": want & WHOLE,
                "limit": want & INPUTS,
            }
            for name, wanted in needed.items():
                if wanted:
                    e["k_" + name] = self._kernel(name)
            self._ready = (what, want)
        return library.entry(what)

    def _prepare_layer(self, i: int, s: Any, what: str, want: int) -> None:
        """The kernels of stage i beside its operations'."""
        kind, e, training = int(s["kind"]), self._engine, what == "train"
        mode = {NONE: "none", FACTOR: "factor", SIGN: "sign"}[int(s["derivative"])]
        by = {BATCH_NORM: "feature", LAYER_NORM: "row", PRELU: "slope"}.get(kind)
        if s["skip"] >= 0:
            e["k_add"] = self._kernel("add")
        if s["skip"] >= 0 or kind in (IDENTITY, BATCH_NORM):
            e["k_copy"] = self._kernel("multiply none")
        if kind == LAYER_NORM:
            e["k_row_moments"] = self._kernel("row_moments")
        if by is not None:
            s["forth"] = self._kernel("prelu" if kind == PRELU else f"normalize {by}")
        if training and kind == LINEAR:
            s["backward"] = self._kernel(f"backward {mode} {'keep' if i or want else 'drop'}")
        elif training:
            s["backward"] = self._kernel(f"multiply {mode}")
        if training and by is not None:
            s["back"] = self._kernel("prelu_backward" if kind == PRELU else f"normalize_backward {by}")
            s["sums"] = self._kernel(f"column_sums {by}")
            if kind == LAYER_NORM:
                e["k_row_means"] = self._kernel("row_means")
            if kind == BATCH_NORM:
                e["k_column_moments"] = self._kernel("column_moments")
            if want:
                s["terms"] = self._kernel(f"row_terms {by}")
                e["k_add"], e["k_multiply"] = self._kernel("add"), self._kernel("multiply factor")

    def _prepare_chain(self, chain: tuple[Op, ...], ops: np.ndarray, what: str, factor: bool) -> None:
        """The kernels of operations that follow each other; `factor`: their derivative is written down."""
        done = False
        for op, record in zip(chain, ops, strict=True):
            dropout = op.kind == "dropout"
            if what == "infer":
                record["infer"] = 0 if dropout else self._kernel(f"{_name(op)} none")
                continue
            record["train"] = 0
            if not dropout or self.training is not None:
                derivative = "none" if not factor else "more" if done else "first"
                record["train"], done = self._kernel(f"{_name(op)} {derivative}"), True
        if what == "train" and factor and not done and len(ops):  # nothing is done: the derivative is 1
            ops[0]["train"] = self._kernel("activation identity first")

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _reserve(self, rows: int, threads: int) -> None:
        """Room for mini-batches of `rows` rows on `threads` threads; rows 0 for inference."""
        if rows > self._capacity or threads > self._arena_threads:
            rows, threads = max(rows, self._capacity), max(threads, self._arena_threads)
            self._capacity = self._arena_threads = -1  # until all is told where it is
            self._arena = Arena(self._engine, self._stages, self.target, rows, threads)
            self._capacity, self._arena_threads = rows, threads


def _lines(stride: int) -> int:
    """Cache lines so many bytes apart that a first-level cache of 8 ways holds; see native_engine.pxi."""
    return 8 * max(1, 4096 // max(64, stride & -stride))


def _name(op: Op) -> str:
    """The name of an operation's kernel."""
    return op.kind if op.kind in ("dropout", "custom") else f"activation {op.kind}"


def _isa(name: str | None) -> str:
    if name is None:
        return isa()
    if name not in available_isas():
        raise unknown_name("isa", name, available_isas())
    return name
