"""What is known of a model from its folder before any weight is read: config, skeleton, experts and where they lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.conversion_mapping import get_model_conversion_mapping

from moe.models.families import FoundExperts, find_experts
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.config import read_quantisation
from moe.offload.formats.find import Found, find_matrices
from moe.offload.index import index_experts
from moe.offload.segments import ExpertIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """What is known of a model from its folder without reading weights."""

    folder: Path
    config: Any
    skeleton: Any  # the whole transformers model on the meta device
    checkpoint: Checkpoint
    experts: tuple[FoundExperts, ...]
    index: ExpertIndex
    quantised: Found  # weights, experts and dense ones, that consist of several tensors

    @property
    def dense_bytes(self) -> int:
        tensors = self.checkpoint.tensors
        return sum(info.nbytes for key, info in tensors.items() if key not in self.index.expert_keys)

    @property
    def expert_bytes(self) -> int:
        """Of all experts as they lie in slots, padding included."""
        return sum(s.num_experts * b.nbytes for s, b in zip(self.index.sites, self.index.layouts))

    @property
    def num_experts(self) -> int:
        return sum(site.num_experts for site in self.index.sites)

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        if not self.experts:
            return 0
        text = self.config.get_text_config()
        for name in ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"):
            if isinstance(getattr(text, name, None), int):
                return int(getattr(text, name))
        ffn = getattr(text, "ffn_config", None)
        return int(getattr(ffn, "moe_top_k", 1)) if ffn is not None else 1

    @property
    def max_context(self) -> int | None:
        """Tokens the positions allow; None where the architecture sets no limit."""
        text = self.config.get_text_config()
        for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
            if isinstance(getattr(text, name, None), int):
                return int(getattr(text, name))
        return None


def read_blueprint(folder: str | Path) -> Blueprint:
    """Reads config and safetensors headers. Raises ValueError for a folder that is no such checkpoint.

    Costs the construction of the model on the meta device: no memory for weights.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.open(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of any kind: the values in the file go through each architecture's own code
        raise ValueError(f"{folder / 'config.json'}: transformers cannot read it: {first_line(error)}") from error
    _without_quantisation(config)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            skeleton = auto.from_config(config)
    except Exception as error:
        raise ValueError(
            f"{folder}: architecture {getattr(config, 'architectures', None) or config.model_type} is no text "
            f"generation model that this transformers version knows: {first_line(error)}"
        ) from error
    experts = tuple(find_experts(skeleton))
    quantised = find_matrices(checkpoint.tensors, read_quantisation(folder))
    index = index_experts(
        checkpoint,
        [e.site for e in experts],
        get_model_conversion_mapping(skeleton),
        skeleton.base_model_prefix,
        quantised,
    )
    return Blueprint(
        folder=folder,
        config=config,
        skeleton=skeleton,
        checkpoint=checkpoint,
        experts=experts,
        index=index,
        quantised=quantised,
    )


def _without_quantisation(config: Any) -> None:
    """Takes it out of the config, so that transformers builds plain layers: the tensors say what they are."""
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1] or [type(error).__name__])[:300]
