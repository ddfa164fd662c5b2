"""Who is faster? fastmb and its peers on the same work, in the same run.

`workloads` names the work, `peers` is how each library does it at its best, and programs time it:

- ``python -m bench.steps`` runs fastmb and the peers in turn, round after round in one process, and prints medians, the
  share of the machine's peak and the ratio to the best peer. This is the comparison to quote.
- ``pytest bench`` is the pytest-benchmark suite: one entry for each workload and peer, to be saved and compared between
  commits. ``pytest bench --benchmark-disable`` runs each once, untimed, and checks that all do the same mathematics.
- ``bench_matmul.py``, ``bench_activation_backward.py`` and ``bench_reduction.py`` set the functions of `fastmb.ops` against
  the peers'; `turns` runs all of a case in turn, so these entries may be compared with each other.
- ``python -m bench.time_to_accuracy`` trains until a goal is reached, each library with its own best settings.
- ``python -m bench.scaling`` shows how the cost of a step grows with batch, width, depth and rows; ``--model`` reckons
  what more cores would give.
- ``python -m bench.threads`` sets the thread count that fastmb picks against every fixed one.

A figure is worth something on a quiet machine only. Environment variables that choose another library's kernels or
threads (OPENBLAS_CORETYPE, OPENBLAS_L2_SIZE, OPENBLAS_NUM_THREADS, MKL_*, OMP_*) handicap a peer without a word:
unset them first. The programs name those they find.
"""
