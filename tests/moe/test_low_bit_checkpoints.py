"""Published low-bit formats, written by the libraries that publish them, say what their dequantised twins say.

The folders stand beside a developer's checkout (../shared/fixtures); without them these tests are skipped.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.params import SamplingParams
from tests.distributed import spawn

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
NAMES = sorted(str(p.parents[1].relative_to(FIXTURES)) for p in FIXTURES.glob("*/*/q/model.safetensors"))
pytestmark = pytest.mark.skipif(not NAMES, reason=f"{FIXTURES} has no folders of low-bit models")


def says(folder: Path, budget: str, prompts: list[list[int]], count: int) -> tuple[list[list[int]], torch.Tensor]:
    config = EngineConfig(
        dtype="float32",
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=512),
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
        return [o.outputs[0].token_ids for o in outputs], torch.stack([rows[0] for rows in logits.values()])


def assert_as_twin(folder: Path, said: dict, budget: str) -> None:
    tokens, first = says(folder, budget, said["prompts"], 24)
    assert tokens == said["greedy"]
    wanted = torch.tensor(said["first_logits"])
    assert float((first - wanted).abs().max() / wanted.abs().max()) < 1e-5  # fp32 sums of another order


def serve(names: list[str]) -> list[list[list[int]]]:
    """One rank: its prompts on every folder."""
    answers = []
    with process_groups() as groups:
        for name in names:
            prompts = json.loads((FIXTURES / name / "tokens.json").read_text())["prompts"]
            config = EngineConfig(dtype="float32", offload=OffloadConfig(budget="2"), batch=BatchConfig(kv_tokens=512))
            with LLM(FIXTURES / name / "q", config, groups=groups) as llm:
                own = llm.generate(prompts[groups.rank :: 2], SamplingParams(max_tokens=24, ignore_eos=True))
                answers.append([o.outputs[0].token_ids for o in own])
    return answers


@pytest.mark.heavy
def test_two_ranks():
    said = spawn(2, serve, NAMES, time_limit_s=600)
    for name, *by_rank in zip(NAMES, *said):
        expected = json.loads((FIXTURES / name / "tokens.json").read_text())["greedy"]
        assert by_rank == [expected[0::2], expected[1::2]], name


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_twin(name, tmp_path):
    folder = FIXTURES / name / "q"
    said = json.loads((FIXTURES / name / "tokens.json").read_text())
    for budget in ("1.0", "0.25", "1 expert"):
        assert_as_twin(folder, said, budget)
    blueprint = read_blueprint(folder)
    pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
    assert read_blueprint(tmp_path / "packed").index.layouts == blueprint.index.layouts
    assert_as_twin(tmp_path / "packed", said, "0.25")


def in_two_shards(folder: Path, out: Path) -> None:
    """Scales in another file than codes, as large checkpoints may have them."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for key, tensor in tensors.items():
        is_code = "scale" not in key and "absmax" not in key and tensor.dtype in (torch.uint8, torch.int32)
        shards["a.safetensors" if is_code else "b.safetensors"][key] = tensor
    for name, part in shards.items():
        save_file(part, out / name, metadata={"format": "pt"})
    (out / "model.safetensors").unlink()
    weight_map = {key: name for name, part in shards.items() for key in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["mxfp4_gptoss/A", "gptq_int4/A_actorder", "nvfp4_ct/A", "bnb_nf4/A"])
def test_codes_and_scales_in_different_shards(name, tmp_path):
    in_two_shards(FIXTURES / name / "q", tmp_path / "q")
    assert_as_twin(tmp_path / "q", json.loads((FIXTURES / name / "tokens.json").read_text()), "0.25")


def test_the_lists_of_the_configuration_do_not_decide(tmp_path):
    """Everything is declared unquantised, and the folder has ModelOpt's file only: the tensors know better."""
    name = "fp8_modelopt/A"
    shutil.copytree(FIXTURES / name / "q", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    about = json.loads((tmp_path / "q" / "hf_quant_config.json").read_text())
    about["quantization"]["exclude_modules"] = ["*"]
    (tmp_path / "q" / "hf_quant_config.json").write_text(json.dumps(about))
    assert_as_twin(tmp_path / "q", json.loads((FIXTURES / name / "tokens.json").read_text()), "0.25")


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "mxfp4_gptoss/A/q", tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][3, 5, 0] = 255
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"down\.scale .*no finite number"):
        says(tmp_path / "q", "1.0", [[1, 2, 3]], 2)
