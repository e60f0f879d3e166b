"""From the stored matrices of one layer's experts to the layout of their blobs and the segments that fill them."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moe.offload.checkpoint import DTYPE_NAMES, TensorInfo
from moe.offload.conversions import Stack, View
from moe.offload.formats.slot import FLOATS, WHOLE, MatrixFormat
from moe.offload.formats.stored import Source, StoredMatrix
from moe.offload.layout import ExpertLayout, ExpertSite, Piece
from moe.offload.segments import Conversion, Parts, Segment


def layer_parts(layer: int, site: ExpertSite, stacks: dict[str, Stack]) -> tuple[ExpertLayout, tuple[Parts, ...]]:
    """The layout of one layer's blobs and where each expert's bytes come from.

    stacks: as `Conversions` finds them. Raises ValueError where the experts of the layer are not stored alike.
    """
    where = f"layer {layer} ({site.module})"
    first = "gate_up_proj" if site.gated else "up_proj"
    names = {"gate_up": first, "down": "down_proj", "gate_up_bias": f"{first}_bias", "down_bias": "down_proj_bias"}
    named = {name: stacks[stored] for name, stored in names.items() if stored in stacks}
    formats = {name: _format(where, site, named[name], name) for name in ("gate_up", "down")}
    dtypes = {f.dtype for f in formats.values()} if all(f.code is None for f in formats.values()) else set()
    biases = {view.info.dtype for name in named if name.endswith("_bias") for each in named[name] for view in each}
    if not biases <= set(FLOATS) or len(dtypes | (biases if dtypes else set())) > 1 or len(biases) > 1:
        _refuse_dtypes(where, dtypes | biases)
    layout = ExpertLayout.of(site, formats["gate_up"], formats["down"], next(iter(biases), None))
    at = {name: _Place.of(where, site, layout, name) for name in named}
    return layout, tuple(
        _joined(part for name, stack in named.items() for part in at[name].parts(stack[expert]))
        for expert in range(site.num_experts)
    )


def _refuse_dtypes(where: str, dtypes: set[torch.dtype]) -> None:
    raise ValueError(
        f"{where}: expert weights are stored as {', '.join(sorted(DTYPE_NAMES[d] for d in dtypes))}; only one of F32, "
        "BF16, F16 for all experts of a layer is read, or one quantised format: convert the checkpoint"
    )


def _format(where: str, site: ExpertSite, stack: Stack, name: str) -> MatrixFormat:
    """How this matrix lies in the slots of the layer; the same for all its experts."""
    infos = [view.info for views in stack for view in views]
    coded = {info.format: info for info in infos if isinstance(info, StoredMatrix)}
    dtypes = {info.dtype for info in infos if not isinstance(info, StoredMatrix)}
    if not coded:
        if len(dtypes) > 1 or not dtypes <= set(FLOATS):
            _refuse_dtypes(where, dtypes)
        return MatrixFormat(dtypes.pop())
    plain = next((info for info in infos if not isinstance(info, StoredMatrix)), None)
    if plain is not None:
        raise ValueError(
            f"{where}: {next(iter(coded.values())).name} is quantised, other weights of {name} here are stored "
            f"as {DTYPE_NAMES[plain.dtype]}; all experts of a layer must be stored alike"
        )
    freely = {f for f in coded if f.num_groups}
    rest = {f._replace(num_groups=0) for f in coded}
    if len(rest) > 1 or len({f.num_groups for f in freely}) > 1:
        first, second, *_ = coded.values()
        raise ValueError(
            f"{where}: {first.name} is stored as {first.format}, {second.name} as {second.format}; all experts of a "
            "layer must be stored alike"
        )
    return freely.pop() if freely else rest.pop()


def _joined(parts: Iterator[Segment | Conversion]) -> Parts:
    every = list(parts)
    segments = tuple(part for part in every if isinstance(part, Segment))
    return Parts(segments, tuple(part for part in every if isinstance(part, Conversion)))


class _Place(NamedTuple):
    """One parameter's place in the blobs of a layer."""

    where: str
    site: ExpertSite
    layout: ExpertLayout
    name: str
    pieces: tuple[tuple[str, Piece], ...]  # by the end of their names, weights or codes first

    @staticmethod
    def of(where: str, site: ExpertSite, layout: ExpertLayout, name: str) -> "_Place":
        own = [p for p in layout.pieces if p.name == name or p.name.startswith(f"{name}.")]
        return _Place(where, site, layout, name, tuple((p.name.removeprefix(name), p) for p in own))

    def parts(self, views: list[View]) -> Iterator[Segment | Conversion]:
        """What fills the pieces of one expert."""
        matrices = [view.info for view in views if isinstance(view.info, StoredMatrix)]
        if not matrices:
            yield from _plain(self.pieces[0][1], views)
            return
        num_parts, _, _ = self._sizes()
        if len(matrices) not in (1, num_parts):
            raise ValueError(f"{self.where}: {self.name} is joined of {len(matrices)} quantised matrices")
        if len(matrices) > 1 and self.site.interleaved:
            raise ValueError(f"{self.where}: quantised gate and up that are apart cannot be interleaved")
        for end, piece in self.pieces:
            if len(matrices) == num_parts:
                for part, matrix in enumerate(matrices):
                    yield _coded(piece, num_parts, part, self.source_of(matrix, end))
            elif end == "":
                yield _coded(piece, 1, 0, matrices[0].sources[""])
            else:
                yield self._split(piece, self.source_of(matrices[0], end), matrices[0].format)

    def _sizes(self) -> tuple[int, int, int]:
        """Parts, rows of one, columns."""
        hidden, inter = self.site.hidden_size, self.site.intermediate_size
        return (self.site.parts, inter, hidden) if self.name == "gate_up" else (1, hidden, inter)

    def source_of(self, matrix: StoredMatrix, end: str) -> Source:
        if end == ".group_of" and end not in matrix.sources:  # others of the layer are grouped freely, this one is not
            return Source((), partial(_groups, columns=matrix.shape[-1], block=matrix.format.block[1]))
        return matrix.sources[end]

    def _split(self, piece: Piece, source: Source, layout: MatrixFormat) -> Segment | Conversion:
        """What belongs to gate and up stored as one matrix, taken apart."""
        num_parts, n, _ = self._sizes()
        stored = _rows_stored(source, piece)
        if piece.name.endswith((".factor", ".table", ".group_of")) or layout.block[0] == WHOLE:
            split = partial(_twice, parts=num_parts)
        elif self.site.interleaved:
            if layout.block[0] != 1:
                raise ValueError(f"{self.where}: blocks of {layout.block[0]} rows straddle interleaved gate and up")
            split = partial(_in_turn, parts=num_parts)
        elif stored == num_parts * -(-n // layout.block[0]):
            return _coded(piece, 1, 0, source)
        else:
            raise ValueError(f"{self.where}: {self.name} has {stored} rows of scales; a block straddles gate and up")
        return Conversion(Source(source.tensors, partial(_then, source, split)), piece.offset, piece.shape, piece.dtype)


def _rows_stored(source: Source, piece: Piece) -> int:
    nbytes = sum(info.nbytes for info in source.tensors)
    return nbytes // (piece.shape[-1] * piece.dtype.itemsize) if source.convert is None else prod(piece.shape[:-1])


def _then(source: Source, split: partial[Tensor], *tensors: Tensor) -> Tensor:
    return split(tensors[0] if source.convert is None else source.convert(*tensors))


def _twice(made: Tensor, parts: int) -> Tensor:
    return made.reshape(1, -1).expand(parts, -1)


def _in_turn(made: Tensor, parts: int) -> Tensor:
    return made.reshape(-1, parts, made.shape[-1]).transpose(0, 1)


def _groups(columns: int, block: int) -> Tensor:
    return (torch.arange(columns) // block).to(torch.int32)


def _coded(piece: Piece, parts: int, part: int, source: Source) -> Segment | Conversion:
    """The `part`-th of `parts` equal stretches of a piece."""
    shape = (piece.shape[0] // parts, *piece.shape[1:])
    nbytes = piece.nbytes // parts
    offset = piece.offset + part * nbytes
    if source.convert is not None:
        return Conversion(source, offset, shape, piece.dtype)
    (info,) = source.tensors
    assert info.nbytes == nbytes, (piece.name, info, nbytes)
    return Segment(info.path, info.offset, nbytes, offset)


def _plain(piece: Piece, views: list[View]) -> Iterator[Segment]:
    """Float weights or biases: runs of bytes, rearranged where the checkpoint has another orientation."""
    offset, itemsize = piece.offset, piece.dtype.itemsize
    for view in views:
        assert isinstance(view.info, TensorInfo)
        contiguous = view.stride == tuple(prod(view.size[d + 1 :]) for d in range(len(view.size)))
        extent = 1 + sum((n - 1) * s for n, s in zip(view.size, view.stride))
        assert extent == prod(view.size), (piece.name, view)  # one run of bytes, every element used once
        segment = Segment(view.info.path, view.info.offset + view.start * itemsize, extent * itemsize, offset)
        yield segment if contiguous else segment._replace(dtype=piece.dtype, size=view.size, stride=view.stride)
        offset += extent * itemsize
    assert offset - piece.offset == piece.nbytes, piece
