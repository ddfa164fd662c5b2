"""From modules to a plan: what fits together, which stages they become, how initial weights are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .layers import Residual
from .modules import Activation, Dropout, Identity, Layer, Linear, Module, Softmax
from .plan import Op, Plan, Stage, aligned


def leaves(modules: Sequence[Module], prefix: str = "", blocks: bool = False) -> Iterator[tuple[str, Module]]:
    """The modules in their order, those in a `Residual` in its place, each with its name: "0", "1.0", "1.1".

    With `blocks`, each `Residual` too, before what it holds.
    """
    for i, module in enumerate(modules):
        if blocks or not isinstance(module, Residual):
            yield f"{prefix}{i}", module
        if isinstance(module, Residual):
            yield from leaves(module.modules, f"{prefix}{i}.", blocks)


# ---- what fits together ----------------------------------------------------------------------------------------------

Before = tuple[str, Layer, int] | None  # the last layer that says how many features it gives: where, which, how many


def check_modules(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """`modules`, if they make a network."""
    _check(modules[:-1] if modules and isinstance(modules[-1], Softmax) else modules, "modules", None, [])
    if not any(isinstance(module, Linear) for _, module in leaves(modules)):
        raise ValueError("modules must hold at least one Linear; got " + (", ".join(map(repr, modules)) or "none"))
    return modules


def _check(modules: Sequence[Module], place: str, before: Before, seen: list[Module]) -> tuple[int | None, Before]:
    """The features that `modules` take, if a layer says so, and their last layer that says what it gives."""
    takes = None
    for i, module in enumerate(modules):
        where = f"{place}[{i}]"
        if not isinstance(module, Module):
            raise TypeError(f"{where} must be a module such as Linear(64, 10) or ReLU(); got {module!r}")
        if isinstance(module, Softmax):
            raise ValueError(f"Softmax must be the last module; {where} is one")
        if isinstance(module, Residual):
            inner, after = _check(module.modules, where + ".modules", before, seen)
            entering = before[2] if before else inner
            if after and entering != after[2]:
                raise ValueError(
                    f"{where}, {module!r}, takes {entering} features and gives {after[2]}; modules(x) + x needs as "
                    "many of both"
                )
            takes, before = takes or inner, after
        elif isinstance(module, Layer):
            if any(module is other for other in seen):
                raise ValueError(f"{where}, {module!r}, is there twice; layers share no parameters: make another one")
            seen.append(module)
            if before and module.takes not in (None, before[2]):
                raise ValueError(
                    f"{where}, {module!r}, takes {module.takes} features; {before[0]}, {before[1]!r}, gives {before[2]}"
                )
            takes = takes or module.takes
            before = (where, module, module.gives) if module.gives else before
    return takes, before


# ---- stages ----------------------------------------------------------------------------------------------------------


def make_plan(modules: tuple[Module, ...], dtype: np.dtype) -> Plan:
    """The modules cut into stages. What does nothing (`Identity`, a `Dropout` of 0) is left out."""
    width = next(m.takes for _, m in leaves(modules) if isinstance(m, Layer) and m.takes)
    cutter = _Cutter(width)
    cutter.add(modules, "")
    stages = (replace(stage, ops=tuple(ops)) for stage, ops in zip(cutter.stages, cutter.ops_of, strict=True))
    return Plan(dtype, tuple(cutter.input_ops), tuple(stages))


class _Cutter:
    """Reads modules and appends stages."""

    def __init__(self, width: int) -> None:
        self.width = width  # of what the next module takes
        self.stages: list[Stage] = []
        self.ops_of: list[list[Op]] = []
        self.input_ops: list[Op] = []
        self.ops: list[Op] | None = self.input_ops  # where an operation goes; None: into a stage of its own
        self.dropouts = self.offset = self.buffer_offset = 0

    def add(self, modules: Sequence[Module], prefix: str) -> None:
        for i, module in enumerate(modules):
            name = f"{prefix}{i}"
            if isinstance(module, Residual):
                self._residual(module, name)
            elif isinstance(module, Layer):
                self._stage(name, module)
            elif isinstance(module, Dropout):
                if callable(module.p):
                    self._op(Op("dropout", 0.0, self.dropouts, module.p), name)
                elif module.p > 0:
                    self._op(Op("dropout", module.p, self.dropouts), name)
                self.dropouts += 1
            elif isinstance(module, Activation) and not isinstance(module, Identity):
                self._op(module.op, name)

    def _op(self, op: Op, name: str) -> None:
        if self.ops is None:
            self._stage(name, None)
        assert self.ops is not None
        self.ops.append(op)

    def _stage(self, name: str, layer: Layer | None) -> None:
        n_in, self.ops = self.width, []
        self.width = (layer and layer.gives) or n_in
        stage = Stage(n_in, self.width, self.offset, (), name, "identity", buffer_offset=self.buffer_offset)
        if layer:
            stage = replace(
                stage,
                kind=layer.kind,
                shapes=layer.shapes,
                eps=getattr(layer, "eps", 0.0),
                momentum=getattr(layer, "momentum", None),
                buffer_shapes=layer.buffer_shapes,
            )
        self.stages.append(stage)
        self.ops_of.append(self.ops)
        self.offset = aligned(self.offset + stage.size)
        self.buffer_offset += aligned(stage.buffer_size)

    def _residual(self, module: Residual, name: str) -> None:
        """The input of the stage that comes next is added to the last one, which must not do anything else then."""
        source = len(self.stages)
        self.ops = None  # an operation on x would change what is to be added
        self.add(module.modules, name + ".")
        if len(self.stages) == source or self.ops or self.stages[-1].skip is not None:
            self._stage(name, None)
        self.stages[-1] = replace(self.stages[-1], skip=source)


# ---- initial weights -------------------------------------------------------------------------------------------------


def layers(modules: Sequence[Module]) -> dict[str, tuple[Layer, float]]:
    """The layers by name, each with the gain of the activation that follows it before the next `Linear`; 1 if none."""
    found = {}
    gain = 1.0
    for name, module in reversed(list(leaves(modules))):
        if isinstance(module, Layer):
            found[name] = module, gain
        gain = 1.0 if isinstance(module, Linear) else getattr(module, "gain", gain)
    return dict(reversed(found.items()))
