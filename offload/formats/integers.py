"""Integer weights as compressed-tensors and bitsandbytes store them.

pack-quantized   `weight_packed` I32 [N, K b / 32], fields of b bits from the lowest, each plus 2^(b - 1);
                 `weight_shape` is the true [N, K]; zero points packed along N (Kimi-K2; W4A16, W8A16)
int-quantized    `weight` I8 [N, K], `weight_scale`, `weight_zero_point` I8
LLM.int8         `weight` I8 [N, K], `SCB` F32 [N]: 127 times the scale
"""

from functools import partial

import torch
from torch import Tensor

from moe.offload.checkpoint import read_tensor
from moe.offload.formats.slot import FLOATS, WHOLE, MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix, columns_per_group


def pack_quantized(group: Group, said: Quantisation) -> StoredMatrix | None:
    packed, scale = group.tensors.get("packed"), group.tensors.get("scale")
    if packed is None or packed.dtype != torch.int32:
        return None
    if scale is None or scale.dtype not in FLOATS:
        raise ValueError(f"{group.keys['packed']} has no scales in F32, BF16 or F16 beside it")
    if len(packed.shape) != 2:
        raise ValueError(
            f"{group.keys['packed']} has shape {list(packed.shape)}; packed stacks of experts are not read"
        )
    n, words = packed.shape
    k = group.columns(n, packed.shape, scale.shape) if "shape" in group.tensors else 0
    if not k:
        if said.bits not in (4, 8):
            raise ValueError(f"{group.name} has neither weight_shape nor a number of bits in the configuration")
        k = words * 32 // said.bits
    bits = next((b for b in (4, 8) if -(-k * b // 32) == words), None)
    if bits is None:
        raise ValueError(f"{group.keys['packed']} has {words} words for {k} columns; only 4 and 8 bits are read")
    rows, groups = group.grid("scale", ())
    if rows != n:
        raise ValueError(f"{group.keys['scale']} has {rows} rows, {group.name} has {n}")
    zero, order = group.tensors.get("zero_point"), group.tensors.get("weight_g_idx")
    block = (
        1,
        WHOLE
        if groups == 1 and max(said.group_sizes, default=0) < 1
        else columns_per_group(group.name, k, groups, said),
    )
    layout = MatrixFormat.coded("int4" if bits == 4 else "int8", block, scale.dtype)
    layout = layout._replace(has_zero=zero is not None, num_groups=0 if order is None else groups)
    sources = {"": Source((packed,), _codes_of(bits, words, k)), ".scale": Source((scale,))}
    if zero is not None:
        if zero.dtype != torch.int32 or zero.shape != (-(-n * bits // 32), groups):
            raise ValueError(f"{group.keys['zero_point']} has shape {list(zero.shape)} for {n} rows, {groups} groups")
        sources[".zero"] = Source((zero,), partial(_zeros, bits=bits, rows=n))
    if order is not None:
        group.elements("weight_g_idx", (torch.int32,), k)
        sources[".group_of"] = Source((order,), partial(within, groups=groups, key=group.keys["weight_g_idx"]))
    return group.matrix(f"compressed-tensors int{bits}", (n, k), layout, sources)


def _codes_of(bits: int, words: int, columns: int):  # type: ignore[no-untyped-def]
    if bits == 4 and words * 4 == -(-columns // 2):
        return None
    return partial(_cut_nibbles if bits == 4 else _signed_bytes, columns=columns)


def _cut_nibbles(packed: Tensor, columns: int) -> Tensor:
    return packed.view(torch.uint8)[:, : -(-columns // 2)]


def _signed_bytes(packed: Tensor, columns: int) -> Tensor:
    return (packed.view(torch.uint8)[:, :columns] ^ 0x80).view(torch.int8)


def within(group_of: Tensor, groups: int, key: str) -> Tensor:
    """As it is. Raises ValueError for groups that have no scales."""
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ValueError(f"{key} names groups outside of 0 to {groups - 1}")
    return group_of


def _zeros(packed: Tensor, bits: int, rows: int) -> Tensor:
    """[N b / 32, G] words along N to int8 [N, G]."""
    fields = torch.arange(32 // bits) * bits
    values = packed[:, None] >> fields[None, :, None] & (1 << bits) - 1
    return (values.flatten(0, 1)[:rows] - (1 << bits - 1)).to(torch.int8)


def int_quantized(group: Group, said: Quantisation) -> StoredMatrix | None:
    weight, scale = group.tensors.get("weight"), group.tensors.get("scale")
    if weight is None or weight.dtype != torch.int8 or scale is None or scale.dtype not in FLOATS:
        return None
    *lead, n, k = weight.shape
    rows, groups = group.grid("scale", tuple(lead))
    if rows not in (1, n):
        raise ValueError(f"{group.keys['scale']} has {rows} rows, {group.name} has {n}")
    columns = WHOLE if groups == 1 else columns_per_group(group.name, k, groups, said)
    layout = MatrixFormat.coded("int8", (1 if rows == n else WHOLE, columns), scale.dtype)
    sources = {"": Source((weight,)), ".scale": Source((scale,))}
    zero = group.tensors.get("zero_point")
    if zero is not None:
        if zero.dtype != torch.int8 or zero.shape != scale.shape:
            raise ValueError(f"{group.keys['zero_point']} is {list(zero.shape)}, expected I8 {list(scale.shape)}")
        layout, sources[".zero"] = layout._replace(has_zero=True), Source((zero,))
    return group.matrix("int8", weight.shape, layout, sources)


def llm_int8(group: Group, said: Quantisation) -> StoredMatrix | None:
    weight, scb = group.tensors.get("weight"), group.tensors.get("SCB")
    if weight is None or scb is None:
        return None
    if weight.dtype != torch.int8 or scb.shape != weight.shape[:1] or scb.dtype != torch.float32:
        raise ValueError(f"{group.name} {list(weight.shape)} does not fit {group.keys['SCB']} {list(scb.shape)}")
    marker = group.tensors.get("weight_format")
    if marker is not None and (
        not group.elements("weight_format", (torch.uint8,)) or int(read_tensor(marker).max()) != 0
    ):
        raise ValueError(f"{group.name} is stored in an LLM.int8 layout other than by rows; save it again by rows")
    layout = MatrixFormat.coded("int8", (1, WHOLE), torch.float32)
    sources = {"": Source((weight,)), ".scale": Source((scb,), _scb_to_scale)}
    return group.matrix("LLM.int8", weight.shape, layout, sources)


def _scb_to_scale(scb: Tensor) -> Tensor:
    return scb / 127
