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


def python(code: str) -> str:
    """What it prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def imported_by(code: str) -> set[str]:
    """Those of HEAVY that are imported when `code` has run."""
    end = f"import sys; print(); print(*({HEAVY!r} & set(sys.modules)))"
    return set(python(f"{code}\n{end}").splitlines()[-1].split())


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


NOT_TO_RUN = {
    "sympy",
    "torch._dynamo.utils",
    "torch.distributed.tensor",
    "scipy.optimize",
    "sklearn",
    "torch._inductor",
}
ALONE = "from moe.launch.lean import import_only_what_runs; import_only_what_runs()"


@pytest.mark.parametrize("words", [["info", TINYMOE], ["generate", TINYMOE, "--prompt", "A", "--max-tokens", "1"]])
def test_a_command_imports_nothing_that_only_trains_and_compiles(words):
    run = f"from moe.launch.cli import main; assert not main({[str(word) for word in words]})"
    seen = "import sys; print(); print(*(NOT & set(sys.modules)))".replace("NOT", repr(NOT_TO_RUN))
    modules = [
        set(python(f"{first}; {run}; {seen}").splitlines()[-1].split())
        for first in ("import moe", f"import moe; {ALONE}")
    ]
    assert "torch._dynamo.utils" in modules[0]
    assert not modules[1]


COMPILES = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({model!r})).eval()
ids = torch.arange(12).reshape(2, 6) + 5
padded = torch.ones_like(ids)
padded[0, :3] = 0
embedded = model.get_input_embeddings()(ids)
mask = create_causal_mask(
    model.config, inputs_embeds=embedded, attention_mask=padded, past_key_values=None,
    and_mask_function=lambda b, h, q, k: k != 4,
)
with torch.no_grad():
    print(mask.float().sum().item(), model(ids).logits.double().sum().item())
    print(torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)(torch.ones(2)).sum().item())
import torch._dynamo
print(torch._dynamo.config.suppress_errors, "torch._dynamo.utils" in __import__("sys").modules)
"""


def test_what_was_left_out_is_there_when_it_is_wanted():
    code = COMPILES.format(model=str(TINYMOE))
    assert python(f"{ALONE}\n{code}") == python(code)


NAMES = """
import os, transformers
from transformers.utils import import_utils as asked

folder = os.path.join(os.path.dirname(transformers.__file__), "models")
paths = [folder, folder + "/__init__.py"]
found = [asked.define_import_structure(path, prefix) for path in paths for prefix in (None, "m")]
assert len(found[0]) > 3 and sum(map(len, found[0].values())) > 1000
for by_backends in found:
    for backends, modules in sorted(by_backends.items(), key=lambda item: sorted(map(str, item[0]))):
        print(sorted(map(str, backends)), sorted((module, sorted(names)) for module, names in modules.items()))
texts = ["", "__all__ = ['a', 'b']", "import x\\n__all__ = [\\n 'c',\\n]\\n__all__ = ['d']\\n"]
print([asked.fetch__all__(text) for text in [*texts, "x = '__all__'", "\\n__all__ = []"]])
print(asked.is_accelerate_available("1.0"))
"""


def test_transformers_finds_the_names_that_it_finds_alone():
    told, alone = (python(f"{first}\n{NAMES}").splitlines() for first in (ALONE, ""))
    assert told[:-1] == alone[:-1]
    assert told[-1] == "False"


@pytest.mark.parametrize(
    "first",
    [
        "import torch._dynamo.aot_compile_types as part; assert part.__file__",
        "from torch._dynamo import config, utils; assert not config.suppress_errors",
        "import torch._dynamo; assert torch._dynamo.list_backends()",
        "import torch._inductor, torch.distributed.tensor, torch.distributed.fsdp, torch.onnx",
    ],
)
def test_the_compiler_works_whatever_of_it_is_imported_first(first):
    compiles = "print(torch.compile(lambda x: x * 2, backend='eager', fullgraph=True)(torch.ones(1)).item())"
    assert python(f"{ALONE}; import torch; {first}; {compiles}; {first}") == "2.0\n"


def test_a_part_that_the_compiler_lacks_is_missing():
    code = f"{ALONE}\ntry:\n    import torch._dynamo.nothing\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code) == "No module named 'torch._dynamo.nothing'\n"


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
