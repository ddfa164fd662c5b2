"""What kernels are compiled for: a dtype, and the vectors of an instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from numba.core.registry import cpu_target

from ... import threads


@dataclass(frozen=True)
class Target:
    """One instruction set and dtype; blocks have `rb` rows, the largest tile `mr`, as in csrc/isa_*.c."""

    isa: str
    itemsize: int  # of T: 4 or 8

    @property
    def vector_bytes(self) -> int:
        return {"v4": 64, "v3": 32}.get(self.isa, 16)

    @property
    def lanes(self) -> int:
        return self.vector_bytes // self.itemsize

    @property
    def rb(self) -> int:
        return 2 * self.lanes

    @property
    def mr(self) -> int:
        return 12 if self.isa in ("v4", "neon") else 6  # 32 registers, or 16

    @property
    def fma(self) -> bool:
        return self.isa != "v2"


@lru_cache(maxsize=1)
def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that kernels can be compiled for here, the widest last.

    Numba knows what the processor has, and what its own settings leave of it.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    have = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    if "neon" in have or triple.startswith(("aarch64", "arm64")):
        return ("neon",)
    found = ["v2"]
    if {"avx2", "fma"} <= have:
        found.append("v3")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= have:
            found.append("v4")
    return tuple(found)


def isa() -> str:
    """Name of the instruction set in use: the widest, or the one that the environment's FASTMB_ISA names."""
    return threads.choose_isa(list(available_isas()))
