"""GGUF blocks as codes against gguf's own decoding, byte for byte random, and a whole file against its twin."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.gguf import open_gguf
from moe.offload.checkpoint import TensorInfo
from moe.offload.formats.gguf import gguf_stack
from moe.params import SamplingParams
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import TINYMOE as DEMO
from tests.placement.test_written import files_of_at_most

gguf = pytest.importorskip("gguf", reason='GGUF needs pip install "moeflow[gguf]"')
FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "gguf" / "A"
KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "F32"]
KEPT = {"Q8_0": "int8", "Q4_0": "int4", "Q5_0": "int8", "Q6_K": "int8", "Q3_K": "int4"}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind, tmp_path):
    """Random bytes are valid blocks but for their F16 scales, which must be finite."""
    qtype = getattr(gguf.GGMLQuantizationType, kind)
    size, nbytes = gguf.GGML_QUANT_SIZES[qtype]
    experts, rows, columns = 2, 3, 512
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (experts, rows, columns // size, nbytes), np.uint8)
    if kind in ("F16", "F32"):
        values = rng.standard_normal((experts, rows, columns)).astype(np.float16 if kind == "F16" else np.float32)
        raw = values.view(np.uint8).reshape(raw.shape)
    else:
        halves = rng.standard_normal((*raw.shape[:3], 2)).astype(np.float16).view(np.uint8)
        at = {
            "Q8_0": 0,
            "Q4_0": 0,
            "Q4_1": 0,
            "Q5_0": 0,
            "Q5_1": 0,
            "Q2_K": 80,
            "Q3_K": 108,
            "Q4_K": 0,
            "Q5_K": 0,
            "Q6_K": 208,
        }
        both = 4 if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
        raw[..., at[kind] : at[kind] + both] = halves[..., :both]
    raw = raw.reshape(experts, rows, -1)
    path = tmp_path / "blocks"
    path.write_bytes(b"x" * 64 + raw.tobytes())
    dequantise = partial(gguf.quants.dequantize, qtype=qtype)
    dtype = {"F16": torch.float16, "F32": torch.float32}.get(kind, torch.uint8)
    info = TensorInfo(path, 64, raw.nbytes, dtype, (experts, rows, raw.shape[2] // dtype.itemsize))
    stack = gguf_stack("blk.0.ffn_up_exps.weight", kind, info, (experts, rows, columns), dequantise)
    assert (stack.format.code or "float") == KEPT.get(kind, "float")
    want = torch.from_numpy(dequantise(raw if dtype == torch.uint8 else values))
    got = stack.decoded()
    assert torch.equal(got, want) or float(((got - want) / want).abs().nan_to_num().max()) < 2e-7


def test_files_that_are_cut_or_of_another_model(tmp_path, capsys):
    """Wherever a file ends, one sentence says that it is no whole one."""
    config, file = tiny_checkpoint("qwen3_moe", tmp_path / "model"), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    whole = file.read_bytes()
    for length in (*range(0, 320, 9), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.gguf is no GGUF file that can be read: .*download it again"):
            with open_gguf(file, config):
                pass
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has no blk.0.ffn_gate_exps.weight"), open_gguf(file, config):
        pass
    assert main(["pack", str(file), str(tmp_path / "out"), "--config", str(DEMO)]) == 2
    assert "is of architecture 'qwen3moe', " in (said := capsys.readouterr().err)
    assert "of 'mixtral', whose names in GGUF files transformers does not map" in said


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"no GGUF model at {FIXTURE}")
def test_a_file_is_packed_and_says_what_its_twin_says(tmp_path, capsys):
    file, packed = FIXTURE / "q" / "model.gguf", tmp_path / "packed"
    assert main(["pack", str(file), str(packed)]) == 2
    assert "--config must name a folder" in capsys.readouterr().err
    with files_of_at_most(100):  # a full disk
        assert main(["pack", str(file), str(packed), "--config", str(FIXTURE / "fp32")]) == 2
    assert (
        "dense tensors take 149.5 KiB here while the file is packed: make room, or set TMPDIR"
        in capsys.readouterr().err
    )
    assert not packed.exists()
    assert main(["pack", str(file), str(packed), "--config", str(FIXTURE / "fp32")]) == 0
    said = json.loads((FIXTURE / "tokens.json").read_text())
    for budget in ("1.0", "0.25", "1 expert"):
        config = EngineConfig(dtype="float32", offload=OffloadConfig(budget=budget), batch=BatchConfig(kv_tokens=512))
        with LLM(packed, config) as llm:
            assert {str(x.gate_up_format.code) for x in llm.engine.blueprint.index.layouts} == {"int4"}
            outputs = llm.generate(said["prompts"], SamplingParams(max_tokens=24, ignore_eos=True))
            assert [o.outputs[0].token_ids for o in outputs] == said["greedy"]


def written_as_gguf(folder, file):
    """A Mixtral as llama.cpp's converter writes it: a llama whose experts are stacks, rows of q and k by pairs."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, "llama")
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if ".experts." not in name:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            place = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{theirs}.weight"
            every = [tensors[place.format(expert)].float().numpy() for expert in range(config["num_local_experts"])]
            writer.add_tensor(f"blk.{layer}.ffn_{ours}_exps.weight", np.stack(every))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_a_mixtral_is_a_llama_there(tmp_path):
    written_as_gguf(DEMO, tmp_path / "model.gguf")
    assert main(["pack", str(tmp_path / "model.gguf"), str(tmp_path / "packed"), "--config", str(DEMO)]) == 0
    found = []
    for folder in (DEMO, tmp_path / "packed"):
        with LLM(folder, EngineConfig(dtype="float32", offload=OffloadConfig(budget="0.5"))) as llm:
            outputs = llm.generate(["Once upon a time", "def f("], SamplingParams(max_tokens=24, temperature=0.0))
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]
