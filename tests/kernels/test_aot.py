"""The compile gate: kernels for GPUs that are not here, and that the gate itself can see what it is for."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.kernels.aot import __main__ as gate
from moe.kernels.aot import assembler

ROOT = Path(__file__).resolve().parents[2]


def is_compiled(decorator):
    return any(name in ast.unparse(decorator) for name in ("device_function", "triton.jit"))


def test_no_function_of_a_kernel_returns_none():
    """triton 3.6 cannot compile that; newer ones can, so that only the gate of the oldest would tell."""
    functions = [
        (path.name, node)
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any(map(is_compiled, node.decorator_list))
    ]
    assert len(functions) > 30
    for name, function in functions:
        for node in ast.walk(function):
            says_none = isinstance(node, ast.Return) and ast.unparse(node) == "return None"
            assert not says_none, f"{name}, {function.name}, line {node.lineno}"


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
@pytest.mark.parametrize(
    ("arch", "only", "at_least"),
    [
        ("sm_80", "down_decode", 6),
        ("sm_90", "decode", 32),
        ("sm_90", "gate_up_prefill", 12),
        ("sm_100", "gate_up_decode", 12),
        ("gfx942", "decode", 18),
    ],
)
def test_everything_compiles(tmp_path, arch, only, at_least):
    """A part that holds every format and every kernel; `python -m moe.kernels.aot` compiles all, for all chips."""
    reports, _ = compile_gate(tmp_path, "--arch", arch, "--only", only)
    assert len(reports) >= at_least


COUNT = """
from moe.kernels.aot.fake import FakeDriver
from moe.kernels.aot.launches import SHAPES, launched
chip = FakeDriver(90).install()
rows = list(launched(chip, SHAPES[0]{tokens}))
assert not any(row.problem for row in rows), rows
print(sorted((row.path, row.kernel) for row in rows))
before = len(chip.loaded)
again = list(launched(chip, SHAPES[0], {then}))
print(len(chip.loaded) - before)
"""


def launches(tokens, then):
    """What the host code compiles for some numbers of tokens, and how many kernels more for others."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT.format(tokens=tokens, then=then)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_host_code_compiles_as_the_jit_specialises_it():
    """One rank: a world size of 1 is what triton 3.6 cannot compile as a constant. More tokens need no other kernel."""
    kernels, more = launches(", [1]", "(2, 7, 16)")
    assert all(name in kernels for name in ("_gate_up_kernel", "_down_kernel", "('single', 'fused_experts_kernel')"))
    assert more == "0"


@pytest.mark.heavy
def test_serving_compiles_at_start_only():
    kernels, more = launches("", "range(1, 300)")
    assert kernels.count("fused_experts_kernel") == 2  # up to 16 tokens, and up to 256
    assert kernels.count("('grouped'") <= 14  # 31 when counts were specialised
    assert more == "0"


def test_an_interpreting_process_is_refused(capsys):
    assert gate.main([]) == 2
    assert "cannot compile" in capsys.readouterr().out


def test_unordered_release_is_seen():
    ordered = "st.global.v4 [a], b;\nbar.sync 0;\nred.release.sys.global.add [c], 1;"
    wrong = "bar.sync 0;\n@%p1 st.global.v4 [a], b;\nred.release.sys.global.add [c], 1;"
    patterns = (r"(?:st|red|atom)[.\w]*\.(?:release|acq_rel)", r"bar\.sync", r"^\s*(?:@\S+ )?st\.global")
    assert assembler._unordered(ordered, *patterns) == 0
    assert assembler._unordered(wrong, *patterns) == 1


def sass(*instructions):
    """Disassembly text; a label stands alone."""
    return "\n".join(f"{i}:" if i.startswith(".L") else f"        /*0000*/  {i} ;" for i in instructions)


def test_spills_are_counted_where_they_hurt():
    loop = (".L_x_1", "HGMMA.64x128x16 R0", "LDL R1, [R2]", "@P0 BRA `(.L_x_1)")
    assert assembler._sass_spills(sass("STL [R2], R1", *loop)) == (2, 1)
    outer = (".L_x_0", "STL [R2], R1", ".L_x_1", "HGMMA R0", "@P0 BRA `(.L_x_1)", "BRA `(.L_x_0)")
    assert assembler._sass_spills(sass(*outer)) == (1, 0)  # outside the innermost loop
    stub = (".L_x_1", "HGMMA R0", ".L_x_2", "@P0 BRA `(.L_x_1)", "STL [R2], R1", "BRA `(.L_x_2)")
    assert assembler._sass_spills(sass(*stub)) == (1, 0)  # a waiting stub that jumps back into the loop


ATTENTION = """
import torch
from moe.kernels.aot.fake import FakeDriver
from moe.kernels.aot.launches import HEADS, launched_attention, launched_block, launched_latents, launched_lookup
chip = FakeDriver(90).install()
for heads in HEADS[{only}]:
    rows = [*launched_attention(chip, heads), *launched_block(chip, heads)]
    assert not any(row.problem for row in rows), rows
    print(sorted(row.kernel for row in rows))
rows = list(launched_lookup(chip, 3072))
assert not any(row.problem for row in rows), rows
print(sorted((row.kernel, row.spills) for row in rows))
rows = list(launched_latents(chip, torch.bfloat16))
print(sorted((row.kernel, row.spills) for row in rows))
"""


def test_attention_and_blocks_compile_once_for_all_lengths():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ATTENTION.format(only="3:4")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [*["_add_norm_kernel"] * 3, "_part_kernel", *["_turn_kernel"] * 3, "sum_kernel"]
    latents = [("_latent_part_kernel", 0), ("sum_kernel", 0)]
    lookup = [("_gather_kernel", 0), ("_route_kernel", 0)]
    assert done.stdout.splitlines() == [str(kernels), str(lookup), str(latents)]
