"""`dense=packed`: quantised attention stays as stored, in less memory, and says what the decoded one says."""

from pathlib import Path

import pytest
import torch
from test_mixed_formats import PROMPTS, channel_fp8, gptq, int4, int8, write_pair

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.dense_packed import PackedLinear
from moe.models.load import loaded_bytes
from moe.offload.integrity import check_dense
from moe.params import SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"


def says(folder, dense):
    config = EngineConfig(
        dtype="float32",
        dense=dense,
        offload=OffloadConfig(budget="3"),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
        rows = torch.stack([row for rows in logits.values() for row in rows])
        model = llm.engine.model
        nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert llm.engine.state().dense_bytes <= nbytes  # tied tensors count once
        foreseen = loaded_bytes(llm.engine.blueprint, torch.float32, packed=dense == "packed")
        assert foreseen == llm.engine.state().dense_bytes
        assert any(("decoded at load" if dense == "decoded" else "packed where") in note for note in llm.engine.notes)
        packed = sum(isinstance(module, PackedLinear) for module in model.modules())
        return [o.outputs[0].token_ids for o in outputs], rows, nbytes, packed


@pytest.mark.parametrize("writer", [int4, int8, channel_fp8, gptq])
def test_equals_the_decoded_one(writer, tmp_path):
    stored, _ = write_pair("qwen3_moe", tmp_path, lambda key: writer if "self_attn" in key else None)
    tokens, logits, nbytes, none = says(stored, "decoded")
    again, close, less, packed = says(stored, "packed")
    assert (none, packed) == (0, 12)  # q, k, v, o of three layers
    assert again == tokens
    assert float((close - logits).abs().max()) < 1e-5 * float(logits.abs().max())  # orders of fp32 sums
    assert less < nbytes


def test_needs_the_compiled_kernels(tmp_path):
    stored, _ = write_pair("qwen3_moe", tmp_path, lambda key: int8 if "self_attn" in key else None)
    with pytest.raises(ValueError, match="dense=packed needs the compiled kernels"):
        LLM(stored, EngineConfig(dense="packed", kernel="reference"))


@pytest.mark.parametrize("target", ["int8", "int4"])
def test_a_packed_folder_may_have_rounded_dense_layers(target, tmp_path, capsys):
    """In registers and decoded they say the same; routers, norms and embeddings are as they were."""
    source, out = DEMO, tmp_path / "packed"
    assert main(["pack", str(source), str(out), "--dense", target]) == 0
    printed = capsys.readouterr().out
    blueprint, before = read_blueprint(out), read_blueprint(source).checkpoint
    rounded = {name for name in before.tensors if name.endswith("_proj.weight") and "self_attn" in name}
    rounded |= {"lm_head.weight"} & set(before.tensors)
    assert set(blueprint.quantised.matrices) == rounded
    assert f"{len(rounded)} other weights became {target}" in printed
    most = 0.02 if target == "int8" else 0.2
    for name, matrix in blueprint.quantised.matrices.items():
        weight = before.load(name).float()
        error = float((matrix.decoded() - weight).norm() / weight.norm())
        assert 0 < error < most
        assert blueprint.checkpoint.packed["dense_errors"][name] == pytest.approx(error, rel=1e-3)
    kept = set(before.tensors) & set(blueprint.checkpoint.tensors) - rounded
    assert any(name.endswith("gate.weight") for name in kept)
    assert all(torch.equal(before.load(name), blueprint.checkpoint.load(name)) for name in kept)
    assert list(check_dense(blueprint.checkpoint)) == []
    tokens, logits, *_ = says(out, "decoded")
    again, close, _, packed = says(out, "packed")
    assert packed == len(rounded)
    assert again == tokens
    assert float((close - logits).abs().max()) < 1e-5 * float(logits.abs().max())


def test_dense_layers_are_rounded_to_known_formats_of_folders(tmp_path, capsys):
    write_pair("qwen3_moe", tmp_path, lambda key: None)
    assert main(["pack", str(tmp_path / "twin"), str(tmp_path / "out"), "--dense", "int3"]) == 2
    assert "--dense (int3) must be one of bf12, int8, int4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
