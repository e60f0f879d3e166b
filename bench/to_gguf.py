"""A Qwen3-MoE folder as a GGUF file without a vocabulary, as llama.cpp reads it: `python to_gguf.py FOLDER OUT KIND`.

KIND: bf16, f16, q8_0 or q4_0. Runs in llama.cpp's environment (gguf and numpy; safetensors is read by hand).
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

KINDS = {k: gguf.GGMLQuantizationType[k.upper()] for k in ("bf16", "f16", "q8_0", "q4_0")}
F32 = gguf.GGMLQuantizationType.F32
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
Array = np.ndarray


class Tensors:
    """bf16 tensors of a folder of safetensors files, as float32 arrays."""

    def __init__(self, folder: Path) -> None:
        self._at: dict[str, tuple[Path, int, list[int]]] = {}
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
            for name, info in header.items():
                if name != "__metadata__":
                    assert info["dtype"] == "BF16", f"{name} is {info['dtype']}"
                    self._at[name] = (file, 8 + size + info["data_offsets"][0], info["shape"])

    def __getitem__(self, name: str) -> Array:
        file, offset, shape = self._at[name]
        raw = np.fromfile(file, np.uint16, int(np.prod(shape)), offset=offset).astype(np.uint32)
        return (raw << 16).view(np.float32).reshape(shape)


def plan(config: dict, tensors: Tensors, kind: gguf.GGMLQuantizationType) -> Iterator[tuple[str, Callable, object]]:
    def one(name: str) -> Callable[[], Array]:
        return lambda: tensors[name]

    def experts(prefix: str, name: str) -> Callable[[], Array]:
        return lambda: np.stack([tensors[f"{prefix}{e}.{name}.weight"] for e in range(config["num_experts"])])

    yield "token_embd.weight", one("model.embed_tokens.weight"), kind
    yield "output_norm.weight", one("model.norm.weight"), F32
    yield "output.weight", one("lm_head.weight"), kind
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        yield f"{target}attn_norm.weight", one(f"{source}input_layernorm.weight"), F32
        yield f"{target}ffn_norm.weight", one(f"{source}post_attention_layernorm.weight"), F32
        for ours, theirs in ATTENTION.items():
            yield f"{target}{ours}.weight", one(f"{source}self_attn.{theirs}.weight"), kind
        for norm in ("q", "k"):
            yield f"{target}attn_{norm}_norm.weight", one(f"{source}self_attn.{norm}_norm.weight"), F32
        yield f"{target}ffn_gate_inp.weight", one(f"{source}mlp.gate.weight"), F32
        for ours, theirs in EXPERTS.items():
            yield f"{target}{ours}.weight", experts(f"{source}mlp.experts.", theirs), kind


def convert(folder: Path, out: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    kind = KINDS[name]
    writer = gguf.GGUFWriter(out, "qwen3moe", use_temp_file=False)
    writer.add_name("walk")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    planned = list(plan(config, Tensors(folder), kind))
    for tensor, make, stored in planned:
        shape = make().shape  # read twice rather than held: the model may be larger than memory
        if stored == F32:
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
        else:
            as_bytes = gguf.quant_shape_to_byte_shape(shape, stored)
            writer.add_tensor_info(tensor, as_bytes, np.dtype(np.uint8), int(np.prod(as_bytes)), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make, stored in planned:
        data = make() if stored == F32 else gguf.quants.quantize(make(), stored)
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
