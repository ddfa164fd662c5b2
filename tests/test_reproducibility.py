"""Whoever trains gets the same bits: docs/reproducibility.md, held to the digests in reproducibility/digests.json.

The trainings are in reproducibility/digests.py, which also runs by itself, where there is no pytest. The kernels on
another processor are test_aarch64.py's.
"""

import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastmb as mb
from fastmb import executors, optim
from fastmb.executors import native

SCRIPT = Path(__file__).parent / "reproducibility" / "digests.py"
digests = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
EXPECTED = json.loads(digests.FILE.read_text())
OPTIMIZERS = {f"{name} {dtype}" for name, _ in digests.optimizers() for dtype in ("float32", "float64")}
LAYERED = {
    f"{name}{what} {dtype}"
    for name in digests.layers()
    for what in ("", ", Muon", ", noise")
    for dtype in ("float32", "float64")
} & EXPECTED.keys()
TRAINED = {name for name in EXPECTED if not name.startswith("initial ")}
ISAS = [isa for isa in native.available_isas() if isa != "v2"]

needs_fma = pytest.mark.skipif(
    native.isa() == "v2", reason="the instruction set is v2, without fused multiply-add: its bits are its own"
)


def check(found, names=TRAINED):
    """Each case that differs is named."""
    wrong = {name: (digest, EXPECTED.get(name)) for name, digest in found.items() if digest != EXPECTED.get(name)}
    assert not wrong, "a change of arithmetic? If on purpose: digests.py --write, and a line in CHANGELOG.md"
    assert found.keys() == names


def test_the_file_has_every_case_and_no_other():
    assert EXPECTED.keys() == digests.recipes().keys() | digests.initial_weights().keys()
    assert len(set(map(EXPECTED.get, OPTIMIZERS))) == len(OPTIMIZERS)
    found = [optimizer for _, optimizer in digests.optimizers()]
    assert {type(optimizer) for optimizer in found} == set(optim.OPTIMIZERS.values())
    assert {optimizer.kind for optimizer in found} == optim.KINDS.keys() | {"muon", "adafactor"}
    stages = [stage for name in digests.layers() for stage in digests.layered("float32", name).plan.stages]
    assert {stage.kind for stage in stages} == set(native.KINDS)
    assert any(stage.skip is not None for stage in stages)


def test_initial_weights():
    check(digests.initial_weights(), EXPECTED.keys() - TRAINED)


@needs_fma
@pytest.mark.parametrize("executor", [name for name in executors.NAMES if name != "numpy"])
def test_every_executor(executor, executors_here):
    if executor not in executors_here:
        pytest.skip(f"the {executor} executor does not load here; the report's header says why")
    check(digests.train(executor=executor))


@needs_fma
@pytest.mark.parametrize("n_threads", [1, 2])
def test_one_thread_and_two(n_threads):
    check(digests.train(allowed=n_threads, n_threads=n_threads))


@needs_fma
@pytest.mark.parametrize("n_threads", [3, 4, 7])
def test_more_threads(n_threads):
    """They may be more than the processors, and then take their time: optimisers and layers, in float32."""
    names = {name for name in OPTIMIZERS | LAYERED if name.endswith("float32")}
    check(digests.train(names=names, allowed=n_threads, n_threads=n_threads), names)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_with_fma(isa, monkeypatch):
    monkeypatch.setenv("FASTMB_ISA", isa)
    check(digests.train())


@needs_fma
@pytest.mark.parametrize("way", ["in_one_go", "in_pieces", "by_step", "pickled"])
def test_every_way_to_train(way):
    names = {name for name in TRAINED if way != "by_step" or not name.startswith("Poisson")}
    check(digests.train(getattr(digests, way), names), names)


@needs_fma
def test_a_machine_that_is_busy():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        check(digests.train(names=OPTIMIZERS, allowed=2, n_threads=2), OPTIMIZERS)
        check(digests.train(names=OPTIMIZERS), OPTIMIZERS)
    finally:
        for process in busy:
            process.kill()
            process.wait()


@needs_fma
def test_the_script_compares_and_says_what_differs(tmp_path):
    """The check that docs/reproducibility.md tells people to run."""

    def run(script):
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)

    done = run(SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(EXPECTED)} of {len(EXPECTED)} digests are the same" in done.stdout
    copy = tmp_path / "digests.py"
    copy.write_text(SCRIPT.read_text())
    copy.with_name("digests.json").write_text(json.dumps(EXPECTED | {"mish float32": "0" * 16}))
    done = run(copy)
    assert done.returncode == 1
    assert f"mish float32: {EXPECTED['mish float32']}, not {'0' * 16}" in done.stdout
    assert f"{len(EXPECTED) - 1} of {len(EXPECTED)} digests" in done.stdout


# ---- net.digest ----------------------------------------------------------------------------------------------------


def test_a_digest_is_the_sha_256_of_names_shapes_dtype_and_values():
    net = mb.Sequential(
        mb.Linear(2, 3, init=[[1, 2, 3], [4, 5, 6]]), mb.ReLU(), mb.Linear(3, 1, bias=False, init="zeros")
    )
    text = b"0.weight 2x3 <f4\n" + np.arange(1, 7, dtype="<f4").tobytes()
    text += b"0.bias 3 <f4\n" + bytes(12) + b"2.weight 3x1 <f4\n" + bytes(12)
    assert net.digest() == hashlib.sha256(text).hexdigest()[:16]


def test_a_digest_tells_apart_what_differs_in_a_bit():
    net = mb.mlp([3, 2, 2])
    found = {net.digest()}
    assert pickle.loads(pickle.dumps(net)).digest() in found
    weight = net.parameters()["0.weight"]
    weight[0, 0] = np.nextafter(weight[0, 0], np.float32(9))
    found.add(net.digest())
    net.parameters()["0.bias"][1] = -0.0
    found.add(net.digest())
    found |= {mb.mlp(sizes, dtype=dtype).digest() for sizes in ([3, 2, 2], [2, 3, 2]) for dtype in ("f4", "f8")}
    assert len(found) == 6  # mlp([3, 2, 2]) is there already
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in found)


def test_a_digest_sees_running_statistics():
    net = mb.Sequential(mb.Linear(2, 1, init="zeros"), mb.BatchNorm1d(1, affine=False))
    text = b"0.weight 2x1 <f4\n" + bytes(8) + b"0.bias 1 <f4\n" + bytes(4) + b"1.running_mean 1 <f4\n" + bytes(4)
    text += b"1.running_var 1 <f4\n" + np.ones(1, "<f4").tobytes() + b"1.num_batches_tracked 1 <f4\n" + bytes(4)
    assert net.digest() == hashlib.sha256(text).hexdigest()[:16]
    for array in net.buffers().values():
        before = net.digest()
        array[0] = np.nextafter(array[0], np.float32(9))
        assert net.digest() != before


def test_a_digest_sees_nothing_else():
    """Not the gaps between parameters, not what a trainer has told the network."""
    net = mb.mlp([3, 2, 2])
    before = net.digest()
    gap = np.ones(net.plan.size, bool)
    for stage in net.plan.stages:
        gap[stage.offset : stage.offset + stage.size] = False
    net.flat[gap] = 7
    mb.Trainer(net, input_scale=0.5)
    assert gap.any()
    assert net.digest() == before
