"""The numba executor: the plan, the sweeps and the bits of the native one, without a compiler at installation.

Numba compiles, at the first call, what a network needs. Two kinds of code:

- *kernels* (`activations`, `losses`, `norms`, `columns`, `updates`, `dropout`, `gemm`, `few`, `layout`, `gradients`):
  what one core does to one block, written as formulas on vectors (`emit`) that become LLVM IR for the host's vectors
  (`target`);
- *sweeps* (`sweeps`, that is `row_sweep`, with `blocks` and `layers`, and `weight_sweep`; `rows`; `applied`;
  `inference`; `sync`): loops and threads, compiled Python on records (`records`) and on what the machine offers
  (`machine`). They call kernels by address, so a kernel is compiled by itself, once.

`library` compiles and caches both; `plan` makes a plan ready to run; `arena` is the memory; `team` holds the threads;
`executor` is what the rest of the package sees.
"""

from __future__ import annotations

from .executor import NumbaExecutor
from .target import available_isas, isa

__all__ = ["NumbaExecutor", "available_isas", "isa"]
