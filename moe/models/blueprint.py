"""What is known of a model from its folder before any weight is read: config, skeleton, experts and where they lie."""

from dataclasses import dataclass
from math import prod
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
        """Of the dense weights in memory; quantised ones are decoded to the dtype of the configuration."""
        tensors, companions = self.checkpoint.tensors, self.quantised.companions
        plain = set(tensors) - self.index.expert_keys - companions - set(self.quantised.matrices)
        itemsize = (getattr(self.config, "dtype", None) or torch.bfloat16).itemsize
        decoded = sum(prod(self.quantised.matrices[name].shape) for name in self.coded_dense)
        return sum(tensors[key].nbytes for key in plain) + decoded * itemsize

    @property
    def coded_dense(self) -> list[str]:
        """The quantised weights that are no experts'."""
        keys = self.index.expert_keys
        return [name for name, matrix in self.quantised.matrices.items() if keys.isdisjoint(matrix.keys)]

    @property
    def expert_formats(self) -> str:
        """How the experts are stored: "bfloat16", or the published formats."""
        names = set(self.quantised.matrices) - set(self.coded_dense)
        every = {layout.gate_up_format for layout in self.index.layouts}
        plain = sorted({str(layout) for layout in every if layout.code is None})
        packed = {f"{layout}" for layout in every if layout.code is not None} if self.index.is_packed else set()
        return ", ".join(filter(None, (self.quantised.labels(names), *plain, *sorted(packed))))

    @property
    def format_note(self) -> str | None:
        """What a user of quantised weights should know; None where none are."""
        if not self.quantised.matrices and not any(x.gate_up_format.code for x in self.index.layouts):
            return None
        dense = self.quantised.labels(self.coded_dense)
        note = f"experts stay as stored ({self.expert_formats})"
        note += f", dense layers are decoded at load ({dense})" if dense else ""
        if self.quantised.activations:
            note += f"; activations stay whole, where GPU engines round them to {self.quantised.activations}"
        return note

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
    skeleton = read_skeleton(folder)
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
        config=skeleton.config,
        skeleton=skeleton,
        checkpoint=checkpoint,
        experts=experts,
        index=index,
        quantised=quantised,
    )


def read_skeleton(folder: Path) -> Any:
    """The whole transformers model on the meta device. Raises ValueError for a folder that describes none."""
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
    return skeleton


def _without_quantisation(config: Any) -> None:
    """Takes it out of the config, so that transformers builds plain layers: the tensors say what they are."""
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1] or [type(error).__name__])[:300]
