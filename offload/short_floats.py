"""bf16 experts in 12 bits, without loss (kernels/bf12.py): by `moe pack --experts bf12`, or as experts arrive.

A store over another one. `pack` reads every layer once before anything is written: how many of a row's weights have
rare exponents says how large its blobs are. A run does not: rows have room for more than those of trained models have
(`ROOM`), one expert of some layers is looked at, and what rows have beyond that is in a table of the process. A matrix
that would not become smaller stays as it is: narrow ones, and those whose exponents are spread over more than 15 in a
row.
"""

# mypy: allow-untyped-calls

import errno
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.kernels.bf12 import bytes_of_row, rare_words
from moe.kernels.cpu_encode import most_rare_of, shorten
from moe.offload.budget import format_bytes
from moe.offload.formats.slot import BF12, MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.segments import ExpertIndex
from moe.offload.stores import Buffers, ExpertStore, PartedStore, aligned_bytes

ROOM = 7  # rare weights of a row: of rows of 2048 normal weights one in 10^10 has more
_PLAIN = MatrixFormat(torch.bfloat16)
_NAMES = ("gate_up", "down")
_GAIN = 0.9  # of the bytes, at most: narrower rows than some 200 columns are not worth it
_TABLE_SHARE = 1024  # of all experts' bytes: what rows with more rare weights may take
_LEAST_TABLE = 1 << 16
_LOOKED_AT = 3  # experts, of as many layers, that are read before any is served


class Short(NamedTuple):
    """A bf16 matrix [P * n, k] as bf12."""

    codes: Tensor
    words: Tensor  # [P, n, 1 + R]


def short_format(rare: int, columns: int) -> MatrixFormat:
    """Of rows of so many columns, at most `rare` of whose weights are; bf16 where that is no larger."""
    made = BF12._replace(rare=3 + -(-max(0, rare - 3) // 4) * 4)  # words of a row fill whole 16 bytes
    sizes = [sum(kind.nbytes for kind in f.pieces(1, 1, columns).values()) for f in (made, _PLAIN)]
    return made if sizes[0] < sizes[1] else _PLAIN


def short(w: Tensor, rare: int, parts: int = 1) -> Short:
    """w: bf16 [P * n, k], contiguous; rare: of the format, no less than `most_rare_of(w)`."""
    made = Short(
        torch.empty(len(w), bytes_of_row(w.shape[1]), dtype=torch.uint8),
        torch.empty(parts, len(w) // parts, 1 + rare, dtype=torch.int32),
    )
    over = shorten(w, *made)
    assert not over, f"{over} rows have more than {rare} rare weights"
    return made


def not_bf16(index_or_store: ExpertIndex | ExpertStore) -> str | None:
    """The first layer whose experts are not bf16 floats, in words; None where all are."""
    for layer, layout in enumerate(index_or_store.layouts):
        if other := {layout.gate_up_format, layout.down_format} - {_PLAIN}:
            return f"experts of layer {layer} are stored as {min(other, key=str)}"
    return None


def shortened(index: ExpertIndex) -> ExpertIndex | None:
    """The same experts where slots are to hold bf12; None where slots would not become a tenth smaller.

    Raises ValueError where they are not bf16.
    """
    if reason := not_bf16(index):
        raise ValueError(reason)
    layouts = tuple(_layout(*both, dict.fromkeys(_NAMES, ROOM)) for both in zip(index.sites, index.layouts))
    sizes = [sum(s.num_experts * x.nbytes for s, x in zip(index.sites, each)) for each in (layouts, index.layouts)]
    if sizes[0] > _GAIN * sizes[1]:
        return None
    return replace(index, layouts=layouts, parts=(), checksums=(), stored=index)


def why_not_shortened(store: ExpertStore, index: ExpertIndex) -> str | None:
    """What the first expert of the first layer, a middle one and the last of the last tell against it: a sentence, or
    None.

    store: of `index.in_files`; index: of `shortened`. Costs the reads. Raises OSError where they fail.
    """
    for layer, expert in _looked_at(index):
        layout = index.layouts[layer]
        table = RareTable(layout.nbytes)
        try:
            Shortened(store, index.sites, index.layouts, table).read_into(layer, expert, aligned_bytes(layout.nbytes))
            is_spread = table.used > layout.nbytes // (4 * _TABLE_SHARE)
        except TooMuchRare:
            is_spread = True
        if is_spread:
            return f"exponents of layer {layer}'s weights are spread over more than 15 in a row"
    return None


def _looked_at(index: ExpertIndex) -> list[tuple[int, int]]:
    """Layers and experts."""
    found = []
    for part in range(_LOOKED_AT):
        layer = (len(index.sites) - 1) * part // (_LOOKED_AT - 1)
        found.append((layer, (index.sites[layer].num_experts - 1) * part // (_LOOKED_AT - 1)))
    return found


class TooMuchRare(OSError):
    """Rows of some expert have more rare weights than is kept memory for."""


class RareTable:
    """Rare weights of rows that have more than there is room for: of all slots of a process, for good.

    words: int32 [1, A], which takes memory where it was written.
    """

    def __init__(self, nbytes: int) -> None:
        room = max(_LEAST_TABLE, nbytes // _TABLE_SHARE // 4 * 4)
        self.words = aligned_bytes(room, huge=False).view(torch.int32)[None]
        self.used = 0
        self._places: dict[tuple[int, int, str, int], int] = {}  # by layer, expert, matrix and row
        self._lock = threading.Lock()

    def place(self, row: tuple[int, int, str, int], words: Tensor) -> int:
        """Where the row's words are, which are the same whenever it is read. Raises TooMuchRare where it is full."""
        with self._lock:
            if row not in self._places:
                if self.used + len(words) > self.words.shape[1]:
                    raise TooMuchRare(
                        errno.ENOMEM,
                        f"expert {row[1]} of layer {row[0]} has rows whose exponents are spread over more than 15, as "
                        f"others before it: {format_bytes(self.words.nbytes)} are kept for such weights; set "
                        "offload.keep=stored",
                    )
                self.words[0, self.used : self.used + len(words)] = words
                self._places[row] = self.used
                self.used += len(words)
            return self._places[row]


class Shortened:
    """Implements `ExpertStore` and `PartedStore`. layouts: what `source`'s become.

    table: None where no row has more rare weights than its layout has room for.
    """

    def __init__(
        self,
        source: ExpertStore,
        sites: Sequence[ExpertSite],
        layouts: Sequence[ExpertLayout],
        table: RareTable | None = None,
    ) -> None:
        self.source, self.sites, self.layouts, self.table = source, list(sites), list(layouts), table
        self.num_experts = list(source.num_experts)
        self._buffers = Buffers()

    @staticmethod
    def read_all(source: ExpertStore, sites: Sequence[ExpertSite], seen: Callable[[int], None]) -> "Shortened":
        """With as much room as rows need. Reads every expert; seen(bytes) is called after each.

        Raises ValueError where experts are not bf16 floats.
        """
        if reason := not_bf16(source):
            raise ValueError(
                f"{reason}; bf12 is bf16 in 12 bits, without loss: leave --experts out to keep them as they are"
            )
        layouts = []
        for layer, (site, layout) in enumerate(zip(sites, source.layouts)):
            blob, rare = aligned_bytes(layout.nbytes), dict.fromkeys(_NAMES, 0)
            views = layout.views(blob[None])
            for expert in range(site.num_experts):
                source.read_into(layer, expert, blob)
                for name in _NAMES:
                    rare[name] = max(rare[name], most_rare_of(views[name][0]))
                seen(layout.nbytes)
            layouts.append(_layout(site, layout, rare))
        return Shortened(source, sites, layouts)

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        with self._buffers.spare(self.source.layouts[layer].nbytes) as blob:
            nbytes = self.source.read_into(layer, expert, blob)
            self._make(layer, expert, blob, out)
        return nbytes

    def read_parts(self, layer: int, expert: int, out: Tensor) -> Generator[int, None, int]:
        with self._buffers.spare(self.source.layouts[layer].nbytes) as blob:
            if isinstance(self.source, PartedStore):
                nbytes = yield from self.source.read_parts(layer, expert, blob)
            else:
                nbytes = self.source.read_into(layer, expert, blob)
            self._make(layer, expert, blob, out)
        return nbytes

    def _make(self, layer: int, expert: int, blob: Tensor, out: Tensor) -> None:
        site, before, after = self.sites[layer], self.source.layouts[layer], self.layouts[layer]
        made = after.views(out[None])
        formats = dict(zip(_NAMES, (after.gate_up_format, after.down_format)))
        for piece in before.pieces:
            name, read = piece.name, before.view(blob[None], piece)[0]
            if formats.get(name, _PLAIN) == _PLAIN:
                np.copyto(made[name][0].view(torch.uint8).numpy(), read.view(torch.uint8).numpy())
                continue
            words, is_woven = made[f"{name}.scale"][0], name == "gate_up" and site.parts == 2 and site.interleaved
            if shorten(read, made[name][0], words, interleaved=is_woven):
                rows = read.unflatten(0, (-1, 2)).transpose(0, 1) if is_woven else read
                self._tell((layer, expert, name), rows.reshape(-1, rows.shape[-1]), words.view(-1, words.shape[-1]))

    def _tell(self, of: tuple[int, int, str], w: Tensor, words: Tensor) -> None:
        """Puts into the table what rows have beyond their room. w: [rows, k], as the rows of `words`."""
        if self.table is None:
            raise OSError(errno.EIO, f"expert {of[1]} of layer {of[0]} is not what it was when it was read before")
        for row in (words[:, 0] >> 8 > words.shape[1] - 1).nonzero()[:, 0].tolist():
            told = rare_words(w[row], int(words[row, 0]) & 255)
            words[row, 1] = self.table.place((*of, row), told)

    @property
    def direct(self) -> bool:
        """Whether what it reads is read past the page cache."""
        return bool(getattr(self.source, "direct", False))

    def close(self) -> None:
        self.source.close()


def _layout(site: ExpertSite, before: ExpertLayout, rare: dict[str, int]) -> ExpertLayout:
    first, second = (short_format(rare[n], k) for n, k in zip(_NAMES, (site.hidden_size, site.intermediate_size)))
    bias = before.piece("gate_up_bias")
    return ExpertLayout.of(site, first, second, None if bias is None else bias.dtype)
