"""The packed form of a checkpoint as an index: one segment an expert, and what must agree with the model."""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from moe.kernels.formats import CodeName
from moe.kernels.nested import BLOCK
from moe.offload.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.segments import ExpertIndex, Parts, Segment

PACKED_PREFIX = "packed.experts."
_NUMBERS = ("num_groups", "bits", "rare")


def describe_layer(site: ExpertSite, layout: ExpertLayout) -> dict[str, Any]:
    """What must agree between a packed file and the model that reads it."""
    return {
        "module": site.module,
        "num_experts": site.num_experts,
        "nbytes": layout.nbytes,
        "formats": [_describe_format(layout.gate_up_format), _describe_format(layout.down_format)],
        "pieces": [[p.name, p.offset, list(p.shape), DTYPE_NAMES[p.dtype]] for p in layout.pieces],
    }


def _describe_format(layout: MatrixFormat) -> dict[str, Any]:
    said = layout._asdict()
    if layout.bits:
        said["block_columns"] = BLOCK  # of planes, which at first held column after column, and did not say so
    else:
        del said["bits"]  # as it was before there was nested precision
    if layout.code != "bf12":
        del said["rare"]
    return said | {
        "dtype": DTYPE_NAMES[layout.dtype],
        "scale_dtype": DTYPE_NAMES[layout.scale_dtype],
        "block": list(layout.block),
    }


def _read_format(said: dict[str, Any]) -> MatrixFormat:
    """What `_describe_format` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    if said["code"] is not None and said["code"] not in get_args(CodeName):
        raise ValueError(said["code"])
    rows, columns = said["block"]
    if any(type(number) is not int for number in (rows, columns, *(said.get(name, 0) for name in _NUMBERS))):
        raise ValueError(said)
    return MatrixFormat(**{name: of for name, of in said.items() if name != "block_columns"})._replace(
        dtype=DTYPES[said["dtype"]], scale_dtype=DTYPES[said["scale_dtype"]], block=(rows, columns)
    )


def index_packed(checkpoint: Checkpoint, sites: Sequence[ExpertSite]) -> ExpertIndex:
    """The index of a packed folder. Raises ValueError where it was packed for another model."""
    assert checkpoint.packed is not None
    described = checkpoint.packed.get("layers", [])
    layouts: list[ExpertLayout] = []
    segments, checksums = [], []
    for layer, site in enumerate(sites):
        layout = _layout(described, layer, site)
        if layout is None and "'nested'" in repr(described) and "block_columns" not in repr(described):
            raise ValueError(
                f"{checkpoint.folder} holds nested precision column after column, as it was packed until 29 November "
                f"2026, not in blocks of {BLOCK} columns; pack the original checkpoint again"
            )
        if layout is None or len(described) != len(sites):
            raise ValueError(
                f"{checkpoint.folder} was packed for {len(described)} layers of experts, the model has {len(sites)}; "
                f"they differ from layer {layer if layout is None else min(len(described), len(sites))} on: pack the "
                "original checkpoint again"
            )
        layouts.append(layout)
        info = checkpoint.tensors.get(f"{PACKED_PREFIX}{layer}")
        if info is None or info.dtype != torch.uint8 or info.shape != (site.num_experts, layout.nbytes):
            raise ValueError(
                f"{checkpoint.folder}: tensor {PACKED_PREFIX}{layer} is missing or has the wrong shape, expected "
                f"uint8 [{site.num_experts}, {layout.nbytes}]; pack the original checkpoint again"
            )
        checksums.append(_checksums(checkpoint, layer, site))
        blobs = range(info.offset, info.offset + info.nbytes, layout.nbytes)
        segments.append(tuple(Parts((Segment(info.path, offset, layout.nbytes, 0),)) for offset in blobs))
    return ExpertIndex(
        sites=tuple(sites),
        layouts=tuple(layouts),
        expert_keys=frozenset(f"{PACKED_PREFIX}{layer}" for layer in range(len(sites))),
        is_packed=True,
        checksums=tuple(checksums),
        parts=tuple(segments),
    )


def _checksums(checkpoint: Checkpoint, layer: int, site: ExpertSite) -> tuple[int, ...]:
    assert checkpoint.packed is not None
    said = checkpoint.packed.get("checksums")
    numbers = said[layer] if isinstance(said, list) and layer < len(said) else None
    if not isinstance(numbers, list) or len(numbers) != site.num_experts or any(type(n) is not int for n in numbers):
        raise ValueError(
            f"{checkpoint.folder}: {site.num_experts} checksums of layer {layer} are missing; pack the original again"
        )
    return tuple(numbers)


def _layout(described: Any, layer: int, site: ExpertSite) -> ExpertLayout | None:
    """The layout that packed.json describes for a layer; None where it is not one of this site's experts."""
    try:
        said = described[layer]
        gate_up, down = (_read_format(f) for f in said["formats"])
        biases = [DTYPES[p[3]] for p in said["pieces"] if p[0] == "gate_up_bias"]
        layout = ExpertLayout.of(site, gate_up, down, biases[0] if biases else None)
        return layout if describe_layer(site, layout) == said else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None
