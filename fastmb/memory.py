"""How much memory a fit takes, told from the plan before anything is allocated.

A fit holds the parameters, the optimiser's states, and what one mini-batch needs on its way forward and back; not the
data, which stay where they are, nor the order of an epoch, 8 bytes a row. `Memory.kept` is the fit's way back from a
loss that becomes NaN. Beside these there are each thread's scratch, the coefficients of the steps to come, and where
tiles of weights are narrow a copy of up to 4 MB of them: a few hundred kilobytes to some megabytes. A large mini-batch
of a small network goes in pieces, with less than is told here. A test compares the sum with what a process really
takes.
"""

from __future__ import annotations

from typing import NamedTuple

from ._snapshot import IN_MEMORY
from .plan import Plan


class Memory(NamedTuple):
    """Bytes."""

    parameters: int
    states: int  # of the optimiser
    activations: int  # every stage's input and output gradient, for all rows of a mini-batch
    kept: int  # weights and states as the epoch found them, if they are kept in memory

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_mib(n)}" for name, n in self._asdict().items() if n)
        return f"{_mib(self.total)} MiB ({parts})"


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f}"


def forecast(plan: Plan, batch_size: int, n_states: int) -> Memory:
    """The peak of a fit by the native executor with mini-batches of `batch_size` rows."""
    size = plan.dtype.itemsize
    parameters, states = plan.size * size, plan.size * size * n_states
    kept = parameters + states if parameters + states <= IN_MEMORY else 0
    return Memory(parameters, states, batch_size * _widths(plan) * size, kept)


def _widths(plan: Plan) -> int:
    """Numbers that a row needs on its way forward and back."""
    stages = plan.stages
    widths = sum(stage.n_in + stage.bias + stage.n_out * (stage.kind != "identity") for stage in stages)
    if plan.batch_norms:  # a row waits for the others: its gradient, derivatives and sums can't be a thread's scratch
        widths += 2 * (1 + max(plan.n_features, *(stage.n_out for stage in stages)))
        widths += sum(stage.n_out * (bool(stage.ops) + (stage.skip is not None)) for stage in stages)
    return widths
