"""The numba executor: what is called. The loops are in `sweeps` and `inference`."""

from __future__ import annotations

import ctypes
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import threads as _threads
from ..._progress import undisturbed
from . import library, team
from .plan import GROUP_BYTES, NumbaPlan, one
from .records import (
    CLIP,
    INPUTS,
    MAX_THREADS,
    NORMS,
    RUN,
    SOURCE,
    WHOLE,
)

if TYPE_CHECKING:
    from ...data import Batches

REGION_FLOPS = 400_000  # work for a thread that makes it worth entering a parallel region
TRIAL = 0.002  # seconds that one thread, or all, are tried for
PROVEN = 0.25  # seconds between two trials
REMEMBERED = 0.05  # seconds that readings count for: one that was disturbed doesn't decide
WORTH = 0.97  # of one thread's time: what all may take at the most to be preferred
CLAIMED_BYTES = 1 << 22  # of a network, up to which weights are near enough to be claimed
PART_ROWS = 256  # rows that go through the network together where their own gradients alone are wanted
_FOREVER = 1e9  # seconds
TRIAL_FLOPS = 1e9  # a step of so much work is never faster on one thread


class _Tried:
    """How long work of some kind takes one thread, and all; as in native.pyx."""

    def __init__(self) -> None:
        self.seconds, self.steps = [0.0, 0.0], [0.0, 0.0]  # what is long ago counts less and less
        self.busy = 0.0  # seconds in all: the clock here
        self.settled = self.end = 0.0  # of a trial: threads that slept are awake, and it is over
        self.next = 0.0  # trial
        self.team, self.fresh = 0, False  # that is tried; whether what was found before doesn't count any more

    def faster(self) -> int:
        """Whether all threads are preferred."""
        return int(self.seconds[1] * self.steps[0] <= WORTH * self.seconds[0] * self.steps[1])

    def begin_trial(self) -> None:
        """First of all threads, then of one; later of what isn't in use."""
        first = self.steps[0] == 0
        self.team = int(self.steps[1] == 0) if first else 1 - self.faster()
        self.fresh = True
        self.settled = self.busy + TRIAL * self.team
        self.end = self.settled + TRIAL
        self.next = self.end if first and self.team else self.busy + PROVEN

    def until(self) -> float:
        """When the next reading ends."""
        if self.busy < self.settled:
            return self.settled
        return self.end if self.busy < self.end else self.next

    def note(self, team: int, seconds: float, steps: int) -> None:
        """A reading. In a trial the first since the threads are awake counts alone, and so do those before."""
        kept = REMEMBERED / (REMEMBERED + seconds)
        if self.busy < self.end and self.fresh:
            kept, self.fresh = 0.0, self.busy < self.settled
        self.seconds[team] = kept * self.seconds[team] + seconds
        self.steps[team] = kept * self.steps[team] + steps
        self.busy += seconds


class NumbaExecutor(NumbaPlan):
    """Runs a plan in code that Numba compiles, on all cores; see `fastmb.executors.Executor` for its methods."""

    def __init__(self, *plan: Any, **options: Any) -> None:
        super().__init__(*plan, **options)
        self._tried: dict[tuple[int, ...], _Tried] = {}  # by about how much work it is, and of what kind, and threads
        self._gradient: np.ndarray | None = None
        self.made = 0

    def _vary(self, run: np.ndarray, keep: list[Any]) -> None:
        """The dropouts' p at the steps to come, where it isn't always the same."""
        t = int(run["t"][0])
        for record, op in self._varying:
            rates = op.values(t, int(run["steps"][0]))
            keep.append(rates)
            record["rates"], record["since"] = rates.ctypes.data, t

    def _source(self, array: np.ndarray, scale: float, keep: list[Any]) -> int:
        """A record that says where an array lies, one column or many, and what reads it."""
        record = one(SOURCE)
        type_ = "u1" if array.dtype.kind == "b" else array.dtype.kind + str(array.dtype.itemsize)
        many = array.ndim == 2
        record["data"], record["row_stride"], record["scale"] = array.ctypes.data, array.strides[0], scale
        record["col_stride"], record["columns"] = (array.strides[1], array.shape[1]) if many else (0, 1)
        how = "dense" if record["col_stride"] == array.itemsize else "strided"
        if how == "dense" and scale == 1 and array.dtype == self.plan.dtype:
            how = "plain"
        record["gather"] = self._kernel(f"gather {type_} {how}")
        record["label_size"] = array.itemsize
        keep.append(record)
        return record.ctypes.data

    def _run(self, batches: Batches, mode: str, keep: list[Any]) -> np.ndarray:
        """The record of a call, but for what only training or inference needs. `keep` holds what it points to."""
        run = one(RUN)
        run["x"] = self._source(batches.X, batches.scale, keep)
        run["n"] = len(batches.X)
        run["input_scale"] = batches.scale
        if batches.y is not None:
            run["y"] = self._source(batches.y, 1.0, keep)
            loss = self._objective
            kind, weighted = loss.kind, loss.weight is not None
            if kind == "cross_entropy":
                run["indices"] = batches.y.ndim == 1
                if batches.y.ndim != 1:
                    kind = "cross_entropy_rows"
                elif weighted or loss.label_smoothing:
                    kind = "cross_entropy_labels"
            run["loss_kernel"] = self._kernel(f"loss {kind} {'weighted' if weighted else 'plain'} {mode}")
            run["row_weights"] = batches.sample_weight is not None or (weighted and run["indices"][0])
        if batches.sample_weight is not None:
            run["sample_weight"] = batches.sample_weight.ctypes.data
        keep.append(batches)
        return run

    def run(
        self,
        batches: Batches,
        first: int,
        t: int,
        coefficients: np.ndarray,
        sums: np.ndarray,
        seconds: float,
        stats: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> int:
        assert self.training is not None
        with self._lock:
            run, _keep = self._begin(batches, len(coefficients), t, sums)
            run["first"], run["sweep"], run["running"] = first, 1, 1
            _try_entropy(run)
            self._optimize(run, coefficients)
            want = CLIP | NORMS if self._rules.clip_per_example < math.inf else 0
            if self._rules.stored:
                if self._gradient is None:
                    self._gradient = np.zeros(self.plan.size, self.plan.dtype)
                self._store(run, self._gradient)
                self._prepare_applying(run)
            if stats is not None:
                want |= NORMS
                run["stats"] = stats.ctypes.data
                self._engine["k_total"] = self._kernel("total")
                self._engine["k_squares"] = self._kernel("squares")
            if norms is not None:
                want |= NORMS
                run["norms"] = norms.ctypes.data
            return self._train(run, want, seconds)

    def gradients(self, batches: Batches, t: int, out: np.ndarray, sums: np.ndarray) -> bool:
        out[:] = 0
        with self._lock:
            run, _keep = self._begin(batches, 1, t, sums)
            run["part_rows"], run["sweep"] = 0, 1
            run["update"] = self._kernel("update gradient")
            self._state(run, out.reshape(1, -1))
            return self._train(run, 0, _FOREVER) == 1

    def accumulate(
        self,
        batches: Batches,
        t: int,
        row: int,
        out: np.ndarray,
        sums: np.ndarray,
        inputs: np.ndarray | None = None,
    ) -> bool:
        with self._lock:
            run, _keep = self._begin(batches, 1, t, sums)
            run["part_rows"], run["sweep"], run["running"], run["row"], run["applied"] = 0, 1, 1, row, 1
            self._store(run, out)
            want = CLIP | NORMS if self._rules.clip_per_example < math.inf else 0
            if inputs is not None:
                want |= INPUTS
                run["inputs"] = inputs.ctypes.data
            return self._train(run, want, _FOREVER) == 1

    @undisturbed()
    def apply(self, gradient: np.ndarray, weight: float, t: int, coefficients: np.ndarray) -> None:
        assert self.training is not None
        with self._lock:
            run = one(RUN)
            entry = self._prepare("apply")
            run["t"], run["params"] = t, self.params.ctypes.data
            self._obey(run)
            run["divide"], run["gradient"] = weight, gradient.ctypes.data
            _try_entropy(run)
            self._optimize(run, coefficients)
            self._prepare_applying(run)
            library.NOTICE.done()
            threads = min(_threads.resolve(self.n_threads_asked, 20.0 * self.plan.size), MAX_THREADS)
            self._reserve(1, threads)
            team.run(entry, self._engine.ctypes.data, run.ctypes.data, threads)
            self.made += 1
            _check_entropy(run)

    def per_example(
        self,
        batches: Batches,
        t: int,
        sums: np.ndarray,
        norms: np.ndarray | None = None,
        gradients: list[np.ndarray | None] | None = None,
        inputs: np.ndarray | None = None,
    ) -> bool:
        with self._lock:
            run, _keep = self._begin(batches, 1, t, sums)
            run["stored"] = run["applied"] = 1  # sums: nothing is divided by the weights
            run["part_rows"] = PART_ROWS
            want = 0
            if norms is not None:
                want |= NORMS
                run["norms_out"] = norms.ctypes.data
            if gradients is not None:
                want |= WHOLE
                places = np.array([0 if g is None else g.ctypes.data for g in gradients], np.int64)
                run["whole"] = places.ctypes.data
            if inputs is not None:
                want |= INPUTS
                run["inputs"] = inputs.ctypes.data
            return self._train(run, want, _FOREVER) == 1

    def _begin(self, batches: Batches, steps: int, t: int, sums: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        """A run over `steps` mini-batches, the first of them 0, with nothing made of the gradients yet; and what must
        live as long as it.
        """
        keep: list[Any] = [sums]
        run = self._run(batches, "train", keep)
        if batches.order is not None:
            run["order"], run["n"] = batches.order.ctypes.data, len(batches.order)
        if batches.offsets is not None:
            run["offsets"] = batches.offsets.ctypes.data
            self._rows_of = batches.offsets
        run["steps"], run["batch_size"], run["t"] = steps, min(batches.batch_size, int(run["n"][0])), t
        run["sums"], run["params"] = sums.ctypes.data, self.params.ctypes.data
        self._obey(run)
        self._vary(run, keep)
        return run, keep

    def _obey(self, run: np.ndarray) -> None:
        """The rules that gradients go by."""
        rules = self._rules
        run["part_rows"], run["clip"], run["secure"] = rules.part_rows, rules.clip_per_example, rules.secure
        run["noise"] = rules.noise_multiplier * rules.clip_per_example if rules.noise_multiplier > 0 else 0.0
        run["max_norm"], run["limit"], run["divide"] = rules.max_grad_norm, rules.clip_value, rules.divide
        run["seed"] = self._seed

    def _optimize(self, run: np.ndarray, coefficients: np.ndarray) -> None:
        """Gradients go into the optimiser's update, and the weights into their average, if there is one."""
        assert self.training is not None
        run["update"] = self._kernel(f"update {self.training.optimizer.kind}")
        run["coefficients"], run["columns"] = coefficients.ctypes.data, coefficients.shape[1]
        if self.training.average is not None:
            run["average"] = self.training.average.ctypes.data
            self._engine["k_average"] = self._kernel("average")
        self._state(run, self.training.state)

    def _state(self, run: np.ndarray, state: np.ndarray) -> None:
        """The arrays that an update changes beside the parameters."""
        for name, array in zip(("state0", "state1", "state2"), state, strict=False):
            run[name] = array.ctypes.data
        touched = (1 + len(state)) * self.plan.size * self.target.itemsize
        run["far"] = run["batch_size"] >= self.target.lanes and touched > GROUP_BYTES

    def _store(self, run: np.ndarray, gradient: np.ndarray) -> None:
        """Gradients are stored, as sums."""
        run["stored"], run["gradient"] = 1, gradient.ctypes.data
        run["store"], run["accumulate"] = self._kernel("update gradient"), self._kernel("update accumulate")

    def _prepare_applying(self, run: np.ndarray) -> None:
        """The kernels that a stored gradient goes through."""
        e = self._engine
        e["k_limit"], e["k_squares"] = self._kernel("limit"), self._kernel("squares")
        if run["noise"] > 0:
            e["k_noise"] = self._kernel("noise")

    def _train(self, run: np.ndarray, want: int, seconds: float) -> int:
        """The steps of a run on as many threads as pay."""
        run["want"] = want
        entry = self._prepare("train", want)
        library.NOTICE.done()
        steps, rows = int(run["steps"][0]), int(run["batch_size"][0])
        flops = self._flops * rows
        if run["offsets"]:
            first = int(run["first"][0])
            rows = max(1, int(np.diff(self._rows_of[first : first + steps + 1]).max()))
        if run["part_rows"]:
            rows = min(rows, int(run["part_rows"][0]))
        run["check"] = 1 + int(1e6 / (flops + 1e4))
        threads = self._threads_for(flops, steps)
        self._reserve(rows, threads)
        deadline, done = time.monotonic() + seconds, run["done"].data
        try:
            if threads > 1 and self.n_threads_asked is None and flops < TRIAL_FLOPS:
                kind = int(flops).bit_length(), int(want != 0), int(steps == 1), threads
                self._try_out(entry, run, threads, self._tried.setdefault(kind, _Tried()), deadline)
            else:
                self._start(entry, run, threads, deadline)
        finally:  # calls nothing, so that no signal's handler comes in between
            self.made += done[0]
        _check_entropy(run)
        return done[0]

    def _threads_for(self, flops: float, steps: int) -> int:
        """The threads for `steps` steps of `flops` operations."""
        threads = min(_threads.resolve(self.n_threads_asked, flops), MAX_THREADS)
        if threads > 1 and self.n_threads_asked is None:
            threads = int(max(1.0, min(threads, flops * steps / REGION_FLOPS)))
        return threads

    def _try_out(self, entry: int, run: np.ndarray, threads: int, tried: _Tried, deadline: float) -> None:
        """Runs with all threads or with one, whichever has been faster; the other is tried from time to time."""
        now, steps, done = time.monotonic(), int(run["steps"][0]), 0
        while done < steps and not run["bad"][0] and (done == 0 or now < deadline):
            if tried.busy >= tried.next:
                tried.begin_trial()
            team = tried.team if tried.busy < tried.end else tried.faster()
            start, before = now, done
            self._start(entry, run, threads if team else 1, min(deadline, now + tried.until() - tried.busy))
            now, done = time.monotonic(), int(run["done"][0])
            tried.note(team, now - start, done - before)

    def _start(self, entry: int, run: np.ndarray, threads: int, deadline: float) -> None:
        """Steps `done` .. of a run, until a deadline, on so many threads."""
        run["deadline"], run["stop"], run["start"] = deadline, 0, run["done"]
        near = self.plan.size * self.target.itemsize <= CLAIMED_BYTES
        updates = run["coefficients"] != 0 and not run["stored"]
        run["claim"] = threads > 1 and run["batch_size"] >= self.target.lanes and near and updates
        team.run(entry, self._engine.ctypes.data, run.ctypes.data, threads)

    def forward(self, X: np.ndarray, scale: float, out: np.ndarray) -> None:
        from ...data import Batches

        self._infer(Batches(X, None, None, None, len(X), scale), out, None, None)

    def evaluate(self, batches: Batches, out: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        self._infer(batches, out, losses, weights)

    def _infer(self, batches: Batches, out: np.ndarray, losses: np.ndarray | None, weights: np.ndarray | None) -> None:
        keep: list[Any] = []
        threads = min(_threads.resolve(self.n_threads_asked, self._flops / 3 * len(batches.X)), MAX_THREADS)
        with self._lock:
            entry = self._prepare("infer")
            run = self._run(batches, "evaluate", keep)
            library.NOTICE.done()
            run["result"] = out.ctypes.data
            if losses is not None and weights is not None:
                run["losses"], run["weights"] = losses.ctypes.data, weights.ctypes.data
            self._reserve(0, threads)
            self._infer_statistics()
            team.run(entry, self._engine.ctypes.data, run.ctypes.data, threads)

    def _infer_statistics(self) -> None:
        """What inference multiplies by, from the running variances as they are now."""
        for i in self._cuts:
            stage = self.plan.stages[i]
            here, n = stage.buffer_offset, stage.n_in
            variance = self.buffers[here + n : here + 2 * n].astype(np.float64)
            self._running_rstd[here : here + n] = 1 / np.sqrt(variance + stage.eps)


def _try_entropy(run: np.ndarray) -> None:
    """Before an update with noise: whether the operating system gives random numbers, if they are its own."""
    if run["noise"] > 0 and run["secure"]:
        run["failed"] = ctypes.CDLL(None).getentropy(ctypes.create_string_buffer(1), 1)
    _check_entropy(run)


def _check_entropy(run: np.ndarray) -> None:
    if run["failed"]:
        raise OSError("the operating system gave no random numbers for the noise")
