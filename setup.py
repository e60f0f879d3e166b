"""Builds the compiled helpers; everything else about the package is in pyproject.toml.

They are plain C without the Python API, loaded with ctypes. The experts' one is compiled with OpenMP's code
generation but not linked to an OpenMP library, so that it uses the thread pool that torch already loaded.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "moe.kernels._cpu_experts",
            ["kernels/cpu_experts.c"],
            extra_compile_args=[
                *["-O3", "-std=c11", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"],
                *["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],  # the same bits from every compiler
            ],
            depends=["kernels/cpu_experts_isa.h"],
            optional=True,
        ),
        Extension(
            "moe.kernels._cpu_norm",
            ["kernels/cpu_norm.c"],
            extra_compile_args=[
                *["-O3", "-std=c11", "-fvisibility=hidden"],
                *["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
            ],
            optional=True,
        ),
    ]
)
