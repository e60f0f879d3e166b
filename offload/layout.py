"""How one expert lies in memory: the same bytes on a packed disk file, in a host copy and in a slot."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.weights import Activation, ExpertWeights
from moe.offload.formats.slot import MatrixFormat

ALIGNMENT = 4096  # O_DIRECT on every file system that we know; also the page size


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSite:
    """One layer's experts as the model's own module declares them, before their weights exist.

    `module` is the dotted name in the transformers model ("model.layers.3.mlp.experts"). N = 2I when `gated`, else I.
    `transposed`: the module keeps [H, N] and [I, H] (GPT-OSS, Llama 4) where others keep [N, H] and [H, I].
    `interleaved`: gate's and up's rows stand in turn (GPT-OSS).
    """

    module: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    has_bias: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def parts(self) -> int:
        """Matrices that the first projection joins: gate and up, or one."""
        return 2 if self.gated else 1


class Piece(NamedTuple):
    name: str  # "gate_up", "down", "gate_up_bias", "down_bias", and what decodes a matrix: "gate_up.scale", …
    offset: int  # bytes from the start of the blob
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _level(name: str) -> int:
    """Bits for which a piece is needed, of nested precision; 0 of all others."""
    end = name[-1]
    return int(end) if end.isdigit() else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Byte layout of one expert's blob: gate_up, down, biases, then what decodes the two; padded to `ALIGNMENT`.

    In nested precision the planes follow level by level, so that fewer bits are a prefix of more.

    Always [N, H] and [H, I] with the input dimension contiguous, whatever the checkpoint's orientation; the order of
    the N rows (gate first, or interleaved) is the module's own. Scales and the like: gate's apart from up's.
    """

    pieces: tuple[Piece, ...]
    gate_up_format: MatrixFormat
    down_format: MatrixFormat
    nbytes: int
    sizes: tuple[int, ...] = ()  # bytes of each expert where they are not nbytes: nested precision only

    @staticmethod
    def of(
        site: ExpertSite,
        gate_up: MatrixFormat,
        down: MatrixFormat | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> "ExpertLayout":
        """The layout of `site`'s experts. down: None = as gate_up; bias_dtype: None = that of gate_up."""
        down = gate_up if down is None else down
        hidden, inter = site.hidden_size, site.intermediate_size
        first, *first_rest = gate_up.pieces(site.parts, inter, hidden).items()
        second, *second_rest = down.pieces(1, hidden, inter).items()
        named = [("gate_up" + first[0], *first[1]), ("down" + second[0], *second[1])]
        if site.has_bias:
            dtype = bias_dtype or gate_up.dtype
            named += [("gate_up_bias", (site.parts * inter,), dtype), ("down_bias", (hidden,), dtype)]
        rest = [("gate_up" + end, *kind) for end, kind in first_rest] + [
            ("down" + end, *kind) for end, kind in second_rest
        ]
        named += sorted(rest, key=lambda piece: _level(piece[0]))
        pieces, offset = [], 0
        for name, shape, dtype in named:
            pieces.append(Piece(name, offset, shape, dtype))
            offset += -(-pieces[-1].nbytes // 64) * 64  # every piece starts on a cache line
        nbytes = -(-offset // ALIGNMENT) * ALIGNMENT
        return ExpertLayout(pieces=tuple(pieces), gate_up_format=gate_up, down_format=down, nbytes=nbytes)

    def of_sizes(self, sizes: tuple[int, ...]) -> "ExpertLayout":
        """The same pieces where each expert's blob is only so long a beginning."""
        assert max(sizes) <= self.nbytes, (max(sizes), self.nbytes)
        return replace(self, sizes=sizes)

    def size_of(self, expert: int) -> int:
        return self.sizes[expert] if self.sizes else self.nbytes

    @property
    def spared(self) -> int:
        """Bytes of its experts' slots that none of them fills."""
        return sum(self.nbytes - size for size in self.sizes)

    def piece(self, name: str) -> Piece | None:
        return next((piece for piece in self.pieces if piece.name == name), None)

    def view(self, blobs: Tensor, piece: Piece) -> Tensor:
        """`piece` of every blob. blobs: uint8 [S, nbytes or more], contiguous. Returns [S, *piece.shape], no copy."""
        typed = blobs.view(piece.dtype)
        start = piece.offset // piece.dtype.itemsize
        return typed[:, start : start + prod(piece.shape)].view(len(blobs), *piece.shape)

    def views(self, blobs: Tensor) -> dict[str, Tensor]:
        """Every piece of every blob, by name."""
        return {piece.name: self.view(blobs, piece) for piece in self.pieces}

    def not_finite(self, blob: Tensor) -> str | None:
        """The piece of one expert whose scales are not all finite; None if all are. blob: uint8 [nbytes]."""
        for piece in self.pieces:
            if piece.name.endswith((".scale", ".factor", ".scale8")):
                stored = blob[piece.offset : piece.offset + piece.nbytes]
                if piece.dtype == torch.float8_e8m0fnu:
                    is_finite = stored != 255
                elif piece.dtype == torch.float8_e4m3fn:
                    is_finite = stored & 127 != 127
                else:
                    is_finite = stored.view(piece.dtype).isfinite()
                if not bool(is_finite.all()):
                    return piece.name
        return None

    def weights(self, views: Mapping[str, Tensor], activation: Activation) -> ExpertWeights:
        """`views` of a slab as kernels take them."""
        return ExpertWeights(
            views["gate_up"],
            views["down"],
            views.get("gate_up_bias"),
            views.get("down_bias"),
            activation,
            self.gate_up_format.coding(views, "gate_up"),
            self.down_format.coding(views, "down"),
        )
