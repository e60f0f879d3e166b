"""The compile gate: kernels for GPUs that are not here, and that the gate itself can see what it is for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.kernels import aot

ROOT = Path(__file__).resolve().parents[2]


def compile_gate(tmp_path, *arguments):
    """Run the gate in a process that compiles; returns its reports and its text."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe.kernels.aot", "--json", str(tmp_path / "report.json"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "report.json").read_text())["reports"], done.stdout


def test_decode_kernels_on_hopper(tmp_path):
    reports, text = compile_gate(tmp_path, "--arch", "sm_90", "--only", "decode_tma")
    assert [r["name"] for r in reports] == ["grouped_gate_up_decode_tma", "grouped_down_decode_tma", "fused_decode_tma"]
    assert all(r["matrix_instructions"] and r["tma"] and not r["spills_in_matrix_loops"] for r in reports)
    fused = reports[-1]
    assert (fused["acquires"], fused["releases"], fused["unordered_releases"]) == (5, 5, 0)
    assert "3 compiled, 0 with problems" in text


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arch", "only", "at_least"),
    [("sm_80", "prefill", 6), ("sm_90", "", 42), ("sm_100", "decode", 17), ("gfx942", "", 24)],
)
def test_everything_compiles(tmp_path, arch, only, at_least):
    """All kernels for sm_90 and gfx942, a part for the others; `python -m moe.kernels.aot` compiles the rest too."""
    reports, _ = compile_gate(tmp_path, "--arch", arch, "--only", only)
    assert len(reports) >= at_least


def test_an_interpreting_process_is_refused(capsys):
    assert aot.main([]) == 2
    assert "cannot compile" in capsys.readouterr().out


def test_unordered_release_is_seen():
    ordered = "st.global.v4 [a], b;\nbar.sync 0;\nred.release.sys.global.add [c], 1;"
    wrong = "bar.sync 0;\n@%p1 st.global.v4 [a], b;\nred.release.sys.global.add [c], 1;"
    patterns = (r"(?:st|red|atom)[.\w]*\.(?:release|acq_rel)", r"bar\.sync", r"^\s*(?:@\S+ )?st\.global")
    assert aot._unordered(ordered, *patterns) == 0
    assert aot._unordered(wrong, *patterns) == 1


def sass(*instructions):
    """Disassembly text; a label stands alone."""
    return "\n".join(f"{i}:" if i.startswith(".L") else f"        /*0000*/  {i} ;" for i in instructions)


def test_spills_are_counted_where_they_hurt():
    loop = (".L_x_1", "HGMMA.64x128x16 R0", "LDL R1, [R2]", "@P0 BRA `(.L_x_1)")
    assert aot._sass_spills(sass("STL [R2], R1", *loop)) == (2, 1)
    outer = (".L_x_0", "STL [R2], R1", ".L_x_1", "HGMMA R0", "@P0 BRA `(.L_x_1)", "BRA `(.L_x_0)")
    assert aot._sass_spills(sass(*outer)) == (1, 0)  # outside the innermost loop
    stub = (".L_x_1", "HGMMA R0", ".L_x_2", "@P0 BRA `(.L_x_1)", "STL [R2], R1", "BRA `(.L_x_2)")
    assert aot._sass_spills(sass(*stub)) == (1, 0)  # a waiting stub that jumps back into the loop
