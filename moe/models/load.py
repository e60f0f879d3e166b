"""Loads a transformers model without its experts: dense weights in memory, experts known by where they lie on disk."""

import ctypes
import re
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.utils import logging as transformers_logging

from moe.models.blueprint import Blueprint, first_line
from moe.models.dense_packed import pack_dense, packable, shorten_dense, shortenable, tied_weights
from moe.models.families import slot_class
from moe.models.on_meta import quick_meta
from moe.models.towers import CODE_OF_MODELS, absent_class, prune
from moe.offload.formats.stored import StoredMatrix
from moe.offload.short_floats import short_format

_UNTOLD = ("_scale", ".inv_freq")  # of activations and KV caches, which are not rounded here; computed, not read
_DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRIM_BYTES = 16 << 20  # so many bytes of weights are decoded between two looks at what that left in the heap


def load_dense(
    blueprint: Blueprint,
    dtype: torch.dtype,
    attention: str,
    *,
    packed: bool = False,
    short: bool = False,
    shortens: bool = False,
) -> Any:
    """The transformers model in eval mode with every weight but the experts', which its modules do not have.

    attention: a name of transformers' attention interface; packed: quantised linear layers stay as they are stored;
    short: those in bf12; shortens: those in bf16 become bf12.
    Raises ValueError if dense tensors are missing.
    Peak memory: the dense weights and one tensor; if `dtype` is narrower than the stored one, both forms of them.
    """
    wanted = dense_keys(blueprint)
    _check_stored(blueprint, wanted)
    kept = _kept(blueprint, wanted, packed, short)
    places = {matrix.name: torch.zeros((), dtype=dtype).expand(matrix.shape) for matrix in kept}  # take no memory
    dense = places | _dense_tensors(blueprint, [n for n in wanted if n not in places], dtype)
    with quiet(), quick_meta(), _patched(_replacements(blueprint)):
        model, info = type(blueprint.skeleton).from_pretrained(
            None,
            config=blueprint.config,
            state_dict=dense,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{blueprint.folder}: {len(missing)} dense tensors are missing from the checkpoint, first {missing[0]}"
        )
    if info["mismatched_keys"]:
        key, on_disk, asked = min(info["mismatched_keys"])
        raise ValueError(
            f"{blueprint.folder}: {len(info['mismatched_keys'])} dense tensors have another shape than the config "
            f"asks for, first {key}: {list(on_disk)} on disk, {list(asked)} asked for"
        )
    prune(model)
    pack_dense(model, kept)
    del dense
    if shortens:
        shorten_dense(model, blueprint)
    return_freed()
    if blueprint.generation.decoder_start_token_id is not None:
        model.generation_config.decoder_start_token_id = blueprint.generation.decoder_start_token_id
    return model.eval()


def loaded_bytes(
    blueprint: Blueprint, dtype: torch.dtype, *, packed: bool = False, short: bool = False, shortens: bool = False
) -> int:
    """What `load_dense` leaves in memory, known from headers: rows that become bf12 are taken to have few rare weights,
    as those of trained models do."""
    kept = {matrix.name: matrix.format for matrix in _kept(blueprint, dense_keys(blueprint), packed, short)}
    shapes = {f"{path}.weight": shape for path, shape in shortenable(blueprint.skeleton, blueprint).items()}
    coded = {name: (layout, blueprint.quantised.matrices[name].shape) for name, layout in kept.items()}
    for name, shape in shapes.items() if shortens and dtype == torch.bfloat16 else ():
        if name not in coded and (layout := short_format(0, shape[1])).code is not None:
            coded[name] = layout, shape
    pieces = [piece for layout, shape in coded.values() for piece in layout.pieces(1, *shape).values()]
    plain = sum(prod(shape) for _, shape in coded.values()) * dtype.itemsize
    return blueprint.dense_bytes_in(dtype) - plain + sum(piece.nbytes for piece in pieces)


def _kept(blueprint: Blueprint, names: Sequence[str], packed: bool, short: bool) -> list[StoredMatrix]:
    """The dense matrices that stay as they are stored."""
    matrices = [blueprint.quantised.matrices[name] for name in names if name in blueprint.quantised.matrices]
    matrices = [matrix for matrix in matrices if packed or (short and matrix.format.code == "bf12")]
    return [matrix for matrix in matrices if packable(blueprint.skeleton, matrix)]


def _check_stored(blueprint: Blueprint, names: Sequence[str]) -> None:
    """Raises ValueError for a dense tensor that nobody here can read."""
    found = blueprint.quantised
    for name in names:
        if name in found.problems:
            raise ValueError(f"{blueprint.folder}: {found.problems[name]}")
        stored = torch.float32 if name in found.matrices else blueprint.checkpoint.tensors[name].dtype
        if name.endswith(".weight") and stored not in _DENSE_DTYPES:
            raise ValueError(
                f"{blueprint.folder}: {name} is stored as {str(stored)[6:]}, only "
                f"{', '.join(str(d)[6:] for d in _DENSE_DTYPES)} are read; give a checkpoint that is not quantised"
            )


def _dense_tensors(blueprint: Blueprint, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensor by name, decoded. What decoding frees lies between what stays: it is given back on the way, not at the end
    (without that, half as much again was resident at times)."""
    tensors, decoded = {}, 0
    for name in names:
        tensors[name] = _widened(_load(blueprint, name, dtype), dtype)
        decoded += tensors[name].nbytes
        if decoded > _TRIM_BYTES:
            return_freed()
            decoded = 0
    return tensors


def dense_keys(blueprint: Blueprint) -> list[str]:
    """Tensors that the dense model takes: no experts, no prediction layers, nothing of other modalities.

    Names of the checkpoint, or of what its quantised tensors make up. Where some parameter has none under the names
    that transformers gives, all but the experts': then loading says what is missing.
    """
    skeleton, quantised, experts = blueprint.skeleton, blueprint.quantised, blueprint.index.expert_keys
    names = (
        (set(blueprint.checkpoint.tensors) - quantised.companions) | set(quantised.matrices) | set(quantised.problems)
    )
    names -= experts | {n for n, matrix in quantised.matrices.items() if not experts.isdisjoint(matrix.keys)}
    ignored = [re.compile(p) for p in getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()]
    inside = tuple(f"{site.module}." for site in blueprint.index.sites)
    parameters = {name for name, _ in skeleton.named_parameters() if not name.startswith(inside)}
    known = parameters | {name for name, _ in skeleton.named_buffers()} | set(tied_weights(skeleton))
    transforms = get_model_conversion_mapping(skeleton)
    targets = {name: _target(name, transforms, skeleton.base_model_prefix, known) for name in sorted(names)}
    every = [name for name, target in targets.items() if target or not any(p.search(name) for p in ignored)]
    return [name for name in every if targets[name]] if parameters <= set(targets.values()) else every


def why_untied(blueprint: Blueprint, model: Any) -> list[str]:
    """What a user should know of weights that the config makes one and the files do not. model: of `load_dense`.

    As in transformers, what is stored twice is one weight only if both are equal.
    """
    tied = tied_weights(blueprint.skeleton)
    apart = sorted(set(tied) - set(tied_weights(model)))
    return [
        f"config.json makes {name} and {tied[name]} one weight (tie_word_embeddings), the files "
        "hold two that differ: both are used as they are stored, as transformers does; set tie_word_embeddings to "
        "false if that is what was meant, or take the wrong one out of the files"
        for name in apart
    ]


def unread_keys(blueprint: Blueprint) -> list[str]:
    """Tensors of layers which the model has that it does not take: a bias, say, which the config switches off.

    Those of prediction layers and towers are none of them.
    """
    skeleton, used = blueprint.skeleton, {*dense_keys(blueprint), *blueprint.index.expert_keys}
    used |= blueprint.quantised.companions
    names = sorted(name for name in blueprint.checkpoint.tensors if name not in used and not name.endswith(_UNTOLD))
    towers = tuple(f"{name}." for name, module in skeleton.named_modules() if type(module) in blueprint.absent)
    layers = {name for name, _ in skeleton.named_modules() if name.rpartition(".")[2].isdecimal()}
    layers -= {name for name in layers if name.startswith(towers)}
    transforms = get_model_conversion_mapping(skeleton)
    ignored = [re.compile(p) for p in getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found = []
    for name in names:
        spellings = _spellings(name, transforms, skeleton.base_model_prefix)
        above = {spelling[: match.start()] for spelling in spellings for match in re.finditer(r"\.", spelling)}
        if not layers.isdisjoint(above) and not any(p.search(name) for p in ignored):
            found.append(name)
    return found


def _target(key: str, transforms: Sequence[Any], prefix: str, known: Set[str]) -> str | None:
    """The model's own name for a key of the checkpoint; None if it has none."""
    return next((name for name in _spellings(key, transforms, prefix) if name in known), None)


def _spellings(key: str, transforms: Sequence[Any], prefix: str) -> list[str]:
    """What the model may call a key of the checkpoint, likeliest first."""
    renamed = key
    for transform in transforms:
        if isinstance(transform, WeightRenaming):
            renamed, _ = transform.rename_source_key(renamed)
    names = [renamed, *(t.rename_source_key(renamed)[0] for t in transforms if isinstance(t, WeightConverter)), key]
    return [one for name in names for one in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))]


def _replacements(blueprint: Blueprint) -> dict[type[nn.Module], type[nn.Module]]:
    slots = {cls: slot_class(cls) for experts in blueprint.experts for cls in experts.replaced}
    return slots | {cls: absent_class(cls) for cls in blueprint.absent}


def _load(blueprint: Blueprint, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor `name`; if it is quantised, decoded in float32 and rounded to `dtype`."""
    matrix = blueprint.quantised.matrices.get(name)
    return blueprint.checkpoint.load(name) if matrix is None else matrix.decoded().to(dtype)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` if that loses nothing: then the model takes the tensor over as it is. Narrowing is transformers'."""
    is_wider = tensor.is_floating_point() and torch.promote_types(tensor.dtype, dtype) == dtype
    return tensor.to(dtype) if is_wider else tensor


def return_freed() -> None:
    """Gives back what decoding and casting used between the tensors that stay; glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and report: dense weights take a moment, what is wrong is said."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def _patched(mapping: dict[type[nn.Module], type[nn.Module]]) -> Iterator[None]:
    """transformers' modules know `mapping`'s values by the names of its keys, inside this block only.

    What transformers' own patch mapping does, which takes half a second a load and puts nothing back after an error.
    """
    modules = [vars(m) for n, m in list(sys.modules.items()) if n.startswith(CODE_OF_MODELS)]
    places = [
        (names, name, cls)
        for names in modules
        for name, cls in list(names.items())
        if isinstance(cls, type) and cls in mapping
    ]
    for names, name, cls in places:
        names[name] = mapping[cls]
    try:
        yield
    finally:
        for names, name, cls in places:
            names[name] = cls


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None if it has none (prompts are then token ids). Raises ValueError for a bad one.

    trust_remote_code: whether Python code of the folder's own may run; without it, none does and nobody is asked.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind: a package of the tokenizer's own may be missing
        path = folder / "tokenizer_config.json"
        if not trust_remote_code and path.is_file() and '"auto_map"' in path.read_text(errors="replace"):
            raise ValueError(
                f"{folder}: its tokenizer is code of the folder's own, which is not run; set trust_remote_code=true if "
                "you trust its authors, or add the tokenizer.json of the same model"
            ) from error
        raise ValueError(f"{folder}: transformers cannot read its tokenizer: {first_line(error)}") from error
