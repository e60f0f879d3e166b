"""Folders of published sizes, right shapes and no bytes (sparse files): what is known of them is known in seconds."""

import json
import math
from pathlib import Path

import pytest

from moe.launch.cli import main
from moe.models.blueprint import read_blueprint
from moe.offload.budget import resolve_slots

SIZES = {"BF16": 2, "U8": 1, "I32": 4, "I64": 8, "F32": 4}


def write_sparse(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], shards: int) -> None:
    weight_map, names = {}, list(tensors)
    for n in range(shards):
        header, end = {}, 0
        for name in names[n::shards]:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            weight_map[name] = f"model-{n}.safetensors"
        raw = json.dumps(header).encode()
        with (folder / f"model-{n}.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def gpt_oss_20b() -> tuple[dict, dict]:
    hidden, experts, layers = 2880, 32, 24
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (201088, hidden)))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    for layer in range(layers):
        p = f"model.layers.{layer}."
        small = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        small |= {"self_attn.sinks": (64,), "mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,)}
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            small |= {f"self_attn.{name}_proj.weight": (rows, hidden), f"self_attn.{name}_proj.bias": (rows,)}
        small |= {"self_attn.o_proj.weight": (hidden, 4096), "self_attn.o_proj.bias": (hidden,)}
        for name, rows in (("gate_up", 2 * hidden), ("down", hidden)):
            e = f"{p}mlp.experts.{name}_proj"
            tensors |= {f"{e}_blocks": ("U8", (experts, rows, 90, 16)), f"{e}_scales": ("U8", (experts, rows, 90))}
            small[f"mlp.experts.{name}_proj_bias"] = (experts, rows)
        tensors |= {p + name: ("BF16", shape) for name, shape in small.items()}
    return config, tensors


def kimi_k2() -> tuple[dict, dict]:
    hidden, inter, experts, layers = 7168, 2048, 384, 61
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "moe_intermediate_size": inter,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 163840,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "type": "int"}}},
        },
    }
    tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (163840, hidden)))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    shapes = {"gate_proj": (inter, hidden), "up_proj": (inter, hidden), "down_proj": (hidden, inter)}
    for layer in range(1, layers):
        mlp = f"model.layers.{layer}.mlp."
        tensors[mlp + "gate.weight"] = ("BF16", (experts, hidden))
        for expert in range(experts):
            for name, (n, k) in shapes.items():
                e = f"{mlp}experts.{expert}.{name}.weight_"
                tensors |= {e + "packed": ("I32", (n, k // 8)), e + "scale": ("BF16", (n, k // 32))}
                tensors[e + "shape"] = ("I64", (2,))
    return config, tensors


@pytest.mark.parametrize(
    ("make", "experts", "nbytes", "label"),
    [
        pytest.param(gpt_oss_20b, 768, 3 * 2880 * (1440 + 90), "MXFP4"),
        pytest.param(kimi_k2, 23040, 3 * 7168 * (1024 + 128), "int4", marks=pytest.mark.heavy),
    ],
)
def test_what_is_known_without_a_byte(make, experts, nbytes, label, tmp_path, capsys):
    config, tensors = make()
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse(tmp_path, tensors, 3)
    blueprint = read_blueprint(tmp_path)
    blob = blueprint.index.layouts[0].nbytes
    assert nbytes <= blob < nbytes * 1.01 + 4096
    assert blueprint.num_experts == experts
    slots = resolve_slots("0.25", sizes=[blob], counts=[experts], available_bytes=1 << 50)
    assert slots == experts // 4
    assert main(["info", str(tmp_path)]) == 0
    assert label in capsys.readouterr().out
