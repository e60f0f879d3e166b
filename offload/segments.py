"""An expert's blob in pieces: where its bytes lie, and what is rearranged on the way."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from moe.offload.checkpoint import TensorInfo
from moe.offload.formats.stored import Source
from moe.offload.layout import ExpertLayout, ExpertSite


class Segment(NamedTuple):
    """A run of bytes in a file and its place in the blob.

    `size`, `stride`: the bytes, as elements of `dtype`, form a tensor of this view, whose contiguous copy goes to
    `blob_offset`; all None where the bytes go there as they are.
    """

    path: Path
    offset: int
    nbytes: int
    blob_offset: int
    dtype: torch.dtype | None = None
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None


class Conversion(NamedTuple):
    """Bytes of the blob that are made of stored tensors: rearranged, never rounded."""

    source: Source
    blob_offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return self.source.tensors


class Parts(NamedTuple):
    """Where one expert's blob comes from."""

    segments: tuple[Segment, ...]
    conversions: tuple[Conversion, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertIndex:
    """Where each expert's bytes lie. Layers are numbered by their place in `sites`."""

    sites: tuple[ExpertSite, ...]
    layouts: tuple[ExpertLayout, ...]
    expert_keys: frozenset[str]  # keys of the checkpoint that belong to these experts; all others are dense
    parts: tuple[tuple[Parts, ...], ...]
    is_packed: bool = False
    checksums: tuple[tuple[int, ...], ...] = ()  # of every blob, in packed folders
    stored: "ExpertIndex | None" = None  # where slots hold the same weights in other bytes: what the files hold

    @property
    def in_files(self) -> "ExpertIndex":
        """Whose parts say where bytes lie."""
        return self.stored or self

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's weights or codes; float32 where there are none."""
        return self.layouts[0].gate_up_format.dtype if self.layouts else torch.float32

    @property
    def expert_bytes(self) -> int:
        """Of all experts as they lie in slots, padding included."""
        return sum(site.num_experts * layout.nbytes for site, layout in zip(self.sites, self.layouts))

    @property
    def is_mixed(self) -> bool:
        """Whether experts of one layer differ in size."""
        return any(layout.sizes for layout in self.layouts)

    def segments(self, layer: int, expert: int) -> tuple[Segment, ...]:
        return self.parts[layer][expert].segments

    def conversions(self, layer: int, expert: int) -> tuple[Conversion, ...]:
        return self.parts[layer][expert].conversions

    def files(self) -> list[Path]:
        every = [parts for layer in self.parts for parts in layer]
        paths = {segment.path for parts in every for segment in parts.segments}
        return sorted(paths | {t.path for parts in every for c in parts.conversions for t in c.tensors})
