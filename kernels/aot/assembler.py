"""What compiled code says of itself: registers, spills, matrix instructions, and the order of memory operations."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

MATRIX_SASS = re.compile(r"\b(HGMMA|HMMA|QGMMA|UTCHMMA|UTCQMMA)")


def cubin_facts(cubin: bytes) -> tuple[int, int, int]:
    """Registers, spill instructions, and those of them inside matrix loops, of a kernel for NVIDIA."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1]), *_sass_spills(sass)


def nvidia_facts(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    registers, spills, in_loops = cubin_facts(kernel.asm["cubin"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?:0x)?([0-9a-f]+)\s*[,;]", ptx)
    return {
        "registers": registers,
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


def amd_facts(kernel: Any) -> dict[str, int]:
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
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
