"""Compile every kernel for GPUs that are not there, and refuse what would be slow or wrong on them.

    python -m moe.kernels.aot                      all kernels for sm_80, sm_90, sm_100 and gfx942
    python -m moe.kernels.aot --arch sm_90 --only fused
    python -m moe.kernels.aot --json report.json

The interpreter runs on a CPU, whose memory order is stronger than a GPU's: a missing acquire, release or barrier never
shows there. Here it does. Needs no driver; the assemblers come with Triton. Must not run under TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe.kernels.combine import _combine_kernel
from moe.kernels.fused import fused_constants
from moe.kernels.fused_kernel import fused_experts_kernel
from moe.kernels.gate import _gate_kernel
from moe.kernels.grouped_gemm import _down_kernel, _gate_up_kernel
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import is_interpreted, tl_dtype
from moe.kernels.permute import _small_dense_routing_kernel, _small_routing_kernel
from moe.kernels.tiles import TileConfig, pick_tiles, tiles_in_blocks

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = {  # what the matrix loop must contain
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",  # 16-row tiles are too small for wgmma
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
LOW_BIT = {"sm_80": ("int8",), "sm_90": ("fp8", "int8"), "sm_100": ("fp8", "int8"), "gfx942": ("fp8", "int8")}
MATRIX_SASS = re.compile(r"\b(HGMMA|HMMA|QGMMA|UTCHMMA|UTCQMMA)")


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments that it is compiled for. sync: (acquires, releases) that must be there at least."""

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool = False
    sync: tuple[int, int] = (0, 0)


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


def capability(arch: str) -> int:
    return int(arch[3:]) if arch.startswith("sm_") else 80  # AMD tiles: as on sm_80, shared memory is as small


def cases(arch: str) -> Iterator[Case]:
    """Every kernel as Qwen3-30B-A3B's layer would call it: decode and prefill tiles, one rank of eight."""
    hidden, inter, experts, top_k = 2048, 768, 128, 8
    tiny = {"ids_ptr": "*i32", "weights_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32", "scale": "fp32"}
    yield Case(
        "gate",
        _gate_kernel,
        {"logits_ptr": "*fp32", "num_tokens": "i32", **tiny},
        {
            "E": 256,
            "TOP_K": 8,
            "TOP_K_P": 8,
            "SCORE": "sigmoid",
            "GROUPS": 8,
            "TOPK_GROUPS": 4,
            "GROUP_SCORE": "top2",
            "RENORMALIZE": True,
            "HAS_BIAS": True,
            "BLOCK_T": 4,
            "GROUPS_P": 8,
            "GROUP": 32,
            "GROUP_P": 32,
        },
        4,
        1,
    )
    pointers = ("ids_ptr", "order_ptr", "sorted_ptr", "table_ptr", "num_tiles_ptr", "offsets_ptr", "begin_ptr")
    yield Case(
        "small_routing",
        _small_routing_kernel,
        {**dict.fromkeys(pointers, "*i32"), "num_rows": "i32", "num_ids": "i32", "capacity": "i32"},
        {"WITH_OFFSETS": True, "BLOCK_M": 16, "BLOCK": 1024, "BLOCK_ROWS": 8, "BLOCK_IDS": 8},
        8,
        1,
    )
    dense = ("ids_ptr", "order_ptr", "sorted_ptr", "dense_ptr", "slots_ptr", "offsets_ptr")
    yield Case(
        "small_dense_routing",
        _small_dense_routing_kernel,
        {**dict.fromkeys(dense, "*i32"), "num_rows": "i32", "capacity": "i32"},
        {"BLOCK": 1024, "BLOCK_ROWS": 8},
        8,
        1,
    )
    yield Case(
        "combine",
        _combine_kernel,
        {"y_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "num_tokens": "i32"},
        {"TOP_K": top_k, "H": hidden, "DTYPE": tl_dtype(torch.bfloat16), "BLOCK_T": 1, "BLOCK_H": 1024},
        4,
        1,
    )
    for phase, rows in (("decode", 4), ("mid", 40), ("prefill", 512)):
        for tma in (False, True) if capability(arch) >= 90 else (False,):
            config = pick_tiles(rows, torch.bfloat16, capability(arch), tma=tma)
            yield from _grouped_cases(f"{phase}{'_tma' if tma else ''}", config, hidden, inter, top_k, tma)
            for stored in LOW_BIT[arch] if phase != "mid" else ():
                name = f"{phase}_{stored}{'_tma' if tma else ''}"
                yield from _grouped_cases(name, config, hidden, inter, top_k, tma, stored)
            if phase == "mid":
                continue
            shape = FusedShape(
                world_size=8,
                num_experts=experts,
                top_k=top_k,
                hidden_size=hidden,
                intermediate_size=inter,
                max_tokens=16 if phase == "decode" else 1024,
            )
            config = pick_tiles(rows, torch.bfloat16, capability(arch))
            for stored in ("bf16", *LOW_BIT[arch]):
                if not (tma and stored == "fp8"):  # the launcher takes pointers for scales in blocks
                    yield _fused_case(phase, config, shape, tma, stored)


def _weights(config: TileConfig, tma: bool, stored: str = "bf16") -> tuple[dict[str, str], dict[str, str]]:
    kind = {"bf16": "bf16", "fp8": "fp8e4nv", "int8": "i8"}[stored]
    first, second = f"*{kind}", f"*{kind}"
    if tma:
        first, second = (f"tensordesc<{kind}[1,{n},{config.block_k}]>" for n in (config.block_n1, config.block_n2))
    gate_up = {"gate": first, "up": first, "gate_bias": "*bf16", "up_bias": "*bf16"}
    gate_up |= {"gate_scale": "*fp32", "up_scale": "*fp32"}
    return gate_up, {"down": second, "down_bias": "*bf16", "down_scale": "*fp32"}


def _block(stored: str, hidden: int, inter: int) -> tuple[int, int] | None:
    return {"bf16": None, "fp8": (128, 128), "int8": (1, max(hidden, inter))}[stored]


def _grouped_cases(
    phase: str, config: TileConfig, hidden: int, inter: int, top_k: int, tma: bool, stored: str = "bf16"
) -> Iterator[Case]:
    block = _block(stored, hidden, inter)
    config = tiles_in_blocks(config, block, hidden, inter)
    gate_up, down = _weights(config, tma, stored)
    walk = {"order_ptr": "*i32", "table_ptr": "*i32", "num_tiles_ptr": "*i32", "max_tiles": "i32"}
    strides = {"stride_slot": "i64", "stride_row": "i64", "stride_bias": "i64", "stride_scale": "i64"}
    shared = {"H": hidden, "I": inter, "HAS_BIAS": False, "TMA": tma, "GROUP_M": 8}
    shared |= dict(zip(("SCALE_N", "SCALE_K"), block or (0, 0)))
    shared |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    yield Case(
        f"grouped_gate_up_{phase}",
        _gate_up_kernel,
        {"x_ptr": "*bf16", "stride_x": "i64", "h_ptr": "*bf16", **walk, **gate_up, **strides}
        | {"bias_step": "i32", "alpha": "fp32", "limit": "fp32"},
        shared
        | {"TOP_K": top_k, "KIND": "silu", "GATED": True, "DTYPE": tl_dtype(torch.bfloat16)}
        | {"BLOCK_N": config.block_n1},
        config.num_warps,
        config.num_stages,
        matrix=True,
    )
    yield Case(
        f"grouped_down_{phase}",
        _down_kernel,
        {"h_ptr": "*bf16", "y_ptr": "*fp32", **walk, **down, **strides},
        shared | {"Y_DTYPE": tl_dtype(torch.float32), "BLOCK_N": config.block_n2},
        config.num_warps,
        config.num_stages,
        matrix=True,
    )


def _fused_case(phase: str, config: TileConfig, shape: FusedShape, tma: bool, stored: str) -> Case:
    block = _block(stored, shape.hidden_size, shape.intermediate_size)
    config = tiles_in_blocks(config, block, shape.hidden_size, shape.intermediate_size)
    gate_up, down = _weights(config, tma, stored)
    ints = ("ids", "order", "offsets", "slots", "tile_flag", "tickets", "state")
    scalars = ("num_programs", "first_rank", "num_ranks", "G", "num_tokens", "lag", "split", "limit", "bias_step")
    strides = [f"stride_{of}{gemm}" for of in ("slot", "row", "bias", "scale") for gemm in (1, 2)]
    types = {"bases": "*i64", "x": "*bf16", "topk_weights": "*fp32", "out": "*bf16", "inter": "*bf16"}
    types |= dict.fromkeys(ints, "*i32") | dict.fromkeys(scalars, "i32") | dict.fromkeys(strides, "i64")
    types |= {"alpha": "fp32", "act_limit": "fp32", **gate_up, **down}
    rows = shape.world_size * shape.max_tokens * shape.top_k
    tiles = rows // config.block_m + 2 * shape.experts_per_rank
    constants = fused_constants(shape, config, shape.experts_per_rank, tiles, HeapLayout.of(shape))
    constants |= {"KIND": "silu", "GATED": True, "HAS_BIAS": False, "TMA": tma, "ALIGNED": True}
    constants |= dict(zip(("SCALE_N", "SCALE_K"), block or (0, 0)))
    return Case(
        f"fused_{phase}{'' if stored == 'bf16' else '_' + stored}{'_tma' if tma else ''}",
        fused_experts_kernel,
        types,
        constants,
        config.num_warps,
        config.num_stages,
        matrix=True,
        sync=(5, 5),  # counts, tokens, first GEMM, results, exit; row numbers, tokens, first GEMM, results, exit
    )


def compile_case(case: Case, arch: str) -> Any:
    """Triton's compiled kernel. Pointers and strides are taken to be multiples of 16, as the launcher finds them."""
    names = case.fn.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.startswith("stride_")]
    source = ASTSource(
        case.fn,
        signature,
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    stages = min(case.num_stages, 2) if arch.startswith("gfx") else case.num_stages
    options = {"num_warps": case.num_warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target(arch), options=options)


def examine(case: Case, arch: str) -> Report:
    """Compile a case and measure what came out."""
    start = time.perf_counter()
    kernel = compile_case(case, arch)
    seconds = time.perf_counter() - start
    facts = _nvidia_facts(kernel) if arch.startswith("sm_") else _amd_facts(kernel)
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
    if case.matrix and arch.startswith("sm_") and facts["narrow_copies"] > facts["wide_copies"]:
        problems.append(f"{facts['narrow_copies']} copies of fewer than 16 bytes")
    limit = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}[arch]
    if kernel.metadata.shared > limit:
        problems.append(f"{kernel.metadata.shared} bytes of shared memory, the chip has {limit}")
    return Report(case.name, arch, seconds, shared_bytes=kernel.metadata.shared, problems=tuple(problems), **facts)


def _nvidia_facts(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills, in_loops = _sass_spills(sass)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?:0x)?([0-9a-f]+)\s*[,;]", ptx)
    return {
        "registers": int(registers[1]),
        "spills": spills,
        "spills_in_matrix_loops": in_loops,
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "wide_copies": sum(int(size, 16) == 16 for size in copies),
        "narrow_copies": sum(int(size, 16) != 16 for size in copies),
        "acquires": len(re.findall(r"(?:ld|atom)[.\w]*\.(?:acquire|acq_rel)", ptx)),
        "releases": len(re.findall(r"(?:st|red|atom)[.\w]*\.(?:release|acq_rel)", ptx)),
        "unordered_releases": _unordered(
            ptx, r"(?:st|red|atom)[.\w]*\.(?:release|acq_rel)", r"bar\.sync|barrier\.sync", r"^\s*(?:@\S+ )?st\.global"
        ),
        "barriers": len(re.findall(r"bar\.sync|barrier\.sync", ptx)),
    }


def _amd_facts(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count"),
        "spills_in_matrix_loops": _amd_loop_spills(text),
        "tma": 0,
        "wide_copies": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "narrow_copies": 0,
        "acquires": len(re.findall(r"buffer_inv", text)),
        "releases": len(re.findall(r"buffer_wbl2|s_waitcnt vmcnt\(0\)[^\n]*\n\s*(?:global|flat)_atomic", text)),
        "unordered_releases": _unordered(text, r"buffer_wbl2", r"s_barrier", r"^\s*(?:global|flat)_store"),
        "barriers": text.count("s_barrier"),
    }


def _unordered(text: str, release: str, barrier: str, store: str) -> int:
    """Releases before which, reading backwards, a store comes sooner than a barrier."""
    lines = text.splitlines()
    unordered = 0
    for number, line in enumerate(lines):
        if re.search(release, line):
            for earlier in reversed(lines[:number]):
                if re.search(barrier, earlier):
                    break
                if re.search(store, earlier):
                    unordered += 1
                    break
    return unordered


def _sass_spills(sass: str) -> tuple[int, int]:
    """Spill instructions in all, and inside innermost loops that hold matrix instructions (found by branches back)."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            code.append(instruction[1])
    loops = []
    for end, text in enumerate(code):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append((labels[branch[1]], end))
    return sum(map(_is_spill, code)), _spills_in_loops(code, loops, MATRIX_SASS, _is_spill)


def _is_spill(instruction: str) -> bool:
    return re.search(r"\b(STL|LDL)\b", instruction) is not None


def _amd_loop_spills(text: str) -> int:
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(code)
        elif line.startswith("\t") and not line.startswith("\t."):
            code.append(line)
    loops = []
    for end, line in enumerate(code):
        branch = re.search(r"s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append((labels[branch[1]], end))
    return _spills_in_loops(code, loops, re.compile("v_mfma"), lambda line: "scratch_" in line)


def _spills_in_loops(code: list[str], loops: list[tuple[int, int]], matrix: re.Pattern[str], is_spill: Any) -> int:
    innermost: list[tuple[int, int]] = []
    for a, b in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        # A larger range that overlaps is an outer loop, or a jump back from a waiting stub that stands apart.
        apart = all(b < c or d < a for c, d in innermost)
        if apart and any(matrix.search(line) for line in code[a : b + 1]):
            innermost.append((a, b))
    return sum(is_spill(line) for a, b in innermost for line in code[a : b + 1])


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the reports there")
    options = parser.parse_args(arguments)
    if is_interpreted():
        print("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them; unset it")
        return 2
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    columns = (
        "arch    kernel                           regs shared  spills(in loop)  matrix  tma  16B/other  acq rel bar   s"
    )
    print(columns)
    reports = []
    for arch in options.arch or ARCHITECTURES:
        for case in cases(arch):
            if options.only in case.name:
                r = examine(case, arch)
                reports.append(r)
                print(
                    f"{arch:7s} {r.name:32s} {r.registers:4d} {r.shared_bytes:7d} {r.spills:7d}"
                    f" ({r.spills_in_matrix_loops}){r.matrix_instructions:12d} {r.tma:4d}"
                    f" {r.wide_copies:5d}/{r.narrow_copies:<4d}{r.acquires:4d} {r.releases:3d} {r.barriers:3d}"
                    f" {r.seconds:4.1f}  {'; '.join(r.problems) or 'ok'}",
                    flush=True,
                )
    if options.json:
        document = {"triton": triton.__version__, "torch": torch.__version__, "reports": [asdict(r) for r in reports]}
        options.json.write_text(json.dumps(document, indent=1))
    failed = sum(bool(r.problems) for r in reports)
    print(f"{len(reports)} compiled, {failed} with problems")
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
