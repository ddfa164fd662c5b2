"""Checkpoints: a trainer, whole, in a safetensors file; `Trainer.save` writes it, `load` reads it.

The tensors are the parameters by name ("0.weight"), the buffers ("1.running_mean"), the optimiser's state
("state.0.0.weight"), the average of the parameters that a trainer may keep ("average.0.weight"), the sums of an epoch
that is under way ("epoch.sums"), gradients that wait ("pending.0.weight"), and the arrays that modules and losses were
given ("net.0.init", "loss.pos_weight"). The metadata has the entry "fastmb", JSON that describes the rest, and
"sha256", of that text and all tensors: it finds damage, not forgery. Nothing in the file is run: a class is named,
looked up in a table, and called with its parameters, which it checks as always. Shapes are compared before memory is
asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from . import _gradient_stats
from ._checks import integer, number
from ._checks import seed as check_seed
from ._errors import missing_extra, unknown_name
from ._files import check_path, replace, send
from ._fitting import SLICE, Epoch
from ._per_example import Pending
from ._planning import check_modules, make_plan
from ._settings import OF_AN_EPOCH
from ._version import __version__
from .averaging import AVERAGES, averaged_alike
from .executors import NAMES, available
from .layers import BatchNorm1d, LayerNorm, PReLU, Residual
from .losses import LOSSES
from .modules import ACTIVATIONS, Dropout, Linear, Module, Softmax
from .nn import Sequential, _check_dtype
from .optim import OPTIMIZERS
from .plan import Plan, views
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT = 1
_DTYPES: dict[str, np.dtype] = {"F32": np.dtype("float32"), "F64": np.dtype("float64")}  # little-endian, both
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MODULES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(Linear, Dropout, Softmax, BatchNorm1d, LayerNorm, PReLU, Residual),
        *(type(make()) for make in ACTIVATIONS.values()),
    )
}
_LOSSES = {cls.__name__: cls for cls in LOSSES.values()}
_OPTIMIZERS = {cls.__name__: cls for cls in OPTIMIZERS.values()}
_SETTINGS = (
    *("batch_size", "shuffle", "drop_last", "seed", "n_threads", "executor", "input_scale", "accumulate_steps"),
    *("max_grad_norm", "clip_value", "clip_per_example", "noise_multiplier", "secure", "sampling", "gradient_stats"),
)
_FLAGS = ("shuffle", "drop_last", "secure", "gradient_stats")
_BESIDE = ("state.", "average.", "pending.")  # prefixes of what is as large as the network, but none of it
_PLACE = ("rows", "done", "seconds", "lr", "loss", "weight")  # of an `Epoch`
_FIGURES = ("epoch", "loss", "lr", "seconds", "examples_per_second")  # that each row of a history has
_SHOWN = 8  # differences that an error lists
_MOST = 2**53
_LONGEST = 100_000_000  # bytes of a header that safetensors reads

Tensors = dict[str, np.ndarray]


# ---- a trainer becomes a file ----------------------------------------------------------------------------------------


def save(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """What `Trainer.save` does."""
    import json

    check_path(path)
    tensors: Tensors = {}
    description = describe(trainer, tensors)
    _history(description["history"])  # what isn't read isn't written
    text = json.dumps(description, separators=(",", ":"))
    metadata = {"fastmb": text, "sha256": "0" * 64}  # until it is known: its length doesn't depend on it
    header: dict[str, Any] = {"__metadata__": metadata}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))  # all aligned
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    if (size := len(_front(header)) - 8) > _LONGEST:
        rows = len(trainer.history._rows)
        raise ValueError(f"can't be saved: header of {size} bytes, {_LONGEST} are allowed; history has {rows} rows")

    def write(file: BinaryIO) -> None:
        digest = _meanwhile(lambda: _digest(text, tensors))  # while the disk takes the tensors
        file.write(_front(header))
        for tensor in tensors.values():
            send(file, _bytes(tensor))
        metadata["sha256"] = digest()
        file.seek(0)
        file.write(_front(header))

    replace(path, write)


def _front(header: Mapping[str, Any]) -> bytes:
    """The header as it stands in a file, with its length before it."""
    import json

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def describe(trainer: Trainer, tensors: Tensors) -> dict[str, Any]:
    """All of a trainer but its tensors, in terms of JSON; those are put into `tensors`."""
    net, current = trainer.net, trainer._current
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "net": {
            "modules": [_spec(module, _MODULES, f"net.{i}", tensors) for i, module in enumerate(net.modules)],
            "seed": net.seed,
            "dtype": net.dtype.name,
            "squeeze": net.squeeze,
        },
        "loss": _spec(trainer.loss, _LOSSES, "loss", tensors),
        "optimizer": _spec(trainer.optimizer, _OPTIMIZERS, "optimizer", tensors),
        "average": None if trainer.average is None else _spec(trainer.average, AVERAGES, "average", tensors),
        "trainer": {name: getattr(trainer, name) for name in _SETTINGS},
        "position": {
            "t": trainer.t,
            "epoch": trainer.epoch,
            "since": min(trainer._since, trainer.epoch),
            "current": None,
            "pending": None,
        },
        "history": {"stopped": trainer.history.stopped, "rows": trainer.history._rows},
    }
    if current is not None and current.done:
        description["position"]["current"] = {name: getattr(current, name) for name in _PLACE}
        tensors["epoch.sums"] = current.sums
        if current.stats is not None:
            tensors["epoch.stats"], tensors["epoch.moments"] = current.stats, current.moments
    if trainer._pending is not None:
        description["position"]["pending"] = {"weight": trainer._pending.weight, "rows": trainer._pending.rows}
    if trainer.history.example_norms is not None:
        tensors["history.example_norms"] = trainer.history.example_norms
    tensors |= _arrays(trainer)
    return description


def _vectors(trainer: Trainer) -> list[tuple[str, np.ndarray]]:
    average, pending = trainer.average is not None, trainer._pending
    waiting = [] if pending is None else [pending.flat]
    prefixes = _prefixes(trainer.optimizer.n_states, average, pending is not None)
    return list(zip(prefixes, [trainer.net.flat, *trainer.state, *waiting], strict=True))


def _prefixes(n_states: int, average: bool, pending: bool) -> list[str]:
    """What names begin with: of parameters, of the optimiser's state, of their average, of gradients that wait."""
    return ["", *(f"state.{k}." for k in range(n_states)), *["average."] * average, *["pending."] * pending]


def _arrays(trainer: Trainer) -> Tensors:
    """Parameters, buffers, the optimiser's state, an average and gradients that wait, by name, all of them views."""
    found: Tensors = {}
    for prefix, flat in _vectors(trainer):
        found |= {prefix + name: array for name, array in views(flat, trainer.net.plan).items()}
    found |= trainer.net.buffers()
    return found


def _spec(thing: Any, table: Mapping[str, Any], where: str, tensors: Tensors) -> dict[str, Any]:
    name = type(thing).__name__
    if getattr(thing, "function", None) is not None:
        raise TypeError(
            f"{where} can't be saved: {thing!r} is made of a Python function, which a checkpoint doesn't hold; "
            "pickle holds it, if it can be imported"
        )
    if table.get(name) is not type(thing):
        raise TypeError(f"{where} can't be saved: {name} is not one of {', '.join(table)}")
    parameters = (field.name for field in fields(table[name]) if field.init)
    return {"type": name} | {p: _value(getattr(thing, p), f"{where}.{p}", tensors) for p in parameters}


def _value(value: Any, where: str, tensors: Tensors) -> Any:
    if isinstance(value, np.ndarray):
        tensors[where] = np.ascontiguousarray(value)
        return {"tensor": where}
    if type(value) in SCHEDULES.values():
        return _spec(value, SCHEDULES, where, tensors)
    if isinstance(value, Module):
        return _spec(value, _MODULES, where, tensors)
    if isinstance(value, tuple):
        return [_value(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
    if callable(value):
        raise TypeError(
            f"{where} can't be saved: {value!r} is a Python function; fastmb.schedules has learning rates that can be"
        )
    return value


def _digest(text: str, tensors: Tensors) -> str:
    import hashlib

    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _meanwhile(work: Callable[[], str]) -> Callable[[], str]:
    """Start `work` in a thread; what is returned waits for its result."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    try:
        thread.start()
    except RuntimeError:  # as the interpreter ends there are no more threads
        results.append(work())

    def result() -> str:
        if not results:
            thread.join()
        return results[0]

    return result


def _bytes(tensor: np.ndarray) -> memoryview:
    return tensor.reshape(-1).data.cast("B")


# ---- a file becomes a trainer ----------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Trainer:
    """The trainer that `Trainer.save` wrote to `path`, as it was: what it goes on to has the bits it would have had.

    Parameters
    ----------
    path : str or path-like
        A checkpoint. Nothing in it is run, so it may come from anywhere.

    Returns
    -------
    Trainer
        With its network, loss, optimiser, position and history.

    Raises
    ------
    OSError
        If the file can't be read.
    ValueError
        If it is no checkpoint, is damaged, or contradicts itself; the message says where.
    ImportError
        If safetensors isn't installed: ``pip install 'fastmb[checkpoint]'``.

    Examples
    --------
    >>> import fastmb as mb, os, tempfile
    >>> X, y = mb.datasets.load_digits()
    >>> trainer = mb.Trainer(mb.mlp([64, 32, 10]), input_scale=1 / 16)
    >>> history = trainer.fit(X, y, max_epochs=1, verbose=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer.save(os.path.join(folder, "digits.safetensors"))
    ...     again = mb.load(os.path.join(folder, "digits.safetensors"))
    >>> again.evaluate(X, y) == trainer.evaluate(X, y)
    True
    """
    data = Path(path).read_bytes()
    try:
        return _restored(*_read(data))
    except RecursionError:
        raise ValueError(f"{os.fspath(path)}: its metadata are nested too deeply") from None
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def load_into(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """What `Trainer.load` does."""
    found = load(path)
    arrays, theirs = _arrays(trainer), _arrays(found)
    kinds, others = (each.optimizer.state_kinds(each.net.parameters()) for each in (trainer, found))
    wrong = _differences(
        {name: array for name, array in theirs.items() if not name.startswith(_BESIDE)},
        {name: (array.dtype, array.shape) for name, array in arrays.items() if not name.startswith(_BESIDE)},
    )
    if wrong:
        raise ValueError(f"{os.fspath(path)} is a checkpoint of another network: {wrong}")
    for name, kind in kinds.items():
        if kind != others[name]:
            raise ValueError(
                f"{os.fspath(path)} is a checkpoint of another optimiser: "
                f"of {name} it has the state of {type(found.optimizer).__name__} ({others[name]}), "
                f"this trainer takes that of {type(trainer.optimizer).__name__} ({kind})"
            )
    if not averaged_alike(found.average, trainer.average, found.t, found.epoch):
        raise ValueError(
            f"{os.fspath(path)} is a checkpoint of a trainer with average={found.average!r}; this one's is "
            f"{trainer.average!r}"
        )
    apart = [name for name in OF_AN_EPOCH if getattr(found, name) != getattr(trainer, name)]
    if found._current is not None and apart:
        how = (f"{name} was {getattr(found, name)!r}, is {getattr(trainer, name)!r}" for name in apart)
        raise ValueError(f"{os.fspath(path)} is in the middle of an epoch of other mini-batches: {'; '.join(how)}")
    for name, array in arrays.items():
        if not name.startswith("pending."):
            array[...] = theirs[name]
    trainer.net.squeeze, trainer._pending, trainer._standing = found.net.squeeze, found._pending, None
    trainer.t, trainer.epoch, trainer._since, trainer._current = found.t, found.epoch, found._since, found._current
    vars(trainer.history).update(vars(found.history))
    trainer._teach()


def _read(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """The description and the tensors in a file, if they are as they were written."""
    import json

    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise missing_extra("safetensors", "checkpoint", "load()") from None
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"no safetensors file, or a damaged one: {error}") from None
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if not {"fastmb", "sha256"} <= metadata.keys():
        raise ValueError("a safetensors file, but no checkpoint: its metadata lack 'fastmb' or 'sha256'")
    tensors = {}
    for name, entry in found:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has dtype {entry['dtype']}; a checkpoint has {' and '.join(_DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if _digest(metadata["fastmb"], tensors) != metadata["sha256"]:
        raise ValueError("damaged: the SHA-256 of metadata and tensors is not the one that was written")
    return json.loads(metadata["fastmb"]), tensors


def _restored(description: Any, tensors: Tensors) -> Trainer:
    from .trainer import Trainer

    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"written in another format than {FORMAT}, which this version of fastmb ({__version__}) reads")
    names = ("format", "version", "net", "loss", "optimizer", "average", "trainer", "position", "history")
    _, _, about, loss, optimizer, average, settings, position, history = _entries(description, names, "fastmb")
    modules, seed, dtype, squeeze = _entries(about, ("modules", "seed", "dtype", "squeeze"), "net")
    parts = modules if isinstance(modules, list) else []
    modules = tuple(_built(spec, _MODULES, f"net.{i}", tensors) for i, spec in enumerate(parts))
    loss = _built(loss, _LOSSES, "loss", tensors)
    optimizer = _built(optimizer, _OPTIMIZERS, "optimizer", tensors)
    average = None if average is None else _built(average, AVERAGES, "average", tensors)
    settings = dict(zip(_SETTINGS, _entries(settings, _SETTINGS, "trainer"), strict=True))
    for name in _FLAGS:
        _check_bool(settings[name], f"trainer.{name}")
    position = {"since": 0} | position if isinstance(position, dict) else position  # older files don't have it
    t, epoch, since, place, pending = _entries(position, ("t", "epoch", "since", "current", "pending"), "position")
    rows = integer("batch_size", settings["batch_size"], 1, _MOST)
    rows *= integer("accumulate_steps", settings["accumulate_steps"], 1, _MOST)
    current = None if place is None else _current(place, rows, settings, tensors)

    dtype = _check_dtype(str(dtype))
    prefixes = _prefixes(optimizer.n_states, average is not None, pending is not None)
    expected = _shapes(make_plan(check_modules(modules), dtype), prefixes)
    others = {name for name in tensors if name.startswith(("net.", "loss.", "epoch.", "history."))}
    if wrong := _differences({name: tensor for name, tensor in tensors.items() if name not in others}, expected):
        raise ValueError(f"tensors don't fit the network: {wrong}")

    net: Sequential = Sequential.__new__(Sequential)
    kept = {"modules": modules, "seed": check_seed(seed), "dtype": dtype, "squeeze": _check_bool(squeeze, "squeeze")}
    net.__setstate__({**kept, "task": None, "input_scale": 1.0, "flat": None})
    if settings["executor"] in NAMES and not available(settings["executor"]):
        settings["executor"] = None  # written where there was another one
    trainer = Trainer(net, loss, optimizer, average=average, **settings)
    if pending is not None:
        weight, rows = _entries(pending, ("weight", "rows"), "position.pending")
        weight = None if weight is None else number("weight", weight, "[0, inf)")
        rows = integer("rows", rows, 1, _MOST)
        trainer._pending = Pending(np.zeros_like(net.flat), weight, rows)
    for name, array in _arrays(trainer).items():
        array[:] = tensors[name]
    trainer.t, trainer.epoch = integer("t", t, 0, 2**62), integer("epoch", epoch, 0, _MOST)
    trainer._since, trainer._current = integer("since", since, 0, trainer.epoch), current
    trainer.history.stopped, trainer.history._rows = _history(history)
    if "history.example_norms" in tensors:
        norms = tensors["history.example_norms"]
        if norms.ndim != 1 or norms.dtype != np.float32:
            raise ValueError(f"history.example_norms must be float32 (n,); got {norms.dtype.name} {norms.shape}")
        trainer.history.example_norms = norms.copy()
    again: Tensors = {}
    describe(trainer, again)
    if extra := others - again.keys():
        raise ValueError(f"has tensors that nothing refers to: {', '.join(sorted(extra)[:_SHOWN])}")
    return trainer


def _entries(mapping: Any, names: tuple[str, ...], where: str) -> list[Any]:
    """The values of a mapping that must have these names and no others."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping; got {mapping!r:.80}")
    missing = [name for name in names if name not in mapping]
    extra = [name for name in mapping if name not in names]
    if missing or extra:
        what = [f"{word} {', '.join(some)}" for word, some in (("lacks", missing), ("has also", extra)) if some]
        raise ValueError(f"{where} {' and '.join(what)}")
    return [mapping[name] for name in names]


def _built(spec: Any, table: Mapping[str, Any], where: str, tensors: Tensors) -> Any:
    """The thing that `_spec` described."""
    kind = spec.get("type") if isinstance(spec, dict) else spec
    if not isinstance(kind, str) or kind not in table:
        raise unknown_name(f"{where}: type", str(kind)[:80], table)
    parameters = [field for field in fields(table[kind]) if field.init]
    names = tuple(field.name for field in parameters)
    _, *values = _entries(spec, ("type", *names), where)
    arguments = {name: _taken(value, f"{where}.{name}", tensors) for name, value in zip(names, values, strict=True)}
    for field in parameters:
        if isinstance(field.default, bool):
            _check_bool(arguments[field.name], f"{where}.{field.name}")
    try:
        return table[kind](*arguments.pop("modules", ()), **arguments)  # those that a module holds come first
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _taken(value: Any, where: str, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return tuple(_taken(item, f"{where}[{i}]", tensors) for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if value != {"tensor": where}:
        in_a_module = where.rpartition(".")[2].startswith("modules[")
        return _built(value, _MODULES if in_a_module else SCHEDULES, where, tensors)
    if where not in tensors:
        raise ValueError(f"lacks the tensor {where}")
    return tensors[where]


def _check_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false; got {value!r:.80}")
    return value


def _current(place: Any, batch_size: int, settings: Mapping[str, Any], tensors: Tensors) -> Epoch:
    """The place within an epoch, and its sums."""
    rows, done, *figures = _entries(place, _PLACE, "position.current")
    rows = integer("rows", rows, 1, _MOST)
    steps = rows // batch_size if settings["drop_last"] else -(-rows // batch_size)
    done = integer("done", done, 1, steps)
    if "epoch.sums" not in tensors:
        raise ValueError("lacks the tensor epoch.sums")
    sums = tensors["epoch.sums"].astype(np.float64)
    expected = (min(SLICE, steps - (done - 1) // SLICE * SLICE), 2)
    if sums.shape != expected:
        raise ValueError(f"epoch.sums has shape {sums.shape}; mini-batch {done} of {steps} is in one of {expected}")
    checked = {name: number(name, value, "(-inf, inf)") for name, value in zip(_PLACE[2:], figures, strict=True)}
    epoch = Epoch(rows, done, **checked, sums=sums)  # type: ignore[arg-type]
    if settings["gradient_stats"]:
        shapes = {"epoch.stats": (len(sums), _gradient_stats.COLUMNS), "epoch.moments": (_gradient_stats.MOMENTS,)}
        for name, shape in shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape}; got {getattr(tensors.get(name), 'shape', None)}")
        epoch.stats, epoch.moments = (tensors[name].astype(np.float64) for name in shapes)
    return epoch


def _history(history: Any) -> tuple[str | None, list[dict[str, float]]]:
    stopped, rows = _entries(history, ("stopped", "rows"), "history")
    right = (stopped is None or isinstance(stopped, str)) and isinstance(rows, list)
    for row in rows if right else []:
        right = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
        if not right or not set(_FIGURES) <= row.keys() or type(row["epoch"]) is not int:
            right = False
            break
    if not right:
        raise ValueError(f"history must hold rows of numbers with {', '.join(_FIGURES)}")
    return stopped, rows


def _shapes(plan: Plan, prefixes: list[str]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """What tensors a network is saved as, and all that has its shape."""
    shapes = {f"{prefix}{name}": shape for prefix in prefixes for name, shape in plan.shapes.items()}
    shapes |= {f"{s.name}.{what}": shape for s in plan.stages for what, shape in s.buffer_shapes}
    return {name: (plan.dtype, shape) for name, shape in shapes.items()}


def _differences(tensors: Tensors, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    """Which tensors differ from the network's, and how; nothing if none does."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"{name} is none of the network's")
            continue
        dtype, shape = expected[name]
        if tensor.shape != shape:
            wrong.append(f"{name} has shape {tensor.shape}, the network's has {shape}")
        if tensor.dtype != dtype:
            wrong.append(f"{name} is {tensor.dtype.name}, the network's is {dtype.name}")
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return "; ".join(wrong[:_SHOWN]) + more
