"""Every Mixture-of-Experts architecture of the installed transformers, and a tiny random model of each.

The list is found, not written: the model types whose modelling file has experts and that transformers maps to a model
that generates text. A tiny configuration is the class's own with small sizes in place of the large ones that it has by
name; what a class needs besides stands in `_OWN`.
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name

from moe.models.blueprint import read_blueprint
from moe.models.neighbours import why_not_packed
from tests.families import FAMILIES
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Said, reference_says, relative_error

VOCAB_SIZE = 97
_HAS_EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(|^class \w*TopKGating\(", re.MULTILINE)
_MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
# Wrappers whose experts are those of another architecture that they hold by default.
_WRAPPERS = ("kimi_k25",)


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
        if model_type_to_module_name(model_type) not in with_experts and model_type not in _WRAPPERS:
            continue
        config_class = CONFIG_MAPPING[model_type]
        mapping = next((m for m in _MAPPINGS if config_class in m), None)
        if mapping is not None:
            model_class = mapping[config_class]
            found[model_type] = Architecture(
                model_type, model_class[0] if isinstance(model_class, tuple) else model_class
            )
    return found


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
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
    "dots1": {"n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# Of these a tiny configuration takes more than sizes, and nobody has written it yet; they are not tested here.
UNTESTED = (
    "bailing_hybrid",
    "dbrx",
    "deepseek_ocr2",
    "diffusion_gemma",
    "dots3_note",
    "dots3_note_text",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "glm5_next",
    "hy_v4_vl",
    "inkling2",
    "inkling2_text",
    "inkling2_loop",
    "inkling2_loop_text",
    "inkling_mm_model",
    "jamba",
    "lfm2_moe",
    "mistral4",
    "muse_spark",
    "nllb-moe",
    "qwen3_omni_moe_thinker",
    "qwen4_exp",
    "qwen4_exp_text",
    "step3p7",
    "switch_transformers",
    "unlimited_ocr",
)


def tiny_config(model_type: str) -> PreTrainedConfig:
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
        for name, tensor in model.state_dict().items():
            if (
                not tensor.is_floating_point()
                or "mamba" in name
                or name.endswith(("slope_rate", "_decay", "A_log", "dt_bias"))
            ):
                continue  # a recurrence with random decay grows beyond fp32
            if tensor.ndim >= 2:  # 1.5 / sqrt(fan in): activations neither die nor blow up
                tensor.normal_(std=1.5 / tensor.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                tensor.normal_(std=0.2)
            else:  # the scale of a norm, an attention sink
                tensor.add_(0.2 * torch.randn_like(tensor))
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
        "written by `python -m tests.architectures`. Each is compared with transformers' own greedy tokens, with all",
        "experts in memory and with one slot, in `tests/moe/test_architectures.py`, or in `tests/moe/test_exact.py`",
        "where the last column says so.",
        "",
        "| architecture | experts | sequences | tested |",
        "|---|---|---|---|",
    ]
    for name in architectures():
        if name in UNTESTED:
            known = name.replace("-", "_") in FAMILIES
            lines.append(f"| {name} | | | {'test_exact.py' if known else 'no'} |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(name).save_pretrained(folder)
            blueprint = read_blueprint(folder)
        reason = why_not_packed(blueprint.skeleton, blueprint.max_context)
        experts = "in slots" if blueprint.experts else "resident"
        lines.append(f"| {name} | {experts} | {'packed' if reason is None else f'one at a time: {reason}'} | yes |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    (Path(__file__).resolve().parent.parent / "docs" / "architectures.md").write_text(table())
