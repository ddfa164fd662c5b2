"""What notebooks show of networks, trainers and histories: small, self-contained HTML without scripts or colours.

Text and lines take the colour of what is around them, so that light and dark pages both show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .history import History
    from .nn import Sequential
    from .trainer import Trainer

_CELL = "padding: 0.1em 0.6em; text-align: {}; background: none; color: inherit; border: none"
_LINE = "border-bottom: 1px solid currentColor"
_WIDTH, _HEIGHT = 300, 60  # of the plot, pixels
_POINTS = 300  # of a line


def network(net: Sequential) -> str:
    heads, *rows = net._table("n")
    return _box("Sequential", _table(heads, rows, "rllr"), net._size())


def trainer(trainer: Trainer) -> str:
    settings = [
        ("loss", repr(trainer.loss)),
        ("optimizer", repr(trainer.optimizer)),
        ("batch_size", str(trainer.batch_size)),
        ("executor", str(trainer.executor)),
        ("trained", f"{trainer.epoch} epochs, {trainer.t} updates"),
    ]
    parts = [_table((), settings, "ll"), network(trainer.net)]
    if trainer.history._rows:
        parts.append(history(trainer.history))
    return _box("Trainer", *parts)


def history(history: History) -> str:
    hidden = len(history._rows) - len(history._shown())
    notes = [f"{hidden} earlier epochs not shown"] * (hidden > 0)
    notes += [f"stopped: {history.stopped}"] * (history.stopped is not None)
    losses = {name: history[name] for name in history if name.endswith("loss")}
    table = _table(tuple(history), history._shown(), "r" * len(history))
    return _box("History", _plot(losses), table, "; ".join(notes))


def _box(title: str, *parts: str) -> str:
    """A title, then parts, which are HTML already if they begin with a tag."""
    inside = "".join(part if part.startswith("<") else f"<div>{escape(part)}</div>" for part in parts if part)
    return f'<div style="margin: 0.3em 0; overflow-x: auto"><strong>{escape(title)}</strong>{inside}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], aligned: str) -> str:
    """Cells, each column aligned left (l) or right (r); the first row is heads if there are any."""
    styles = [_CELL.format({"l": "left", "r": "right"}[side]) for side in aligned]

    def row(cells: Sequence[str], tag: str, line: str) -> str:
        inside = (
            f'<{tag} style="{style}{line}">{escape(cell)}</{tag}>' for cell, style in zip(cells, styles, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    head = f"<thead>{row(heads, 'th', f'; {_LINE}')}</thead>" if heads else ""
    body = "".join(row(cells, "td", "") for cells in rows)
    return f'<table style="border-collapse: collapse; border: none">{head}<tbody>{body}</tbody></table>'


def _plot(lines: dict[str, list[float]]) -> str:
    """Lines over a common range, the second and further dashed, with their names; nothing for fewer than two points."""
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    length = max(map(len, lines.values()), default=0)
    if length < 2 or not values:
        return ""
    low, high = min(values), max(values)

    def place(i: int, value: float) -> str:
        height = (value - low) / (high - low) if high > low else 0.5
        return f"{4 + (_WIDTH - 8) * i / (length - 1):.1f},{4 + (_HEIGHT - 8) * (1 - height):.1f}"

    step = -(-length // _POINTS)
    parts = []
    for k, line in enumerate(lines.values()):
        points = " ".join(place(i, value) for i, value in enumerate(line) if i % step == 0 and math.isfinite(value))
        dashes = ' stroke-dasharray="4 3"' * (k > 0)
        parts.append(f'<polyline points="{points}" fill="none" stroke="currentColor"{dashes}></polyline>')
    names = ", ".join(f"{name} ({'dashed' if k else 'line'})" for k, name in enumerate(lines))
    label = escape(f"{names}, {low:.4g} to {high:.4g}")
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    drawn = f'<svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div>{drawn}<div style="font-size: smaller">{label}</div></div>'
