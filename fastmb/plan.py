"""Declarations become a plan: a flat list of work over one flat parameter vector.

A `Sequential` is read once, from its first module to its last, and cut into stages. A stage is one `Linear` with
the elementwise operations that follow it (activation, dropout), which is what an executor does to a block of rows in
one go. Operations that stand before the first `Linear` act on the input. A `Softmax` at the very end belongs to
prediction, not to training, and is no part of a plan.

All parameters live in one flat vector. A stage owns the matrix ``[n_in + bias, n_out]`` that starts at
``stage.offset``: the weight's rows, then the bias as one more row, so that a layer with bias is a product with one
more input that is always 1. Matrices start at multiples of `ALIGNMENT` elements; the gaps between them hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Stage:
    """One `Linear` and the operations that follow it."""

    n_in: int
    n_out: int
    bias: bool
    offset: int  # of the matrix [n_in + bias, n_out] in the flat vector, in elements
    ops: tuple[Op, ...]
    name: str  # the parameters are called name + ".weight" and name + ".bias"

    @property
    def rows(self) -> int:
        """Rows of the stage's matrix: its inputs, and one for the bias."""
        return self.n_in + self.bias

    @property
    def size(self) -> int:
        """Parameters of the stage."""
        return self.rows * self.n_out


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

    @property
    def size(self) -> int:
        """Elements of the flat vector, gaps included."""
        last = self.stages[-1]
        return aligned(last.offset + last.size)

    def flops(self, rows: int) -> int:
        """Floating-point operations of one training step of `rows` examples, products alone.

        Forward and weight gradient take 2 each for every example and weight, the data gradient as many again for
        every stage but the first.
        """
        first, *others = (stage.n_in * stage.n_out for stage in self.stages)
        return rows * (4 * first + 6 * sum(others))


def aligned(elements: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def views(flat: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """The parameters by name, as views ``[n_in, n_out]`` and ``[n_out]`` into a flat vector, in the plan's order."""
    found = {}
    for stage in plan.stages:
        end = stage.offset + stage.n_in * stage.n_out
        found[stage.name + ".weight"] = flat[stage.offset : end].reshape(stage.n_in, stage.n_out)
        if stage.bias:
            found[stage.name + ".bias"] = flat[end : end + stage.n_out]
    return found
