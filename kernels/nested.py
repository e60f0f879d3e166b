"""Experts in nested precision: planes of bits of which the first few are the same weights, coarser.

D2MoE's matryoshka quantisation (MobiCom'25): two bits of base, then residual planes, each with scales of its own that
are fitted to what the planes before it leave. Read at 2, 3, 4 or 8 bits, in fp32, in this order of operations:

    W2 = scale (2 c - 3)     c of 2 bits, scale F16 of a group of columns
    W3 = W2 + s3 (+1 or -1)  s3 = scale * residual3 / 256, residual3 of 8 bits
    W4 = W3 + s4 (+1 or -1)  likewise
    W8 = W4 + s8 (n - 7.5)   n of 4 bits, s8 F16

Every product is exact, so each plane costs one rounding, and kernels may use multiply-adds. Lossy, and only for who
asks for it; wins where memory for experts is short and experts differ in how much their bits matter.

A plane of b bits a column holds a row as one string of bits. Whole blocks of 256 columns come first, in an order in
which a 32-bit word is one lane of a vector: its nibble i is of the i-th 16 columns of half a block, so that a shift
brings the next of 8 columns everywhere (`bit_of`). The columns after them follow one by one.
"""

# mypy: allow-untyped-calls

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = (2, 3, 4, 8)
PLANES = {2: 2, 3: 1, 4: 1, 8: 4}  # level -> bits of a column in the plane that reaches it
BLOCK = 256  # columns


def bit_of(bits: int, columns: int, device: torch.device | None = None) -> Tensor:
    """int64 [columns]: where each column's field begins in a row of a plane.

    In a block, column 128 h + 16 i + l has in nibble i of a word its 4 bits (word 16 h + l), its 2 (word l, from bit
    2 h on) or its one (word l mod 8, bit h, of l >= 8 bit 2 + h).
    """
    k = torch.arange(columns, device=device)
    half, nibble, lane = k % BLOCK // 128, 4 * (k % 128 // 16), k % 16
    inside = {4: 512 * half + 32 * lane, 2: 32 * lane + 2 * half, 1: 32 * (lane % 8) + half + 2 * (lane // 8)}[bits]
    return torch.where(k < columns // BLOCK * BLOCK, k // BLOCK * BLOCK * bits + inside + nibble, k * bits)


def plane_bytes(bits: int, columns: int) -> int:
    """Of a row."""
    return -(-columns * bits // 8)


def pack_plane(values: Tensor, bits: int) -> Tensor:
    """values: uint8 [..., k], below 2**bits. Returns [..., plane_bytes]; bits beyond column k are 0."""
    at = bit_of(bits, values.shape[-1], values.device)
    packed = values.new_zeros(*values.shape[:-1], plane_bytes(bits, values.shape[-1]))
    return packed.index_add_(-1, at // 8, values << (at % 8).to(torch.uint8))


def unpack_plane(plane: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_plane`: uint8 [..., columns]."""
    at = bit_of(bits, columns, plane.device)
    return plane[..., at // 8] >> (at % 8).to(torch.uint8) & (1 << bits) - 1


def nested_values(planes: Sequence[Tensor | None], level: int, columns: int, group: int) -> Tensor:
    """Weights in fp32 [..., n, columns], read at `level` bits.

    planes: codes and scales of one level after another, uint8 [..., n, plane_bytes] and [..., n, G] (float16 of 2 and 8
    bits, else uint8), G = ceil(columns / group). Those above `level` may be anything, None too: they are not read.
    """
    of = torch.arange(columns, device=None if planes[0] is None else planes[0].device) // group
    w = scale = torch.zeros(())
    for bits, codes, stored in zip(LEVELS, planes[::2], planes[1::2]):
        if bits > level:
            break
        assert codes is not None, (level, bits)
        assert stored is not None, (level, bits)
        steps = unpack_plane(codes, PLANES[bits], columns).float()
        if bits == 2:
            scale = stored.float()
            w = (2 * steps - 3) * scale[..., of]
        elif bits == 8:
            w = w + (steps - 7.5) * stored.float()[..., of]
        else:
            w = w + (2 * steps - 1) * residual_scale(scale, stored)[..., of]
    return w


def residual_scale(scale: Tensor, stored: Tensor) -> Tensor:
    """Of a sign plane, exact in fp32."""
    return scale * (stored.float() / 256)
