"""bf16 experts in 12 bits, without loss: what `moe pack --experts bf12` writes (kernels/bf12.py).

A store over another one. Every layer is read once before anything is written: how many of a row's weights have rare
exponents says how large its blobs are. A matrix that would not become smaller stays as it is: narrow ones, and those
whose exponents are spread over more than 15 in a row.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.bf12 import encode_bf12, most_rare
from moe.offload.formats.slot import BF12, MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.stores import ExpertStore, aligned_bytes

_PLAIN = MatrixFormat(torch.bfloat16)
_NAMES = ("gate_up", "down")


class Short(NamedTuple):
    """A bf16 matrix [P * n, k] as bf12."""

    codes: Tensor
    words: Tensor  # [P, n, 1 + R]


def short_format(rare: int, columns: int) -> MatrixFormat:
    """Of rows of so many columns, at most `rare` of whose weights are; bf16 where that is no larger."""
    made = BF12._replace(rare=3 + -(-max(0, rare - 3) // 4) * 4)  # words of a row fill whole 16 bytes
    sizes = [sum(kind.nbytes for kind in f.pieces(1, 1, columns).values()) for f in (made, _PLAIN)]
    return made if sizes[0] < sizes[1] else _PLAIN


def short(w: Tensor, rare: int, parts: int = 1, *, interleaved: bool = False) -> Short:
    """w: bf16 [P * n, k]; rare: of the format."""
    codes, words = encode_bf12(w, rare)
    if interleaved:
        return Short(codes, words.unflatten(0, (-1, parts)).transpose(0, 1))
    return Short(codes, words.unflatten(0, (parts, -1)))


class Shortened:
    """Implements `ExpertStore`. Raises ValueError where experts are not bf16 floats.

    Reads all of `source` at once: seen(bytes) is called after each expert.
    """

    def __init__(self, source: ExpertStore, sites: Sequence[ExpertSite], seen: Callable[[int], None]) -> None:
        self.source, self.sites, self.num_experts = source, list(sites), list(source.num_experts)
        for layer, layout in enumerate(source.layouts):
            other = {layout.gate_up_format, layout.down_format} - {_PLAIN}
            if other:
                raise ValueError(
                    f"experts of layer {layer} are stored as {min(other, key=str)}; bf12 is bf16 in 12 bits, without "
                    "loss: leave --experts out to keep them as they are"
                )
        self.layouts = [self._layout(layer, seen) for layer in range(len(sites))]

    def _layout(self, layer: int, seen: Callable[[int], None]) -> ExpertLayout:
        site, layout, rare = self.sites[layer], self.source.layouts[layer], dict.fromkeys(_NAMES, 0)
        blob = aligned_bytes(layout.nbytes)
        views = layout.views(blob[None])
        for expert in range(site.num_experts):
            self.source.read_into(layer, expert, blob)
            for name in _NAMES:
                rare[name] = max(rare[name], most_rare(views[name][0]))
            seen(layout.nbytes)
        first, second = (short_format(rare[name], views[name].shape[2]) for name in _NAMES)
        bias = layout.piece("gate_up_bias")
        return ExpertLayout.of(site, first, second, None if bias is None else bias.dtype)

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        site, before, after = self.sites[layer], self.source.layouts[layer], self.layouts[layer]
        blob = aligned_bytes(before.nbytes)
        nbytes = self.source.read_into(layer, expert, blob)
        made = after.views(out[None])
        formats = dict(zip(_NAMES, (after.gate_up_format, after.down_format)))
        for name, view in before.views(blob[None]).items():
            if formats.get(name, _PLAIN) == _PLAIN:
                made[name].copy_(view)
                continue
            parts = site.parts if name == "gate_up" else 1
            is_woven = parts == 2 and site.interleaved
            made[name][0], made[f"{name}.scale"][0] = short(view[0], formats[name].rare, parts, interleaved=is_woven)
        return nbytes

    def close(self) -> None:
        self.source.close()
