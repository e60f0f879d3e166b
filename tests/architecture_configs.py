"""A tiny configuration of every Mixture-of-Experts architecture of the installed transformers.

The class's own with small sizes in place of the large ones that it has by name; what a class needs besides stands in
`_OWN`, and what small sizes do not reach is written by hand in `tests/family_configs.py`.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests import families
from tests.family_configs import VOCAB_SIZE

# Those of tests/family_configs.py that a class's own configuration made small does not reach.
WRITTEN = ("dbrx", "jamba", "nllb_moe", "switch_transformers")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "audio_hidden_size": 36,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 40,
    "text_hidden_size": 36,
    "out_hidden_size": 36,
    "intermediate_size_mlp": 40,
    "moe_intermediate_size": 20,
    "expert_intermediate_size": 20,
    "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 14,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_expert_group": 2,
    "num_experts_per_token": 3,
    "model_max_length": 256,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "top_k_experts": 3,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id", "audio_token_id")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")

_INDEXER = {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}
_TOWER = {"depth": 1, "hidden_size": 24, "num_heads": 2, "intermediate_size": 24}
_INKLING2 = {
    "unpadded_vocab_size": 93,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 3,
    "swa_head_dim": 8,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 24,
    "log_scaling_n_floor": 8,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "n_layers_per_attn_res_block": 2,
}
# What a class needs besides small sizes; a text configuration's stands under its own model type.
_OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 9,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "longcat_flash": {"ffn_hidden_size": 40, "expert_ffn_hidden_size": 20, "zero_expert_num": 2},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "deepseek_ocr2_text": {"num_experts_per_tok": 3, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "dots3_note_text": {
        "layer_types": ["indexed_attention"] * 2 + ["sliding_attention"] * 2,
        "per_layer_config": {
            n: {"num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 12, "head_dim": 10}
            for n in ("2", "3")
        },
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "shared_experts_intermediate_size": 12,
        **_INDEXER,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 36,
        "adapter_out_dim": 36,
        "num_attention_heads": 3,
        "mlp_layer_types": ["dense"] * 4,
        "per_layer_config": {},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 36, "adapter_out_dim": 36, "downsample_hidden_size": 8},
    "ernie4_5_vl_moe_text": {
        "head_dim": 8,
        "moe_intermediate_size": [20, 12],
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "ernie4_5_vl_moe_vision": _TOWER,
    "glm4v_moe_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
    },
    "glm4v_moe_vision": _TOWER,
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "index_kpool": 4,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_types": ["full"] * 4,
        **_INDEXER,
    },
    "glm5_next_vision": _TOWER | {"projection_intermediate_size": 24},
    "hy_v4_vl_text": {
        "qk_rope_head_dim": 6,
        "head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]},
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "indexer_types": ["full", "full", "shared", "full"],
        **_INDEXER,
    },
    "hy_v4_vl_vision": {"num_hidden_layers": 1, "max_image_size": 64},
    "inkling_vision": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "patch_size": 8},
    "inkling2_text": _INKLING2,
    "inkling2_vision": {"num_hidden_layers": 1, "projection_hidden_dim": 24, "num_attention_heads": 3},
    "inkling2_loop_text": _INKLING2
    | {"loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_num_passes": 2, "loop_gate_rank": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mistral4": {
        "head_dim": 10,
        "rope_parameters": {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "muse_spark": {"out_hidden_size": 24, "projector_hidden_size": 24},
    "muse_spark_text": {
        "moe_hidden_size": 28,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "layer_rope_theta": [10000.0, 0, 10000.0, 0],
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "muse_spark_vision": {"num_hidden_layers": 1, "num_attention_heads": 3, "layer_types": None},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 0},
    "qwen3_omni_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "head_dim": 8,
    },
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_vision_encoder": _TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_omni_moe_audio_encoder": {
        "d_model": 24,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "output_dim": 36,
        "downsample_hidden_size": 8,
        "num_mel_bins": 16,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "eos_token_id": 96,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "qwen4_exp_vision": _TOWER | {"num_position_embeddings": 16},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "sliding_window": 16,
        "share_expert_dim": 12,
        "num_sliding_attention_heads": 6,
    },
    "radio": {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "video_temporal_patch_size": 2},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 6, "head_dim": 6},
    "nemotron3_diarization_audio": {"num_key_value_heads": 6, "head_dim": 6},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 0, "num_key_value_heads": 6, "head_dim": 6},
    "nemotron_h_omni": {"vision_hidden_size": 24, "projector_hidden_size": 24},
    "step3p5_vision": {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "image_size": 28},
    "unlimited_ocr_text": {"num_key_value_heads": 6},  # its eager attention knows no groups of heads
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Written by hand where `tests/family_configs.py` has it, else derived from the class's own."""
    if (family := model_type.replace("-", "_")) in WRITTEN:
        return families.tiny_config(family)
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_tiny_options(config_class(), _OWN.get(model_type, {})))


def _tiny_options(default: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    said = default.to_dict()
    unsaid = (
        "num_experts_per_tok",
        "top_k_experts",
        "num_experts",
        "n_routed_experts",
        "moe_intermediate_size",
        "head_dim",
    )
    options = {
        name: size
        for name, size in _SIZES.items()
        if isinstance(said.get(name), int) or (name in unsaid and name in said and said[name] is None)
    }
    options |= {name: None for name in _IDS[:2] if name in said}
    options |= {name: 0 for name in _IDS[2:] if name in said}
    if "kv_lora_rank" in said:
        options |= {"num_key_value_heads": 6, "head_dim": 4}
    layers = options.get("num_hidden_layers", 0)
    for name in _PER_LAYER:
        kinds = said.get(name)
        if isinstance(kinds, list) and layers:
            distinct = list(dict.fromkeys(kinds))
            options[name] = [
                distinct[n * len(distinct) // layers] if len(distinct) > layers else distinct[n % len(distinct)]
                for n in range(layers)
            ]
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            part_own = _OWN.get(part.model_type, {})
            options[name] = type(part)(**_tiny_options(part, part_own)).to_dict()
    return options | own
