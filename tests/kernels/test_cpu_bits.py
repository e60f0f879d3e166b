"""The compiled experts give the same bits on every machine with fused multiply-add: here and on an emulated aarch64."""

import shutil
import subprocess
from pathlib import Path

import pytest

from moe.kernels.cpu import instruction_sets

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
INCLUDED = {"cpu_block.c", "cpu_expected.c"}  # by cpu_bits.c
FLAGS = ["-O2", "-std=gnu11", "-Wno-psabi", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-pthread"]
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")


def build(compiler: str, out: Path, *more: str) -> Path:
    sources = [str(path) for path in sorted(KERNELS.glob("cpu_*.c")) if path.name not in INCLUDED]
    sources.append(str(Path(__file__).with_name("cpu_bits.c")))
    subprocess.run([compiler, *FLAGS, *more, "-I", str(KERNELS), *sources, "-o", str(out), "-lm"], check=True)
    return out


def hashes(*command: str) -> list[str]:
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    stored = 8 * 8 + 7 + 1  # kinds of storage by sizes of groups; nested precision has no groups of 8, bf12 has none
    routers, blocks, shortened = 3 * 2 * 2, 2 * 2, 2
    assert len(lines) == len(set(lines)) == stored * (8 + 2) + routers + blocks + shortened
    return lines


@pytest.mark.heavy  # compiles the helper twice
@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
@pytest.mark.skipif("avx2" not in instruction_sets(), reason="needs fused multiply-add on this machine")
def test_aarch64_says_what_this_machine_says(tmp_path):
    assert CROSS is not None
    assert EMULATOR is not None
    here = build("gcc", tmp_path / "here")
    there = hashes(EMULATOR, str(build(CROSS, tmp_path / "there", "-static")), "plain")
    for name in instruction_sets():
        assert (hashes(str(here), name) == there) == (name != "plain"), name
