"""Every Mixture-of-Experts architecture of the installed transformers, and a tiny random model of each.

The list is found, not written: the model types that transformers maps to a model that generates text and whose
modelling file has experts, or whose configuration says how many a token takes. A tiny configuration is the class's
own with small sizes in place of the large ones that it has by name; what a class needs besides stands in `_OWN`.
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name

from moe.models.blueprint import read_blueprint
from moe.models.families import why_resident
from moe.models.fields import TOP_K
from moe.models.neighbours import why_not_packed
from tests import families
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Said, reference_says, relative_error

VOCAB_SIZE = families.VOCAB_SIZE
# Those of tests/families.py that a class's own configuration made small does not reach.
WRITTEN = ("dbrx", "jamba", "nllb_moe", "switch_transformers")
_HAS_EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(|^class \w*TopKGating\(", re.MULTILINE)
MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
# Refused, and what the sentence says.
REFUSED = dict.fromkeys(("diffusion_gemma", "qwen3_omni_moe"), "generates by a method of its own")


class Architecture(NamedTuple):
    model_type: str
    model_class: type[PreTrainedModel]


@cache
def architectures() -> dict[str, Architecture]:
    """By model type, in alphabetical order."""
    folder = Path(transformers.__path__[0]) / "models"
    with_experts = {
        path.parent.name for path in folder.glob("*/modeling_*.py") if _HAS_EXPERTS.search(path.read_text())
    }
    found = {}
    for model_type in sorted(CONFIG_MAPPING):
        config_class = CONFIG_MAPPING[model_type]
        mapping = next((m for m in MAPPINGS if config_class in m), None)
        if mapping is None:
            continue
        is_found = model_type_to_module_name(model_type) in with_experts or names_experts(config_class)
        if is_found or _wraps_experts(config_class, with_experts):
            model_class = mapping[config_class]
            found[model_type] = Architecture(
                model_type, model_class[0] if isinstance(model_class, tuple) else model_class
            )
    return found


def _wraps_experts(config_class: type[PreTrainedConfig], with_experts: set[str]) -> bool:
    """Whether the language model that it holds by default is another architecture's, with experts."""
    if "text_config" not in config_class.sub_configs:
        return False
    try:
        text = config_class().get_text_config()
    except StrictDataclassError:  # one that has no defaults of its own holds no other's
        return False
    return model_type_to_module_name(text.model_type) in with_experts or names_experts(text)


def names_experts(config: PreTrainedConfig | type[PreTrainedConfig]) -> bool:
    return any(hasattr(config, name) for name in TOP_K)


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
    """Written by hand where `tests/families.py` has it, else derived from the class's own."""
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


@torch.no_grad()
def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, fp32; the same for the same seed."""
    model_class = architectures()[model_type].model_class
    config = tiny_config(model_type)
    text = type(config).sub_configs.get("text_config") if hasattr(type(config), "sub_configs") else None
    if text is not None and getattr(model_class, "config_class", None) is text:
        config = config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        families.randomise(model)
    return model.eval()


@torch.no_grad()
def rounding_bound(model: PreTrainedModel, said: Said) -> float:
    """What a rounding of every weight does to the logits, times two: random recurrent models are ill-conditioned."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    return max(FP32_BOUND, 2 * relative_error(reference_says(model, PROMPTS), said))


def reference(model_type: str, folder: Path) -> PreTrainedModel:
    """What transformers makes of the folder, with eager experts where it can."""
    model_class = architectures()[model_type].model_class
    try:
        return model_class.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    except (ValueError, TypeError):
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def table() -> str:
    """docs/architectures.md: how each architecture is served, asked of the engine's own rules."""
    lines = [
        "# Architectures",
        "",
        f"Every Mixture-of-Experts architecture that transformers {transformers.__version__} maps to a model of text;",
        "written by `python -m tests.architectures`. Each is compared with transformers' own tokens and logits in",
        "`tests/moe/test_architectures.py`: alone, together, in chunks, with all experts in memory and with one slot;",
        "or it is refused in a sentence that is tested there.",
        "",
        "| architecture | experts | sequences |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {name} | {_how_served(name)} |" for name in architectures())]) + "\n"


def _how_served(name: str) -> str:
    if name in REFUSED:
        return f"refused: {REFUSED[name]} | -"
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(name).save_pretrained(folder)
        blueprint = read_blueprint(folder)
    experts = "in slots" if blueprint.experts else f"resident: {why_resident(blueprint.skeleton)}"
    reason = why_not_packed(blueprint.skeleton, blueprint.max_context)
    return f"{experts} | {'packed' if reason is None else f'one at a time: {reason}'}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    (Path(__file__).resolve().parent.parent / "docs" / "architectures.md").write_text(table())
