"""Compile every kernel for GPUs that are not there, and refuse what would be slow or wrong on them.

    python -m moe.kernels.aot                      all kernels for sm_80, sm_90, sm_100 and gfx942
    python -m moe.kernels.aot --arch sm_90 --only fused
    python -m moe.kernels.aot --json report.json
    python -m moe.kernels.aot --launches           what the engine's host code launches, as the JIT specialises it

The interpreter runs on a CPU, whose memory order is stronger than a GPU's: a missing acquire, release or barrier never
shows there. Here it does. Needs no driver; the assemblers come with Triton. Must not run under TRITON_INTERPRET.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from moe.kernels.aot.cases import cases
from moe.kernels.aot.compile import ARCHITECTURES, examine
from moe.kernels.aot.launches import show_launches
from moe.kernels.intrinsics import is_interpreted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--launches", action="store_true", help="what the engine launches, by the host code itself")
    parser.add_argument("--json", type=Path, help="also write the reports there")
    options = parser.parse_args(arguments)
    if is_interpreted():
        print("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them; unset it")
        return 2
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    if options.launches:
        return show_launches(options.arch or ["sm_90"], options.only, options.json)
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
