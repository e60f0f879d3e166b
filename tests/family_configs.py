"""Tiny configurations of every model family that is tested.

Sizes are odd where the configuration allows it, K >= 3 where the family allows it (two-term sums hide their order).
"""

from typing import Any

VOCAB_SIZE = 97

_ATTENTION: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,  # a random model must not stop by accident
}
_LATENT_ATTENTION: dict[str, Any] = _ATTENTION | {
    "num_key_value_heads": 6,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}

# family: (transformers config class, model class, configuration)
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _ATTENTION | {"intermediate_size": 29, "num_local_experts": 7, "num_experts_per_tok": 3},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _ATTENTION
        | {
            "intermediate_size": 40,
            "moe_intermediate_size": 19,
            "shared_expert_intermediate_size": 22,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,  # layers 0 and 2 are dense
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _ATTENTION
        | {
            "head_dim": 8,
            "intermediate_size": 40,
            "moe_intermediate_size": 17,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        _ATTENTION | {"intermediate_size": 21, "num_experts": 8, "num_experts_per_tok": 4},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _LATENT_ATTENTION
        | {
            "intermediate_size": 40,
            "moe_intermediate_size": 15,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.3,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _LATENT_ATTENTION
        | {
            "intermediate_size": 40,
            "moe_intermediate_size": 15,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _ATTENTION
        | {
            "head_dim": 8,
            "intermediate_size": 23,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "sliding_window": 16,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        # sparsemixer picks exactly two experts per token
        _ATTENTION | {"intermediate_size": 25, "num_local_experts": 7, "num_experts_per_tok": 2},
    ),
    "phimoe_longrope": (  # as Phi-3.5-MoE is published; of four prompts one is beyond the switch, one crosses it
        "PhimoeConfig",
        "PhimoeForCausalLM",
        _ATTENTION
        | {
            "intermediate_size": 25,
            "num_local_experts": 7,
            "num_experts_per_tok": 2,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 24,
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [2.0, 4.0, 8.0],
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "factor": 8.0,
            },
        },
    ),
    "mixtral_dynamic": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _ATTENTION
        | {
            "intermediate_size": 29,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "head_dim": 6,
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        _ATTENTION
        | {
            "intermediate_size": 27,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        _ATTENTION
        | {
            "head_dim": 8,
            "intermediate_size": 40,
            "moe_intermediate_size": 13,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        _ATTENTION
        | {
            "intermediate_size": 40,
            "moe_intermediate_size": 11,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        _ATTENTION
        | {
            "head_dim": 8,
            "intermediate_size": 27,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        _ATTENTION
        | {
            "num_hidden_layers": 4,
            "intermediate_size": 31,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _ATTENTION
        | {
            "head_dim": 8,
            "intermediate_size": 21,
            "intermediate_size_mlp": 40,
            "num_hidden_layers": 4,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "pad_token_id": 0,
        },
    ),
    "dbrx": (
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 36,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 3, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 36, "ffn_hidden_size": 22, "moe_num_experts": 6, "moe_top_k": 3},
        },
    ),
    "switch_transformers": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 36,
            "d_kv": 6,
            "d_ff": 26,
            "num_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_decoder_layers": 4,
            "num_sparse_decoder_layers": 2,
            "num_heads": 6,
            "num_experts": 6,
            "expert_capacity": 64,
            "router_jitter_noise": 0.0,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "nllb_moe": (
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 36,
            "encoder_layers": 2,
            "encoder_ffn_dim": 26,
            "encoder_attention_heads": 6,
            "decoder_layers": 2,
            "decoder_ffn_dim": 22,
            "decoder_attention_heads": 6,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "expert_capacity": 64,
            "dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "moe_token_dropout": 0.0,
            "max_position_embeddings": 256,
        },
    ),
}
