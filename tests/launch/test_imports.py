"""What is imported for what: torch takes a second, transformers' code of models two more."""

import json
import shutil
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


def imported_and_said(code: str) -> tuple[set[str], str]:
    """Those of HEAVY that are imported when `code` has run, and what it printed."""
    end = f"import sys; print(); print(*({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", f"{code}\n{end}"], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, imported = ran.stdout.splitlines()
    return set(imported.split()), "\n".join(said)


def imported_by(code: str) -> set[str]:
    return imported_and_said(code)[0]


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


def test_info_of_a_model_that_was_looked_at_imports_no_code_of_models(tmp_path, monkeypatch):
    """And says the same; after any change of the folder it is told anew."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = shutil.copytree(TINYMOE, tmp_path / "model")

    def info(path: Path, cwd: Path = ROOT) -> tuple[set[str], str]:
        code = (
            f"import os; os.chdir({str(cwd)!r})\nfrom moe.launch.cli import main; assert main(['info', '{path}']) == 0"
        )
        imported, said = imported_and_said(code)
        return imported, said.partition("fits here")[0]

    first, again, elsewhere = info(model), info(model), info(Path("model"), tmp_path)
    assert first[0] >= MODELS
    assert again[0] == elsewhere[0] == set()
    assert first[1] == again[1] == elsewhere[1]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    changed = info(model)
    assert changed[0] >= MODELS
    assert "top-2" in first[1]
    assert "top-1" in changed[1]
    assert "top-1" in info(model)[1]


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
