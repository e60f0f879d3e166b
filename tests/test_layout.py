"""Imports go only downward, and no folder is imported by its bare name."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": set(),
    "placement": set(),
    "offload": {"placement", "kernels"},
    "comm": {"kernels", "placement"},
    "moe": {"offload", "comm", "kernels", "placement", "moe"},
    "launch": {"moe", "placement", "offload", "comm", "kernels"},
}
FOLDERS = sorted(ALLOWED)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported_modules(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def folder_of(module: str) -> str | None:
    """The folder of this project that a dotted name belongs to; None for other packages."""
    parts = module.split(".")
    if parts[0] != "moe":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "moe"


@cache
def sources(folder: str) -> list[Path]:
    return [p for p in sorted((ROOT / folder).glob("**/*.py")) if not any(q.is_symlink() for q in p.parents)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_point_downward(folder):
    for path in sources(folder):
        if path == ROOT / "moe" / "__main__.py":  # `python -m moe` is launch's, whatever Python calls its file
            continue
        for module in imported_modules(path):
            target = folder_of(module)
            assert target is None or target == folder or target in ALLOWED[folder], f"{path} imports {module}"


def test_no_function_is_both_exported_and_compiled_for_several_machines():
    """gcc takes target_clones with a visibility, clang for x86 refuses the file."""
    for path in sorted((ROOT / "kernels").glob("*.[ch]")):
        heads = re.findall(r"^[^\n#/]*\bCLONES\b[^;{]*[;{]", path.read_text(), re.MULTILINE)
        assert not [head for head in heads if "EXPORT" in head], path


def test_placement_is_free_of_torch():
    for path in sources("placement"):
        assert not {m.split(".")[0] for m in imported_modules(path)} & {"torch", "transformers"}, path


def test_no_bare_folder_names():
    bare = {"placement", "offload", "comm", "kernels", "launch"}
    for path in [p for f in (*FOLDERS, "tests", "bench", "examples") for p in sources(f)]:
        assert not {m.split(".")[0] for m in imported_modules(path)} & bare, path


def test_root_folders_are_not_regular_packages():
    assert [f for f in FOLDERS if f != "moe" and (ROOT / f / "__init__.py").exists()] == []


def test_import_is_cheap():
    code = "import sys, moe; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_sleep_before_torch_is_loaded(given):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    program = "import os, sys, moe; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [given or "PASSIVE", "False"]


def test_every_folder_of_code_is_a_told_package():
    """Packages are listed, not found: a folder that is forgotten would be missing from every install."""
    import tomllib

    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT).as_posix() for f in FOLDERS for p in sources(f)}
    expected = {f.replace("/", ".") if f.startswith("moe") else f"moe.{f.replace('/', '.')}": f for f in folders}
    assert sorted(told["packages"]) == sorted(expected)
    assert told["package-dir"] == {name: f for name, f in expected.items() if not f.startswith("moe")}


WINGS = {"cluster", "engine", "layer", "models"}


def room_of(module: str) -> str | None:
    """The node of the folders' graph: a folder, a wing of moe/, or one file that stands directly in moe/."""
    parts = module.split(".")
    if parts[0] != "moe" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in ALLOWED else f"moe/{parts[1]}"


def arrows() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in (p for folder in FOLDERS for p in sources(folder)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = room_of(".".join(parts if parts[0] == "moe" else ("moe", *parts)))
        if here is None or path.stem.startswith("__"):
            continue
        rooms = {room_of(module) for module in imported_modules(path)}
        graph.setdefault(here, set()).update(room for room in rooms if room not in (None, here))
    return graph


def test_no_circle_and_few_floors():
    graph, chains = arrows(), {}

    def longest(room: str, above: tuple[str, ...]) -> tuple[str, ...]:
        assert room not in above, f"a circle: {' > '.join((*above, room))}"
        if room not in chains:
            below = [longest(r, (*above, room)) for r in graph.get(room, ())]
            chains[room] = (room, *max(below, key=len, default=()))
        return chains[room]

    deepest = max((longest(room, ()) for room in graph), key=len)
    assert len(deepest) <= 9, " > ".join(deepest)


def test_no_file_has_grown_beyond_one_idea():
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for folder in FOLDERS
        for path in sources(folder)
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, long


def test_the_engine_is_built_and_steps_in_few_lines():
    tree = ast.parse((ROOT / "moe" / "engine" / "engine.py").read_text())
    (engine,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine"]
    methods = {node.name: node for node in engine.body if isinstance(node, ast.FunctionDef)}
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(methods["__init__"])) - 1 < 20
    step = methods["step"]
    assert (step.end_lineno or 0) - step.lineno < 15
    assert not [node for node in ast.walk(step) if isinstance(node, (ast.If, ast.IfExp))]


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their base names: with two alike no run of both begins."""
    names = [path.name for path in (ROOT / "tests").glob("**/test_*.py")]
    assert sorted(names) == sorted(set(names))


WAITS = {"wait": 1, "join": 1, "acquire": 1, "result": 1, "get": 1, "wait_for": 2}  # arguments of a call with a limit
ENDLESS = {"accept", "readline", "communicate", "recv"}  # what limits them is set elsewhere
PROCESSES = {"run", "call", "check_call", "check_output"}
OWN = {"comm/wire.py", "comm/gather.py", "moe/engine/coherent.py", "moe/layer/lookahead.py"}  # `Exchange.wait`


def is_endless(call: ast.Call) -> bool:
    """Whether nothing in the call says how long it may wait."""
    if any((keyword.arg or "").startswith(("timeout", "blocking")) for keyword in call.keywords):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id in ("wait", "as_completed")
    if not isinstance(call.func, ast.Attribute):
        return False
    owner, name = ast.unparse(call.func.value), call.func.attr
    if owner == "subprocess":
        return name in PROCESSES
    if owner == "ray":
        return name in ("get", "wait")
    if owner == "asyncio":
        return name in ("wait", "as_completed")
    if owner == "fcntl":
        return "LOCK_NB" not in ast.unparse(call) and "LOCK_UN" not in ast.unparse(call)
    if isinstance(call.func.value, (ast.Constant, ast.JoinedStr)):  # "".join
        return False
    return (name in WAITS and len(call.args) < WAITS[name]) or (name in ENDLESS and len(call.args) < 2)


LIMITED = {*WAITS, *ENDLESS, "poll", "settimeout", "wait_for_words"} - {"get"}  # by their last argument


def limits_in(tree: ast.Module) -> Iterator[tuple[int, float]]:
    """Lines and figures of the limits that stand in a test: of calls that wait, and deadlines."""
    for node in ast.walk(tree):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            given = [k.value for k in node.keywords if "timeout" in str(k.arg) or k.arg in ("time_limit_s", "meet_s")]
            given += node.args[-1:] if name in LIMITED else []
        elif isinstance(node, ast.BinOp) and ast.unparse(node.left) == "time.monotonic()":
            given = [node.right]
        for one in given:
            if isinstance(one, ast.Constant) and type(one.value) in (int, float):
                yield one.lineno, float(one.value)


def test_no_test_bets_on_the_speed_of_the_machine():
    """A limit is one that is run into, of some seconds, or tests/patience.py's; how long something took is no test."""
    found = []
    for path in (ROOT / "tests").glob("**/*.py"):
        tree, name = tree_of(path), path.relative_to(ROOT)
        found += [f"{name}:{line}: a limit of {s:g} s" for line, s in limits_in(tree) if 5 < s < PATIENCE_S]
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Assert)):
            if any("time.monotonic() -" in ast.unparse(n) or "time.perf_counter() -" in ast.unparse(n)
                   for n in ast.walk(node.test) if isinstance(n, ast.BinOp)):  # fmt: skip
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_wait_has_a_limit_or_a_reason(folder):
    """A process that is stopped, a disk or a peer out of reach answers never. The reason stands in the line."""
    found = []
    for path in sources(folder):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        tree, lines = tree_of(path), text.splitlines()
        limited = [n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args[1:]
                   and ast.unparse(n.func) == "asyncio.wait_for"]  # fmt: skip
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n not in limited and is_endless(n)):
            is_own = name in OWN and ast.unparse(call.func).endswith(".wait")
            if not is_own and not any("# no limit: " in line for line in lines[call.lineno - 1 : call.end_lineno]):
                found.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    assert not found, found
