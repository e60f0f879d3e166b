"""GPTQ and AWQ: unsigned integers in words, stored input by output, with zero points.

    GPTQ  `qweight` I32 [K b / 32, N] packed along K, `qzeros` I32 [G, N b / 32] packed along N, `g_idx` I32 [K]: the
          group of each column, whatever the configuration says of act-order. The first version stores zeros less one.
    AWQ   `qweight` I32 [K, N / 8], `qzeros` I32 [G, N / 8], both packed along N, fields in the order _AWQ_FIELDS.

In a slot: int4 nibbles (value less 8) or int8 (value less 128), and zeros less the same. AWQ is told from GPTQ by
shapes: its `qweight` has a row for each column of W.
"""

from functools import partial

import torch
from torch import Tensor

from moe.offload.checkpoint import read_tensor
from moe.offload.formats.integers import within
from moe.offload.formats.slot import FLOATS, WHOLE, MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix, columns_per_group

_AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)  # column 8c + j lies in this field of word c


def gptq(group: Group, said: Quantisation) -> StoredMatrix | None:
    if "qweight" not in group.tensors:
        return None
    for role in ("scales", "qzeros"):
        if role not in group.tensors:
            raise ValueError(f"{group.name} is missing its {role}")
    weight, scales, zeros = (group.tensors[role] for role in ("qweight", "scales", "qzeros"))
    if len(weight.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in FLOATS:
        raise ValueError(f"{group.keys['qweight']} {list(weight.shape)} has scales {list(scales.shape)}")
    if weight.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise ValueError(
            f"{group.keys['qweight']} is packed in {str(weight.dtype)[6:]}; only words of 32 bits are read"
        )
    groups, n = scales.shape
    if weight.shape[1] != n and weight.shape[1] * 8 == n:
        return _awq(group, said)
    order = group.tensors.get("g_idx")
    ordered = None if order is None else group.elements("g_idx", (torch.int32,))
    bits = _bits(weight.shape[0], ordered, said)
    if bits is None or weight.shape[1] != n or zeros.shape != (groups, -(-n * bits // 32)):
        raise ValueError(
            f"{group.keys['qweight']} {list(weight.shape)}, scales {list(scales.shape)} and qzeros "
            f"{list(zeros.shape)} are not GPTQ of 4 or 8 bits"
        )
    k = ordered or weight.shape[0] * 32 // bits
    columns = columns_per_group(group.name, k, groups, said)
    layout = MatrixFormat.coded("int4" if bits == 4 else "int8", (1, _wide(columns, k, said)), scales.dtype)
    layout = layout._replace(has_zero=True)
    sources = {
        "": Source((weight,), partial(_columns_of_words if bits == 4 else _columns_of_bytes, columns=k)),
        ".scale": Source((scales,), _transposed),
        ".zero": Source((zeros,), partial(_gptq_zeros, bits=bits, rows=n, add=int(said.zeros_less_one))),
    }
    if order is not None:
        group_of = within(read_tensor(order).view(-1), groups, group.keys["g_idx"])
        if not torch.equal(group_of, (torch.arange(k) // columns).to(group_of.dtype)):
            layout, sources[".group_of"] = layout._replace(num_groups=groups), Source((order,))
    return group.matrix(f"GPTQ, {bits} bits", (n, k), layout, sources)


def _bits(rows: int, columns: int | None, said: Quantisation) -> int | None:
    """From the length of g_idx, or from the configuration."""
    if columns is None:
        return said.bits if said.bits in (4, 8) else None
    return next((bits for bits in (4, 8) if -(-columns * bits // 32) == rows), None)


def _wide(columns: int, k: int, said: Quantisation) -> int:
    return WHOLE if columns == k and k not in said.group_sizes else columns


def _awq(group: Group, said: Quantisation) -> StoredMatrix:
    weight, scales, zeros = (group.tensors[role] for role in ("qweight", "scales", "qzeros"))
    (k, words), (groups, n) = weight.shape, scales.shape
    if zeros.shape != (groups, words) or said.bits not in (None, 4):
        raise ValueError(f"{group.keys['qzeros']} has shape {list(zeros.shape)}, AWQ needs [{groups}, {words}]")
    columns = columns_per_group(group.name, k, groups, said)
    layout = MatrixFormat.coded("int4", (1, _wide(columns, k, said)), scales.dtype)._replace(has_zero=True)
    sources = {
        "": Source((weight,), _awq_codes),
        ".scale": Source((scales,), _transposed),
        ".zero": Source((zeros,), _awq_zeros),
    }
    return group.matrix("AWQ", (n, k), layout, sources)


def _transposed(t: Tensor) -> Tensor:
    return t.T


def _columns_of_words(words: Tensor, columns: int) -> Tensor:
    """Words along K as rows: the bytes of [N, K / 8] little-endian words are nibbles in their order."""
    return words.T.contiguous().view(torch.uint8)[:, : (columns + 1) // 2]


def _columns_of_bytes(words: Tensor, columns: int) -> Tensor:
    return (words.T.contiguous().view(torch.uint8)[:, :columns] ^ 0x80).view(torch.int8)


def _gptq_zeros(words: Tensor, bits: int, rows: int, add: int) -> Tensor:
    """[G, N b / 32] words to int8 [N, G], less 2^(b - 1) as the codes are."""
    fields = torch.arange(32 // bits) * bits
    zeros = (words[..., None] >> fields & (1 << bits) - 1).flatten(1)[:, :rows] + add - (1 << bits - 1)
    if int(zeros.max()) > 127:
        raise ValueError("a zero point of 8 bits is stored as 255, which versions of GPTQ read differently")
    return zeros.T.to(torch.int8)


def _awq_fields(words: Tensor) -> Tensor:
    """[R, N / 8] to [R, N] of 0 to 15."""
    return (words[..., None] >> torch.tensor(_AWQ_FIELDS) * 4 & 15).flatten(1)


def _awq_codes(words: Tensor) -> Tensor:
    """[K, N / 8] to nibbles uint8 [N, ceil(K / 2)]."""
    values = _awq_fields(words).T.to(torch.uint8)  # [N, K]
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | values[:, 1::2] << 4


def _awq_zeros(words: Tensor) -> Tensor:
    return (_awq_fields(words) - 8).T.to(torch.int8)
