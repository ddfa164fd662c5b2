"""The numba executor beside the native one: the same bits, its cache, its threads, and life without the extension."""

import hashlib
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, threads
from fastmb.executors import native

pytest.importorskip("numba", reason="the numba executor needs it; the test extra brings it")
DTYPES = ["float32", "float64"]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((90, 11))
LABELS, VALUES = RNG.integers(0, 5, 90), RNG.standard_normal((90, 5))
FMA = native.available_isas()[-1] != "v2"

same_bits = pytest.mark.skipif(not FMA, reason="without fused multiply-add the bits are each set's own")


def in_a_new_process(code, **environment):
    """What `code` prints in a new interpreter, and what it says besides."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def network(dtype, activation="gelu"):
    first = mb.mlp([11, 18, 5], activation=activation, dtype=dtype, seed=2).modules
    return mb.Sequential(mb.Dropout(0.1), *first, dtype=dtype, seed=2)


def digest(executor, dtype, loss="cross_entropy", activation="gelu", n_threads=1, **options):
    trainer = mb.Trainer(
        network(dtype, activation), loss, batch_size=16, seed=7, n_threads=n_threads, executor=executor, **options
    )
    target = {"classification": LABELS, "multilabel": VALUES > 0}.get(trainer.loss.task, VALUES)
    trainer.fit(X, target, max_epochs=2, verbose=0)
    weights = trainer.net.flat if trainer.average is None else np.append(trainer.net.flat, trainer.averaged_net().flat)
    losses = trainer.per_example_losses(X, target)
    history = {name: repr(trainer.history[name]) for name in trainer.history if "second" not in name}
    return hashlib.sha256(weights.tobytes() + losses.tobytes()).hexdigest(), history


@same_bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(set(mb.modules.ACTIVATIONS) - {"identity"}))
def test_every_activation_has_the_bits_of_native(activation, dtype):
    assert digest("numba", dtype, activation=activation) == digest("native", dtype, activation=activation)


@same_bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "loss",
    [
        mb.CrossEntropy(),
        mb.CrossEntropy(label_smoothing=0.1),
        mb.CrossEntropy(class_weight=[0.5, 1.0, 2.0, 0.0, 1.5]),
        mb.MSE(),
        mb.MAE(),
        mb.Huber(delta=0.7),
        mb.BCEWithLogits(),
        mb.BCEWithLogits(pos_weight=[0.5, 1.0, 2.0, 3.0, 1.5]),
        mb.Loss(lambda z, y: np.log(np.cosh(z - y))),
        mb.Loss(lambda z, y: np.exp(z) - y * z, lambda z, y: np.exp(z) - y),
    ],
    ids=repr,
)
def test_every_loss_has_the_bits_of_native(loss, dtype):
    assert digest("numba", dtype, loss) == digest("native", dtype, loss)


@same_bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "own",
    [
        mb.Activation(lambda x: x * np.tanh(np.log1p(np.exp(x)))),
        mb.Activation(np.tanh, lambda x, y: 1 - y * y),
        mb.Activation(lambda x: max(0.2 * x, x)),
    ],
    ids=["dual numbers", "given", "branches"],
)
def test_a_users_own_activation_has_the_bits_of_native(own, dtype):
    assert digest("numba", dtype, activation=own) == digest("native", dtype, activation=own)


RULES = {
    "accumulate": {"accumulate_steps": 3},
    "norm": {"max_grad_norm": 0.1},
    "value": {"clip_value": 0.01},
    "per example": {"clip_per_example": 0.5},
    "private": {"clip_per_example": 0.5, "noise_multiplier": 0.7, "sampling": "poisson"},
    "all": {"accumulate_steps": 2, "max_grad_norm": 0.2, "clip_value": 0.05, "clip_per_example": 0.5},
    "groups": {"optimizer": mb.AdamW(lr=0.01, groups={"*.bias": {"weight_decay": 0, "lr": 3}})},
    "moving average": {"average": mb.EMA(0.9, every=2), "optimizer": mb.Adam(lr=0.01)},
    "average of epochs": {"average": mb.SWA(1), "accumulate_steps": 2},
    "gradients' statistics": {"gradient_stats": True},
    "statistics of parts": {"gradient_stats": True, "accumulate_steps": 2},
    "dropout's schedule": {"optimizer": mb.SGD(lr=mb.LinearLR(0.1, total_iters=9), momentum=0.9)},
}


@same_bits
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", RULES)
def test_every_rule_has_the_bits_of_native(rules, dtype, n_threads, monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 4)
    ours, theirs = (digest(name, dtype, n_threads=n_threads, **RULES[rules]) for name in ("numba", "native"))
    assert ours == theirs


@same_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_own_gradients_have_the_bits_of_native(dtype):
    found = []
    for name in ("numba", "native"):
        trainer = mb.Trainer(network(dtype), batch_size=16, executor=name, gradient_stats=True)
        trainer.fit(X, LABELS, max_epochs=1, verbose=0)
        gradients = trainer.per_example_gradients(X, LABELS)
        gradients = gradients[1] if isinstance(gradients, tuple) else gradients
        found.append([g.tobytes() for _, g in sorted(gradients.items())])
    assert found[0] == found[1]


@same_bits
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_features", [127, 128, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_rows_with_many_features_have_the_bits_of_native(dtype, n_features, n_threads, monkeypatch):
    """Native squares 128 features at a time, where nothing is done to the inputs first."""
    monkeypatch.setattr(threads, "limit", lambda: 4)
    wide = np.random.default_rng(1).standard_normal((len(X), n_features)).astype(dtype)
    found = []
    for name in ("numba", "native"):
        net = mb.mlp([n_features, 18, 5], dtype=dtype, seed=2)
        trainer = mb.Trainer(net, batch_size=16, n_threads=n_threads, executor=name, clip_per_example=0.5)
        trainer.fit(wide, LABELS, max_epochs=1, verbose=0)
        found.append([net.flat.tobytes(), trainer.per_example_norms(wide, LABELS).tobytes()])
    assert found[0] == found[1]


@same_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_zero_as_in_native_and_left_alone_outside(dtype):
    small = np.finfo(dtype).smallest_normal
    found = []
    for name in ("numba", "native"):
        net = mb.mlp([11, 18, 5], dtype=dtype, seed=2)
        net.flat *= small
        trainer = mb.Trainer(net, "mse", mb.Adam(lr=float(small)), batch_size=16, n_threads=2, executor=name)
        trainer.fit(X * float(small), VALUES, max_epochs=3, verbose=0)
        net.flat *= np.dtype(dtype).type(0.5)
        found.append([net.flat.tobytes(), trainer.state.tobytes(), trainer.per_example_losses(X, VALUES).tobytes()])
        assert small / 4 * 2 > small / 4 > 0
        assert ((np.abs(trainer.state) >= small) | (trainer.state == 0)).all()
    assert found[0] == found[1]


# ---- the cache -----------------------------------------------------------------------------------------------------


UPDATE = """
import ctypes, sys
import numpy as np
from fastmb.executors.numba import library
from fastmb.executors.numba.target import Target, isa
c, w, g = np.array([1.0] + [0.0] * 7), np.array([5.0]), np.array([2.0])
call = library.function(library.kernel("update sgd", Target(isa(), 8)))
call(c.ctypes.data, w.ctypes.data, 0, 0, 0, g.ctypes.data, 1, 1, 1, 1)
library.NOTICE.done()
print(w[0])
"""


@pytest.fixture
def run_a_copy(tmp_path):
    """Runs code in a new process, with a copy of the package in `tmp_path` and a cache of its own."""
    package = Path(mb.__file__).parent
    shutil.copytree(package, tmp_path / "fastmb", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        "PYTHONPATH": str(tmp_path),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(code):
        return in_a_new_process(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}", **environment)

    return run


EDIT = """
import os
from pathlib import Path
def edit(path):
    text, times = path.read_text(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert text.count("e.fma(-c[0], _decayed") == 1
    path.write_text(text.replace("e.fma(-c[0], _decayed", "e.fma(-c[0] * 2.0, _decayed"))
    os.utime(path, ns=times)
"""


def test_code_in_the_cache_does_not_survive_an_edit_of_any_file(run_a_copy, tmp_path):
    first, again = run_a_copy(UPDATE), run_a_copy(UPDATE)
    assert first[0] == again[0] == "3.0\n"
    assert first[1].count("compiling") == first[1].count("compiled in") == 1
    assert again[1] == ""  # from the cache
    here = {}
    exec(EDIT, here)
    here["edit"](tmp_path / "fastmb" / "executors" / "numba" / "updates.py")
    assert run_a_copy(UPDATE)[0] == "1.0\n"


def test_code_of_a_process_that_was_imported_before_an_edit_is_not_taken_after_it(run_a_copy):
    edits = f"from fastmb.executors.numba import updates\n{EDIT}\nedit(Path(updates.__file__))\n"
    assert run_a_copy(edits + UPDATE)[0] == "3.0\n"
    assert run_a_copy(UPDATE)[0] == "1.0\n"


def test_kernels_and_entries_have_an_index_each(tmp_path):
    """Numba numbers the files of an index, without a lock: two processes would give two kernels one file."""
    code = """
from fastmb.executors.numba import library
from fastmb.executors.numba.target import Target, isa
names = ["activation relu none", "activation relu first", "average"]
addresses = {library.kernel(name, Target(isa(), size)) for name in names for size in (4, 8)}
print(len(addresses | {library.entry("serve"), library.entry("lead")}))
"""
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path))[0] == "8\n"
    indices = [path.name for path in tmp_path.rglob("*.nbi")]
    assert len(indices) == len({*tmp_path.rglob("*.nbc")}) == 8
    assert sum(".average." in name for name in indices) == 2


NOWHERE = """
import warnings, numpy as np, fastmb as mb
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []  # as where nothing can be written
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    {}
print(*[str(warning.message).count("NUMBA_CACHE_DIR") for warning in said])
"""


@pytest.mark.parametrize(
    "code",
    [
        "from fastmb.executors.numba import library, target; library.kernel('add', target.Target(target.isa(), 8))",
        "with mb.use_backend('numba'): mb.ops.matmul(np.ones((2, 2)), np.ones((2, 2)))",
    ],
    ids=["executor", "functions"],
)
def test_where_nothing_can_be_cached_it_compiles_all_the_same(code):
    assert in_a_new_process(NOWHERE.format(code))[0] == "1\n"


# ---- threads -------------------------------------------------------------------------------------------------------


def test_a_forked_child_trains_on():
    code = """
import os, sys, numpy as np, fastmb as mb
from fastmb import threads
threads.limit = lambda: 3
X, y = np.ones((256, 8)), np.zeros(256, int)
def train():
    trainer = mb.Trainer(mb.mlp([8, 64, 2]), batch_size=64, n_threads=3, executor="numba")
    trainer.fit(X, y, max_epochs=2, verbose=0)
    return trainer.net.flat.tobytes()
before = train()
child = os.fork()
if child == 0:
    os._exit(0 if train() == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), train() == before)
"""
    assert in_a_new_process(code)[0].split() == ["0", "True"]


def test_a_child_forked_while_another_thread_compiles_can_compile(tmp_path):
    code = """
import os, signal, threading, time
from fastmb.executors.numba import library
from fastmb.executors.numba.target import Target, isa
started, real = threading.Event(), library.KERNELS["average"]
def slow(*arguments):
    started.set()
    time.sleep(0.3)
    real(*arguments)
library.KERNELS["average"] = slow
target = Target(isa(), 4)
other = threading.Thread(target=library.kernel, args=("average", target))
other.start()
started.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    library.kernel("add", target)
    os._exit(0)
other.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path))[0] == "0\n"


def test_what_is_compiled_does_not_wait_for_another_thread_that_compiles(tmp_path):
    code = """
import threading
from fastmb.executors.numba import library
from fastmb.executors.numba.target import Target, isa
target, started, had, real = Target(isa(), 4), threading.Event(), threading.Event(), library.KERNELS["average"]
library.kernel("add", target)
def slow(*arguments):
    started.set()
    print(had.wait(20))
    real(*arguments)
library.KERNELS["average"] = slow
other = threading.Thread(target=library.kernel, args=("average", target))
other.start()
started.wait()
library.kernel("add", target)
had.set()
other.join()
"""
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path))[0] == "True\n"


@pytest.mark.parametrize("anew", [False, True])
def test_ctrl_c_at_any_moment_of_a_region_leaves_threads_that_work(anew):
    """Instruction by instruction of what surrounds the region, with threads that are there, or made for it."""
    code = f"""
import faulthandler, sys, threading, numpy as np, fastmb as mb
from fastmb import threads
from fastmb.executors.numba import team
threads.limit = lambda: 3
faulthandler.dump_traceback_later(120, exit=True)
X, y = np.ones((48, 8), np.float32), np.zeros(48, int)
net = mb.mlp([8, 4, 2])
trainer = mb.Trainer(net, batch_size=48, n_threads=3, executor="numba")
expected = trainer.evaluate(X, y)
left = 0

def trace(frame, event, _):
    global left
    if frame.f_code.co_filename != team.__file__ or "run" not in frame.f_code.co_name:
        return trace
    frame.f_trace_opcodes, frame.f_trace_lines = True, False
    if event == "opcode":
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
    return trace

moments, whole = 0, False
while not whole:
    moments += 1
    if {anew}:
        team._dismiss_all()
    left, whole = moments, True
    try:
        sys.settrace(trace)
        trainer.evaluate(X, y)
    except KeyboardInterrupt:
        whole = False
    finally:
        sys.settrace(None)
    assert trainer.evaluate(X, y) == expected
team._dismiss_all()
for thread in threading.enumerate():
    if thread.name.startswith("fastmb"):
        thread.join(20)
print(moments > 50, threading.active_count())
"""
    assert in_a_new_process(code)[0] == "True 1\n"


def test_threads_that_sleep_are_woken(monkeypatch):
    monkeypatch.setattr(threads, "limit", lambda: 3)
    trainer = mb.Trainer(network("float32"), batch_size=64, n_threads=3, executor="numba")
    alone = mb.Trainer(network("float32"), batch_size=64, n_threads=1, executor="numba")
    for _ in range(3):
        trainer.step(X, LABELS)
        alone.step(X, LABELS)
        time.sleep(0.05)  # they go to sleep
    assert np.array_equal(trainer.net.flat, alone.net.flat)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = mb.Trainer(network("float32"), "mse", batch_size=16, executor="numba")
    before = trainer.net.flat.copy()
    with pytest.raises(FloatingPointError):
        trainer.step(X, np.full((90, 5), math.inf))
    assert np.array_equal(trainer.net.flat, before)


def test_memory_that_there_is_not_leaves_what_was_there():
    code = """
import numpy as np, fastmb as mb
from fastmb.executors.numba import arena
trainer = mb.Trainer(mb.mlp([4, 8, 3]), executor="numba", n_threads=1)
X, y, zeros = np.ones((9, 4)), np.zeros(9, int), np.zeros
def none(shape, *_):
    if np.prod(shape) > 10_000:
        raise MemoryError
    return zeros(shape, *_)
trainer.step(X, y)
arena.np.zeros = none
try:
    trainer.step(np.ones((1000, 4)), np.zeros(1000, int))
except MemoryError as error:
    print(str(error).startswith("a mini-batch of 1000 rows needs"))
arena.np.zeros = zeros
print(trainer.step(X, y) > 0)
"""
    assert in_a_new_process(code)[0].split() == ["True", "True"]


def test_a_kernel_that_is_not_compiled_leaves_those_that_were_there():
    code = """
import numpy as np, fastmb as mb
from fastmb.executors.numba import library
net = mb.Sequential(mb.Dropout(0.2), mb.Linear(4, 8), mb.ReLU(), mb.Linear(8, 3))
trainer = mb.Trainer(net, executor="numba", n_threads=1)
X, y, real = np.ones((9, 4)), np.zeros(9, int), library.kernel
trainer.step(X, y)
def interrupted(words, target):
    if words == "limit":
        raise KeyboardInterrupt  # Ctrl-C while it is compiled
    return real(words, target)
library.kernel = interrupted
try:
    trainer.input_gradients(X, y)
except KeyboardInterrupt:
    print(trainer.step(X, y) > 0)
"""
    assert in_a_new_process(code)[0] == "True\n"


def test_it_evaluates_before_it_has_trained():
    ours, theirs = (mb.Trainer(network("float32"), "mse", executor=name) for name in ("numba", "native"))
    assert ours.evaluate(X, VALUES) == theirs.evaluate(X, VALUES)


# ---- with and without ----------------------------------------------------------------------------------------------


def test_without_numba_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"executor='numba' needs the package 'numba': pip install 'fastmb\[numba\]'"):
        executors.load("numba")


def test_numba_is_imported_when_it_is_asked_for():
    code = "import fastmb as mb, sys; mb.Trainer(mb.mlp([2, 2])); print('numba' in sys.modules)"
    assert in_a_new_process(code)[0] == "False\n"


@same_bits
@pytest.mark.parametrize("optimizer", ["mb.Adam()", "mb.Muon(0.05)", "mb.Adafactor(0.05)"])
def test_without_the_extension_numba_is_the_default_and_the_bits_are_the_same(optimizer):
    train = f"""
X, y = np.random.default_rng(0).standard_normal((200, 9)), np.arange(200) % 3
X[0, 0] = 1e-300
trainer = mb.Trainer(mb.mlp([9, 16, 3]), optimizer={optimizer}, seed=3)
trainer.fit(X, y, max_epochs=2, X_val=X, y_val=y, verbose=0)
import hashlib
print(trainer.executor, hashlib.sha256(trainer.net.flat.tobytes()).hexdigest(), trainer.history["val_loss"])
"""
    pure = "import sys; sys.modules['fastmb.executors.native'] = sys.modules['fastmb.ops._native'] = None\n"
    start = "import numpy as np, fastmb as mb\n"
    without = in_a_new_process(pure + start + "assert mb.show_config()['executor'] == 'numba'\n" + train)[0]
    with_it = in_a_new_process(start + train)[0]
    assert without.split()[0] == "numba"
    assert with_it.split()[0] == "native"
    assert without.split()[1:] == with_it.split()[1:]
