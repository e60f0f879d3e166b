"""How one matrix of an expert is laid out in a slot: the static part of a `Coding`, and the pieces it takes."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.formats import CODE_DTYPES, NIBBLE_CODES, CodeName, Coding, Residual, bytes_per_row
from moe.kernels.nested import LEVELS, PLANES, plane_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = 1 << 30  # rows or columns of a block that is at least the matrix


class PieceKind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class MatrixFormat(NamedTuple):
    """A matrix as it lies in a slot. code None: plain floats of `dtype`; the other fields are those of a `Coding`."""

    dtype: torch.dtype
    code: CodeName | None = None
    block: tuple[int, int] = (0, 0)
    scale_dtype: torch.dtype = torch.float32
    has_zero: bool = False
    has_factor: bool = False
    num_groups: int = 0  # of columns that are grouped freely; 0 where groups follow from the block
    bits: int = 0  # of nested: the most that a slot holds; 0 of other codes
    rare: int = 0  # of bf12: a row's weights with rare exponents, at most

    @staticmethod
    def coded(code: CodeName, block: tuple[int, int], scale_dtype: torch.dtype) -> "MatrixFormat":
        return MatrixFormat(CODE_DTYPES[code], code, block, scale_dtype)

    def pieces(self, parts: int, n: int, k: int) -> dict[str, PieceKind]:
        """What `parts` matrices [n, k] take, codes (or weights) first, in the order of `Coding`'s fields.

        In nested precision what fewer bits take is the beginning of what more take.
        """
        if self.code is None:
            return {"": PieceKind((parts * n, k), self.dtype)}
        grid = (parts, -(-n // self.block[0]), self.num_groups or -(-k // self.block[1]))
        if self.code == "bf12":
            grid = (parts, n, 1 + self.rare)
        pieces = {
            "": PieceKind((parts * n, bytes_per_row(self.code, k)), self.dtype),
            ".scale": PieceKind(grid, self.scale_dtype),
        }
        if self.has_zero:
            pieces[".zero"] = PieceKind(grid, torch.int8)
        if self.has_factor:
            pieces[".factor"] = PieceKind((parts,), torch.float32)
        if self.code == "lut4":
            pieces[".table"] = PieceKind((parts, 16), torch.float32)
        if self.bits:
            pieces[".bits"] = PieceKind((1,), torch.int32)
        for level in LEVELS[1:] if self.bits else ():
            if level <= self.bits:
                pieces[f".codes{level}"] = PieceKind((parts * n, plane_bytes(PLANES[level], k)), torch.uint8)
                pieces[f".scale{level}"] = PieceKind(grid, torch.float16 if level == 8 else torch.uint8)
        if self.num_groups:
            pieces[".group_of"] = PieceKind((parts, k), torch.int32)
        return pieces

    def coding(self, views: Mapping[str, Tensor], name: str) -> Coding | None:
        """The coding whose tensors are the pieces of matrix `name`, each [S, …]."""
        if self.code is None:
            return None
        return Coding(
            self.code,
            self.block,
            views[f"{name}.scale"],
            views.get(f"{name}.zero"),
            views.get(f"{name}.factor"),
            views.get(f"{name}.table"),
            views.get(f"{name}.group_of"),
            self._residual(views, name) if self.bits else None,
        )

    def _residual(self, views: Mapping[str, Tensor], name: str) -> Residual:
        more = (views.get(f"{name}.{what}{level}") for level in LEVELS[1:] for what in ("codes", "scale"))
        return Residual(views[f"{name}.bits"], *more)

    def __str__(self) -> str:
        if self.code is None:
            return str(self.dtype).removeprefix("torch.")
        if self.code == "bf12":
            return "bf12 (12 bits, without loss)"
        rows, columns = ("all" if size == WHOLE else str(size) for size in self.block)
        bits = self.bits or (4 if self.code in NIBBLE_CODES else 8)
        scale = str(self.scale_dtype).removeprefix("torch.")
        return f"{self.code} ({bits} bits, {scale} scales of {rows} x {columns} weights)"


BF12 = MatrixFormat.coded("bf12", (1, WHOLE), torch.int32)._replace(rare=3)  # as most models have it
