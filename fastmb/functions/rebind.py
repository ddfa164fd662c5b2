"""A function with other functions in the place of NumPy's, `math`'s and Python's own.

Only what a function looks up is changed (its globals and closure, in a copy); its code stays, and so does the user's
function. Python functions that it calls are rebound too, and passed through `wrap`.
"""

from __future__ import annotations

import builtins
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from .rules import NAMES


def rebind(f: Callable[..., Any], functions: Mapping[str, Any], wrap: Callable[[Any], Any] = lambda f: f) -> Any:
    """A copy of `f` that uses `functions`, by the names of `rules.SOURCES`."""
    return _Rebinding(functions, wrap).function(f)


def looked_up(*functions: Any) -> tuple[Any, ...]:
    """What functions, and those that they call, find by the names they use: equal, if nothing has changed since."""
    found: dict[FunctionType, tuple[Any, ...]] = {}
    left = list(functions)
    while left:
        f = left.pop()
        f = getattr(f, "py_func", f)  # what Numba compiled
        if not isinstance(f, FunctionType) or f in found:
            continue
        values = [*_globals(f).values(), *(cell.cell_contents for cell in f.__closure__ or ())]
        for module in [v for v in values if isinstance(v, ModuleType) and v not in (np, math)]:
            values += [getattr(module, name) for name in _names(f.__code__) if hasattr(module, name)]
        found[f] = tuple(_contents(v) for v in values)
        left += values
    return tuple(found.items())


def _contents(value: Any) -> Any:
    """What is equal for equal values only, numbers' types and signs and the elements of arrays included."""
    if isinstance(getattr(value, "py_func", value), (FunctionType, ModuleType)):
        return value
    try:
        return pickle.dumps(value)
    except Exception:  # of any kind: the value's own
        return object()


class _Rebinding:
    def __init__(self, functions: Mapping[str, Any], wrap: Callable[[Any], Any]) -> None:
        self.functions, self.wrap = functions, wrap
        self.done: dict[int, Any] = {}
        self.modules = {id(module): self._module(module) for module in (np, math)}

    def function(self, f: Any) -> Any:
        f = getattr(f, "py_func", f)  # what Numba compiled
        if not isinstance(f, FunctionType):
            return self.value(f)
        swapped = {name: self.value(value) for name, value in _globals(f).items()}
        cells = tuple(CellType(self.value(cell.cell_contents)) for cell in f.__closure__ or ())
        copy = FunctionType(f.__code__, {**f.__globals__, **swapped}, f.__name__, f.__defaults__, cells)
        copy.__kwdefaults__ = f.__kwdefaults__
        return self.wrap(copy)

    def value(self, value: Any) -> Any:
        """What stands for something that the function looks up."""
        name = NAMES.get(id(value))
        if name is not None:
            return self.functions[name]
        if id(value) in self.modules:
            return self.modules[id(value)]
        if isinstance(getattr(value, "py_func", value), FunctionType):
            if id(value) not in self.done:
                self.done[id(value)] = self.function(value)
            return self.done[id(value)]
        return value

    def _module(self, module: ModuleType) -> ModuleType:
        stand_in = ModuleType(module.__name__)
        for name in dir(module):
            if not name.startswith("_"):
                value = getattr(module, name)
                vars(stand_in)[name] = self.functions.get(NAMES.get(id(value), ""), value)
        return stand_in


def _globals(f: FunctionType) -> dict[str, Any]:
    """The globals and built-ins that a function and those inside it use."""
    found = {**vars(builtins), **f.__globals__}
    return {name: found[name] for name in dict.fromkeys(_names(f.__code__)) if name in found}


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function and those inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
