"""The compiled extensions; everything else about the package is in pyproject.toml.

`fastmb.executors.native` is made of native.pyx (loops and threads) and csrc/*.c (what one core does to one block);
`fastmb.ops._native` of _native.pyx and csrc/ops_*.c, and it takes the other kernels from the first. On x86-64 the base
is v2, so that a wheel built here runs on every such machine; faster instruction sets are compiled beside it
(csrc/isa_*.c choose theirs by pragma) and chosen at import. On AArch64 every machine has the one set, NEON. There is no
-march=native and no -ffast-math.
`FASTMB_PURE=1 pip install .` leaves the extensions out; fastmb then runs on Numba, or on the slow reference.
"""

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The instruction sets of each processor, as the files of csrc/ name them, and the flags of its base.
# PREFETCHW is a hint that older processors pass over; without the flag GCC asks to read what is going to be written.
X86, ARM = ("v*", ["-march=x86-64-v2", "-mprfchw"]), ("neon", [])
PROCESSORS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
processor = sysconfig.get_platform().split("-")[-1].lower()
if processor not in PROCESSORS:
    raise SystemExit(f"fastmb has kernels for x86-64 and AArch64; this machine is {processor}")
ISAS, BASE = PROCESSORS[processor]
# Nothing is fused but what the kernels fuse themselves, and nothing is reordered: the arithmetic contract.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OTHERS = ["-O3", "-falign-functions=64", "-std=gnu11", "-fopenmp", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # kernels of one kind share a signature
# Python's own flags ask for debug information, most of a wheel's size: it is for who asks, `CFLAGS=-g pip install .`
DEBUG = ["-g"] if "-g" in os.environ.get("CFLAGS", "").split() else ["-g0"]


class BuildExt(build_ext):
    """Compiles the files of the extension side by side, and leaves a copy of the result beside its source.

    The copy is for commands run in the checkout, such as ``python -m fastmb``: Python looks into the current
    directory first, so they import ./fastmb and not what pip installed.
    """

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cython_c_in_temp = True  # native.c goes to build/, not beside native.pyx

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor() as pool:
                compiled = list(pool.map(lambda source: compile_all([source], **options), sources))
            return [name for names in compiled for name in names]

        self.compiler.compile = compile_side_by_side
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all

    def run(self) -> None:
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


PARTS = ("dispatch", "isa"), ("ops_dispatch", "ops")  # what chooses an instruction set, and what there is


def extension(name: str, sources: list[str]) -> Extension:
    """An extension of the package, compiled with the flags above."""
    made = Extension(
        name,
        sources=sources,
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc") + glob("csrc/isa_*.c") + glob("fastmb/*/*.px[di]")),
        include_dirs=["csrc", np.get_include()],
        define_macros=[("_GNU_SOURCE", None), ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=[*OTHERS, *WARNINGS, *DEBUG, *ARITHMETIC, *BASE],
        extra_link_args=["-fopenmp"],
    )
    made.cython_directives = {"language_level": "3"}
    return made


kernels, functions = ([f"csrc/{main}.c", *sorted(glob(f"csrc/{part}_{ISAS}.c"))] for main, part in PARTS)
native = extension("fastmb.executors.native", ["fastmb/executors/native.pyx", *kernels])
ops = extension("fastmb.ops._native", ["fastmb/ops/_native.pyx", *functions])

# On purpose, for a platform without a compiler. A compiler that is there and fails is an error, as ever.
PURE = os.environ.get("FASTMB_PURE", "0") not in ("", "0")

setup(ext_modules=[] if PURE else [native, ops], cmdclass={"build_ext": BuildExt})
