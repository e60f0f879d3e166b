"""From a checkpoint's tensors to (layer, expert): which bytes of which file make up one expert's blob.

The names and conversions are transformers' own (`get_model_conversion_mapping`): its renamings are applied to the
keys, and its few expert operations (merge a list, concatenate, transpose, interleave) to strided views of the stored
tensors instead of to data. So every family that transformers converts with these operations is read in place. The
families whose experts transformers keeps in other modules (DBRX, Switch, NLLB) have a line each in `_OTHER_NAMES`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moe.offload.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo
from moe.offload.layout import ExpertLayout, ExpertSite, Piece, ScaleFormat

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALE = "_scale_inv"
PACKED_PREFIX = "packed.experts."
_QUANTISED = re.compile(
    r"(_scale|_scale_inv|_scales|_blocks|\.scales|\.qweight|\.qzeros|_packed|\.absmax|_zero_point)$"
)


class Segment(NamedTuple):
    """A run of bytes in a file and its place in the blob.

    `size`, `stride`: the bytes, as elements, form a tensor of this view, whose contiguous copy goes to
    `blob_offset`; both None where the bytes go there as they are.
    """

    path: Path
    offset: int
    nbytes: int
    blob_offset: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertIndex:
    """Where each expert's bytes lie. Layers are numbered by their place in `sites`."""

    sites: tuple[ExpertSite, ...]
    layouts: tuple[ExpertLayout, ...]
    dtype: torch.dtype
    expert_keys: frozenset[str]  # keys of the checkpoint that belong to these experts; all others are dense
    _segments: tuple[tuple[tuple[Segment, ...], ...], ...]

    def segments(self, layer: int, expert: int) -> tuple[Segment, ...]:
        return self._segments[layer][expert]

    def files(self) -> list[Path]:
        return sorted({s.path for layer in self._segments for expert in layer for s in expert})


class _View(NamedTuple):
    """A strided view of one stored tensor; `start`, `stride` in elements."""

    info: TensorInfo
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def whole(info: TensorInfo, shape: tuple[int, ...]) -> "_View":
        return _View(info, 0, shape, tuple(prod(shape[d + 1 :]) for d in range(len(shape))))

    def select(self, index: int) -> "_View":
        return _View(self.info, self.start + index * self.stride[0], self.size[1:], self.stride[1:])

    def transposed(self) -> "_View":
        return self._replace(size=self.size[::-1], stride=self.stride[::-1])


# One parameter of every expert: E lists of views that follow each other along the first dimension.
_Stack = list[list[_View]]

# Names below a site's module where transformers keeps no fused parameter: parameter -> (patterns, shape of one tensor
# as letters, transposed). `*` is the expert's number.
_OTHER_NAMES: tuple[dict[str, tuple[tuple[str, ...], str, bool]], ...] = (
    {  # DBRX
        "gate_up_proj": (("mlp.w1", "mlp.v1"), "EIH", False),
        "down_proj": (("mlp.w2",), "EIH", True),
    },
    {  # Switch Transformers
        "up_proj": (("expert_*.wi.weight",), "IH", False),
        "down_proj": (("expert_*.wo.weight",), "HI", False),
    },
    {  # NLLB-MoE
        "up_proj": (("expert_*.fc1.weight",), "IH", False),
        "up_proj_bias": (("expert_*.fc1.bias",), "I", False),
        "down_proj": (("expert_*.fc2.weight",), "HI", False),
        "down_proj_bias": (("expert_*.fc2.bias",), "H", False),
    },
)


def index_experts(
    checkpoint: Checkpoint,
    sites: Sequence[ExpertSite],
    transforms: Sequence[Any] = (),
    base_model_prefix: str = "",
    scale_block: tuple[int, int] | None = None,
) -> ExpertIndex:
    """Finds every expert of `sites` in `checkpoint`, original or packed.

    transforms: `transformers.conversion_mapping.get_model_conversion_mapping(model)` of the model on the meta device;
    base_model_prefix: the model's own ("model"), for checkpoints saved without it. Neither is used for a packed folder.
    scale_block: rows and columns of the weights that share a scale in fp8 (e4m3) experts, stored as `*_scale_inv`
    beside them; None: weights of 16 or 32 bits.
    Raises ValueError for missing, misshapen, quantised or mixed-dtype expert tensors, naming the layer and expert.
    """
    if not sites:
        return ExpertIndex(sites=(), layouts=(), dtype=torch.float32, expert_keys=frozenset(), _segments=())
    if checkpoint.packed is not None:
        return _index_packed(checkpoint, sites, scale_block)
    return _Indexer(checkpoint, sites, transforms, base_model_prefix, scale_block).index()


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


class _Found(NamedTuple):
    key: str  # in the checkpoint
    expert: int | None  # its number in the key, None for a tensor of all experts
    info: TensorInfo


class _Indexer:
    """Collects the tensors of each expert parameter, then turns them into segments."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sites: Sequence[ExpertSite],
        transforms: Sequence[Any],
        prefix: str,
        scale_block: tuple[int, int] | None,
    ) -> None:
        self.checkpoint, self.sites = checkpoint, sites
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.prefix, self.scale_block = prefix, scale_block
        self.modules = {site.module for site in sites}
        # model parameter -> source pattern ("" when only renamed) -> tensors
        self.found: dict[str, dict[str, list[_Found]]] = defaultdict(lambda: defaultdict(list))
        self.converter_of: dict[str, Any] = {}
        self.below: dict[str, list[str]] = defaultdict(list)  # module -> keys of the checkpoint below it

    def index(self) -> ExpertIndex:
        for key in sorted(self.checkpoint.tensors, key=natural_key):
            self._add(key)
        self._refuse_quantised()
        stacks = [self._site_stacks(layer, site) for layer, site in enumerate(self.sites)]
        every = [(n, v.info, layer) for layer, site in enumerate(stacks) for n, s in site.items() for e in s for v in e]
        used = [(info, layer) for name, info, layer in every if not name.endswith(_SCALE)]
        dtypes = {info.dtype for info, _ in used}
        if self.scale_block is not None and dtypes != {torch.float8_e4m3fn}:
            raise ValueError(
                f"the config says that weights are in fp8, the experts are {', '.join(sorted(map(str, dtypes)))[:99]}; "
                "experts must all be F8_E4M3 with scales, or the config without quantization_config"
            )
        if self.scale_block is None and (len(dtypes) > 1 or not dtypes <= set(STORAGE_DTYPES)):
            bad = next((info, layer) for info, layer in used if info.dtype != used[0][0].dtype or len(dtypes) == 1)
            raise ValueError(
                f"layer {bad[1]} ({self.sites[bad[1]].module}): expert weights are stored as "
                f"{', '.join(sorted(DTYPE_NAMES[d] for d in dtypes))}; only one of F32, BF16, F16 for all experts "
                "is read: convert the checkpoint"
            )
        dtype = used[0][0].dtype
        scales = None
        if self.scale_block is not None:
            found = {info.dtype for name, info, _ in every if name.endswith(_SCALE)}
            if len(found) > 1 or not found <= set(STORAGE_DTYPES):
                names = ", ".join(sorted(DTYPE_NAMES[d] for d in found))
                raise ValueError(f"the experts' scales are stored as {names}; only one of F32, BF16, F16 is read")
            scales = ScaleFormat(self.scale_block, found.pop())
        layouts = tuple(ExpertLayout.of(site, dtype, scales) for site in self.sites)
        offsets = {(info.path, info.offset) for _, info, _ in every}
        return ExpertIndex(
            sites=tuple(self.sites),
            layouts=layouts,
            dtype=dtype,
            expert_keys=frozenset(k for k, i in self.checkpoint.tensors.items() if (i.path, i.offset) in offsets),
            _segments=tuple(
                tuple(_segments(layer, site, layout, stack, expert) for expert in range(site.num_experts))
                for layer, (site, layout, stack) in enumerate(zip(self.sites, layouts, stacks))
            ),
        )

    def _add(self, key: str) -> None:
        if self.scale_block is not None and key.endswith(_SCALE):
            return  # `_scales` finds it beside its weight; some versions' patterns would take it for the weight itself
        info = self.checkpoint.tensors[key]
        renamed = key
        for renaming in self.renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        target, pattern, converter = renamed, None, None
        for candidate in self.converters:
            target, pattern = candidate.rename_source_key(renamed)
            if pattern is not None:
                converter = candidate
                break
        place = self._place(target)
        if place is None and converter is not None:  # in the model's own form already, under a name a pattern matches
            target, pattern, converter = key, None, None
            place = self._place(target)
        if place is None:
            return
        module, name = place
        parameter = f"{module}.{name}"
        self.below[module].append(key)
        if converter is None or pattern is None:
            self.found[parameter][""].append(_Found(key, None, info))
            return
        number = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), renamed) if "*." in pattern else None
        self.found[parameter][pattern].append(_Found(key, int(number["expert"]) if number else None, info))
        self.converter_of[parameter] = converter

    def _place(self, name: str) -> tuple[str, str] | None:
        """(site's module, rest of the name), whether or not the base model's prefix is written; None if elsewhere."""
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:length])
            for candidate in (module, f"{self.prefix}.{module}", module.removeprefix(f"{self.prefix}.")):
                if candidate in self.modules:
                    return candidate, ".".join(parts[length:])
        return None

    def _refuse_quantised(self) -> None:
        for layer, site in enumerate(self.sites):
            for key in self.below[site.module]:
                dtype = self.checkpoint.tensors[key].dtype
                if self.scale_block is not None and (key.endswith(_SCALE) or dtype == torch.float8_e4m3fn):
                    continue
                if _QUANTISED.search(key) or dtype.itemsize == 1:
                    raise ValueError(
                        f"layer {layer} ({site.module}): {key} is part of a quantised expert format "
                        f"({DTYPE_NAMES[dtype]}), which is not read yet; use a BF16, F16 or F32 checkpoint"
                    )

    def _site_stacks(self, layer: int, site: ExpertSite) -> dict[str, _Stack]:
        first = "gate_up_proj" if site.gated else "up_proj"
        names = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if site.has_bias else [])]
        other = self._other_names(site)
        stacks = {}
        for name in names:
            parameter = f"{site.module}.{name}"
            if other is not None:
                stack = self._other_stack(layer, site, *other[name])
            elif parameter in self.found:
                stack = self._converted(layer, site, parameter)
            else:
                present = sorted(k.removeprefix(site.module + ".") for k in self.below[site.module])
                what = f"found only {', '.join(present[:4])}" if present else "nothing is stored under that module"
                raise ValueError(f"layer {layer}: the checkpoint has no {parameter}; {what}")
            stacks[name] = stack
        if self.scale_block is not None:
            for name in (first, "down_proj"):
                stacks[name + _SCALE] = self._scales(layer, site, f"{site.module}.{name}", is_plain=other is None)
        return stacks

    def _scales(self, layer: int, site: ExpertSite, parameter: str, *, is_plain: bool) -> _Stack:
        """The scales of the tensors found for `parameter`, joined as they are."""
        converter = self.converter_of.get(parameter)
        operations = [] if converter is None else list(converter.operations)
        if not (is_plain and all(isinstance(o, (MergeModulelist, Concatenate)) for o in operations)):
            raise ValueError(f"layer {layer} ({site.module}): experts of this family are not read in fp8")
        if site.transposed or site.has_bias:
            raise ValueError(f"layer {layer} ({site.module}): transposed or biased experts are not read in fp8")
        for pattern, tensors in self.found[parameter].items():
            for found in tensors:
                info = self.checkpoint.tensors.get(found.key + _SCALE)
                if info is None:
                    raise ValueError(f"layer {layer} ({site.module}): {found.key}{_SCALE} is missing")
                self.found[parameter + _SCALE][pattern].append(_Found(found.key + _SCALE, found.expert, info))
        if converter is not None:
            self.converter_of[parameter + _SCALE] = converter
        return self._converted(layer, site, parameter + _SCALE)

    def _converted(self, layer: int, site: ExpertSite, parameter: str) -> _Stack:
        """Applies the converter's operations to views of the tensors found for `parameter`."""
        sources, converter = self.found[parameter], self.converter_of.get(parameter)
        if "" in sources:
            converter, sources = None, {"": sources[""]}
        transposed_matrix = site.transposed and not parameter.endswith("_bias")
        expected = _expected_shape(site, parameter, self.scale_block)
        stored = expected[::-1] if transposed_matrix else expected
        groups: dict[str, _Stack] = {}
        for pattern in converter.source_patterns if converter is not None else [""]:
            if pattern not in sources:
                raise ValueError(f"layer {layer} ({site.module}): no tensor matches {pattern} for {parameter}")
            groups[pattern] = self._unmerged(layer, site, sources[pattern])
        operations = list(converter.operations) if converter is not None else []
        for operation in operations:
            match operation:
                case MergeModulelist(dim=0):
                    pass  # a stack is a list already
                case Concatenate(dim=1):
                    groups = {"": [[v for stack in groups.values() for v in stack[e]] for e in range(site.num_experts)]}
                case Transpose(dim0=1, dim1=2) | Transpose(dim0=2, dim1=1):
                    for stack in groups.values():
                        for views in stack:
                            if len(views) != 1:
                                raise ValueError(f"layer {layer}: {parameter} is concatenated before it is transposed")
                            if not (operation.check_dims and views[0].size == stored):
                                views[0] = views[0].transposed()
                case Interleave(dim=1):
                    groups = {
                        p: [[_interleaved(v, operation.inverse) for v in e] for e in s] for p, s in groups.items()
                    }
                case _:
                    raise ValueError(
                        f"layer {layer} ({site.module}): transformers makes {parameter} with {operation}, which cannot "
                        "be read expert by expert yet"
                    )
        if len(groups) != 1:
            raise ValueError(f"layer {layer} ({site.module}): {parameter} comes from {len(groups)} unjoined tensors")
        (stack,) = groups.values()
        for expert, views in enumerate(stack):
            rest = views[0].size[-1:] if len(stored) == 2 else ()
            shape = (sum(prod(v.size) for v in views) // max(1, prod(rest)), *rest)
            if shape != stored or any(v.size[-1:] != rest for v in views if rest):
                raise ValueError(
                    f"layer {layer} ({site.module}): expert {expert} has {parameter.rsplit('.', 1)[1]} of shape "
                    f"{list(shape)} on disk, the config asks for {list(stored)}"
                )
        if transposed_matrix:
            assert all(len(views) == 1 for views in stack), parameter
            stack = [[views[0].transposed()] for views in stack]
        return stack

    def _unmerged(self, layer: int, site: ExpertSite, tensors: list[_Found]) -> _Stack:
        """One view per expert, from E tensors or from one tensor of all experts."""
        if tensors[0].expert is None:
            found = tensors[0]
            if len(tensors) > 1:
                raise ValueError(f"layer {layer} ({site.module}): {tensors[0].key} and {tensors[1].key} are the same")
            if not found.info.shape or found.info.shape[0] != site.num_experts:
                raise ValueError(
                    f"layer {layer} ({site.module}): {found.key} has shape {list(found.info.shape)}, "
                    f"expected {site.num_experts} experts in the first dimension"
                )
            whole = _View.whole(found.info, found.info.shape)
            return [[whole.select(expert)] for expert in range(site.num_experts)]
        by_number = {found.expert: found for found in tensors}
        for expert in range(site.num_experts):
            if expert not in by_number:
                like = re.sub(rf"\b{tensors[0].expert}\b(?!.*\b{tensors[0].expert}\b)", str(expert), tensors[0].key)
                raise ValueError(f"layer {layer} ({site.module}): expert {expert} is missing ({like} not found)")
        if len(tensors) != site.num_experts:
            raise ValueError(
                f"layer {layer} ({site.module}): the checkpoint has {len(tensors)} experts "
                f"({tensors[-1].key}), the config says {site.num_experts}"
            )
        return [[_View.whole(by_number[e].info, by_number[e].info.shape)] for e in range(site.num_experts)]

    def _other_names(self, site: ExpertSite) -> dict[str, tuple[tuple[str, ...], str, bool]] | None:
        for names in _OTHER_NAMES:
            if f"{site.module}.{names['down_proj'][0][0].replace('*', '0')}" in self.found:
                return names
        return None

    def _other_stack(
        self, layer: int, site: ExpertSite, patterns: Iterable[str], letters: str, transposed: bool
    ) -> _Stack:
        stack: _Stack = [[] for _ in range(site.num_experts)]
        sizes = {"E": site.num_experts, "I": site.intermediate_size, "H": site.hidden_size}
        shape = tuple(sizes[letter] for letter in letters)
        for pattern in patterns:
            for expert in range(site.num_experts):
                name = f"{site.module}.{pattern.replace('*', str(expert))}"
                if name not in self.found:
                    raise ValueError(f"layer {layer} ({site.module}): expert {expert} is missing ({name} not found)")
                (found,) = self.found[name][""]
                if prod(found.info.shape) != prod(shape) or found.info.shape[-1:] != shape[-1:]:
                    raise ValueError(
                        f"layer {layer} ({site.module}): {found.key} has shape {list(found.info.shape)} on disk, "
                        f"the config asks for {list(shape)}"
                    )
                view = _View.whole(found.info, shape)
                view = view.select(expert) if letters[0] == "E" else view
                stack[expert].append(view.transposed() if transposed else view)
        return stack


def _expected_shape(site: ExpertSite, parameter: str, scale_block: tuple[int, int] | None) -> tuple[int, ...]:
    """Shape of one expert's parameter in the blob's orientation; of scales, gate's blocks stand before up's."""
    halves = 2 if site.gated else 1
    rows = site.intermediate_size * halves
    is_down = ".down_proj" in parameter
    if parameter.endswith(_SCALE):
        assert scale_block is not None
        n, k = (site.hidden_size, site.intermediate_size) if is_down else (site.intermediate_size, site.hidden_size)
        num_rows, num_columns = -(-n // scale_block[0]), -(-k // scale_block[1])
        return (num_rows, num_columns) if is_down else (halves * num_rows, num_columns)
    if parameter.endswith("_bias"):
        return (site.hidden_size if is_down else rows,)
    return (site.hidden_size, site.intermediate_size) if is_down else (rows, site.hidden_size)


def _interleaved(view: _View, inverse: bool) -> _View:
    """Rows a0 b0 a1 b1 ... become a0 a1 ... b0 b1 ... (the other way when `inverse`)."""
    rows, *rest = view.size
    step, *rest_stride = view.stride
    outer, inner = (rows // 2, 2) if inverse else (2, rows // 2)
    strides = (step, rows // 2 * step) if inverse else (step, 2 * step)
    return view._replace(size=(outer, inner, *rest), stride=(*strides, *rest_stride))


def _segments(
    layer: int, site: ExpertSite, layout: ExpertLayout, stacks: dict[str, _Stack], expert: int
) -> tuple[Segment, ...]:
    """Segments of one expert in the order of the blob."""
    first = "gate_up_proj" if site.gated else "up_proj"
    pieces: list[tuple[str, Piece | None]] = [
        (first, layout.gate_up),
        ("down_proj", layout.down),
        (f"{first}_bias", layout.gate_up_bias),
        ("down_proj_bias", layout.down_bias),
        (f"{first}{_SCALE}", layout.gate_up_scale),
        (f"down_proj{_SCALE}", layout.down_scale),
    ]
    segments = []
    for name, piece in pieces:
        if piece is None:
            continue
        scales = layout.scales if name.endswith(_SCALE) else None
        offset, itemsize = piece.offset, (layout.dtype if scales is None else scales.dtype).itemsize
        for view in stacks[name][expert]:
            contiguous = view.stride == tuple(prod(view.size[d + 1 :]) for d in range(len(view.size)))
            extent = 1 + sum((n - 1) * s for n, s in zip(view.size, view.stride))
            assert extent == prod(view.size), (layer, expert, view)  # one run of bytes, every element used once
            segment = Segment(view.info.path, view.info.offset + view.start * itemsize, extent * itemsize, offset)
            segments.append(segment if contiguous else segment._replace(size=view.size, stride=view.stride))
            offset += extent * itemsize
        assert offset - piece.offset == prod(piece.shape) * itemsize, (layer, expert, name)
    return tuple(segments)


def _index_packed(
    checkpoint: Checkpoint, sites: Sequence[ExpertSite], scale_block: tuple[int, int] | None
) -> ExpertIndex:
    assert checkpoint.packed is not None
    readable = STORAGE_DTYPES if scale_block is None else (torch.float8_e4m3fn,)
    dtype = next((d for d in readable if DTYPE_NAMES[d] == checkpoint.packed.get("dtype")), None)
    if dtype is None:
        raise ValueError(
            f"{checkpoint.folder}: packed experts of dtype {checkpoint.packed.get('dtype')!r} are not read"
        )
    scales = None
    if scale_block is not None:
        names = {DTYPE_NAMES[d]: d for d in STORAGE_DTYPES}
        name = checkpoint.packed.get("scale_dtype")
        if name not in names:
            raise ValueError(f"{checkpoint.folder}: packed scales of dtype {name!r} are not read; pack it again")
        scales = ScaleFormat(scale_block, names[name])
    layouts = tuple(ExpertLayout.of(site, dtype, scales) for site in sites)
    described = checkpoint.packed.get("layers", [])
    wanted = [describe_site(site, layout) for site, layout in zip(sites, layouts)]
    if described != wanted:
        at = next((n for n, (a, b) in enumerate(zip(described, wanted)) if a != b), min(len(described), len(wanted)))
        raise ValueError(
            f"{checkpoint.folder} was packed for {len(described)} layers of experts, the model has {len(wanted)}; "
            f"they differ from layer {at} on: pack the original checkpoint again"
        )
    segments = []
    for layer, (site, layout) in enumerate(zip(sites, layouts)):
        info = checkpoint.tensors.get(f"{PACKED_PREFIX}{layer}")
        if info is None or info.dtype != torch.uint8 or info.shape != (site.num_experts, layout.nbytes):
            raise ValueError(
                f"{checkpoint.folder}: tensor {PACKED_PREFIX}{layer} is missing or has the wrong shape, expected "
                f"uint8 [{site.num_experts}, {layout.nbytes}]; pack the original checkpoint again"
            )
        segments.append(
            tuple(
                (Segment(info.path, info.offset + expert * layout.nbytes, layout.nbytes, 0),)
                for expert in range(site.num_experts)
            )
        )
    return ExpertIndex(
        sites=tuple(sites),
        layouts=layouts,
        dtype=dtype,
        expert_keys=frozenset(f"{PACKED_PREFIX}{layer}" for layer in range(len(sites))),
        _segments=tuple(segments),
    )


def describe_site(site: ExpertSite, layout: ExpertLayout) -> dict[str, Any]:
    """What must agree between a packed file and the model that reads it."""
    pieces = [layout.gate_up, layout.down, layout.gate_up_bias, layout.down_bias]
    pieces += [] if layout.scales is None else [layout.gate_up_scale, layout.down_scale]
    return {
        "module": site.module,
        "num_experts": site.num_experts,
        "nbytes": layout.nbytes,
        "pieces": [None if p is None else [p.offset, list(p.shape)] for p in pieces],
    }
