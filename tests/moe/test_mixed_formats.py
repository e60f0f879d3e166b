"""Formats mixed by layer and between experts and attention, in several families, against the dequantised twin."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.params import SamplingParams
from tests.families import tiny_checkpoint

PROMPTS = [[5, 9, 30], [7], [1, 2, 3, 4, 5, 6]]


def int4(key, w):
    """compressed-tensors, groups of 4 columns, zero points; rows that do not fill a word."""
    n, k = w.shape
    groups = -(-k // 4)
    of = torch.arange(k) // 4
    padded = torch.nn.functional.pad(w, (0, groups * 4 - k)).unflatten(1, (groups, 4))
    low, high = padded.amin(-1), padded.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-4).bfloat16()
    zero = (-8 - (low / scale.float()).round()).clamp(-8, 7)
    q = ((w / scale.float()[:, of]).round() + zero[:, of]).clamp(-8, 7)
    base = key.removesuffix("weight")
    stored = {
        base + "weight_packed": words(q + 8),
        base + "weight_scale": scale,
        base + "weight_zero_point": words((zero + 8).T).T.contiguous(),
        base + "weight_shape": torch.tensor([n, k]),
    }
    return stored, (q - zero[:, of]) * scale.float()[:, of]


def words(fields):
    padded = torch.nn.functional.pad(fields.long(), (0, -fields.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8) * 4).sum(-1).to(torch.int32)  # wraps as the bits do


def channel_fp8(key, w):
    scale = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {key: codes, key + "_scale": scale}, codes.float() * scale


def int8(key, w):
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    return {key: codes, key + "_scale": scale}, codes.float() * scale


def gptq(key, w):
    """One group a row of the transposed matrix, scattered over columns; eight rows to a word."""
    n, k = w.shape
    group_of = torch.randint(0, 2, (k,), dtype=torch.int32)
    scale = torch.stack([w[:, group_of == g].abs().amax(1) / 7 + 1e-3 for g in range(2)]).half()  # [G, N]
    q = (w / scale.float()[group_of.long()].T).round().clamp(-8, 7) + 8
    base = key.removesuffix("weight")
    stored = {
        base + "qweight": words(q).T.contiguous(),
        base + "scales": scale,
        base + "qzeros": words(torch.full((2, n), 7)),
        base + "g_idx": group_of,
    }
    return stored, (q - 8) * scale.float()[group_of.long()].T


def write_pair(family, folder: Path, choose) -> tuple[Path, Path]:
    """choose(key) -> a writer or None. Returns the quantised folder and its twin."""
    torch.manual_seed(0)
    twin, stored = tiny_checkpoint(family, folder / "twin"), folder / "q"
    shutil.copytree(twin, stored)
    tensors = load_file(twin / "model.safetensors")
    plain, low = dict(tensors), dict(tensors)
    for key, w in tensors.items():
        writer = choose(key) if key.endswith(".weight") and w.ndim == 2 else None
        if writer is not None:
            companions, plain[key] = writer(key, w)
            del low[key]
            low |= companions
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(low, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    group = {"weights": {"num_bits": 4, "group_size": 4}, "input_activations": {"type": "float", "num_bits": 8}}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    config["quantization_config"]["config_groups"] = {"group_0": group}
    (stored / "config.json").write_text(json.dumps(config))
    return stored, twin


def says(folder: Path, budget: str, kernel: str = "auto") -> tuple[list[list[int]], torch.Tensor, list[str]]:
    config = EngineConfig(
        dtype="float32",
        kernel=kernel,
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
        cache = llm.engine.experts.cache
        cache.check()
        share = cache.num_slots / llm.engine.blueprint.num_experts
        runs = len(cache.slab.runs)
        assert runs == (1 if budget == "1 expert" else len({layout.nbytes for layout in cache.store.layouts}))
        if runs > 1:  # no slot is larger than the experts that it is for
            exact = share * llm.engine.blueprint.expert_bytes
            assert abs(cache.slot_bytes - exact) < runs * cache.blob_bytes
        rows = torch.stack([row for rows in logits.values() for row in rows])
        return [o.outputs[0].token_ids for o in outputs], rows, llm.engine.notes


def by_layer(key):
    if ".experts." in key:
        return (int4, channel_fp8, None)[int(key.split("layers.")[1][0]) % 3]
    return gptq if key.endswith("o_proj.weight") and "layers.1" in key else int8 if "_proj" in key else None


def experts_int4(key):
    return int4 if ".experts." in key else None


@pytest.mark.parametrize(
    ("family", "choose"),
    [("qwen3_moe", by_layer), ("mixtral", experts_int4), ("deepseek_v3", by_layer), ("olmoe", experts_int4)],
)
def test_equals_its_twin(family, choose, tmp_path):
    stored, twin = write_pair(family, tmp_path, choose)
    blueprint = read_blueprint(stored)
    assert len({layout.gate_up_format for layout in blueprint.index.layouts}) == (
        1 if choose is experts_int4 else len(blueprint.index.sites)
    )
    pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
    tokens, logits, _ = says(twin, "1.0", "reference")
    for folder, budget, kernel in (
        (stored, "1.0", "reference"),
        (stored, "1 expert", "auto"),
        (tmp_path / "packed", "0.25", "auto"),
    ):
        again, close, notes = says(folder, budget, kernel)
        assert again == tokens
        assert float((close - logits).abs().max()) < 1e-5 * float(logits.abs().max())  # orders of fp32 sums
    assert any("stay as stored" in note and "round them to float8" in note for note in notes)


def test_experts_of_a_layer_must_be_stored_alike(tmp_path):
    stored, _ = write_pair("qwen3_moe", tmp_path, lambda key: int8 if "layers.1.mlp.experts.3.up" in key else None)
    with pytest.raises(ValueError, match=r"layer 1 .*experts\.3\.up_proj\.weight is quantised, .*stored alike"):
        read_blueprint(stored)
    stored, _ = write_pair(
        "mixtral", tmp_path / "b", lambda key: (int8 if ".w1." in key else int4) if ".experts." in key else None
    )
    with pytest.raises(ValueError, match=r"layer 0 .*is stored as .*must be stored alike"):
        read_blueprint(stored)
