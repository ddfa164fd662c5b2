"""How many threads run: asked for, allowed, worth it; and what happens around them: forks, other threads, signals."""

import ctypes
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import fastmb as mb
from fastmb import threads
from fastmb.executors import native

RNG = np.random.default_rng(0)
X = RNG.standard_normal((512, 64)).astype(np.float32)
Y = RNG.integers(0, 10, 512)


@pytest.fixture(autouse=True)
def _three_threads_anywhere():
    """Not here: this is about what the machine allows."""


def digest(trainer):
    trainer.fit(X, Y, max_epochs=2, verbose=0)
    return trainer.net.flat.tobytes()


def trainer(n_threads=None, seed=0):
    return mb.Trainer(mb.mlp([64, 256, 10], seed=seed), optimizer=mb.Adam(), n_threads=n_threads, seed=seed)


def in_a_new_process(code, **environment):
    """What `code` prints in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_small_steps_take_one_thread_and_large_ones_all_that_are_allowed(monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 8)
    assert threads.resolve(None, 1e3) == 1
    assert threads.resolve(None, 3.5 * threads.FLOPS_PER_THREAD) == 3
    assert threads.resolve(None, 1e12) == 8


def test_what_was_asked_for_is_never_more_than_what_is_allowed(monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 2)
    assert [threads.resolve(asked, 1.0) for asked in (1, 2, 3, 100)] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("content", "limit"), [("max 100000", None), ("150000 100000", 2), ("100000 100000", 1), ("5000 100000", 1)]
)
def test_version_2_control_groups_are_respected(tmp_path, content, limit):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("400000 100000\n")
    (group / "cpu.max").write_text(content + "\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert threads.cgroup_limit(tmp_path, tmp_path / "cgroup") == (limit or 4)


@pytest.mark.parametrize(("quota", "limit"), [(-1, 1 << 30), (250_000, 3), (20_000, 1)])
def test_version_1_control_groups_are_respected(tmp_path, quota, limit):
    group = tmp_path / "cpu,cpuacct" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup").write_text("3:cpu,cpuacct:/job\n2:memory:/job\n")
    assert threads.cgroup_limit(tmp_path, tmp_path / "cgroup") == limit


def test_a_machine_without_control_groups_has_no_such_limit(tmp_path):
    assert threads.cgroup_limit(tmp_path, tmp_path / "missing") == 1 << 30


def test_openmp_environment_and_affinity_are_respected():
    code = "from fastmb import threads; print(threads.resolve(None, 1e12), threads.resolve(2, 1e12))"
    assert in_a_new_process(code, OMP_NUM_THREADS="1") == ["1", "1"]
    pinned = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});" + code
    assert in_a_new_process(pinned) == ["1", "1"]


FEWER = """
import numpy as np, fastmb as mb
from fastmb import threads
threads.limit = lambda: 3
rng = np.random.default_rng(0)
for sizes, rows in ((4, 32, 16, 4), 2000), ((300, 64, 10), 100), ((40, 24, 10), 70):
    X, y = rng.standard_normal((rows, sizes[0])), rng.integers(0, sizes[-1], rows)
    trainer = mb.Trainer(mb.mlp(list(sizes)), batch_size=rows // 2, n_threads=3)
    trainer.fit(X, y, max_epochs=3, verbose=0)
    trainer.step(X, y)
    print(trainer.net.digest())
"""


def test_fewer_threads_than_openmp_was_asked_for_do_all_the_work():
    assert in_a_new_process(FEWER, OMP_THREAD_LIMIT="2") == in_a_new_process(FEWER.replace("threads=3", "threads=1"))


def test_threadpoolctl_limits_are_respected_and_not_changed():
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert threads.limit() == native.max_threads() == 1
        digest(trainer())
        assert native.max_threads() == 1


def test_a_fit_after_a_fork_works_in_parent_and_child():
    expected = digest(trainer())
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        here, there = context.Pipe()
        child = context.Process(target=lambda connection: connection.send(digest(trainer(2))), args=(there,))
        child.start()
        try:
            assert here.poll(60), "the child hangs"
            assert here.recv() == expected
        finally:
            child.kill()
            child.join()
        assert digest(trainer(2)) == expected


def test_a_child_of_a_process_that_trains_in_another_thread_can_train():
    code = """
import multiprocessing, threading
import numpy as np, fastmb as mb
rng = np.random.default_rng(0)
X, y = rng.standard_normal((60000, 32), np.float32), rng.integers(0, 10, 60000)

def train():
    trainer = mb.Trainer(mb.mlp([32, 64, 10]), batch_size=1000, n_threads=2)
    return trainer.fit(X, y, max_epochs=1, verbose=0)["loss"][0]

expected, over = train(), threading.Event()

def busy():
    while not over.is_set():
        train()

beside = threading.Thread(target=busy)
beside.start()
context = multiprocessing.get_context("fork")
for _ in range(3):
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(train()))
    child.start()
    print(here.recv() == expected if here.poll(20) else "hangs")
    child.kill()
over.set()
beside.join()
"""
    assert in_a_new_process(code) == ["True"] * 3


def test_trainers_in_several_python_threads_dont_disturb_one_another():
    expected = {seed: digest(trainer(2, seed)) for seed in range(3)}
    found = {}

    def work(seed):
        for _ in range(3):
            found[seed] = digest(trainer(2, seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


def test_predictions_of_one_network_from_several_threads_are_right():
    net = mb.mlp([64, 256, 10])
    expected, found = net(X), [None] * 4

    def work(i):
        for _ in range(20):
            found[i] = net(X[i * 100 : i * 100 + 100])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((found[i] == expected[i * 100 : i * 100 + 100]).all() for i in range(4))


def test_an_unknown_instruction_set_is_an_error_with_those_that_there_are(monkeypatch):
    monkeypatch.setenv("FASTMB_ISA", "v9")
    with pytest.raises(ValueError, match=r"FASTMB_ISA must be one of .*got 'v9'"):
        native.isa()


def test_single_steps_try_one_thread_and_all_and_have_the_same_bits():
    """In trials of all threads, of one, and past them."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((64, 32)).astype(np.float32), rng.integers(0, 10, 64)
    nets = []
    for n_threads in (None, 1, 2):
        trained = mb.Trainer(mb.mlp([32, 64, 64, 10], seed=1), optimizer=mb.Adam(), n_threads=n_threads)
        losses = [trained.step(X[: 64 - i % 3], y[: 64 - i % 3]) for i in range(1100)]
        nets.append((trained.net.flat, trained.state, losses))
    for flat, state, losses in nets[1:]:
        np.testing.assert_array_equal(flat, nets[0][0])
        np.testing.assert_array_equal(state, nets[0][1])
        assert losses == nets[0][2]


SPREAD = r"""
#define _GNU_SOURCE
#include <sched.h>
static int *told, at_once;
static int moving(pid_t pid, size_t size, const cpu_set_t *set)
{
    at_once = at_once ? at_once : *told;
    return sched_setaffinity(pid, size, set);
}
#define sched_setaffinity moving
#include "sync.h"
void spread(int *found)
{
    static fmb_barrier barrier;
    told = &barrier.cpu[0];
    barrier.cpu[0] = barrier.cpu[1] = sched_getcpu();
    fmb_spread(&barrier, 0, 2);
    found[0] = at_once, found[1] = barrier.cpu[0], found[2] = barrier.cpu[1];
}
"""
CSRC = Path(__file__).parent.parent / "csrc"
two_processors = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second processor")


@two_processors
@pytest.mark.skipif(shutil.which("gcc") is None or not CSRC.is_dir(), reason="compiles csrc/sync.h with gcc")
def test_a_thread_that_leaves_a_processor_to_another_tells_before_it_goes(tmp_path):
    (tmp_path / "spread.c").write_text(SPREAD)
    library = tmp_path / "spread.so"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{CSRC}", "-o", library, tmp_path / "spread.c"], check=True)
    allowed, found = os.sched_getaffinity(0), (ctypes.c_int * 3)()
    for _ in range(100):
        ctypes.CDLL(str(library)).spread(found)
        if found[0] != 0:  # else the scheduler had moved it just then
            break
    assert found[0] == -1
    assert found[1] >= 0
    assert found[1] != found[2]
    assert os.sched_getaffinity(0) == allowed


@two_processors
def test_so_does_a_thread_of_the_numba_executor():
    sync = pytest.importorskip("fastmb.executors.numba.sync")
    allowed = os.sched_getaffinity(0)
    barrier = np.zeros(1 << 16, np.uint8)
    cpus = barrier[sync._CPUS :].view(np.int64)
    for _ in range(100):
        cpus[:2] = ctypes.CDLL(None).sched_getcpu()
        sync._spread(barrier.ctypes.data, 0, 2)
        if cpus[0] != cpus[1]:
            break
    assert cpus[0] != cpus[1]
    assert {int(cpu) for cpu in cpus[:2]} <= allowed == os.sched_getaffinity(0)


def test_what_most_of_the_last_steps_took_decides_how_many_threads_work():
    tried = pytest.importorskip("fastmb.executors.numba.executor")._Tried()

    def work(seconds, took):
        """Steps for so long, as an executor makes them; `took` says what the next one takes one thread and all."""
        used, end = [0, 0], tried.busy + seconds
        while tried.busy < end:
            if tried.busy >= tried.next:
                tried.begin_trial()
            team = tried.team if tried.busy < tried.end else tried.faster()
            used[team] += 1
            tried.note(team, took()[team], 1)
        return used

    used = work(1.0, lambda: (500e-6, 300e-6))
    assert used[0] <= 5 * (0.002 / 500e-6 + 1)  # in trials, the first and those of each quarter of a second
    tried.note(1, 0.005, 1)  # one step is disturbed
    assert tried.faster()
    disturbed = itertools.cycle([0.004, 300e-6, 300e-6, 300e-6])
    work(0.2, lambda: (700e-6, next(disturbed)))  # every fourth is: the mean is 1.2 ms
    assert not tried.faster()
    used = work(1.0, lambda: (700e-6, next(disturbed)))
    assert used[0] > 5 * used[1]
    work(0.3, lambda: (500e-6, 300e-6))  # alone again: found at the next trial
    assert tried.faster()
