"""Models of several modalities served for text, folders with code of their own, and generation_config.json."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moe.config import EngineConfig
from moe.engine.sampling import SamplingParams
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.generation import read_generation
from moe.models.load import dense_keys, load_tokenizer
from moe.models.towers import Absent
from tests.architectures import architectures, rounding_bound, tiny_model
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, TINYMOE, config, engine_says, reference_says, relative_error

ONLY_IMAGE_TEXT = ("qwen3_vl_moe", "kimi_k25", "mistral_large4")


@pytest.mark.parametrize("model_type", ONLY_IMAGE_TEXT)
def test_models_that_are_mapped_to_image_and_text_only_are_served_for_text(model_type, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = reference_says(reference, PROMPTS)
    with LLM(tmp_path, config("0.25", max_tokens=7)) as llm:
        said = engine_says(llm, PROMPTS)
        assert said.tokens == expected.tokens
        assert relative_error(said, expected) <= FP32_BOUND
        blueprint = llm.engine.blueprint
        towers = [m for m in llm.engine.model.modules() if isinstance(m, Absent)]
        assert len(towers) >= 1
        assert not any(p.numel() for tower in towers for p in tower.parameters())
        assert blueprint.dense_bytes < sum(p.nbytes for p in model.parameters()) - blueprint.expert_bytes // 2
        with pytest.raises(ValueError, match="served for text only"):
            towers[0](torch.zeros(1))


def as_published(model_type, folder):
    """A composite folder: the text model's tensors under another prefix, and a tensor of a vision tower beside them."""
    model = tiny_model(model_type)
    model.save_pretrained(folder / "text")
    stored = load_file(folder / "text" / "model.safetensors")
    prefix = "model.language_model." if model_type == "qwen3_5_moe" else "language_model.model."
    tensors = {
        (
            prefix + key.removeprefix("model.") if key.startswith("model.") else f"language_model.{key}"
        ): tensor.contiguous()
        for key, tensor in stored.items()
    }
    if model_type == "qwen3_5_moe":
        tensors["lm_head.weight"] = tensors.pop("language_model.lm_head.weight")
    tensors["model.visual.patch_embed.proj.weight" if model_type == "qwen3_5_moe" else "vision_model.x.weight"] = (
        torch.ones(4)
    )
    said = {"model_type": model_type, "text_config": json.loads((folder / "text" / "config.json").read_text())}
    (folder / "whole").mkdir()
    save_file(tensors, folder / "whole" / "model.safetensors", {"format": "pt"})
    (folder / "whole" / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": False}))
    return folder / "whole"


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "llama4"])
def test_composite_folders_as_they_are_published(model_type, tmp_path):
    folder = as_published(model_type, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference_says(reference, PROMPTS)
    with LLM(folder, config("0.25")) as llm:
        said = engine_says(llm, PROMPTS)
        assert said.tokens == expected.tokens
        assert relative_error(said, expected) <= rounding_bound(reference, expected)
        assert not [key for key in dense_keys(llm.engine.blueprint) if "vision" in key or "visual" in key]


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
from transformers import MixtralConfig
class XConfig(MixtralConfig):
    model_type = {model_type!r}
"""
MODEL_CODE = """
from transformers import MixtralForCausalLM
from .configuration_x import XConfig
class XForCausalLM(MixtralForCausalLM):
    config_class = XConfig
"""


def with_own_code(folder, model_type):
    shutil.copytree(TINYMOE, folder)
    if model_type == "other":  # transformers has no names for its tensors but the model's own
        state = AutoModelForCausalLM.from_pretrained(TINYMOE, dtype="auto").state_dict()
        save_file({k: t.clone() for k, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said |= {"model_type": model_type, "architectures": ["XForCausalLM"]}
    said["auto_map"] = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "configuration_x.py").write_text(CODE.format(ran=str(folder / "ran"), model_type=model_type))
    (folder / "modeling_x.py").write_text(MODEL_CODE)
    return folder


def test_code_of_an_unknown_architecture_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch, capfd):
    folder = with_own_code(tmp_path / "model", "other")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # for whoever asks
    assert main(["info", str(folder)]) == 2
    said = capfd.readouterr()
    assert "trust_remote_code=true" in said.err
    assert "y/N" not in said.out + said.err
    assert sys.stdin.read() == "y\n"
    assert not (folder / "ran").exists()


def test_code_for_a_known_architecture_is_not_needed(tmp_path):
    folder = with_own_code(tmp_path / "model", "mixtral")
    assert type(read_blueprint(folder).skeleton).__module__.startswith("transformers.models.mixtral")
    assert not (folder / "ran").exists()


def test_code_runs_where_a_setting_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_own_code(tmp_path / "model", "other")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with LLM(TINYMOE, experts_in_memory=0.5) as llm:
        expected = llm.generate("Once upon a time", params)[0].outputs[0].token_ids
    with LLM(folder, EngineConfig(trust_remote_code=True), experts_in_memory=0.5) as llm:
        assert type(llm.engine.model).__name__ == "XForCausalLM"
        assert llm.generate("Once upon a time", params)[0].outputs[0].token_ids == expected
    assert (folder / "ran").exists()


def test_a_tokenizer_of_own_code_is_refused_with_the_remedy(tmp_path):
    said = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(ValueError, match="trust_remote_code=true"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_end_tokens_of_generation_config_are_honoured(tmp_path):
    folder = shutil.copytree(TINYMOE, tmp_path / "model")
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(folder, experts_in_memory=0.5) as llm:
        tokens = llm.generate("Once upon a time", free)[0].outputs[0].token_ids
    said = {"eos_token_id": [0, tokens[3]], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    with LLM(folder, experts_in_memory=0.5) as llm:
        answer = llm.generate("Once upon a time", SamplingParams(max_tokens=8))[0].outputs[0]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == tokens[:4]
        defaults = llm.engine.blueprint.generation
        assert defaults.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[1]", "holds a list, expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"eos_token_id": "</s>"}', "must be a token id"),
        ('{"temperature": "hot"}', "temperature ('hot') must be a number"),
        ('{"do_sample": true, "top_p": 2}', "generation_config.json: top_p (2.0) must lie in [0, 1]; mend it there"),
        ('{"max_new_tokens": 0}', "max_tokens (0) must be >= 1"),
    ],
)
def test_a_damaged_generation_config_is_one_sentence(tmp_path, said, words):
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_generation(tmp_path, read_blueprint(TINYMOE).config)
    assert "\n" not in str(error.value)


def test_an_alive_zero_configuration_is_named(monkeypatch):
    monkeypatch.setattr("moe.models.blueprint.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        read_blueprint(TINYMOE)


def test_every_architecture_is_found():
    found = architectures()
    assert len(found) >= 60
    assert {"mixtral", "deepseek_v3", "kimi_k25", "jetmoe", "afmoe", "longcat_flash", "qwen3_vl_moe"} <= set(found)
