"""How one expert lies in memory: the same bytes on a packed disk file, in a host copy and in a slot."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 4096  # O_DIRECT on every file system that we know; also the page size


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSite:
    """One layer's experts as the model's own module declares them, before their weights exist.

    `module` is the dotted name in the transformers model ("model.layers.3.mlp.experts"). N = 2I when `gated`, else I.
    `transposed`: the module keeps [H, N] and [I, H] (GPT-OSS, Llama 4) where others keep [N, H] and [H, I].
    """

    module: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    has_bias: bool = False
    transposed: bool = False


class Piece(NamedTuple):
    offset: int  # bytes from the start of the blob
    shape: tuple[int, ...]


class ScaleFormat(NamedTuple):
    """Of weights in fp8: `block` rows x columns of a matrix share one scale of `dtype`."""

    block: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Byte layout of one expert's blob: gate_up, down, biases, scales, padded to `ALIGNMENT`.

    Always [N, H] and [H, I] with the input dimension contiguous, whatever the checkpoint's orientation; the order of
    the N rows (gate first, or interleaved) is the module's own. Scales, of weights in fp8: gate's blocks apart from
    up's.
    """

    gate_up: Piece  # [N, H]
    down: Piece  # [H, I]
    gate_up_bias: Piece | None  # [N]
    down_bias: Piece | None  # [H]
    gate_up_scale: Piece | None  # [2 or 1, ceil(I / rows), ceil(H / columns)]
    down_scale: Piece | None  # [ceil(H / rows), ceil(I / columns)]
    dtype: torch.dtype
    scales: ScaleFormat | None
    nbytes: int

    @staticmethod
    def of(site: ExpertSite, dtype: torch.dtype, scales: ScaleFormat | None = None) -> "ExpertLayout":
        n = site.intermediate_size * (2 if site.gated else 1)
        shapes: list[tuple[int, ...]] = [(n, site.hidden_size), (site.hidden_size, site.intermediate_size)]
        shapes += [(n,), (site.hidden_size,)] if site.has_bias else []
        pieces, offset = [], 0
        for shape in shapes:
            pieces.append(Piece(offset, shape))
            offset += -(-prod(shape) * dtype.itemsize // 64) * 64  # every piece starts on a cache line
        bias = (pieces[2], pieces[3]) if site.has_bias else (None, None)
        first_scale, second_scale = None, None
        if scales is not None:
            (rows, columns), hidden, inter = scales.block, site.hidden_size, site.intermediate_size
            first_scale = Piece(offset, (2 if site.gated else 1, -(-inter // rows), -(-hidden // columns)))
            offset += -(-prod(first_scale.shape) * scales.dtype.itemsize // 64) * 64
            second_scale = Piece(offset, (-(-hidden // rows), -(-inter // columns)))
            offset += -(-prod(second_scale.shape) * scales.dtype.itemsize // 64) * 64
        return ExpertLayout(
            gate_up=pieces[0],
            down=pieces[1],
            gate_up_bias=bias[0],
            down_bias=bias[1],
            gate_up_scale=first_scale,
            down_scale=second_scale,
            dtype=dtype,
            scales=scales,
            nbytes=-(-offset // ALIGNMENT) * ALIGNMENT,
        )

    def view(self, blobs: Tensor, piece: Piece) -> Tensor:
        """`piece` of every blob. blobs: uint8 [S, nbytes], contiguous. Returns [S, *piece.shape], no copy."""
        is_scale = self.scales is not None and piece in (self.gate_up_scale, self.down_scale)
        dtype = self.scales.dtype if self.scales is not None and is_scale else self.dtype
        typed = blobs.view(dtype)
        start = piece.offset // dtype.itemsize
        return typed[:, start : start + prod(piece.shape)].view(len(blobs), *piece.shape)
