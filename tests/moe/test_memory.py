"""A checkpoint of B bytes with a budget of M peaks near dense + M, not B: measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from moe.launch.cli import main
from moe.models.blueprint import read_blueprint
from moe.models.load import loaded_bytes
from moe.offload.budget import format_bytes
from moe.offload.layout import ALIGNMENT
from moe.offload.pack import pack
from moe.offload.short_floats import shortened
from moe.placement.machine import save_machine
from tests.moe.moe_cases import ROOT
from tests.moe.test_keep import machine

MIB = 1 << 20
LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 3, 64, 256, 640, 16384
EXPERT_BYTES = 3 * HIDDEN * INNER * 4

MEASURE = """
import json, sys
import torch
torch.set_num_threads(1)
from moe.config import *
from moe.offload.memory import peak_rss_bytes
from moe.llm import LLM
from moe.params import SamplingParams

folder, budget, store, direct = sys.argv[1:5]
# Whatever a first load imports is not the model's: load a tiny one first.
with LLM(sys.argv[5], EngineConfig(dtype="float32", offload=OffloadConfig(budget="1 expert"))) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
start = peak_rss_bytes()
offload = OffloadConfig(budget=budget, store=store, direct={"direct": True, "buffered": False}[direct])
batch = BatchConfig(max_sequences=2, max_tokens=64, kv_tokens=256)
with LLM(folder, EngineConfig(dtype="float32", offload=offload, batch=batch)) as llm:
    loaded = peak_rss_bytes()
    out = llm.generate([list(range(1, 33)), [5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))
    read = sum(s.bytes_read for s in llm.engine.layer_stats())
    slots = llm.engine.experts.cache.num_slots
print(json.dumps({
    "start": start, "loaded": loaded, "peak": peak_rss_bytes(), "read": read, "slots": slots,
    "tokens": [o.outputs[0].token_ids for o in out],
}))
"""


def write_checkpoint(
    folder, layers, experts, hidden, inner, vocab=512, *, heads=4, stored=lambda tensors: tensors, predicting=0, **more
) -> int:
    """A random Qwen3-MoE, a layer at a time; returns its bytes.

    stored: what a file gets in place of fp32. predicting: layers in the files that the config does not count.
    """
    folder.mkdir()
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=inner,
        intermediate_size=inner,
        max_position_embeddings=512,
        architectures=["Qwen3MoeForCausalLM"],
        eos_token_id=None,
        **more,
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns) / columns**0.5

    weight_map, total = {}, 0
    for layer in [*range(layers + predicting), None]:
        tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden)}
        tensors["model.norm.weight"] = torch.ones(hidden)
        if layer is not None:
            at = f"model.layers.{layer}."
            tensors = {
                at + "self_attn.q_proj.weight": matrix(heads * 32, hidden),
                at + "self_attn.k_proj.weight": matrix(64, hidden),
                at + "self_attn.v_proj.weight": matrix(64, hidden),
                at + "self_attn.o_proj.weight": matrix(hidden, heads * 32),
                at + "self_attn.q_norm.weight": torch.ones(32),
                at + "self_attn.k_norm.weight": torch.ones(32),
                at + "input_layernorm.weight": torch.ones(hidden),
                at + "post_attention_layernorm.weight": torch.ones(hidden),
                at + "mlp.gate.weight": matrix(experts, hidden),
            }
            for e in range(experts):
                tensors[f"{at}mlp.experts.{e}.gate_proj.weight"] = matrix(inner, hidden)
                tensors[f"{at}mlp.experts.{e}.up_proj.weight"] = matrix(inner, hidden)
                tensors[f"{at}mlp.experts.{e}.down_proj.weight"] = matrix(hidden, inner)
        tensors = stored(tensors)
        name = f"model-{'dense' if layer is None else layer}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    write_checkpoint(folder / "tiny", 1, 4, 64, 16)
    total = write_checkpoint(folder / "model", LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY)
    assert total > 350 * MIB
    return folder, total


def measure(checkpoint, budget, store="file", direct="direct"):
    folder, _ = checkpoint
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder / "model", budget, store, direct, folder / "tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{budget} {store} {direct}: {result}")
    return result


def test_peak_is_dense_plus_budget(checkpoint):
    _, total = checkpoint
    budget = 8 * (EXPERT_BYTES + 2 * ALIGNMENT)  # 15 MiB: a slot that is read into straight has two pages more
    dense = total - LAYERS * EXPERTS * EXPERT_BYTES
    small = measure(checkpoint, str(budget) + "B")
    assert small["slots"] == 8
    assert small["read"] > 100 * EXPERT_BYTES  # far more than fits has been through the slots
    # Beside them: the readers' buffers, activations, the KV cache, what the allocator keeps. Less than holding the
    # dense weights twice would take.
    allowed = dense + budget + 24 * MIB
    assert 24 * MIB < dense < small["peak"] - small["start"] < allowed < total / 4, small


@pytest.mark.heavy
def test_all_in_memory_takes_all_of_it(checkpoint):
    """The control: the same measurement sees the bytes when they are there. And the tokens are the same."""
    _, total = checkpoint
    whole = measure(checkpoint, "1.0")
    assert whole["peak"] - whole["start"] > 0.95 * total
    small = [measure(checkpoint, "8", "file", direct) for direct in ("direct", "buffered")]
    for one in small:
        assert one["tokens"] == whole["tokens"]
        assert one["peak"] - one["start"] < total / 4


SAID = """
import json, sys
import torch
torch.set_num_threads(1)
from moe.config import *
from moe.offload.memory import peak_rss_bytes
from moe.llm import LLM
from moe.params import SamplingParams

def run(folder, dtype, budget):
    batch = BatchConfig(max_sequences=2, max_tokens=64, kv_tokens=256)
    with LLM(folder, EngineConfig(dtype=dtype, offload=OffloadConfig(budget=budget), batch=batch)) as llm:
        llm.generate([list(range(1, 33)), [5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
        state = llm.engine.state()
        return {"dense": state.dense_bytes, "slots": state.slot_bytes, "kv": llm.engine.loaded.memory.kv_bytes}

folder, dtype, tiny, budget = sys.argv[1:5]
run(tiny, dtype, "1 expert")
start = peak_rss_bytes()
said = run(folder, dtype, budget)
print(json.dumps({**said, "taken": peak_rss_bytes() - start}))
"""


def in_fp8(tensors):
    """Every projection in e4m3 with a scale for each block of 128 x 128; the rest in bf16."""
    out = {}
    for key, w in tensors.items():
        out[key] = w.to(torch.bfloat16)
        if key.endswith("_proj.weight"):
            out[key] = (w * 64).to(torch.float8_e4m3fn)
            out[key + "_scale_inv"] = torch.full((-(-w.shape[0] // 128), -(-w.shape[1] // 128)), 1 / 64)
    return out


def in_bf16(tensors):
    return {key: w.to(torch.bfloat16) for key, w in tensors.items()}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KINDS = {
    "fp32 run as bf16": ("bfloat16", {}),
    "bf16 with prediction layers": ("bfloat16", {"stored": in_bf16, "predicting": 4, "dtype": "bfloat16"}),
    "fp8, dense decoded to fp32": ("float32", {"stored": in_fp8, "quantization_config": FP8}),
    "packed bf16": ("bfloat16", {"stored": in_bf16, "dtype": "bfloat16"}),
    "bf16 kept as bf12": ("bfloat16", {"stored": in_bf16, "dtype": "bfloat16"}),
}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_said_are_bytes_taken(kind, tmp_path, capsys, monkeypatch):
    """Slots, dense weights and KV as the engine says them, against the peak of the process that holds them.

    24 MiB: one dense tensor on its way, readers' buffers, activations, what the allocator keeps. 10 %: pages, and KV
    that is said whole and committed as it fills. Dense weights as they are stored (fp8), prediction layers that are
    loaded, or slots twice would each be further off. While weights load that are stored wider than computed, both
    forms of them are there (`load_dense`), before the slots are.
    """
    dtype, how = KINDS[kind]
    computed = getattr(torch, dtype)
    write_checkpoint(tmp_path / "tiny", 1, 4, 64, 16)
    folder = tmp_path / "model"
    write_checkpoint(folder, 12, 8, 512, 640, 2048, heads=64, **how)
    blueprint = read_blueprint(folder)
    if kind.startswith("packed"):
        folder = pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
        blueprint = read_blueprint(folder)
    index, is_short = blueprint.index, kind == "bf16 kept as bf12"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # figures that choose it, or none
    if is_short:
        (tmp_path / "cache/moe").mkdir(parents=True)
        save_machine(tmp_path / "cache/moe/probe.json", machine(1e-10))
        index = shortened(index)
        assert index.expert_bytes < 0.8 * blueprint.expert_bytes
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    foreseen = loaded_bytes(blueprint, blueprint.dtype, short=is_short, shortens=is_short)
    assert format_bytes(foreseen) in shown["dense weights"]
    assert format_bytes(index.expert_bytes) in shown["all experts"]
    dense = blueprint.dense_bytes_in(computed)
    loading = dense + blueprint.dense_bytes if blueprint.dtype.itemsize > computed.itemsize else dense
    for budget in (0.25, 1.0):
        done = subprocess.run(
            [sys.executable, "-c", SAID, folder, dtype, tmp_path / "tiny", str(budget)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        one = json.loads(done.stdout.splitlines()[-1])
        said = max(one["dense"] + one["slots"] + one["kv"], loading)
        print(f"{kind}, {budget}: {one}, {said=}, {loading=}")
        assert one["dense"] == pytest.approx(foreseen if is_short else dense, rel=0.01)
        assert one["slots"] == pytest.approx(budget * index.expert_bytes, rel=0.01)
        assert abs(one["taken"] - said) < 0.1 * said + 24 * MIB, (one, said)
