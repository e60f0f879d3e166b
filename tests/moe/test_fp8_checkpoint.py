"""Checkpoints whose experts and dense layers are in fp8 with block scales say what their dequantised twins say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.kernels.formats import Coding, decode
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.check import check_folder
from moe.offload.pack import pack
from moe.params import SamplingParams
from tests.families import tiny_checkpoint

BLOCK = (16, 32)
PROMPTS = [[5, 9, 30], [7], [1, 2, 3, 4, 5, 6]]


def in_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] in fp8, and the scale of each block, written with loops."""
    scale = torch.empty(-(-w.shape[0] // BLOCK[0]), -(-w.shape[1] // BLOCK[1]))
    stored = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
            scale[i, j] = w[rows, columns].abs().max() / 448
            stored[rows, columns] = (w[rows, columns] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale


def write_pair(family: str, folder: Path, scale_dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A checkpoint in fp8, and the same values in float32."""
    twin, stored = tiny_checkpoint(family, folder / "twin"), folder / "fp8"
    shutil.copytree(twin, stored)
    tensors = load_file(twin / "model.safetensors")
    plain, low = dict(tensors), dict(tensors)
    for key, w in tensors.items():
        if key.endswith("_proj.weight") or ".experts." in key:
            low[key], scale = in_fp8(w)
            low[key + "_scale_inv"] = scale = scale.to(scale_dtype)
            plain[key] = decode(low[key], Coding("e4m3", BLOCK, scale[None, None]), w.shape[1], 0)
            assert not torch.equal(plain[key], w)
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(low, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"]["weight_block_size"] = list(BLOCK)
    (stored / "config.json").write_text(json.dumps(config))
    return stored, twin


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> tuple[Path, Path]:
    return write_pair("qwen3_moe", tmp_path_factory.mktemp("qwen3"), torch.bfloat16)  # as its publisher stores them


def answers(folder: Path, kernel: str, budget: str = "1.0") -> tuple[list[list[int]], torch.Tensor]:
    config = EngineConfig(
        dtype="float32",
        kernel=kernel,
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
        llm.engine.experts.cache.check()
        return [o.outputs[0].token_ids for o in outputs], torch.stack([row for rows in logits.values() for row in rows])


def test_equals_its_dequantised_twin(qwen3):
    stored, twin = qwen3
    index = read_blueprint(stored).index
    assert index.dtype == torch.float8_e4m3fn
    assert index.layouts[0].nbytes <= read_blueprint(twin).index.layouts[0].nbytes
    tokens, logits = answers(twin, "reference")
    for budget in ("1.0", "3"):  # resident, and in waves
        again, same = answers(stored, "reference", budget)
        assert again == tokens
        assert torch.equal(same, logits)


@pytest.mark.parametrize("kernel", ["grouped", "cpu"])
def test_other_kernels(qwen3, kernel):
    tokens, logits = answers(qwen3[1], "reference")
    again, close = answers(qwen3[0], kernel, "5")
    assert again == tokens
    assert float((close - logits).abs().max()) < 1e-4 * float(logits.abs().max())  # orders of fp32 sums


def test_packed(qwen3, tmp_path):
    blueprint = read_blueprint(qwen3[0])
    pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
    said = json.loads((tmp_path / "packed" / "packed.json").read_text())["layers"][0]["formats"][0]
    assert (said["code"], said["block"], said["scale_dtype"]) == ("e4m3", list(BLOCK), "BF16")
    again, same = answers(tmp_path / "packed", "reference", "3")
    tokens, logits = answers(qwen3[1], "reference")
    assert again == tokens
    assert torch.equal(same, logits)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "olmoe"])
def test_other_families(family, tmp_path):
    stored, twin = write_pair(family, tmp_path)
    tokens, logits = answers(twin, "reference")
    again, same = answers(stored, "reference", "4")
    assert again == tokens
    assert torch.equal(same, logits)


def edited(folder: Path, out: Path, change) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_check_finds_codes_and_scales_that_are_no_numbers(qwen3, tmp_path):
    dense = "model.layers.0.self_attn.q_proj.weight"

    def damage(tensors):
        tensors[KEY].view(torch.uint8)[2, 3] = 0xFF
        tensors[dense].view(torch.uint8)[1, 1] = 0x7F

    blueprint = read_blueprint(edited(qwen3[0], tmp_path / "damaged", damage))
    said = list(check_folder(blueprint.checkpoint, blueprint.index))
    assert len(said) == 2
    assert any(f"tensor {dense} holds numbers that are not finite" in s for s in said)
    assert any("layer 1, expert 5: gate_up holds numbers that are not finite" in s for s in said)


KEY = "model.layers.1.mlp.experts.5.up_proj.weight"
DENSE = "model.layers.1.self_attn.q_proj.weight_scale_inv"


def test_what_cannot_be_read_is_refused(qwen3, tmp_path):
    stored, _ = qwen3
    for name, change, message in (
        ("none", lambda t: t.pop(KEY + "_scale_inv"), rf"layer 1 .*{KEY} is stored as F8_E4M3 without the scales"),
        (
            "mixed",
            lambda t: t.update({KEY + "_scale_inv": t[KEY + "_scale_inv"].float()}),
            "is stored as e4m3 .* experts of a layer must be stored alike",
        ),
        (
            "shape",
            lambda t: t.update({KEY + "_scale_inv": torch.ones(3, 5)}),
            rf"layer 1 .*{KEY} .*has scales \[3, 5\], not one for each 16 x 32",
        ),
        ("wide", lambda t: t.update({KEY: t[KEY].float()}), rf"layer 1 .*{KEY} F32"),
        (
            "dense",
            lambda t: t.update({DENSE: torch.ones(1, 1)}),
            r"q_proj.weight .*has scales \[1, 1\], not one for each",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            answers(edited(stored, tmp_path / name, change), "reference")
