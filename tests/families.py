"""Tiny random checkpoints of every model family that is tested, written by transformers itself.

Weights are scaled so that hidden states keep their size and routing spreads over the experts. With such odd sizes
transformers' default `grouped_mm` refuses to run (strides of 16 bytes): compare with `reference_model`, which is eager.
"""

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe.models.blueprint import read_blueprint
from moe.offload.layout import ExpertSite
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from tests.family_configs import CONFIGS

_DECAYS = ("slope_rate", "_decay", "A_log", "dt_bias")
FAMILIES: list[str] = list(CONFIGS)
IN_SLOTS = [family for family in FAMILIES if family != "nllb_moe"]  # it is served whole (moe/models/families.py)
# The experts of these are not reached through transformers' ExpertsInterface.
WITHOUT_INTERFACE = {"llama4", "dbrx", "switch_transformers", "nllb_moe"}
ENCODER_DECODER = {"switch_transformers", "nllb_moe"}


def tiny_config(family: str) -> PreTrainedConfig:
    name, _, options = CONFIGS[family]
    return getattr(transformers, name)(**options)


def model_class(family: str) -> type[PreTrainedModel]:
    return getattr(transformers, CONFIGS[family][1])


@torch.no_grad()
def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` in eval mode; the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(family)(tiny_config(family))
        randomise(model)
    return model.to(dtype).eval()


def randomise(model: PreTrainedModel) -> None:
    """Draws every weight anew, so that activations neither die nor blow up and no two experts are alike."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or "mamba" in name or name.endswith(_DECAYS):
            continue  # a recurrence with random decay grows beyond fp32
        if tensor.ndim >= 2:  # 1.5 / sqrt(fan in)
            tensor.normal_(std=1.5 / tensor.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            tensor.normal_(std=0.2)
        else:  # the scale of a norm, an attention sink
            tensor.add_(0.2 * torch.randn_like(tensor))


def reference_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What transformers itself makes of the checkpoint in `folder`, every expert in memory, eager experts."""
    options = {} if family in WITHOUT_INTERFACE else {"experts_implementation": "eager"}
    return model_class(family).from_pretrained(folder, dtype=dtype, **options).eval()


def tiny_checkpoint(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB"
) -> Path:
    """Writes `tiny_model(family)` into `folder` in the family's Hugging Face format and returns `folder`."""
    tiny_model(family, dtype, seed).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def expert_sites(model: PreTrainedModel) -> list[ExpertSite]:
    """The experts modules of `model` in order of layers; the model may be on the meta device."""
    sites = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # the experts interface
            rows = module.down_proj.shape[1:]
            hidden, inner = rows[::-1] if module.is_transposed else rows
            options = {"gated": module.has_gate, "has_bias": module.has_bias, "transposed": module.is_transposed}
            count = len(module.down_proj)
        elif kind == "Llama4TextExperts":
            count, inner, hidden = module.down_proj.shape
            options = {"transposed": True}
        elif kind == "DbrxExperts":
            count, inner, hidden, options = module.num_experts, module.ffn_hidden_size, module.hidden_size, {}
        elif kind in {"SwitchTransformersExperts", "NllbMoeExperts"}:
            first = module.expert_0.wi if hasattr(module.expert_0, "wi") else module.expert_0.fc1
            count = sum(child.startswith("expert_") for child, _ in module.named_children())
            inner, hidden = first.weight.shape
            options = {"gated": False, "has_bias": first.bias is not None}
        else:
            continue
        sites.append(ExpertSite(module=name, num_experts=count, hidden_size=hidden, intermediate_size=inner, **options))
    return sites


def expert_parameters(model: PreTrainedModel, site: ExpertSite, expert: int) -> list[Tensor | None]:
    """gate_up [N, H], down [H, I], gate_up bias, down bias of one expert as transformers loaded them."""
    module = model.get_submodule(site.module)
    if hasattr(module, "mlp"):  # DBRX
        w1, v1, w2 = (w.view(site.num_experts, -1, site.hidden_size)[expert] for w in module.mlp.parameters())
        assert [n for n, _ in module.mlp.named_parameters()] == ["w1", "v1", "w2"]
        return [torch.cat([w1, v1]), w2.T, None, None]
    if hasattr(module, "expert_0"):
        one = getattr(module, f"expert_{expert}")
        up, down = (one.wi, one.wo) if hasattr(one, "wi") else (one.fc1, one.fc2)
        return [up.weight, down.weight, up.bias, down.bias]
    first = "gate_up_proj" if site.gated else "up_proj"
    matrices = [getattr(module, name)[expert] for name in (first, "down_proj")]
    biases = [getattr(module, f"{name}_bias")[expert] if site.has_bias else None for name in (first, "down_proj")]
    return [m.T if site.transposed else m for m in matrices] + biases


def nested_folder(base: Path) -> Path:
    """base/packed: two layers of six experts in nested precision, of the random model base/original."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2}
    heads = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(vocab_size=64, intermediate_size=40, **sizes, **heads)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(base / "original")
    blueprint = read_blueprint(base / "original")
    return pack(blueprint.checkpoint, blueprint.index, base / "packed", experts=target_format("nested", 32))
