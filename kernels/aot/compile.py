"""A case compiled for a chip, and what would be slow or wrong there."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe.kernels.aot.assembler import amd_facts, nvidia_facts
from moe.kernels.aot.cases import Case
from moe.kernels.matrix import Matrix, Planes

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = {  # what the matrix loop must contain
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",  # 16-row tiles are too small for wgmma
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Spills are instructions; None where the tool cannot tell."""

    name: str
    arch: str
    seconds: float
    registers: int
    shared_bytes: int
    spills: int
    spills_in_matrix_loops: int
    matrix_instructions: int
    tma: int
    wide_copies: int  # 16-byte asynchronous copies
    narrow_copies: int
    acquires: int
    releases: int
    unordered_releases: int  # with no barrier between them and the stores before
    barriers: int
    problems: tuple[str, ...]


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture: "sm_90" or "gfx942"."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_case(case: Case, arch: str) -> Any:
    """Triton's compiled kernel. Pointers and strides are taken to be multiples of 16, as the launcher finds them."""
    names = case.fn.arg_names
    signature: dict[str, Any] = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    constants = {
        (names.index(key),) if isinstance(key, str) else (names.index(key[0]), key[1]): value
        for key, value in case.constants.items()
    }
    aligned: list[tuple[int, ...]] = []
    for i, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, Matrix):
            aligned += _aligned(kind, (i,))
        elif kind.startswith("*") or name.startswith("stride_"):
            aligned.append((i,))
    source = ASTSource(case.fn, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    stages = min(case.num_stages, 2) if arch.startswith("gfx") else case.num_stages
    options = {"num_warps": case.num_warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target(arch), options=options)


def _aligned(fields: Matrix | Planes, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for j, (name, kind) in enumerate(zip(fields._fields, fields)):
        if isinstance(kind, Planes):
            yield from _aligned(kind, (*path, j))
        elif kind[0] == "*" or (kind == "i64" and name[0] == "s"):
            yield (*path, j)


def examine(case: Case, arch: str) -> Report:
    """Compile a case and measure what came out."""
    start = time.perf_counter()
    kernel = compile_case(case, arch)
    seconds = time.perf_counter() - start
    facts = nvidia_facts(kernel) if arch.startswith("sm_") else amd_facts(kernel)
    text = kernel.asm["ptx"] if arch.startswith("sm_") else kernel.asm["amdgcn"]
    facts["matrix_instructions"] = len(re.findall(MATRIX[arch], text))
    problems = []
    if case.matrix and not facts["matrix_instructions"]:
        problems.append("no matrix instruction")
    if arch != "sm_80" and facts["spills_in_matrix_loops"]:
        problems.append(f"{facts['spills_in_matrix_loops']} spills inside a matrix loop")
    if facts["acquires"] < case.sync[0] or facts["releases"] < case.sync[1]:
        problems.append(f"acquires/releases {facts['acquires']}/{facts['releases']}, want at least {case.sync}")
    if facts["unordered_releases"]:
        problems.append(f"{facts['unordered_releases']} releases that do not wait for the whole block's stores")
    if case.matrix and "_tma" in case.name and arch.startswith("sm_") and not facts["tma"]:
        problems.append("no TMA load")
    if case.matrix and arch.startswith("sm_") and facts["narrow_copies"] > facts["wide_copies"] and not case.scales:
        problems.append(f"{facts['narrow_copies']} copies of fewer than 16 bytes")
    limit = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}[arch]
    if kernel.metadata.shared > limit:
        problems.append(f"{kernel.metadata.shared} bytes of shared memory, the chip has {limit}")
    return Report(case.name, arch, seconds, shared_bytes=kernel.metadata.shared, problems=tuple(problems), **facts)
