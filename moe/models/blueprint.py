"""What is known of a model from its folder before any weight is read: config, skeleton, experts and where they lie."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled

from moe.models import fields
from moe.models.families import FoundExperts, find_experts
from moe.models.generation import GenerationDefaults, read_generation
from moe.models.on_meta import on_meta, without_values
from moe.models.towers import beside_the_text, hollow
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.config import read_quantisation
from moe.offload.formats.find import Found, find_matrices
from moe.offload.index import index_experts
from moe.offload.segments import ExpertIndex

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """What is known of a model from its folder without reading weights."""

    folder: Path
    config: Any
    skeleton: Any  # the whole transformers model on the meta device
    checkpoint: Checkpoint
    experts: tuple[FoundExperts, ...]
    absent: tuple[type[nn.Module], ...]  # classes of the skeleton that text does not reach; they are not loaded
    index: ExpertIndex
    quantised: Found  # weights, experts and dense ones, that consist of several tensors
    generation: GenerationDefaults

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and dense weights, if nobody says another: as the config declares, else as they are stored."""
        declared = getattr(self.config, "dtype", None)
        if isinstance(declared, str):
            declared = getattr(torch, declared, None)
        if isinstance(declared, torch.dtype) and declared in COMPUTE_DTYPES:
            return declared
        stored = {info.dtype for info in self.checkpoint.tensors.values()} & set(COMPUTE_DTYPES)
        return next(iter(stored)) if len(stored) == 1 else torch.float32

    @property
    def dense_bytes(self) -> int:
        return self.dense_bytes_in(self.dtype)

    def dense_bytes_in(self, dtype: torch.dtype) -> int:
        """Memory that the weights outside of the slots take when computing in `dtype`, however they are stored."""
        inside = tuple(f"{site.module}." for site in self.index.sites)
        wide = [*(getattr(self.skeleton, "_keep_in_fp32_modules_strict", None) or ())]
        wide += (getattr(self.skeleton, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
        total = 0
        for name, tensor in (*self.skeleton.named_parameters(), *self.skeleton.named_buffers()):
            if not name.startswith(inside):
                is_wide = not tensor.is_floating_point() or any(part in name.split(".") for part in wide)
                total += tensor.numel() * (tensor.itemsize if is_wide else dtype.itemsize)
        return total

    @property
    def coded_dense(self) -> list[str]:
        """The quantised weights that are no experts'."""
        keys = self.index.expert_keys
        return [name for name, matrix in self.quantised.matrices.items() if keys.isdisjoint(matrix.keys)]

    @property
    def expert_formats(self) -> str:
        """How the experts are stored: "bfloat16", or the published formats."""
        names = set(self.quantised.matrices) - set(self.coded_dense)
        every = {f for layout in self.index.layouts for f in (layout.gate_up_format, layout.down_format)}
        plain = sorted({str(layout) for layout in every if layout.code is None})
        packed = {f"{layout}" for layout in every if layout.code is not None} if self.index.is_packed else set()
        return ", ".join(filter(None, (self.quantised.labels(names), *plain, *sorted(packed))))

    def format_note(self, dense_handling: str) -> str | None:
        """What a user of quantised weights should know; None where none are. dense_handling: "decoded" or "packed"."""
        if not self.quantised.matrices and not any(x.gate_up_format.code for x in self.index.layouts):
            return None
        dense = self.quantised.labels(self.coded_dense)
        note = f"experts stay as stored ({self.expert_formats})"
        how = "decoded at load" if dense_handling == "decoded" else "packed where they are plain linear layers"
        note += f", dense ones are {how} ({dense})" if dense else ""
        if self.quantised.activations:
            note += f"; activations stay whole, where GPU engines round them to {self.quantised.activations}"
        return note

    @property
    def expert_bytes(self) -> int:
        """Of all experts as they lie in slots, padding included."""
        return self.index.expert_bytes

    @property
    def num_experts(self) -> int:
        return sum(site.num_experts for site in self.index.sites)

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        if not self.experts:
            return 0
        return fields.top_k(self.config.get_text_config())

    @property
    def max_context(self) -> int | None:
        """Tokens the positions allow; None where the architecture sets no limit."""
        return fields.max_context(self.config.get_text_config())


def read_blueprint(folder: str | Path, *, trust_remote_code: bool = False) -> Blueprint:
    """Reads config and safetensors headers. Raises ValueError for a folder that is no such checkpoint.

    trust_remote_code: whether Python code that the folder brings may run; without it, none does and nobody is asked.
    Costs the construction of the model on the meta device: no memory for weights.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.open(folder)
    skeleton = read_skeleton(folder, trust_remote_code=trust_remote_code)
    absent = beside_the_text(skeleton)
    for name in absent:
        hollow(skeleton.get_submodule(name))
    experts = tuple(find_experts(skeleton))
    _check_top_k(folder, experts, skeleton.config)
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
        config=skeleton.config,  # of a composite config the part that this architecture takes
        skeleton=skeleton,
        checkpoint=checkpoint,
        experts=experts,
        absent=tuple(absent.values()),
        index=index,
        quantised=quantised,
        generation=read_generation(folder, skeleton.config),
    )


def _check_top_k(folder: Path, experts: Sequence[FoundExperts], config: Any) -> None:
    if not experts:
        return
    top_k, most = fields.top_k(config.get_text_config()), max(found.site.num_experts for found in experts)
    if not 1 <= top_k <= most:
        raise ValueError(
            f"{folder}/config.json: a token takes {top_k} experts, layers have {most}; it must be 1 to {most}"
        )


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        said = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: transformers cannot read it: it is not valid JSON: {error}") from None
    known = isinstance(said, dict) and said.get("model_type") in CONFIG_MAPPING
    if isinstance(said, dict) and "auto_map" in said and not known and not trust_remote_code:
        raise ValueError(
            f"{path}: model_type {said.get('model_type')!r} is not one of transformers {transformers.__version__}, and "
            "the code that the folder brings for it is not run; set trust_remote_code=true if you trust its authors, "
            "or change model_type to the architecture that it follows"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code and not known)
    except Exception as error:  # of any kind: the values in the file go through each architecture's own code
        raise ValueError(f"{path}: transformers cannot read it: {first_line(error)}") from error


def read_skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The whole transformers model on the meta device. Raises ValueError for a folder that describes none."""
    config = _read_config(folder, trust_remote_code)
    for name in fields.SIZES:
        size = getattr(config.get_text_config(), name, None)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{folder}/config.json: {name} ({size}) must be >= 1")
    _without_quantisation(config)
    auto = _auto_class(config, trust_remote_code)
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    if auto is None:
        raise ValueError(
            f"{folder}: architecture {name} is no text generation model that transformers {transformers.__version__} "
            "knows"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "a DeepSpeed ZeRO-3 configuration (HfDeepSpeedConfig) is alive in this process, and transformers gives its "
            "parts to every model that is built meanwhile; build the LLM before it, or in another process"
        )
    try:
        with on_meta():
            skeleton = auto.from_config(config, trust_remote_code=trust_remote_code)
        without_values(skeleton)
    except Exception as error:  # of any kind: sizes that do not fit each other fail in each architecture's own code
        raise ValueError(
            f"{folder}: transformers cannot build {name} as config.json describes it: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    steps = type(skeleton).forward is not nn.Module.forward
    if not steps or (not trust_remote_code and not isinstance(skeleton, GenerationMixin)):
        raise ValueError(f"{folder}: {name} generates by a method of its own, not one token after another: not served")
    return skeleton


def _auto_class(config: Any, trust_remote_code: bool) -> Any:
    """The auto class that generates text with this architecture; None if there is none."""
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else None


def _without_quantisation(config: Any) -> None:
    """Takes it out of the config, so that transformers builds plain layers: the tensors say what they are."""
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1] or [type(error).__name__])[:300]
