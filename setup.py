"""Builds the compiled helpers; everything else about the package is in pyproject.toml.

They are plain C without the Python API, loaded with ctypes, so that one build serves every Python 3.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.editable_wheel import editable_wheel

SAME_BITS = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]  # from every compiler
COMMON = ["-O3", "-g0", "-std=c11", "-fvisibility=hidden", *SAME_BITS]  # symbols for debuggers are ten times the code


class AnyPython(bdist_wheel):
    """The helpers know no Python: the wheel is of this platform, but of no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class EditableNeedsLinks(editable_wheel):
    """An editable install imports from the checkout, where moe/comm and its like are symbolic links."""

    def run(self) -> None:
        if not Path("moe/comm").is_dir():
            sys.exit(
                "an editable install needs symbolic links, and this checkout has none (moe/comm is a text file): "
                "clone with core.symlinks=true, or install with `pip install .`"
            )
        super().run()


setup(
    cmdclass={"bdist_wheel": AnyPython, "editable_wheel": EditableNeedsLinks},
    ext_modules=[
        Extension(
            "moe.kernels._cpu_experts",
            sorted(map(str, Path("kernels").glob("cpu_*.c"))),  # the same sums, compiled for each instruction set
            extra_compile_args=[*COMMON, "-pthread", "-Wno-psabi"],
            depends=sorted(map(str, Path("kernels").glob("cpu_*.h"))),
            optional=True,
        ),
        Extension("moe.comm._line", ["comm/line.c"], extra_compile_args=COMMON, optional=True),
        Extension(
            "moe.placement._placement",
            [*(f"placement/solve/{name}.c" for name in ("anneal", "assign", "best_swaps")), "placement/serve.c"],
            extra_compile_args=COMMON,
            depends=["placement/cover.h", *(f"placement/solve/{name}.h" for name in ("change", "pace", "random"))],
            libraries=["m"],
            optional=True,
        ),
    ],
)
