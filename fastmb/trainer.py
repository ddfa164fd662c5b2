"""Training: a network, a loss and an optimiser brought together and run over data by an executor.

The trainer is the only one who knows how far training is: updates made (`t`), epochs done (`epoch`), and, when a fit
was broken off, the place within an epoch. Everything random is a function of these and of the seed. The loop of `fit`
is in `fastmb._fitting`, what may be assigned to is in `fastmb._settings`; the checks of the data are in `fastmb.data`.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import executors, losses, optim
from ._averaged import Averaged
from ._checks import boolean, integer, number
from ._checks import seed as check_seed
from ._checks import verbose as check_verbose
from ._errors import unknown_metric, unknown_name
from ._fitting import Epoch, Fitting
from ._gradient_stats import FIGURES
from ._metrics import BY_TASK
from ._per_example import Pending, PerExample, check_rows_apart
from ._planning import leaves
from ._settings import assignable
from .data import Batches, check_weights, check_X, check_y, flat
from .executors import Executor, Rules, Training, default_name
from .history import History
from .losses import Loss
from .nn import Sequential, _aligned_zeros
from .optim import Adam, Optimizer
from .optim.base import check_end
from .rng import Stream, splitmix64

SAMPLINGS = ("shuffle", "poisson")
_MOST_ROWS = 2**53  # of an update
_CHUNK = 1 << 20  # numbers of the widest layer that an evaluation may have at a time
if TYPE_CHECKING:
    from .averaging import Average
    from .callbacks import Callback

_FOREVER = 1e9  # seconds
_UNSAVED = ("_lock", "_under_way", "_executor", "_weights", "_ahead", "_standing")


@assignable
class Trainer(PerExample, Averaged):
    """Trains a network by mini-batch gradient descent.

    Parameters
    ----------
    net : Sequential
        The network; its parameters are changed in place.
    loss : str or Loss, default "cross_entropy"
        ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"``, ``"mae"``, ``"huber"``, or an instance with options.
    optimizer : str or Optimizer, optional
        An instance such as ``SGD(lr=0.1, momentum=0.9)``, or a name. Default: ``Adam()``, with its lr of 0.001.
    batch_size : int, default 64
        Rows of a mini-batch; may be more than there are. The last of an epoch may be smaller.
    shuffle : bool, default True
        Take the rows in a new order in each epoch (else in their own).
    drop_last : bool, default False
        Leave out the last mini-batch of an epoch if it is smaller.
    seed : int, default 0
        For the order of rows and the dropout masks. Same seed and data, same bits.
    n_threads : int, optional
        At most so many threads. Default: what the machine allows. The result doesn't depend on it.
    executor : {"native", "numba", "numpy"}, optional
        What runs the steps: the compiled extension; code that Numba compiles when it is first used, with the same bits
        (``pip install 'fastmb[numba]'``); or the slow and plain reference. Default: the first that is there.
    accumulate_steps : int, default 1
        Make an update from so many mini-batches of `batch_size` rows, as from one that has all their rows, in the
        memory of one (an epoch's last update takes what is left). `BatchNorm1d` takes the statistics of each.
    max_grad_norm : float, optional
        Scale the mean gradient so that its norm over all parameters is no larger (Pascanu et al. 2013; as
        `torch.nn.utils.clip_grad_norm_`).
    clip_value : float, optional
        Cut each number of the mean gradient to ``-clip_value .. clip_value``, after `max_grad_norm`.
    clip_per_example : float, optional
        Scale every row's own gradient so that its norm is no larger, before the mean over the weights is taken (Abadi
        et al. 2016). This, Poisson sampling and `gradient_stats` exclude `BatchNorm1d`, which mixes the rows.
    noise_multiplier : float, default 0
        Add normal noise to the sum of the clipped gradients, of deviation ``noise_multiplier * clip_per_example`` for
        each number, before it is divided by the rows: differentially private SGD.
    secure : bool, default False
        Draw this noise, and `sampling="poisson"`, from the operating system's generator instead of from the seed.
        Nobody can draw it again, neither an attacker nor you.
    sampling : {"shuffle", "poisson"}, default "shuffle"
        ``"poisson"``: a mini-batch takes each row with probability ``batch_size / n``, independently, so that its
        size varies; sums are divided by `batch_size`. What the accounting of differential privacy assumes. An epoch has
        as many mini-batches as else.
    gradient_stats : bool, default False
        Tell of the rows' gradients in `history`: norms, variance, the gradient noise scale, the hardest rows.
    input_scale : float, default 1
        What X is multiplied by as it is read, such as 1/255 for images in uint8. `net` uses it too, to predict.
    average : EMA or SWA, optional
        An average of the weights to keep beside them; see `averaged`, `averaged_net` and `update_bn`.

    Attributes
    ----------
    net, loss, optimizer, average
        As given, names replaced by instances. These but for `net`, and the other arguments, may be assigned anew
        between fits, as in ``trainer.optimizer = SGD(lr=0.01)``: what a new trainer would refuse is refused, and so is
        an optimiser, or average, that would need another state than the updates made so far have left. Within a fit
        callbacks may assign an optimiser of the same kind and groups; it counts from the next mini-batch on.
    t : int
        Updates made.
    epoch : int
        Epochs completed.
    state : ndarray of shape (optimizer.n_states, net.plan.size)
        The optimiser's state; with an `average`, this is one row more. What is assigned is copied in.
    history : History
        One row for each epoch of all fits.

    Notes
    -----
    A trainer can be pickled and copied, in the middle of an epoch too, and goes on to the same bits. Its methods wait
    for one another when called from several threads.

    Examples
    --------
    >>> import fastmb as mb
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), optimizer=mb.Adam(lr=0.01), input_scale=1 / 16)
    >>> history = trainer.fit(X[:1500], y[:1500], max_epochs=20, verbose=0)
    >>> trainer.evaluate(X[1500:], y[1500:])["accuracy"] > 0.9
    True
    """

    def __init__(
        self,
        net: Sequential,
        loss: str | Loss = "cross_entropy",
        optimizer: str | Optimizer | None = None,
        *,
        batch_size: int = 64,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        n_threads: int | None = None,
        executor: str | None = None,
        input_scale: float = 1.0,
        accumulate_steps: int = 1,
        max_grad_norm: float | None = None,
        clip_value: float | None = None,
        clip_per_example: float | None = None,
        noise_multiplier: float = 0.0,
        secure: bool = False,
        sampling: str = "shuffle",
        gradient_stats: bool = False,
        average: Average | None = None,
    ) -> None:
        if not isinstance(net, Sequential):
            raise TypeError(f"net must be a Sequential; got {type(net).__name__}")
        self.net = net
        self.loss = losses.get(loss)
        self.loss.check_outputs(net.plan.n_outputs)
        if net.softmax and self.loss.task != "classification":
            raise ValueError(f"a Softmax at the output goes with cross_entropy; loss is {self.loss.kind}")
        self.optimizer = Adam() if optimizer is None else optim.get(optimizer)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.shuffle, self.drop_last = boolean("shuffle", shuffle), boolean("drop_last", drop_last)
        self.seed = check_seed(seed)
        self.n_threads = None if n_threads is None else integer("n_threads", n_threads, 1)
        self.executor = default_name() if executor is None else executor
        self.input_scale = number("input_scale", input_scale, "(0, inf)")
        self.accumulate_steps = integer("accumulate_steps", accumulate_steps, 1)
        integer("batch_size * accumulate_steps", self.rows_of_update, 1, _MOST_ROWS)
        self.max_grad_norm = _limit("max_grad_norm", max_grad_norm)
        self.clip_value = _limit("clip_value", clip_value)
        self.clip_per_example = _limit("clip_per_example", clip_per_example)
        self.noise_multiplier = number("noise_multiplier", noise_multiplier, "[0, inf)")
        self.secure, self.gradient_stats = boolean("secure", secure), boolean("gradient_stats", gradient_stats)
        self.sampling = sampling
        if sampling not in SAMPLINGS:
            raise unknown_name("sampling", sampling, SAMPLINGS)
        if self.noise_multiplier and self.clip_per_example is None:
            raise ValueError("noise_multiplier needs clip_per_example, which bounds what one row can do")
        if self.noise_multiplier and getattr(self.loss, "class_weight", None) is not None:
            raise ValueError(
                "noise_multiplier and class weights exclude each other: the mean must not tell the classes"
            )
        if self.clip_per_example is not None:
            check_rows_apart(net, "clip_per_example")
        if self.gradient_stats:
            check_rows_apart(net, "gradient_stats")
        if sampling == "poisson":
            check_rows_apart(net, "sampling='poisson'")
        if average is not None:
            from .averaging import Average

            if not isinstance(average, Average):
                raise TypeError(f"average must be an average such as EMA(0.999); got {average!r}")
        self.average = average
        self.t = self.epoch = 0
        self._pending: Pending | None = None
        self.history = History()
        self._current: Epoch | None = None  # an epoch that was broken off
        self._unlock()
        self._build(None)
        if net.task is None:
            self._teach()

    def _unlock(self) -> None:
        self._lock = threading.RLock()
        self._under_way = False  # whether a fit is; what looks at it has the lock, so it is called by that fit

    def _build(self, state: np.ndarray | None) -> None:
        """What can't be pickled, and the optimiser's state, fresh or a copy."""
        own, plan = self.optimizer.n_states, self.net.plan
        n = own + (self.average is not None)
        vars(self)["state"] = _aligned_zeros(n * plan.size, plan.dtype).reshape(n, plan.size)
        if state is not None:
            self.state[:] = state
        elif self.optimizer.initial_state:  # zeros are there already, their memory not yet asked for
            self.optimizer.init_state(self.state[:own])
        self._weights: np.ndarray | None = None  # as trained, while the network has their average
        self._ahead: tuple[Optimizer, int, int, np.ndarray, np.ndarray] | None = None
        self._standing: tuple[int, Any] | None = None
        self._executor = self._executor_for(self.loss)

    def _is_fresh(self) -> bool:
        """Whether the state is as `_build` makes it: no update has been made, and nobody has assigned another."""
        own, n, some = self.optimizer.n_states, self.net.plan.size, 1 << 16
        pieces = ((i, self.state[i, at : at + some]) for i in range(len(self.state)) for at in range(0, n, some))
        return not self.t and all((x == (self.optimizer.initial_state if i < own else 0)).all() for i, x in pieces)

    def _executor_for(self, loss: Loss) -> Executor:
        """An executor of this network, for this optimiser and its state."""
        own = self.optimizer.n_states
        average = self.state[own] if self.average is not None and self.average.each_update else None
        training = Training(loss, self.optimizer, self.state[:own], self.batch_size, self.seed, self.rules, average)
        return executors.build(self.executor, self.net, training, self.n_threads)

    @property
    def rows_of_update(self) -> int:
        """Rows that an update is made from: ``batch_size * accumulate_steps``."""
        return self.batch_size * self.accumulate_steps

    @property
    def rules(self) -> Rules:
        """What executors do to a gradient before the update."""
        return Rules(
            part_rows=self.batch_size if self.accumulate_steps > 1 else 0,
            clip_per_example=_or_inf(self.clip_per_example),
            noise_multiplier=self.noise_multiplier,
            secure=self.secure,
            max_grad_norm=_or_inf(self.max_grad_norm),
            clip_value=_or_inf(self.clip_value),
            divide=float(self.rows_of_update) if self.sampling == "poisson" else 0.0,
        )

    def _uniform(self) -> Callable[[int], np.ndarray]:
        """Where the mini-batches of this epoch are drawn from, if by chance."""
        if self.secure:
            return lambda n: (np.frombuffer(os.urandom(8 * n), np.uint64) >> np.uint64(11)) * 2.0**-53
        return Stream(splitmix64(splitmix64(self.seed) ^ self.epoch) ^ 1).uniform

    def _check_free(self, call: str) -> None:
        """Raise a `RuntimeError` if `call`, which moves weights and position, can't be right now."""
        if self._under_way or self._weights is not None:
            self._check_own_weights()
            raise RuntimeError(f"fit() of this trainer is under way: {call} has to wait until it has ended")

    def __copy__(self) -> Trainer:
        return copy.deepcopy(self)  # one that shared the network would go on from other weights than its own

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._check_own_weights()
            return {name: value for name, value in vars(self).items() if name not in _UNSAVED}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)
        self._unlock()
        self._build(self.state)

    def __repr__(self) -> str:
        settings = f"{self.loss!r}, {self.optimizer!r}, batch_size={self.batch_size}"
        return f"Trainer({settings}, executor={self.executor!r}): {self.epoch} epochs, {self.t} updates"

    def _repr_html_(self) -> str:
        from ._html import trainer

        return trainer(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of this trainer to a file, from which `fastmb.load` makes it again, in the middle of an epoch too.

        The file has the safetensors format; README and `fastmb.checkpoint` say what is in it. It is written beside an
        older one of that name, which it replaces when the disk has all of it: whatever happens, one of them is there.

        Raises
        ------
        TypeError
            If there is something that a file can't hold: a learning rate that is a Python function (those of
            `fastmb.schedules` can be saved), a module or loss of a class of your own.
        OSError
            If the file can't be written; an older one is as it was.
        """
        from . import checkpoint

        with self._lock:
            self._check_own_weights()
            checkpoint.save(self, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint that a trainer like this one has saved.

        Parameters, optimiser state, position and history are the file's; loss, hyper-parameters and settings stay as
        they are. `fastmb.load` makes a trainer with all that is in the file instead.

        Raises
        ------
        ValueError
            If it is a checkpoint of another network (the message tells which parameters differ, and how) or of an
            optimiser or average with another state; if it is in the middle of an epoch of other mini-batches; if it is
            damaged or no checkpoint. Nothing is changed then.
        OSError
            If the file can't be read.
        ImportError
            If safetensors isn't installed: ``pip install 'fastmb[checkpoint]'``.

        Examples
        --------
        >>> import fastmb as mb, os, tempfile
        >>> X, y = mb.datasets.load_digits()
        >>> slow, fast = (mb.Trainer(mb.mlp([64, 32, 10]), "cross_entropy", mb.SGD(lr)) for lr in (0.01, 0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     slow.fit(X, y, max_epochs=1, verbose=0).stopped
        ...     slow.save(os.path.join(folder, "slow"))
        ...     fast.load(os.path.join(folder, "slow"))
        'max_epochs'
        >>> fast.epoch
        1
        """
        from . import checkpoint

        with self._lock:
            self._check_free("load()")
            checkpoint.load_into(self, path)

    def step(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Train on one mini-batch, all rows of `X` in their order, and return its mean loss before the update.

        Parameters are as in `fit`, but for NaN and infinity: here they show in the loss.

        Raises
        ------
        FloatingPointError
            If the loss is NaN or infinite; nothing is changed then.
        """
        with self._lock:
            batches = self._mini_batch(X, y, sample_weight)
            net = self.net
            if net.plan.batch_norms:  # else there's nothing to call it for
                n = len(batches.X)
                self._check_rows(n, self.batch_size if self.accumulate_steps > 1 else n)
            self._check_free("step()")
            t, running, sums, executor = self.t, net.flat_buffers, np.zeros((1, 2)), self._executor
            before = running.copy() if net.plan.batch_norms else running
            _, coefficients = self._coefficients(1)
            made = executor.made
            try:
                executor.run(batches, 0, t, coefficients, sums, _FOREVER)
            finally:  # calls nothing, so that no signal's handler comes in between; likewise elsewhere
                done = executor.made - made
                if done:
                    self.t = t + done
                else:
                    running[:] = before  # earlier parts of the mini-batch moved them
            if not done:
                raise FloatingPointError(f"the loss of update {t + 1} is {sums[0, 0]}; nothing was changed")
            self._teach(y)
            return _mean(*sums.tolist()[0])

    def _teach(self, y: Any = None) -> None:
        """Tell the network what it predicts, and from what: what it is trained for, from then on."""
        net, task, scale = self.net, self.loss.task, self.input_scale
        if net.task is not task or net.input_scale is not scale:  # to look takes less time than to assign
            net.task, net.input_scale = task, scale
        if y is not None and net.squeeze is not (squeeze := flat(y)):
            net.squeeze = squeeze

    def _mini_batch(self, X: Any, y: Any, sample_weight: Any, zeros: bool = False) -> Batches:
        X, y, weight = self._checked(X, y, sample_weight, check_finite=False, zeros=zeros)
        return Batches(X, y, weight, None, len(X), self.input_scale)

    def _check_rows(self, rows: int, batch_size: int, drop_last: bool = False) -> None:
        """Raise a `ValueError` if mini-batches (or their parts) have too few rows for batch normalisation."""
        last = 0 if drop_last else rows % batch_size
        if self.net.plan.batch_norms and 1 in (last, min(batch_size, rows)):
            which = f"the last mini-batch of {batch_size} would have 1 (drop_last=True leaves it out)"
            which = which if batch_size > 1 and rows > 1 else "a mini-batch would have 1"
            raise ValueError(
                "BatchNorm1d needs more than 1 row in a mini-batch, more than 1 value per channel, in training; "
                f"X has {rows} row{'s' * (rows > 1)}, and {which}"
            )

    def _checked(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        check_finite: bool,
        X_name: str = "X",
        y_name: str = "y",
        zeros: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        plan = self.net.plan
        X = check_X(X, plan.n_features, check_finite, X_name, plan.dtype)
        y = check_y(y, X, self.loss.task, plan.n_outputs, check_finite, y_name, X_name, plan.dtype)
        weight = None if sample_weight is None else check_weights(sample_weight, X, zeros=zeros)
        if weight is not None and self.noise_multiplier:
            raise ValueError(
                "sample_weight and noise_multiplier exclude each other: weights would undo the bound on a row"
            )
        return X, y, weight

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None, check_finite: bool = True) -> dict[str, float]:
        """The mean loss and the metric over all rows, without dropout.

        Rows are taken some thousand at a time, so that memory doesn't grow with the set.

        Returns
        -------
        dict
            ``loss``, with class weights and label smoothing as in training; and

            - ``accuracy`` for ``cross_entropy``, the share of rows whose largest output is the right class; for
              ``bce_with_logits``, of labels on whose right side of 0 the output is (targets count as 1 above 0.5);
            - ``r2`` else, averaged over the outputs.

            Sample weights are in all of them.
        """
        with self._lock:
            return self._evaluate(*self._checked(X, y, sample_weight, boolean("check_finite", check_finite)))

    def _evaluate(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray | None) -> dict[str, float]:
        plan = self.net.plan
        chunk = max(1, _CHUNK // max(plan.n_features, *(stage.n_out for stage in plan.stages)))
        metric = BY_TASK[self.loss.task]()
        total = np.zeros(2)
        for start in range(0, len(X), chunk):
            rows = slice(start, start + chunk)
            w = None if weight is None else weight[rows]
            batches = Batches(X[rows], y[rows], w, None, self.batch_size, self.input_scale)
            n = len(batches.X)
            out, parts = np.empty((n, plan.n_outputs), plan.dtype), np.empty((2, n))
            self._executor.evaluate(batches, out, parts[0], parts[1])
            total += parts.sum(axis=1)
            metric.add(out, y[rows], np.ones(n) if w is None else w)
        return {"loss": _mean(*total.tolist()), metric.name: metric.result()}

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        max_epochs: int = 10,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight: Any = None,
        verbose: int = 1,
        stop_at: Mapping[str, float] | None = None,
        max_seconds: float | None = None,
        check_finite: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> History:
        """Train for a number of epochs.

        Called again, it goes on: with the next epoch, or in the middle of one that was broken off, if `X` has as many
        rows as then. Ctrl-C ends it after the current mini-batch; no exception is raised. A second one, while a
        validation or a callback goes on, is raised there.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            bool, integers or floats of up to 64 bits, in any memory layout. Not copied, unless byte-swapped.
        y : array-like
            For ``cross_entropy`` class indices (n,), or probabilities (n, C); else targets (n, C), or (n,) if C is 1.
        max_epochs : int, default 10
            Epochs of this call. The rest of one that was broken off counts as one.
        X_val, y_val : array-like, optional
            Validation data, evaluated after every epoch.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows of `X`, not negative. Losses are means over the weights.
        verbose : int, default 1
            1 shows the progress (as a bar if tqdm is installed), 0 is silent.
        stop_at : mapping, optional
            Stop after an epoch that reaches all of these: losses down to, metrics up to, such as
            ``{"val_accuracy": 0.9}``. Of the figures of `gradient_stats`, noise scales up, norms and variance down.
        max_seconds : float, optional
            Stop after the first mini-batch that ends later than this.
        check_finite : bool, default True
            Look for NaN and infinity in the data first, and for numbers that would be infinite in the network's dtype.
        callbacks : sequence of Callback, default ()
            Called in their order, such as `EarlyStopping`, `ModelCheckpoint`, `CSVLogger`. Without one that overrides
            `on_batch_end`, no Python runs inside an epoch.

        Returns
        -------
        History
            The rows of this and all earlier fits; ``history.stopped`` says why this one ended.

        Raises
        ------
        TypeError, ValueError
            For data that don't fit; nothing is changed then.
        RuntimeError
            If a callback calls it for the trainer that it is called with; so do `step`, `apply` and `load`.
        FloatingPointError
            If the loss, or a weight, becomes NaN or infinite. Weights, optimiser and position are those of the end of
            the last epoch (or fit) that was finite; of a network over 4 MiB, those of an epoch's end some seconds ago.

        Notes
        -----
        Memory beside the network's, the state's and the data's (`Sequential.summary` foretells it): the activations of
        one mini-batch, and the copy of weights and state that a fit returns to if it diverges. That copy is in memory
        up to 4 MiB, and else in a temporary file (TMPDIR), written at most once an epoch, and so seldom that it takes
        2 % of the time.
        """
        begin = time.perf_counter()
        max_epochs = integer("max_epochs", max_epochs, 1)
        limit = _FOREVER if max_seconds is None else number("max_seconds", max_seconds, "[0, inf)")
        check_finite, verbose = boolean("check_finite", check_finite), check_verbose(verbose)
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val must be given together")
        if callbacks != ():
            from .callbacks import check_callbacks

            callbacks = check_callbacks(callbacks)
        with self._lock:
            self._check_free("fit()")
            val = None if X_val is None else self._checked(X_val, y_val, None, check_finite, "X_val", "y_val")
            metrics = ["loss", *FIGURES * self.gradient_stats]
            metrics += ["val_loss", "val_" + BY_TASK[self.loss.task].name] * (val is not None)
            goals = self._goals(stop_at, metrics)
            if self.optimizer.reacts and self.optimizer.lr.monitor not in metrics:  # type: ignore[union-attr]
                raise unknown_metric("monitor", self.optimizer.lr.monitor, metrics)  # type: ignore[union-attr]
            given = y
            X, y, weight = self._checked(X, y, sample_weight, check_finite)
            batches = Batches(X, y, weight, None, self.rows_of_update, self.input_scale)
            n, size = len(batches.X), batches.batch_size
            steps = n // size if self.drop_last else batches.n_batches
            self._check_rows(n, self.batch_size, self.drop_last and n >= size)
            if not steps:
                raise ValueError(f"X has {n} rows; drop_last leaves no mini-batch of {size}")
            if self.sampling == "poisson" and n < size:
                raise ValueError(
                    f"X has {n} rows; mini-batches of {size} can't be drawn from them by sampling='poisson'"
                )
            under_way = self._current.done if self._current is not None and self._current.rows == len(batches.X) else 0
            self._check_length(self.t + max_epochs * steps - under_way)
            try:
                self._under_way, self.history.stopped = True, None
                for callback in callbacks:
                    callback.on_fit_begin(self, metrics)
                self._teach(given)
                fitting = Fitting(self, batches, steps, begin + limit, callbacks)
                self.history.stopped = fitting.run(max_epochs, val, goals, verbose)
            except BaseException as error:
                self._under_way = False
                for callback in callbacks:
                    try:
                        callback.on_exception(self, error)
                    except Exception as another:
                        error.add_note(f"{type(callback).__name__}.on_exception raised {another!r}")
                raise
            self._under_way = False
            if callbacks:
                from .callbacks import end_fit

                end_fit(self, callbacks)
            return self.history

    def _check_length(self, steps: int) -> None:
        """Raise a `ValueError` if a schedule ends before `steps` updates are made."""
        self.optimizer.check_length(steps)
        for name, module in leaves(self.net.modules):
            check_end(f"p of modules[{name}]", getattr(module, "p", None), steps)

    def _goals(self, stop_at: Mapping[str, float] | None, metrics: list[str]) -> dict[str, float]:
        stop_at = {} if stop_at is None else stop_at
        if not isinstance(stop_at, Mapping):
            raise TypeError(f"stop_at must be a mapping of names to goals, such as {{'loss': 0.1}}; got {stop_at!r}")
        for name in stop_at:
            if name not in metrics:
                raise unknown_metric("stop_at", name, metrics)
        return {name: number(f"stop_at[{name!r}]", goal, "(-inf, inf)") for name, goal in stop_at.items()}


def _limit(name: str, value: float | None) -> float | None:
    return None if value is None else number(name, value, "(0, inf)")


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _mean(total: float, weight: float) -> float:
    return total / weight if weight else math.nan
