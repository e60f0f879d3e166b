"""GGUF blocks as codes: what a stack of experts in a GGUF file becomes in a packed folder.

Blocks run along K, each with its own scale inside. Types whose weights are scale times integer keep every bit:

    Q8_0, Q5_0  int8, F16 scales of 32 columns        Q4_0  int4, F16 scales of 32
    Q6_K        int8, F32 scales of 16 (d * sc)       Q3_K  int4, F32 scales of 16

Types with a minimum beside the scale (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) and the rest fit no code of ours; they become
float32, exactly, which is many times as large: round them with `moe pack --experts`. The twin of all of this is
`gguf.quants.dequantize`.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.offload.checkpoint import TensorInfo
from moe.offload.formats.slot import MatrixFormat
from moe.offload.formats.stored import Source, StoredMatrix

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Blocks(NamedTuple):
    """How one type's blocks come apart. codes, scales: uint8 [rows, blocks, bytes] -> values."""

    format: MatrixFormat
    nbytes: int  # of a block
    codes: Callable[[Tensor], Tensor]
    scales: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The F16 that lies `at` bytes into each block: [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].contiguous().view(torch.int8)


def _halves(packed: Tensor) -> Tensor:
    """Bytes whose low nibbles are the first half of a block: values 0 to 15 in order."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q4_0(blocks: Tensor) -> Tensor:
    values = _halves(blocks[..., 2:])
    return values[..., 0::2] | values[..., 1::2] << 4


def _q5_0(blocks: Tensor) -> Tensor:
    bits = blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (_halves(blocks[..., 6:]) | bits.flatten(-2) << 4).to(torch.int8) - 16


def _q6_k(blocks: Tensor) -> Tensor:
    """ql 128, qh 64, sc 16, d 2: 256 values of 4 low and 2 high bits, in two runs of 128."""
    low = blocks[..., :128].unflatten(-1, (2, 1, 64)) >> torch.tensor([0, 4], dtype=torch.uint8)[:, None] & 15
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    values: Tensor = (low.flatten(-3) | high.flatten(-3) << 4).to(torch.int8) - 32
    return values


def _q6_k_scales(blocks: Tensor) -> Tensor:
    return _half(blocks, 208)[..., None].float() * blocks[..., 192:208].contiguous().view(torch.int8).float()


def _q3_k(blocks: Tensor) -> Tensor:
    """hmask 32, qs 64, scales 12, d 2: two low bits and a third, whose absence takes 4 off."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    low = blocks[..., 32:96].unflatten(-1, (2, 1, 32)) >> shifts & 3
    high = blocks[..., None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    nibbles: Tensor = (low.flatten(-3) | high.flatten(-2) << 2) + 4  # 0 to 7 stand for -4 to 3, nibbles are plus 8
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _q3_k_scales(blocks: Tensor) -> Tensor:
    packed = blocks[..., 96:108]
    low = packed[..., None, :8] >> torch.tensor([0, 4], dtype=torch.uint8)[:, None] & 15
    high = packed[..., None, 8:12] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    scales = (low.flatten(-2) | high.flatten(-2) << 4).to(torch.int8) - 32
    return _half(blocks, 108)[..., None].float() * scales.float()


_BLOCKS = {
    "Q8_0": _Blocks(MatrixFormat.coded("int8", (1, 32), torch.float16), 34, _q8_0, partial(_half, at=0)),
    "Q4_0": _Blocks(MatrixFormat.coded("int4", (1, 32), torch.float16), 18, _q4_0, partial(_half, at=0)),
    "Q5_0": _Blocks(MatrixFormat.coded("int8", (1, 32), torch.float16), 22, _q5_0, partial(_half, at=0)),
    "Q6_K": _Blocks(MatrixFormat.coded("int8", (1, 16), torch.float32), 210, _q6_k, _q6_k_scales),
    "Q3_K": _Blocks(MatrixFormat.coded("int4", (1, 16), torch.float32), 110, _q3_k, _q3_k_scales),
}


def gguf_stack(
    name: str, kind: str, info: TensorInfo, shape: tuple[int, int, int], dequantise: Callable[[Any], Any]
) -> StoredMatrix:
    """The experts of one matrix. kind: ggml's name of the type; info: uint8 [E, N, bytes of a row] (or floats);
    shape: [E, N, K]; dequantise: numpy bytes [N, …] -> float32 [N, K], for types that no code of ours holds."""
    if kind in _FLOATS:
        layout, sources = MatrixFormat(_FLOATS[kind]), {"": Source((info,))}
    elif kind in _BLOCKS:
        blocks = _BLOCKS[kind]
        layout = blocks.format
        sources = {
            "": Source((info,), partial(_taken, blocks.codes, blocks.nbytes)),
            ".scale": Source((info,), partial(_taken, blocks.scales, blocks.nbytes)),
        }
    else:
        layout, sources = MatrixFormat(torch.float32), {"": Source((info,), partial(_decoded, dequantise))}
    return StoredMatrix(name=name, label=f"GGUF {kind}", keys=(), shape=shape, format=layout, sources=sources)


def _taken(take: Callable[[Tensor], Tensor], nbytes: int, rows: Tensor) -> Tensor:
    return take(rows.unflatten(-1, (-1, nbytes))).flatten(1)


def _decoded(dequantise: Callable[[Any], Any], rows: Tensor) -> Tensor:
    return torch.from_numpy(dequantise(rows.numpy()))
