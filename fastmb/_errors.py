"""Errors that say which argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """A `ValueError` for a name that isn't one of `known`, with the nearest that is."""
    import difflib

    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{argument} must be one of {', '.join(map(repr, known))}; got {name!r}{hint}")


def unknown_metric(argument: str, name: object, metrics: Sequence[str]) -> ValueError:
    """A `ValueError` for a name that isn't one of a fit's losses and metrics."""
    hint = "" if any(metric.startswith("val_") for metric in metrics) else " (val_ metrics need X_val and y_val)"
    return ValueError(f"{unknown_name(argument, name, metrics)}{hint}")


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """An `ImportError` for an optional package, with the extra that brings it."""
    return ImportError(f"{purpose} needs the package {package!r}: pip install 'fastmb[{extra}]'")
