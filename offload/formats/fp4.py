"""FP4 (e2m1) weights: MXFP4 and NVFP4, two to a byte, the even column in the low half, scales along the columns.

gpt-oss             `_blocks` U8 [E, N, K/32, 16], `_scales` U8 [E, N, K/32]: powers of two
compressed-tensors  `weight_packed` U8 [N, K/2]; MXFP4 as above, or NVFP4: e4m3 scales of 16 columns, divided by
                    `weight_global_scale`
DeepSeek-V4         `weight` I8 [N, K/2], `scale` E8M0 [N, K/32]
ModelOpt            NVFP4 in `weight` U8 [N, K/2], e4m3 scales of 16 columns, multiplied by `weight_scale_2`
"""

import torch

from moe.offload.formats.slot import MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix

_CODES = (torch.uint8, torch.int8)
_POWERS = (torch.uint8, torch.float8_e8m0fnu)


def mxfp4(group: Group, said: Quantisation) -> StoredMatrix | None:
    """Groups of 32 columns whose scale is a power of two."""
    codes, scale = _codes(group), group.tensors.get("scale")
    if codes is None or scale is None or scale.dtype not in _POWERS:
        return None
    shape, groups = codes
    columns = shape[-1]
    if columns != 32 * groups or scale.shape != (*shape[:-1], groups):
        raise ValueError(
            f"{group.name} has {columns} columns and scales {list(scale.shape)}; MXFP4 has one scale for 32 columns"
        )
    layout = MatrixFormat.coded("e2m1", (1, 32), torch.float8_e8m0fnu)
    return group.matrix("MXFP4", shape, layout, {"": Source((_tensor(group),)), ".scale": Source((scale,))})


def nvfp4(group: Group, said: Quantisation) -> StoredMatrix | None:
    """Groups of 16 columns whose scale is e4m3 times a number of the whole matrix."""
    codes, scale = _codes(group), group.tensors.get("scale")
    if codes is None or scale is None or scale.dtype != torch.float8_e4m3fn:
        return None
    shape, groups = codes
    if shape[-1] != 16 * groups or scale.shape != (*shape[:-1], groups):
        raise ValueError(
            f"{group.name} has {shape[-1]} columns and scales {list(scale.shape)}; NVFP4 has one scale for 16 columns"
        )
    divisor, factor = group.tensors.get("global_scale"), group.tensors.get("scale_2")
    if (divisor is None) == (factor is None):
        raise ValueError(f"{group.name} is in NVFP4 and needs one of weight_global_scale and weight_scale_2")
    info, convert = (factor, None) if divisor is None else (divisor, torch.reciprocal)
    assert info is not None
    if info.dtype != torch.float32 or info.nbytes != 4 * (shape[0] if len(shape) == 3 else 1):
        raise ValueError(f"the global scale of {group.name} has shape {list(info.shape)}, expected one F32")
    layout = MatrixFormat.coded("e2m1", (1, 16), torch.float8_e4m3fn)._replace(has_factor=True)
    sources = {"": Source((_tensor(group),)), ".scale": Source((scale,)), ".factor": Source((info,), convert)}
    return group.matrix("NVFP4", shape, layout, sources)


def _tensor(group: Group):  # type: ignore[no-untyped-def]
    return next(group.tensors[role] for role in ("blocks", "packed", "weight") if role in group.tensors)


def _codes(group: Group) -> tuple[tuple[int, ...], int] | None:
    """Logical shape and groups of columns, None where this is not FP4."""
    scale = group.tensors.get("scale")
    if not {"blocks", "packed", "weight"} & set(group.tensors) or scale is None or not scale.shape:
        return None
    info = _tensor(group)
    if info.dtype not in _CODES or len(info.shape) < 2:
        return None
    if "blocks" in group.tensors:
        if len(info.shape) != 4 or info.shape[-1] != 16:
            raise ValueError(f"{group.keys['blocks']} has shape {list(info.shape)}, expected [E, N, K / 32, 16]")
        return (*info.shape[:2], info.shape[2] * 32), scale.shape[-1]
    return (*info.shape[:-1], info.shape[-1] * 2), scale.shape[-1]
