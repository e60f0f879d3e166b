"""A matrix of weights as a checkpoint stores it: which tensors it consists of, and how they become a slot's pieces."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.formats import decode
from moe.offload.checkpoint import DTYPE_NAMES, TensorInfo, read_tensor
from moe.offload.formats.slot import MatrixFormat


class Source(NamedTuple):
    """Where one piece of a matrix comes from: `convert` of the tensors, or the bytes of the only one as they are."""

    tensors: tuple[TensorInfo, ...]
    convert: Callable[..., Tensor] | None = None

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The piece, read from the files. Raises OSError or ValueError, naming the file, where that fails."""
        tensors = [read_tensor(info) for info in self.tensors]
        return self.made(tensors, shape, dtype)

    def made(self, tensors: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = (tensors[0] if self.convert is None else self.convert(*tensors)).contiguous().view(-1)
        if made.nbytes != prod(shape) * dtype.itemsize:
            where = f" in {self.tensors[0].path}" if self.tensors else ""
            raise ValueError(f"{made.nbytes} bytes{where} are not the {list(shape)} of {dtype} that a weight needs")
        return made.view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMatrix:
    """One weight that consists of several tensors, under the name it would have as plain floats.

    shape: [N, K], or [E, N, K] where all experts are in one tensor; K is the input. sources: by the names that
    `format.pieces(1, N, K)` gives, each the whole stack.
    """

    name: str
    label: str  # of the published format, for messages: "GPTQ, 4 bits"
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    format: MatrixFormat
    sources: Mapping[str, Source]

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    def select(self, expert: int) -> "StoredMatrix":
        """The matrix of one expert of a stack."""
        assert len(self.shape) == 3, self.name
        sources = {
            piece: source._replace(tensors=tuple(_part(info, expert) for info in source.tensors))
            for piece, source in self.sources.items()
        }
        return replace(self, shape=self.shape[1:], sources=sources)

    def decoded(self) -> Tensor:
        """The weights in float32, read from the files: [N, K] or [E, N, K]."""
        if len(self.shape) == 3:
            return torch.stack([self.select(expert).decoded() for expert in range(self.shape[0])])
        views = self.views()
        coding = self.format.coding(views, "")
        if coding is None:
            return views[""][0].float()
        scales = (
            coding.scale.float() if coding.factor is None else coding.scale.float() * coding.factor[..., None, None]
        )
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{self.name} ({self.label}): a scale is not a finite number; download it again")
        return decode(views[""][0], coding, self.shape[1], 0)

    def views(self) -> dict[str, Tensor]:
        """The pieces, read from the files and rearranged, as a slab of one slot: [1, …]. Of one matrix, not a stack."""
        n, k = self.shape
        return {
            piece: self.sources[piece].read(kind.shape, kind.dtype)[None]
            for piece, kind in self.format.pieces(1, n, k).items()
        }


def _part(info: TensorInfo, index: int) -> TensorInfo:
    nbytes = info.nbytes // info.shape[0]
    return info._replace(offset=info.offset + index * nbytes, nbytes=nbytes, shape=info.shape[1:])


class Group(NamedTuple):
    """The tensors that belong to one weight, by their role ("weight", "scale", "zero_point", …)."""

    name: str
    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, str]
    memo: dict[tuple[object, ...], int]  # what was read for other weights of the same shapes

    def matrix(
        self, label: str, shape: tuple[int, ...], layout: MatrixFormat, sources: Mapping[str, Source]
    ) -> StoredMatrix:
        keys = tuple(self.keys.values())
        return StoredMatrix(name=self.name, label=label, keys=keys, shape=shape, format=layout, sources=sources)

    def elements(self, role: str, dtypes: Collection[torch.dtype], count: int | None = None) -> int:
        """How many elements the tensor of a role has. Raises ValueError unless they are of `dtypes`, and `count`."""
        info = self.tensors[role]
        found = prod(info.shape)
        if info.dtype not in dtypes or count not in (None, found):
            names = " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
            wanted = names if count is None else f"{count} of {names}"
            raise ValueError(f"{self.keys[role]} is {DTYPE_NAMES[info.dtype]} {list(info.shape)}, expected {wanted}")
        return found

    def columns(self, rows: int, *stored: tuple[int, ...]) -> int:
        """The true number of columns: `weight_shape`'s, read once for all weights of the same stored shapes.

        A model has tens of thousands of them, each a read of 16 bytes; a wrong number does not fit the model's own
        shapes. 0 for a file of shapes without data. Raises ValueError for another number of rows.
        """
        if stored not in self.memo:
            self.elements("shape", (torch.int64, torch.int32), 2)
            said, columns = read_tensor(self.tensors["shape"]).view(-1).tolist()
            if said != rows and (said, columns) != (0, 0):
                raise ValueError(f"{self.keys['shape']} says {said} rows, {self.name} has {rows}")
            self.memo[stored] = columns
        return self.memo[stored]

    def grid(self, role: str, lead: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a tensor of scales; [n] counts as [n, 1], a single number as [1, 1]."""
        shape = self.tensors[role].shape
        if shape[: len(lead)] != lead:
            raise ValueError(f"{self.keys[role]} has shape {list(shape)}, expected {list(lead)} in front")
        rest = shape[len(lead) :]
        if len(rest) > 2:
            raise ValueError(f"{self.keys[role]} has shape {list(shape)}, expected scales of rows and columns")
        if 0 in rest:
            raise ValueError(f"{self.keys[role]} has shape {list(shape)}: it holds no scales")
        return (rest[0] if rest else 1, rest[1] if len(rest) == 2 else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """What the folder's configuration says beside the tensors; empty for plain checkpoints."""

    method: str = ""
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    group_sizes: tuple[int, ...] = ()
    bits: int | None = None
    zeros_less_one: bool = True  # GPTQ's first version stores zero points less one
    activations: str = ""  # what other engines round the activations to, as the configuration asks; this one does not


def columns_per_group(name: str, columns: int, groups: int, said: Quantisation) -> int:
    """Columns that share a scale. Raises ValueError where neither the configuration nor the shape tells."""
    for size in said.group_sizes:
        if size > 0 and -(-columns // size) == groups:
            return size
    if groups == 1:
        return columns
    if groups < 1 or columns % groups:
        raise ValueError(
            f"{name} has {columns} columns in {groups} groups: the configuration gives no group size that fits"
        )
    return columns // groups
