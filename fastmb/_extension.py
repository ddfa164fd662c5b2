"""What the package takes from the compiled extension beside its executor; a build may leave the extension out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


@cache
def compiled(name: str) -> Callable[..., Any] | None:
    """A function of the extension, or None without it. Loaded at the first call: the executors import their callers."""
    try:
        module = import_module(".executors.native", __package__)
    except ModuleNotFoundError:
        return None
    function: Callable[..., Any] = getattr(module, name)
    return function
