"""What is imported for what: torch takes a second, transformers' code of models two more."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe
from moe.placement.trace import RoutingTrace

ROOT = Path(__file__).resolve().parent.parent.parent
TINYMOE = ROOT / "examples" / "tinymoe"
MODELS = {"transformers.modeling_utils", "transformers"}  # the first is what takes the seconds
HEAVY = {*MODELS, "torch", "scipy", "numpy"}


def imported_by(code: str) -> set[str]:
    """Those of HEAVY that are imported when `code` has run."""
    end = f"import sys; print(); print(*({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{end}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


def imported_by_command(*words: str | Path, status: int = 0) -> set[str]:
    arguments = [str(word) for word in words]
    return imported_by(f"from moe.launch.cli import main; assert main({arguments}) == {status}")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    ids = np.random.default_rng(0).integers(0, 8, (64, 2, 1)).astype(np.int16)
    RoutingTrace(expert_ids=ids, sequence_lengths=np.full(4, 16, np.int32), num_experts=8, model="m").save(path)
    return path


def test_the_check_sees_what_a_model_imports():
    assert imported_by_command("generate", TINYMOE, "--prompt", "A", "--max-tokens", "1") >= {*MODELS, "torch"}


@pytest.mark.parametrize("name", sorted(moe.__all__))
def test_public_names_are_cheap(name):
    assert imported_by(f"from moe import {name}") == set()


def test_the_class_is_described_without_a_model():
    code = "import inspect, pydoc, moe; assert 'experts_in_memory' in pydoc.render_doc(moe.LLM)"
    assert imported_by(f"{code}; assert 'hosts' in inspect.signature(moe.LLM).parameters") == set()


def test_commands_of_no_model_import_no_code_of_models(trace, tmp_path):
    plan, on = tmp_path / "plan.json", ("--topology", "h200x4", "--sizes", "8,float32,256")
    assert not imported_by_command("analyze", trace) & MODELS
    assert not imported_by_command("probe", "--show", "--file", tmp_path / "none.json", status=2) & MODELS
    assert not imported_by_command("place", trace, *on, "--seconds", 1, "--out", plan) & {*MODELS, "torch"}
    assert not imported_by_command("simulate", trace, plan, *on) & {*MODELS, "torch"}
    assert not imported_by_command("top", "http://127.0.0.1:9", "--once", status=2) & {*MODELS, "torch"}


COLLECTED = """
import gc, sys
from moe.uncollected import uncollected
{before}
with uncollected():
    assert not gc.isenabled()
    import {module}
assert gc.isenabled() == {is_on}
print(gc.get_freeze_count() > 0, end=" ")
"""


@pytest.mark.parametrize(
    ("before", "module", "is_frozen"),
    [("", "torch", True), ("gc.disable()", "torch", True), ("import torch", "json", False), ("", "json", False)],
)
def test_what_torch_makes_when_it_is_imported_is_not_looked_at_again(before, module, is_frozen):
    code = COLLECTED.format(before=before, module=module, is_on="disable" not in before)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == (str(is_frozen), "")


def test_nothing_is_called_lost_when_a_command_ends():
    command = [sys.executable, "-m", "moe", "generate", str(TINYMOE), "--prompt", "A", "--max-tokens", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "leak" not in ran.stderr
