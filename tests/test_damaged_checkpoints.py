"""Damaged and hostile checkpoints: a ValueError that says what is wrong, never anything else."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmb as mb
from fastmb import checkpoint

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 100)
SCHEDULE = mb.SequentialLR(
    [
        mb.ChainedScheduler([mb.LinearLR(0.01), mb.MultiStepLR(0.01, [3, 9])]),
        mb.WarmUp(mb.CyclicLR(0.001, 0.01, 3, mode="exp_range", gamma=0.99)),
    ],
    [20],
)


def small() -> mb.Trainer:
    trainer = mb.Trainer(mb.mlp([6, 3]), "cross_entropy", mb.SGD(0.1, 0.9), batch_size=50, executor="numpy")
    trainer.fit(X, Y, max_epochs=1, verbose=0)
    trainer.fit(X, Y, max_epochs=1, verbose=0, max_seconds=0)  # one of two mini-batches
    return trainer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "file"
    small().save(path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    """Loads bytes."""

    def load(data: bytes) -> mb.Trainer:
        (tmp_path / "file").write_bytes(data)
        return mb.load(tmp_path / "file")

    return load


def test_no_truncated_file_is_taken(written, load):
    for length in range(len(written)):
        with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
            load(written[:length])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        load(written + b"\0")


@pytest.mark.parametrize("bits", [0xFF, 0x01, 0x20])
def test_every_flipped_byte_is_found(written, load, bits):
    length = int.from_bytes(written[:8], "little")
    blanks = {8 + length - 1 - i for i in range(8)}
    for i in range(len(written)):
        damaged = written[:i] + bytes([written[i] ^ bits]) + written[i + 1 :]
        try:
            load(damaged)
        except ValueError as error:
            said = str(error).split("file: ")[1]
        else:
            said = "not noticed"
        told = re.match("no safetensors file|damaged|a safetensors file, but no checkpoint|.* has dtype", said)
        assert told or i in blanks, f"byte {i}, {written[i : i + 1]!r}, became {damaged[i : i + 1]!r}: {said}"


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(data):
    with pytest.raises(ValueError, match=r"no safetensors file|no checkpoint"):
        checkpoint._read(data)
    with pytest.raises(ValueError, match=r"no safetensors file|no checkpoint"):
        checkpoint._read(len(data).to_bytes(8, "little") + data)


def forged(change: Any, tensors_too: Any = None) -> bytes:
    """A file with a right digest of what `change` makes of the description, and `tensors_too` of the tensors."""
    tensors: dict[str, np.ndarray] = {}
    description = json.loads(json.dumps(checkpoint.describe(small(), tensors)))
    change = change(description) if callable(change) else change
    if tensors_too is not None:
        tensors_too(tensors)
    text = json.dumps(description if change is None else change)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    header, body, codes = {}, b"", {"f4": "F32", "f8": "F64", "i8": "I64"}
    for name, tensor in tensors.items():
        data = tensor.tobytes()
        offsets = len(body), len(body) + len(data)
        header[name] = {"dtype": codes[tensor.dtype.str[1:]], "shape": tensor.shape, "data_offsets": offsets}
        body += data
    header["__metadata__"] = {"fastmb": text, "sha256": checkpoint._digest(text, tensors)}
    front = json.dumps(header).encode()
    return len(front).to_bytes(8, "little") + front + body


def put(*path: Any) -> Any:
    """Changes a description: the last of `path` is put where the others lead."""

    def change(description: dict[str, Any]) -> None:
        *where, last, value = path
        for step in where:
            description = description[step]
        description[last] = value

    return change


def swap(**arrays: Any) -> Any:
    """Changes tensors; None takes one away, and __ stands for a dot."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            name = name.strip("_").replace("__", ".")
            del tensors[name]
            if array is not None:
                tensors[name] = array

    return change


def test_a_forgery_that_changes_nothing_is_a_checkpoint(load):
    found = load(forged(None))
    assert (found.t, found.epoch, found._current.done) == (3, 1, 1)
    assert (found.net.flat == small().net.flat).all()


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["epoch.more"] = zeros(2)


def drop_place(description: dict[str, Any]) -> None:
    description["position"]["current"] = None


@pytest.mark.parametrize(
    ("change", "tensors_too", "message"),
    [
        (None, swap(_0__weight=zeros(6, 4)), r"0.weight has shape \(6, 4\), the network's has \(6, 3\)"),
        (None, swap(_0__weight=zeros(18)), r"0.weight has shape \(18,\), the network's has \(6, 3\)"),
        (None, swap(_0__bias=zeros(3, dtype="float64")), "0.bias is float64, the network's is float32"),
        (None, swap(_0__bias=zeros(3, dtype="int64")), "0.bias has dtype I64; a checkpoint has F32 and F64"),
        (None, swap(_0__bias=None, state__0__0__weight=None), "0.bias is missing; state.0.0.weight is missing"),
        (None, lambda tensors: tensors.update({"7.weight": zeros(1)}), "7.weight is none of the network's"),
        (None, add, "has tensors that nothing refers to: epoch.more"),
        (drop_place, None, "has tensors that nothing refers to: epoch.sums"),
        (None, swap(epoch__sums=None), "lacks the tensor epoch.sums"),
        (
            None,
            swap(epoch__sums=zeros(5, 2)),
            r"epoch.sums has shape \(5, 2\); mini-batch 1 of 2 is in one of \(2, 2\)",
        ),
        (
            put("net", "modules", 0, "in_features", 10**15),
            None,
            r"0.weight has shape \(6, 3\), the network's has \(10000",
        ),
        (put("net", "modules", 0, "in_features", 2.5), None, "net.0: in_features must be an integer >= 1; got 2.5"),
        (put("net", "modules", 0, "type", "Conv2d"), None, "net.0: type must be one of 'Linear', .* got 'Conv2d'"),
        (put("net", "modules", 0, "type", "Callback"), None, "net.0: type must be one of 'Linear', "),
        (put("net", "modules", 0, "type", "x" * 10**6), None, "net.0: type must be one of 'Linear', "),
        (put("net", "modules", 0, "type", ["os"]), None, "net.0: type must be one of 'Linear', "),
        (put("net", "modules", 0, "bias", 1), None, "net.0.bias must be true or false; got 1"),
        (put("net", "modules", 0, "colour", 1), None, "net.0 has also colour"),
        (put("net", "modules", 0, "init", {"tensor": "net.0.init"}), None, "lacks the tensor net.0.init"),
        (
            put("net", "modules", 0, "init", {"tensor": "0.weight"}),
            None,
            "net.0.init: type must be one of 'ConstantLR'",
        ),
        (put("net", "modules", 0, "init", "best"), None, "net.0: init must be one of 'kaiming_uniform'"),
        (put("net", "modules", []), None, "modules must hold at least one Linear; got none"),
        (put("net", "modules", 5), None, "modules must hold at least one Linear; got none"),
        (put("net", "modules", [{"type": "ReLU"}]), None, r"modules must hold at least one Linear; got ReLU\(\)"),
        (put("net", "dtype", "float16"), None, "dtype must be one of 'float32', 'float64'; got 'float16'"),
        (put("net", "dtype", {"names": 5}), None, "dtype must be one of 'float32', 'float64'"),
        (put("net", "dtype", "float64"), None, "0.weight is float32, the network's is float64"),
        (put("net", "squeeze", "yes"), None, "squeeze must be true or false; got 'yes'"),
        (put("net", "seed", -1), None, "seed must be an integer from 0 to"),
        (put("net", 7), None, "net must be a mapping; got 7"),
        (put("loss", None), None, "loss: type must be one of 'CrossEntropy', .*; got 'None'"),
        (put("loss", "label_smoothing", 2), None, r"loss: label_smoothing must be a number in \[0, 1\]; got 2"),
        (put("loss", "class_weight", [1, 2]), None, "class_weight must have 3 values, one per output; got 2"),
        (put("optimizer", "lr", "os.system"), None, "optimizer: lr must be a number"),
        (put("optimizer", "lr", {"type": "StepLR", "lr": 1}), None, "optimizer.lr lacks step_size, gamma"),
        (put("optimizer", "lr", {"type": "SGD"}), None, "optimizer.lr: type must be one of 'ConstantLR'"),
        (put("optimizer", "nesterov", 1), None, "optimizer.nesterov must be true or false; got 1"),
        (put("optimizer", "momentum", 0.0), None, "state.0.0.weight is none of the network's"),
        (put("trainer", "batch_size", 0), None, "batch_size must be an integer >= 1|from 1"),
        (put("trainer", "batch_size", 60), None, None),
        (put("trainer", "batch_size", 10**30), None, "batch_size must be an integer from 1 to"),
        (put("trainer", "n_threads", 10**30), None, None),
        (put("trainer", "executor", "shell"), None, "executor must be one of 'native', 'numba', 'numpy'; got 'shell'"),
        (put("trainer", "executor", ["numpy"]), None, "executor must be one of 'native', 'numba', 'numpy'"),
        (put("trainer", "input_scale", math.inf), None, "input_scale must be a number in"),
        (put("trainer", "shuffle", 1), None, "trainer.shuffle must be true or false; got 1"),
        (put("trainer", "seed", "x"), None, "seed must be an integer"),
        (put("position", "t", -1), None, "t must be an integer from 0 to .*; got -1"),
        (put("position", "epoch", 0.5), None, "epoch must be an integer from 0 to .*; got 0.5"),
        (put("position", "current", []), None, r"position.current must be a mapping; got \[\]"),
        (put("position", "current", "done", 3), None, "done must be an integer from 1 to 2; got 3"),
        (put("position", "current", "rows", 10**40), None, "rows must be an integer from 1 to"),
        (put("position", "current", "lr", math.nan), None, "lr must be a number in"),
        (put("history", "rows", [{"epoch": 1}]), None, "history must hold rows of numbers with epoch, loss, lr"),
        (put("history", "rows", 0, "loss", "0.1"), None, "history must hold rows of numbers"),
        (put("history", "rows", 5), None, "history must hold rows of numbers"),
        (put("history", "stopped", 5), None, "history must hold rows of numbers"),
        (put("format", 2), None, "written in another format than 1"),
        ([1], None, "written in another format than 1"),
        (lambda description: {"format": 1}, None, "fastmb lacks version, net, loss, optimizer"),
    ],
)
def test_a_file_that_lies_is_told_where(load, change, tensors_too, message):
    if message is None:
        assert isinstance(load(forged(change, tensors_too)), mb.Trainer)
        return
    with pytest.raises(ValueError, match="file: .*(" + message + ")"):
        load(forged(change, tensors_too))


LIES = [
    None,
    True,
    0,
    -1,
    10**40,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    [1],
    {},
    {"type": "ReLU"},
    {"tensor": "0.bias"},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in a description."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, item in inner for found in [(*path, name), *places(item, (*path, name))]]


def varied() -> mb.Trainer:
    rate = mb.ReduceLROnPlateau(0.1, "loss")
    optimizer = mb.SGD(rate, SCHEDULE, groups={"*.bias": {"lr": 2, "momentum": 0}})
    net = mb.Sequential(mb.Dropout(SCHEDULE), mb.Linear(6, 3))
    return mb.Trainer(net, optimizer=optimizer, average=mb.SWA(1, lr=0.1), batch_size=50, executor="numpy")


def stepwise() -> mb.Trainer:
    return mb.Trainer(mb.mlp([6, 3]), optimizer=mb.Muon(0.1), average=mb.EMA(), batch_size=50, executor="numpy")


@pytest.mark.parametrize("make", [small, varied, stepwise])
def test_every_lie_in_every_place_is_told_or_harmless(make):
    tensors: dict[str, np.ndarray] = {}
    trainer = make()
    if make is small:
        trainer.optimizer = mb.SGD(SCHEDULE, 0.9)
    description = json.loads(json.dumps(checkpoint.describe(trainer, tensors)))
    checkpoint._restored(description, tensors)
    told = 0
    for path in places(description):
        for lie in LIES:
            changed = copy.deepcopy(description)
            put(*path, lie)(changed)
            try:
                checkpoint._restored(changed, tensors).fit(X, Y, max_epochs=1, verbose=0)
            except (TypeError, ValueError, ArithmeticError, MemoryError):  # what `load` tells, or the fit
                told += 1
    assert told > 500


def test_metadata_nested_without_end_are_told(load):
    deep = "[" * 200_000 + "]" * 200_000
    front = json.dumps({"__metadata__": {"fastmb": deep, "sha256": hashlib.sha256(deep.encode()).hexdigest()}}).encode()
    with pytest.raises(ValueError, match="nested too deeply"):
        load(len(front).to_bytes(8, "little") + front)


def test_another_safetensors_file_is_told(load):
    from safetensors.numpy import save

    with pytest.raises(ValueError, match="a safetensors file, but no checkpoint: its metadata lack 'fastmb'"):
        load(save({"a": np.zeros(3)}))
    with pytest.raises(FileNotFoundError):
        mb.load("no such file")
