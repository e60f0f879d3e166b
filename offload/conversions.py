"""From the names in a checkpoint to experts: which stored tensors make up each parameter of each expert.

The names and conversions are transformers' own (`get_model_conversion_mapping`): its renamings are applied to the
keys, and its few expert operations (merge a list, concatenate, transpose, interleave) to strided views of the stored
tensors instead of to data. So every family that transformers converts with these operations is read in place. The
families whose experts transformers keeps in other modules (DBRX, Switch) have a line each in `_OTHER_NAMES`.
A quantised weight goes through the same names as the float it stands for, but only whole: it is merged and joined.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moe.offload.checkpoint import TensorInfo
from moe.offload.formats.stored import StoredMatrix
from moe.offload.layout import ExpertSite

Weight = TensorInfo | StoredMatrix


class View(NamedTuple):
    """A strided view of one stored tensor; `start`, `stride` in elements. A quantised matrix is only seen whole."""

    info: Weight
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def whole(info: Weight, shape: tuple[int, ...]) -> "View":
        return View(info, 0, shape, tuple(prod(shape[d + 1 :]) for d in range(len(shape))))

    def select(self, index: int) -> "View":
        if isinstance(self.info, StoredMatrix):
            return View.whole(self.info.select(index), self.size[1:])
        return View(self.info, self.start + index * self.stride[0], self.size[1:], self.stride[1:])

    def transposed(self) -> "View":
        return self._replace(size=self.size[::-1], stride=self.stride[::-1])


# One parameter of every expert: E lists of views that follow each other along the first dimension.
Stack = list[list[View]]

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
)


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


class _Found(NamedTuple):
    key: str  # in the checkpoint
    expert: int | None  # its number in the key, None for a tensor of all experts
    info: Weight


class Conversions:
    """Collects the tensors of each expert parameter.

    weights: by key, quantised ones under the name of the float they stand for; problems: names that cannot be read,
    and why. transforms, prefix: see `index_experts`.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        problems: Mapping[str, str],
        sites: Sequence[ExpertSite],
        transforms: Sequence[Any],
        prefix: str,
    ) -> None:
        self.weights, self.problems, self.sites, self.prefix = weights, problems, sites, prefix
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.layer_of = {site.module: layer for layer, site in enumerate(sites)}
        # model parameter -> source pattern ("" when only renamed) -> tensors
        self.found: dict[str, dict[str, list[_Found]]] = defaultdict(lambda: defaultdict(list))
        self.converter_of: dict[str, Any] = {}
        self.below: dict[str, list[str]] = defaultdict(list)  # module -> keys of the checkpoint below it

    def stacks(self) -> list[dict[str, Stack]]:
        """For each site, its parameters by the names transformers gives them. Raises ValueError for what is missing."""
        for key in sorted({*self.weights, *self.problems}, key=natural_key):
            self._add(key)
        return [self._site_stacks(layer, site) for layer, site in enumerate(self.sites)]

    def _add(self, key: str) -> None:
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
        if key in self.problems:
            raise ValueError(f"layer {self.layer_of[module]} ({module}): {self.problems[key]}")
        info = self.weights[key]
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
                if candidate in self.layer_of:
                    return candidate, ".".join(parts[length:])
        return None

    def _site_stacks(self, layer: int, site: ExpertSite) -> dict[str, Stack]:
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
        return stacks

    def _converted(self, layer: int, site: ExpertSite, parameter: str) -> Stack:
        """Applies the converter's operations to views of the tensors found for `parameter`."""
        where = f"layer {layer} ({site.module})"
        sources, converter = self.found[parameter], self.converter_of.get(parameter)
        if "" in sources:
            converter, sources = None, {"": sources[""]}
        is_coded = any(isinstance(f.info, StoredMatrix) for tensors in sources.values() for f in tensors)
        is_transposed = site.transposed and not parameter.endswith("_bias") and not is_coded
        expected = expected_shape(site, parameter)
        stored = expected[::-1] if is_transposed else expected
        patterns = converter.source_patterns if converter is not None else [""]
        operations = converter.operations if converter is not None else []
        if operations and "Dequantize" in type(operations[0]).__name__ and set(sources) == {patterns[0]}:
            patterns, operations = patterns[:1], operations[1:]  # no scales are stored: the weight is a plain one
        groups: dict[str, Stack] = {}
        for pattern in patterns:
            if pattern not in sources:
                raise ValueError(f"{where}: no tensor matches {pattern} for {parameter}")
            groups[pattern] = self._unmerged(layer, site, sources[pattern])
        for operation in operations:
            if is_coded and not isinstance(operation, MergeModulelist | Concatenate):
                raise ValueError(
                    f"{where}: transformers makes {parameter} with {operation}, not done to packed weights"
                )
            groups = _operated(groups, operation, stored, f"{where}: {parameter}")
        if len(groups) != 1:
            raise ValueError(f"{where}: {parameter} comes from {len(groups)} unjoined tensors")
        (stack,) = groups.values()
        _check_shapes(stack, stored, where, parameter)
        if is_transposed:
            assert all(len(views) == 1 for views in stack), parameter
            stack = [[views[0].transposed()] for views in stack]
        return stack

    def _unmerged(self, layer: int, site: ExpertSite, tensors: list[_Found]) -> Stack:
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
            whole = View.whole(found.info, found.info.shape)
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
        return [[View.whole(by_number[e].info, by_number[e].info.shape)] for e in range(site.num_experts)]

    def _other_names(self, site: ExpertSite) -> dict[str, tuple[tuple[str, ...], str, bool]] | None:
        for names in _OTHER_NAMES:
            if f"{site.module}.{names['down_proj'][0][0].replace('*', '0')}" in self.found:
                return names
        return None

    def _other_stack(
        self, layer: int, site: ExpertSite, patterns: Iterable[str], letters: str, transposed: bool
    ) -> Stack:
        stack: Stack = [[] for _ in range(site.num_experts)]
        sizes = {"E": site.num_experts, "I": site.intermediate_size, "H": site.hidden_size}
        shape = tuple(sizes[letter] for letter in letters)
        for pattern in patterns:
            for expert in range(site.num_experts):
                name = f"{site.module}.{pattern.replace('*', str(expert))}"
                if name not in self.found:
                    raise ValueError(f"layer {layer} ({site.module}): expert {expert} is missing ({name} not found)")
                (found,) = self.found[name][""]
                if isinstance(found.info, StoredMatrix):
                    raise ValueError(f"layer {layer} ({site.module}): quantised experts of this family are not read")
                if prod(found.info.shape) != prod(shape) or found.info.shape[-1:] != shape[-1:]:
                    raise ValueError(
                        f"layer {layer} ({site.module}): {found.key} has shape {list(found.info.shape)} on disk, "
                        f"the config asks for {list(shape)}"
                    )
                view = View.whole(found.info, shape)
                view = view.select(expert) if letters[0] == "E" else view
                stack[expert].append(view.transposed() if transposed else view)
        return stack


def _operated(groups: dict[str, Stack], operation: Any, stored: tuple[int, ...], what: str) -> dict[str, Stack]:
    """One of transformers' operations, on views."""
    match operation:
        case MergeModulelist(dim=0):
            return groups  # a stack is a list already
        case Concatenate(dim=1):
            return {"": [[v for views in each for v in views] for each in zip(*groups.values(), strict=True)]}
        case Transpose(dim0=1, dim1=2) | Transpose(dim0=2, dim1=1):
            if any(len(views) != 1 for stack in groups.values() for views in stack):
                raise ValueError(f"{what} is concatenated before it is transposed")
            return {
                p: [[v if operation.check_dims and v.size == stored else v.transposed()] for (v,) in stack]
                for p, stack in groups.items()
            }
        case Interleave(dim=1):
            return {p: [[_interleaved(v, operation.inverse) for v in e] for e in s] for p, s in groups.items()}
        case _:
            raise ValueError(
                f"{what}: transformers makes it with {operation}, which cannot be read expert by expert yet"
            )


def _check_shapes(stack: Stack, stored: tuple[int, ...], where: str, parameter: str) -> None:
    for expert, views in enumerate(stack):
        rest = views[0].size[-1:] if len(stored) == 2 else ()
        shape = (sum(prod(v.size) for v in views) // max(1, prod(rest)), *rest)
        if shape != stored or any(v.size[-1:] != rest for v in views if rest):
            raise ValueError(
                f"{where}: expert {expert} has {parameter.rsplit('.', 1)[1]} of shape "
                f"{list(shape)} on disk, the config asks for {list(stored)}"
            )


def expected_shape(site: ExpertSite, parameter: str) -> tuple[int, ...]:
    """Shape of one expert's parameter in the blob's orientation."""
    rows, is_down = site.intermediate_size * site.parts, ".down_proj" in parameter
    if parameter.endswith("_bias"):
        return (site.hidden_size if is_down else rows,)
    return (site.hidden_size, site.intermediate_size) if is_down else (rows, site.hidden_size)


def _interleaved(view: View, inverse: bool) -> View:
    """Rows a0 b0 a1 b1 ... become a0 a1 ... b0 b1 ... (the other way when `inverse`)."""
    rows, *rest = view.size
    step, *rest_stride = view.stride
    outer, inner = (rows // 2, 2) if inverse else (2, rows // 2)
    strides = (step, rows // 2 * step) if inverse else (step, 2 * step)
    return view._replace(size=(outer, inner, *rest), stride=(*strides, *rest_stride))
