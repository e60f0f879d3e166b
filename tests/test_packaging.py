"""Installs as people do them: a checkout without symbolic links, through sdist and wheel, in a new environment."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.heavy
IMPORT_ALL = """
import importlib, pkgutil, moe
def walk(package, prefix):
    for found in pkgutil.iter_modules(package.__path__, prefix):
        if not found.name.endswith("__main__"):
            yield found.name
folders = PACKAGES
names = [n for f in folders for n in walk(importlib.import_module(f), f + ".") if "._" not in n]
for name in names:
    if importlib.util.find_spec(name) is None:
        raise SystemExit(name)
import moe.launch.cli, moe.llm, moe.comm.wire, moe.placement.solve.milp, moe.kernels.cpu
print(len(names), moe.__file__)
"""


def run(*command, cwd=None, **options):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of_checkout(target: Path) -> None:
    """What git would write with core.symlinks=false: a link becomes a file that holds its target."""
    listed = run("git", "ls-files", "-s", cwd=ROOT).splitlines()
    for line in listed:
        mode, name = line.split()[0], line.split("\t")[1]
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if mode == "120000":
            file.write_text(str((ROOT / name).readlink()))
        elif (ROOT / name).is_file() and (ROOT / name).stat().st_size < 4 << 20:
            shutil.copy(ROOT / name, file)


@pytest.fixture(scope="module")
def without_links(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what a clone would hold is not known")
    folder = tmp_path_factory.mktemp("checkout")
    files_of_checkout(folder)
    assert (folder / "moe" / "comm").is_file()
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment that sees this one's packages, but not this project."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    purelib = next(folder.glob("lib/python*/site-packages"))
    others = [p for p in sys.path if p.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (purelib / "others.pth").write_text("\n".join(others) + "\n")
    return folder / "bin" / "python"


def pip(environment, *arguments, **options):
    return run(environment, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--quiet", **options)


def test_sdist_and_wheel_of_a_checkout_without_links(without_links, environment, tmp_path):
    build = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    sdist = tmp_path / run(sys.executable, "-W", "ignore", "-c", build, cwd=without_links).splitlines()[-1]
    pip(environment, "wheel", sdist, "--wheel-dir", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    pip(environment, "install", "--force-reinstall", wheel, cwd=tmp_path)

    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    said = run(environment, "-c", IMPORT_ALL.replace("PACKAGES", repr(told)), cwd=tmp_path)
    assert str(environment.parent.parent) in said
    on_disk = sum(1 for f in ("moe", "comm", "kernels", "launch", "offload", "placement") for _ in modules(ROOT / f))
    assert int(said.split()[0]) >= on_disk - 5  # packages themselves and `__main__` are not counted alike

    assert run(environment, "-m", "moe", "--version", cwd=tmp_path).startswith("moe ")
    assert "96 experts" in run(environment.parent / "moe", "info", ROOT / "examples" / "tinymoe", cwd=tmp_path)
    demo = subprocess.run([environment, "-m", "moe", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert demo.returncode == 2
    assert "--model" in demo.stderr
    assert "Traceback" not in demo.stderr


def modules(folder: Path):
    for file in folder.rglob("*.py"):
        if not any(p.is_symlink() for p in file.parents) and not file.name.startswith("__"):
            yield file


def test_an_editable_install_without_links_is_refused(without_links, environment):
    command = [environment, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", without_links]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "needs symbolic links" in done.stdout + done.stderr
