"""Every Mixture-of-Experts architecture of the installed transformers, and a tiny random model of each.

The list is found, not written: the model types that transformers maps to a model that generates text and whose
modelling file has experts, or whose configuration says how many a token takes. Their tiny configurations stand in
`tests/architecture_configs.py`.
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
from tests.architecture_configs import tiny_config
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Said, reference_says, relative_error

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
