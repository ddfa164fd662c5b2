"""Who is faster? fastmb and its peers on the same work, in the same run.

`workloads` names the work, `peers` is how each library does it at its best, and two programs time it:

- ``python -m bench.steps`` runs fastmb and the peers in turn, round after round in one process, and prints medians, the
  share of the machine's peak and the ratio to the best peer. This is the comparison to quote.
- ``pytest bench`` is the pytest-benchmark suite: one entry for each workload and peer, to be saved and compared between
  commits. ``pytest bench --benchmark-disable`` runs each once, untimed, and checks that all do the same mathematics.

A figure is worth something on a quiet machine only. Environment variables that choose another library's kernels or
threads (OPENBLAS_CORETYPE, OPENBLAS_L2_SIZE, OPENBLAS_NUM_THREADS, MKL_*, OMP_*) handicap a peer without a word:
unset them first. Both programs name those they find.
"""
