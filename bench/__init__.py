"""Who is faster? fastmb and its peers on the same work, in the same run.

``pytest bench --benchmark-json=results.json`` runs the pytest-benchmark suites, and ``python -m bench.report
results.json`` makes a Markdown table and plots of what they found. In a suite fastmb and the peers run in turn, round
after round in one process (`turns`); the medians count, and each result carries its conditions, the share of the
machine's peak measured in the same rounds, and the largest error against float64. This is the comparison to quote:

- ``bench_step``: training steps; `workloads` names the work, `peers` is how each library does it at its best;
- ``bench_matmul``, ``bench_activation_backward``, ``bench_reduction``: the functions of `fastmb.ops`;
- ``bench_latency``: one step, and one prediction, of a few rows from Python;
- ``bench_import``: the time of an import, the size of a wheel.

Others go beside a baseline of fastmb's own, or of plain NumPy, and tell the ratio to it and what it is to be at most:

- ``bench_custom``: a user's own activation beside the built-in one;
- ``bench_gradients``: steps that look at their gradients beside plain ones;
- ``bench_callbacks``: callbacks and schedules beside a plain fit;
- ``bench_checkpoint``: `Trainer.save` beside `numpy.save` and fsync.

``--threads 2,1`` measures with these counts instead of all processors. ``pytest bench --benchmark-disable`` runs
everything once, untimed, and checks that all do the same mathematics. Programs beside the suites:

- ``python -m bench.time_to_accuracy`` trains until a goal is reached, each library with its own best settings.
- ``python -m bench.scaling`` shows how the cost of a step grows with batch, width, depth and rows; ``--model`` reckons
  what more cores would give.
- ``python -m bench.threads`` sets the thread count that fastmb picks against every fixed one.
- ``python -m bench.neighbours`` tells what a step takes beside busy neighbours.

A figure is worth something on a quiet machine only. Environment variables that choose another library's kernels or
threads (OPENBLAS_CORETYPE, OPENBLAS_L2_SIZE, OPENBLAS_NUM_THREADS, MKL_*, OMP_*) handicap a peer without a word:
unset them first. The programs name those they find.
"""
