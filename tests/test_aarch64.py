"""The kernels give the same bits on AArch64 and on every instruction set here, and they are the executor's.

`reproducibility/train.c` trains small networks by the kernels alone. It is compiled by setup.py's flags, warnings being
errors, for this processor and for AArch64, and run here and under QEMU.
"""

import ast
import io
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import fastmb as mb
from fastmb import losses, nn, optim
from fastmb.data import Batches
from fastmb.executors import Training, native
from fastmb.executors.native import NativeExecutor
from fastmb.rng import permutation

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PROGRAM = Path(__file__).parent / "reproducibility" / "train.c"
CROSS, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
ISAS = [isa for isa in native.available_isas() if isa != "v2"]
TYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")  # enum fmb_type
EPOCHS, BATCH, ROWS = 2, 67, 150

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="the C sources (csrc/) are not beside the tests")


# ---- cases ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A training of a network: the executor runs it, and `write` puts it down for train.c."""

    net: mb.Sequential
    loss: losses.Loss
    optimizer: optim.Optimizer
    X: np.ndarray
    y: np.ndarray
    batch: int = BATCH
    scale: float = 1.0
    seed: int = 2**63 + 11

    def __post_init__(self):
        self.steps = -(-len(self.X) // self.batch)
        self.orders = [permutation(len(self.X), self.seed, epoch) for epoch in range(EPOCHS)]
        n = EPOCHS * self.steps
        self.coefficients = self.optimizer.coefficients(0, n, self.optimizer.learning_rates(0, n))
        self.state = np.zeros((self.optimizer.n_states, self.net.plan.size), self.net.dtype)
        self.optimizer.init_state(self.state)

    def run(self, isa):
        """Parameters, state, loss sums and outputs after training by the executor, as bytes."""
        flat, state = self.net.flat.copy(), self.state.copy()
        training = Training(self.loss, self.optimizer, state, self.batch, self.seed)
        executor = NativeExecutor(self.net.plan, flat, training, 1, isa)
        sums = np.full((EPOCHS * self.steps, 2), np.nan)
        for epoch, order in enumerate(self.orders):
            batches = Batches(self.X, self.y, None, order, self.batch, self.scale)
            rows = slice(epoch * self.steps, (epoch + 1) * self.steps)
            done = executor.run(batches, 0, rows.start, self.coefficients[rows], sums[rows], 1e9)
            assert done == self.steps
        out = np.full((len(self.X), self.net.plan.n_outputs), np.nan, self.net.dtype)
        executor.forward(self.X, self.scale, out)
        assert np.isfinite(flat).all()
        assert np.isfinite(sums).all()
        return b"".join(array.tobytes() for array in (flat, state, sums, out))

    def write(self, file):
        def integers(*values):
            file.write(np.array([value % 2**64 for value in values], "<u8").tobytes())

        def reals(*values):
            file.write(np.array(values, "<f8").tobytes())

        def ops(ops):
            for op in ops:
                dropout = op.kind == "dropout"
                kind = -1 if dropout else native.ACTIVATIONS.index(op.kind)
                integers(kind, op.index, int(op.value * 2**32) if dropout else 0)
                reals(op.value, 1 / (1 - op.value) if dropout else 0)

        def source(array):
            columns = array.shape[1] if array.ndim == 2 else 1
            integers(TYPES.index(array.dtype.str[1:]), columns, array.itemsize)
            file.write(array.tobytes())

        plan = self.net.plan
        integers(nn.DTYPES.index(plan.dtype.name), len(plan.input_ops))
        ops(plan.input_ops)
        integers(len(plan.stages))
        for stage in plan.stages:
            integers(stage.n_in, stage.n_out, stage.rows, stage.offset, len(stage.ops))
            ops(stage.ops)
        integers(plan.size, self.optimizer.n_states)
        file.write(self.net.flat.tobytes() + self.state.tobytes())
        integers(len(self.X))
        reals(self.scale)
        source(self.X)
        source(self.y)
        integers(native.LOSSES.index(self.loss.kind), self.loss.kind == "cross_entropy" and self.y.ndim == 1)
        reals(self.loss.label_smoothing, self.loss.delta)
        weight = self.loss.weight
        integers(weight is not None)
        if weight is not None:
            file.write(weight.astype(plan.dtype).tobytes())
        integers(native.UPDATES.index(self.optimizer.kind), self.seed, self.batch, EPOCHS)
        file.write(self.coefficients.tobytes())
        file.write(np.stack(self.orders).tobytes())


def integers(rows, columns, below):
    """Whole numbers that look like noise."""
    i = np.arange(1, rows * columns + 1, dtype=np.uint64)
    return (i * (i + 7) * 2654435761 >> 7) % 2**25 % below


def inputs(rows=ROWS, columns=19, dtype="f4"):
    return (integers(rows, columns, 256).astype("f8").reshape(rows, columns) / 64 - 2).astype(dtype)


def targets(loss, rows, n):
    if loss.task == "classification":
        return integers(rows, 1, n).astype("i8")
    whole = integers(rows, n, 64).reshape(rows, n)
    return (whole % 2).astype("u1") if loss.task == "multilabel" else whole / 32 - 1


def cases():
    """Name -> case."""
    cross_entropy, sgd = mb.CrossEntropy(), mb.SGD(lr=0.1, momentum=0.9)

    def case(modules, dtype, loss=cross_entropy, optimizer=sgd, X=None, y=None, **options):
        net = mb.Sequential(*modules, seed=3, dtype=dtype)
        X = inputs(columns=net.plan.n_features) if X is None else X
        y = targets(loss, len(X), net.plan.n_outputs) if y is None else y
        return Case(net, loss, optimizer, X, y, **options)

    def modules(activation="gelu"):
        hidden = nn.ACTIVATIONS[activation]
        layers = mb.Linear(19, 40), hidden(), mb.Dropout(0.3), mb.Linear(40, 33, bias=False), mb.ReLU()
        return mb.Dropout(0.1), *layers, mb.Linear(33, 10), mb.Dropout(0.2)

    weights = np.arange(10) / 8
    found = {}
    for dtype in nn.DTYPES:
        for name in nn.ACTIVATIONS:
            found[f"{name} {dtype}"] = case(modules(name), dtype)
        for loss in [
            *(cls() for cls in losses.LOSSES.values()),
            mb.CrossEntropy(label_smoothing=0.1, class_weight=weights),
            mb.BCEWithLogits(pos_weight=weights),
            losses.FromOutside(),
        ]:
            found[f"{loss} {dtype}"] = case(modules(), dtype, loss)
        probabilities = inputs(columns=10, dtype="f8") ** 2
        found[f"rows of probabilities {dtype}"] = case(modules(), dtype, y=probabilities / 40)
        for kind, optimizer in OPTIMIZERS.items():
            found[f"{kind} {dtype}"] = case(modules(), dtype, optimizer=optimizer)
        for source in TYPES:
            X = integers(ROWS, 19, 100).reshape(ROWS, 19).astype(source)
            found[f"X of {source} {dtype}"] = case(modules(), dtype, X=X, scale=0.01)
        for batch in (1, 2, 3, 6, 7, 13, 33):
            found[f"batch of {batch} {dtype}"] = case(modules("tanh"), dtype, X=inputs(40), batch=batch)
        for width in (1, 2, 5, 17, 65, 97):
            layers = mb.Linear(width, 21), mb.Tanh(), mb.Linear(21, width)
            found[f"width {width} {dtype}"] = case(layers, dtype, mb.MSE(), batch=23)
        tiny = 2e-38 if dtype == "float32" else 4e-308  # their products with the weights are denormal
        found[f"denormals {dtype}"] = case(modules("silu"), dtype, mb.MSE(), X=inputs(dtype=dtype) * tiny)
    return found


OPTIMIZERS = {
    kind: optimizer
    for cls in optim.OPTIMIZERS.values()
    if cls.fused  # the others have no kernel
    for optimizer in (cls(),)
    for kind in (optimizer.kind,)
} | {
    "sgd, decayed": mb.SGD(lr=0.1, weight_decay=0.01),
    "momentum": mb.SGD(lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": mb.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": mb.Adam(lr=0.01, amsgrad=True, weight_decay=0.01),
    "adamw": mb.AdamW(lr=0.01),
    "rmsprop_momentum": mb.RMSprop(momentum=0.9),
    "rmsprop_centered": mb.RMSprop(centered=True),
    "rmsprop_centered_momentum": mb.RMSprop(centered=True, momentum=0.9),
    "adagrad, from 0.1": mb.Adagrad(initial_accumulator_value=0.1),
}


# ---- programs ------------------------------------------------------------------------------------------------------


def flags():
    """The flags in setup.py, by name; the base's apart."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return ["-D_GNU_SOURCE", *found["OTHERS"], *found["WARNINGS"], "-Werror", *found["ARITHMETIC"]]


def build(compiler, isas, folder, *options):
    """The program for the instruction sets of `isas`, compiled file by file, side by side."""
    sources = [PROGRAM, CSRC / "dispatch.c", *(CSRC / f"isa_{isa}.c" for isa in isas)]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source, to):
        subprocess.run([compiler, *flags(), *options, "-I", CSRC, "-c", source, "-o", to], check=True, timeout=300)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    program = folder / "train"
    subprocess.run([compiler, *options, "-fopenmp", *objects, "-o", program], check=True, timeout=60)
    return program


def need(*tools):
    """Skips the test where a tool is missing, and says what to install."""
    packages = {QEMU: "qemu-user", CROSS: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"}
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        names = " ".join(packages.get(tool, tool) for tool in missing)
        pytest.skip(f"{' and '.join(missing)} not found: apt-get install --no-install-recommends {names}")


@pytest.fixture(scope="module")
def all_cases():
    return cases()


@pytest.fixture(scope="module")
def written(all_cases):
    file = io.BytesIO()
    for case in all_cases.values():
        case.write(file)
    return file.getvalue()


@pytest.fixture(scope="module")
def expected(all_cases):
    """What the executor gives, on its widest instruction set."""
    if not ISAS:
        pytest.skip("this processor has no fused multiply-add: its bits are its own")
    return {name: case.run(ISAS[-1]) for name, case in all_cases.items()}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The program for this processor."""
    need("gcc")
    arm = platform.machine() in ("aarch64", "arm64")
    isas, base = (["neon"], []) if arm else (["v2", "v3", "v4"], ["-march=x86-64-v2"])
    return build("gcc", isas, tmp_path_factory.mktemp("here"), *base)


def results(command, all_cases, written):
    """Name -> what the program says of each case: what the executor has too, and the rest."""
    done = subprocess.run(command, input=written, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    found, at = {}, 0
    for name, case in all_cases.items():
        plan = case.net.plan
        first = plan.stages[0]
        sizes = [
            plan.size * (1 + len(case.state)) + len(case.X) * plan.n_outputs,
            plan.size + 4 + first.n_in * first.n_out,
        ]
        trained, rest = (size * plan.dtype.itemsize for size in sizes)
        trained, rest = at + trained + 16 * EPOCHS * case.steps, rest + 8
        found[name] = done.stdout[at:trained], done.stdout[trained : trained + rest]
        at = trained + rest
    assert len(done.stdout) == at
    return found


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [name for name, result in found.items() if result != expected[name]]


# ---- tests ---------------------------------------------------------------------------------------------------------


def test_every_kind_is_among_the_cases(all_cases):
    """So that what is new isn't left out."""
    used = {op.kind for case in all_cases.values() for stage in case.net.plan.stages for op in stage.ops}
    assert used == {*native.ACTIVATIONS, "dropout"} - {"identity"}
    assert {case.loss.kind for case in all_cases.values()} == set(native.LOSSES) - {"custom"}  # a user's own
    assert {case.optimizer.kind for case in all_cases.values()} == set(native.UPDATES) - {"gradient", "accumulate"}


@pytest.mark.parametrize("isa", ISAS)
def test_the_executor_has_the_same_bits_on_every_instruction_set(isa, all_cases, expected):
    assert {name for name, case in all_cases.items() if case.run(isa) != expected[name]} == set()


def test_the_kernels_have_the_executors_bits_here(here, all_cases, written, expected):
    of = {isa: results([here, isa], all_cases, written) for isa in ISAS}
    for isa, found in of.items():
        assert differing({name: trained for name, (trained, _) in found.items()}, expected) == [], isa
        assert differing(found, of[ISAS[-1]]) == [], isa


def test_the_kernels_have_the_same_bits_on_aarch64(here, tmp_path, all_cases, written, expected):
    need(CROSS, QEMU)
    found = results([QEMU, build(CROSS, ["neon"], tmp_path, "-static"), "neon"], all_cases, written)
    assert differing({name: trained for name, (trained, _) in found.items()}, expected) == []
    assert differing(found, results([here, ISAS[-1]], all_cases, written)) == []
