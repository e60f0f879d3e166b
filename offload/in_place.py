"""Slots in which direct reads put experts of an original checkpoint where they belong.

O_DIRECT moves whole pages of a file to whole pages of memory, and tensors of a checkpoint begin anywhere in a page. A
slot whose pieces begin as far into a page as they do in the file takes all but the pages at their ends without a copy:

    file    | header | down        | gate        | up          |          pages: |
    slot         | down's pages ...|               down begins where it does in its page of the file

It costs a slot a page for each piece, and rows of weights that begin on no cache line.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from moe.offload.layout import ALIGNMENT, ExpertLayout, Piece
from moe.offload.segments import ExpertIndex, Parts

_LEAST_BYTES = 64 * ALIGNMENT  # of a piece that is worth a page
_WORD = 8  # bytes; kernels read codes as words of so many at most


def in_place(index: ExpertIndex) -> ExpertIndex:
    """The same experts in blobs whose large pieces lie in their pages as most experts of the layer do in the file.

    Slots of all layers that were of one size are of one size again. Packed folders are as they should be already. Where
    slots hold other bytes than the files, what is read before them is made so, and slots are as they were.
    """
    if index.stored is not None:
        return replace(index, stored=in_place(index.stored))
    if index.is_packed:
        return index
    made = [_in_place(layout, parts) for layout, parts in zip(index.layouts, index.parts)]
    return replace(index, layouts=tuple(layout for layout, _ in made), parts=tuple(parts for _, parts in made))


def _in_place(layout: ExpertLayout, experts: Sequence[Parts]) -> tuple[ExpertLayout, tuple[Parts, ...]]:
    large = [piece for piece in layout.pieces if piece.nbytes >= _LEAST_BYTES]
    pieces, end = [], 0
    for piece in layout.pieces:
        begin = -(-end // 64) * 64
        if piece in large and (within := _place_in_page(piece, experts)) is not None:
            begin = end + (within - end) % ALIGNMENT
        pieces.append(piece._replace(offset=begin))
        end = begin + piece.nbytes
    nbytes = layout.nbytes + len(large) * ALIGNMENT
    assert end <= nbytes, (pieces, nbytes)
    moved = {old.offset: new.offset - old.offset for old, new in zip(layout.pieces, pieces)}
    return replace(layout, pieces=tuple(pieces), nbytes=nbytes), tuple(_moved(parts, moved) for parts in experts)


def _place_in_page(piece: Piece, experts: Sequence[Parts]) -> int | None:
    """Where most of the piece's bytes want it to begin, modulo a page; None where no read could put them there."""
    votes = Counter[int]()
    for parts in experts:
        for segment in parts.segments:
            within = segment.blob_offset - piece.offset
            if segment.size is None and 0 <= within < piece.nbytes:
                votes[(segment.offset - within) % ALIGNMENT] += segment.nbytes
    fits = [place for place, _ in votes.most_common(1) if place % _WORD == 0]
    return fits[0] if fits else None


def _moved(parts: Parts, moved: dict[int, int]) -> Parts:
    """moved: by where pieces began, how far they moved."""

    def place(offset: int) -> int:
        return offset + moved[max(begin for begin in moved if begin <= offset)]

    return Parts(
        tuple(segment._replace(blob_offset=place(segment.blob_offset)) for segment in parts.segments),
        tuple(made._replace(blob_offset=place(made.blob_offset)) for made in parts.conversions),
    )
