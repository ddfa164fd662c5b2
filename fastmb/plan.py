"""Declarations become a plan: a flat list of work over one flat parameter vector.

A `Sequential` is read once, from its first module to its last, and cut into stages. A stage is one layer (`Linear`,
`BatchNorm1d`, `LayerNorm`, `PReLU`) with the elementwise operations that follow it (activation, dropout), which is what
an executor does to a block of rows in one go. Operations that stand before the first layer act on the input. A
`Residual` becomes the stages of its modules, the last of which has a `skip`. A `Softmax` at the very end belongs to
prediction, not to training, and is no part of a plan.

All parameters live in one flat vector. A stage owns the matrix ``[rows, columns]`` that starts at ``stage.offset``, its
parameters one below the other: of a `Linear` the weight's rows, then the bias as one more row, so that a layer with
bias is a product with one more input that is always 1; of a normalisation the row of its weight and the row of its
bias. Matrices start at multiples of `ALIGNMENT` elements; the gaps between them hold zeros.

What training changes but no gradient does, such as the running statistics of `BatchNorm1d`, are buffers: they live in
a second flat vector of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ._checks import per_step

if TYPE_CHECKING:
    from .functions import Function

ALIGNMENT = 16  # elements: 64 bytes in float32, one cache line and one AVX-512 vector


@dataclass(frozen=True)
class Op:
    """One elementwise operation on a stage's output (or on the input).

    `kind` is the name of an activation in `fastmb.nn.ACTIVATIONS`, ``"custom"`` for a user's own, which is `function`,
    or ``"dropout"``. `value` is the slope of
    ``leaky_relu``, the alpha of ``elu``, the probability of ``dropout``, and is not looked at otherwise. `index`
    numbers the dropouts of a network from 0: it is the purpose of their random numbers. `schedule`, if there is one,
    takes the place of a dropout's `value`: its probability as a function of the updates made before.
    """

    kind: str
    value: float = 0.0
    index: int = 0
    schedule: Callable[[int], float] | None = None
    function: Function | None = None

    def values(self, t: int, n: int) -> np.ndarray:
        """The probabilities of a dropout at the `n` steps after `t` updates, float64 ``(n,)``."""
        return per_step("p", self.value if self.schedule is None else self.schedule, "[0, 1)", t, n)


Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes, in the order in which they lie in a flat vector


@dataclass(frozen=True)
class Stage:
    """One layer and the operations that follow it: ``f(x)``, plus what a `skip` adds, then `ops`.

    `kind` says what f is:

    - ``"linear"``: ``x W + b``
    - ``"batch_norm"``: ``(x - mean) / sqrt(variance + eps) * weight + bias``, statistics of each feature over the rows
    - ``"layer_norm"``: the same, statistics of each row over its features
    - ``"prelu"``: x where x > 0, else ``weight * x``
    - ``"identity"``: x; there where operations or a `skip` need a stage that no layer gives them
    """

    n_in: int
    n_out: int
    offset: int  # of its parameters in the flat vector, in elements
    ops: tuple[Op, ...]
    name: str  # the parameters are called name + ".weight" and name + ".bias"
    kind: str = "linear"
    shapes: Shapes = ()  # of its parameters
    skip: int | None = None  # the stage whose input is added to f(x): this one, or one before it
    eps: float = 0.0  # of a normalisation
    momentum: float | None = None  # of running statistics; None: the mean over all mini-batches
    buffer_offset: int = 0  # in the flat vector of buffers, in elements
    buffer_shapes: Shapes = ()

    @property
    def bias(self) -> bool:
        return any(name == "bias" for name, _ in self.shapes)

    @property
    def columns(self) -> int:
        """Columns of the stage's matrix; 0 if it has no parameters."""
        return self.shapes[0][1][-1] if self.shapes else 0

    @property
    def rows(self) -> int:
        """Rows of the stage's matrix: of a `Linear` its inputs, and one for the bias."""
        return self.size // self.columns if self.shapes else 0

    @cached_property
    def size(self) -> int:
        """Parameters of the stage."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def buffer_size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.buffer_shapes)


@dataclass(frozen=True)
class Plan:
    """What an executor needs to know of a network."""

    dtype: np.dtype
    input_ops: tuple[Op, ...]
    stages: tuple[Stage, ...]

    @property
    def n_features(self) -> int:
        return self.stages[0].n_in

    @property
    def n_outputs(self) -> int:
        return self.stages[-1].n_out

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector, gaps included."""
        last = self.stages[-1]
        return aligned(last.offset + last.size)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, by name, in the order in which they lie."""
        return {f"{stage.name}.{what}": shape for stage in self.stages for what, shape in stage.shapes}

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """The name of each stage's weight, and that of its bias, in turn, whether it has them or not."""
        return tuple(f"{stage.name}.{what}" for stage in self.stages for what in ("weight", "bias"))

    @cached_property
    def n_parameters(self) -> int:
        return sum(stage.size for stage in self.stages)

    @property
    def buffer_size(self) -> int:
        """Elements of the flat vector of buffers."""
        return sum(aligned(stage.buffer_size) for stage in self.stages)

    @cached_property
    def batch_norms(self) -> tuple[int, ...]:
        """The stages that need statistics of all rows of a mini-batch."""
        return tuple(i for i, stage in enumerate(self.stages) if stage.kind == "batch_norm")

    def flops(self, rows: int) -> int:
        """Floating-point operations of one training step of `rows` examples, products alone.

        Forward and weight gradient take 2 each for every example and weight, the data gradient as many again for
        every stage but the first.
        """
        products = ((4 if i == 0 else 6) * s.n_in * s.n_out for i, s in enumerate(self.stages) if s.kind == "linear")
        return rows * sum(products)


def aligned(elements: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def views(flat: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """The parameters by name, as views into a flat vector, in the plan's order.

    A `Linear` has ``[n_in, n_out]`` and ``[n_out]``, a normalisation ``[n]`` twice, a `PReLU` ``[1]`` or ``[n]``.
    """
    found: dict[str, np.ndarray] = {}
    for stage in plan.stages:
        found |= _views(flat, stage.name, stage.offset, stage.shapes)
    return found


def buffer_views(flat: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """The buffers by name, as views into their flat vector, in the plan's order."""
    found: dict[str, np.ndarray] = {}
    for stage in plan.stages:
        found |= _views(flat, stage.name, stage.buffer_offset, stage.buffer_shapes)
    return found


def _views(flat: np.ndarray, name: str, offset: int, shapes: Shapes) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for what, shape in shapes:
        end = offset + math.prod(shape)
        found[f"{name}.{what}"] = flat[offset:end].reshape(shape)
        offset = end
    return found
