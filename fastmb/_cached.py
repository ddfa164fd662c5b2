"""What Numba compiles is kept in its cache on disk, where it can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from uuid import uuid4

keeps = True  # until something could not be kept


def cached(how: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `how` of Numba's, such as `numba.njit`, with its cache; without it where nothing can be written."""

    def compiled(function: Callable[..., Any]) -> Any:
        global keeps
        if keeps:
            try:
                return _numbered_by_chance(how(*arguments, cache=True, **options)(function))
            except (OSError, RuntimeError) as error:
                keeps = False
                text = f"every process compiles anew: {error}; set NUMBA_CACHE_DIR to a directory that can be written"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        return how(*arguments, **options)(function)

    return compiled


def _numbered_by_chance(made: Any) -> Any:
    """Numba counts the signatures of a function in an index without a lock: two processes could give two one number."""
    files = getattr(getattr(made, "_cache", None), "_cache_file", None)
    if files is not None:
        name = files._data_name
        files._data_name = lambda _number: name(uuid4().int)
    return made
