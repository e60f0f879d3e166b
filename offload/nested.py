"""Packed experts in nested precision: which bits each is served in, and the part of its blob that this takes.

A blob's planes lie level by level (offload/layout.py), so that an expert in fewer bits is a prefix of the file's bytes:
fewer are read, fewer are held. How many is fixed before anything is read, of each expert by itself: an answer depends
neither on what is asked beside it nor on what was asked before.

    2, 3, 4, 8   all experts alike, in slots as of any other format, evicted where there are fewer slots than experts
    auto         all experts stay in memory, each in as many bits as a budget in bytes buys: D2MoE's order, hottest
                 expert, lowest bit first, where what counts is the error that a plane takes from answers, per byte
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.kernels.nested import LEVELS
from moe.offload.budget import format_bytes, parse_budget, resolve_slots
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.stored import Source
from moe.offload.integrity import checksum
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.segments import Conversion, ExpertIndex, Parts, Segment

_BITS = ("gate_up.bits", "down.bits")


class Sensitivity(NamedTuple):
    """What one expert's bits are worth, as `moe pack` measured it; squares, summed over what the expert was asked."""

    energy: float  # of its answers to the calibration text, or of its weights where there was none
    losses: tuple[float, ...]  # of the same, read at each of LEVELS


def is_nested(layout: ExpertLayout) -> bool:
    return layout.gate_up_format.code == "nested"


def at_level(site: ExpertSite, layout: ExpertLayout, bits: int) -> ExpertLayout:
    """The layout of the first `bits` bits: a prefix of `layout`, which holds 8."""
    bias = layout.piece("gate_up_bias")
    gate_up, down = (f._replace(bits=bits) for f in (layout.gate_up_format, layout.down_format))
    return ExpertLayout.of(site, gate_up, down, None if bias is None else bias.dtype)


def set_bits(layout: ExpertLayout, blob: Tensor, bits: int) -> None:
    """Says in a blob (uint8 [nbytes]) how many bits of it mean anything."""
    for name in _BITS:
        piece = layout.piece(name)
        assert piece is not None, layout
        layout.view(blob[None], piece).fill_(bits)


def checksums(site: ExpertSite, layout: ExpertLayout, blob: Tensor) -> list[int]:
    """Of what is read at each of LEVELS, as it lies in a slot. blob: of 8 bits, as it is again afterwards."""
    found = []
    for bits in LEVELS:
        set_bits(layout, blob, bits)
        found.append(checksum(blob[: at_level(site, layout, bits).nbytes]))
    return found


def serve(checkpoint: Checkpoint, index: ExpertIndex, bits: str, budget: str | None) -> ExpertIndex:
    """`index` with every expert in as many bits as it is served in. bits, budget: settings.

    Raises ValueError where nothing here is in nested precision, and for a budget that does not hold 2 bits of all.
    """
    if bits == "8":
        return index
    if not index.layouts or not all(map(is_nested, index.layouts)):
        raise ValueError(
            f"offload.bits ({bits}) is for experts in nested precision; make them with `moe pack MODEL OUT --experts "
            "nested`"
        )
    if bits == "auto":
        chosen = plan_bits(read_sensitivity(checkpoint), sizes_of(index), _bytes_of(budget))
    else:
        chosen = [[int(bits)] * site.num_experts for site in index.sites]
    return _cut(checkpoint, index, chosen)


def describe(index: ExpertIndex) -> str | None:
    """What a user should know of the bits that experts are served in; None where none is in nested precision.

    A plan takes what costs no further page, so that a size tells the bits.
    """
    count: Counter[int] = Counter()
    for site, layout in zip(index.sites, index.layouts):
        if is_nested(layout):
            of_size = {
                at_level(site, layout, bits).nbytes: bits for bits in LEVELS if bits <= layout.gate_up_format.bits
            }
            count.update(of_size[layout.size_of(expert)] for expert in range(site.num_experts))
    if not count:
        return None
    each = ", ".join(f"{number} in {bits} bits" for bits, number in sorted(count.items()))
    return f"experts are in nested precision, which is lossy: {each}; `moe evaluate` measures what it changes"


def _bytes_of(budget: str | None) -> int:
    parsed = None if budget is None else parse_budget(budget)
    if parsed is None or parsed.kind != "bytes":
        raise ValueError(f"offload.bits=auto shares out a number of bytes; set offload.budget=6GiB, not {budget}")
    return int(parsed.value)


def check_mixed(index: ExpertIndex, counts: Sequence[int], *, can_mix: bool) -> None:
    """Raises ValueError where experts differ in size and not all ask for a slot (counts, by layer), or a slot takes
    memory for what its expert does not fill (not `can_mix`)."""
    if index.is_mixed and (sum(counts) < sum(site.num_experts for site in index.sites) or not can_mix):
        raise ValueError(
            "offload.bits=auto keeps all experts of a model in the slots of one process on a CPU, read from files; set "
            "offload.bits=2, 3, 4 or 8 for ranks, GPUs and offload.store=ram"
        )


def slots_for(budget: str | None, index: ExpertIndex, counts: Sequence[int], room: int) -> int:
    """Slots that `budget` buys; where experts differ in size, one each. counts: experts by layer that ask for slots.

    room: bytes that are free. Slots stand as far apart as the largest; on a host what a smaller expert leaves of its
    own is never touched, and so takes no memory (`check_mixed`). Raises ValueError where they do not fit.
    """
    if not index.is_mixed:
        sizes = [layout.nbytes for layout in index.layouts]
        return resolve_slots(budget, sizes=sizes, counts=counts, available_bytes=room)
    total = sum(site.num_experts for site in index.sites)
    nbytes = sum(layout.size_of(e) for s, layout in zip(index.sites, index.layouts) for e in range(s.num_experts))
    if nbytes > room:
        raise ValueError(f"experts take {format_bytes(nbytes)}, free are {format_bytes(room)}; lower offload.budget")
    return total


def sizes_of(index: ExpertIndex) -> list[list[int]]:
    """Bytes of an expert at each of LEVELS, by layer."""
    return [[at_level(s, l, bits).nbytes for bits in LEVELS] for s, l in zip(index.sites, index.layouts)]


def read_sensitivity(checkpoint: Checkpoint) -> list[list[Sensitivity]]:
    """By layer and expert, from packed.json."""
    said = (checkpoint.packed or {}).get("nested", {})
    try:
        return [[Sensitivity(float(e), tuple(map(float, of))) for e, of in layer] for layer in said["losses"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.folder} does not say what bits are worth; pack the original again") from error


def plan_bits(worth: Sequence[Sequence[Sensitivity]], sizes: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Bits of each expert, by layer, that take no more than `budget` bytes. sizes: as `sizes_of` returns them.

    Begins with 2 bits of all and buys, one by one, the plane that takes most error from answers per byte: the error of
    an expert counts as a share of its layer's answers, and so as often as it is asked. What no longer fits is passed
    over. Deterministic: ties go to the first layer and expert. Raises ValueError where 2 bits of all are too much.
    """
    left = budget - sum(size[0] * len(layer) for size, layer in zip(sizes, worth))
    if left < 0:
        raise ValueError(
            f"offload.budget ({format_bytes(budget)}) must hold 2 bits of every expert ({format_bytes(budget - left)}) "
            "for offload.bits=auto; raise it, or set offload.bits=2, which keeps the rest on disk"
        )
    energy = [sum(expert.energy for expert in layer) or 1.0 for layer in worth]
    step = [[0] * len(layer) for layer in worth]
    heads: list[tuple[float, int, int]] = []

    def offer(layer: int, expert: int) -> None:
        at = step[layer][expert]
        if at + 1 < len(LEVELS):
            of, size = worth[layer][expert].losses, sizes[layer]
            gain = (of[at] - of[at + 1]) / energy[layer] / max(1, size[at + 1] - size[at])
            heapq.heappush(heads, (-gain, layer, expert))

    for layer, experts in enumerate(worth):
        for expert in range(len(experts)):
            offer(layer, expert)
    while heads:
        _, layer, expert = heapq.heappop(heads)
        at = step[layer][expert]
        cost = sizes[layer][at + 1] - sizes[layer][at]
        if cost <= left:
            left -= cost
            step[layer][expert] += 1
            offer(layer, expert)
    return [[LEVELS[at] for at in layer] for layer in step]


def _cut(checkpoint: Checkpoint, index: ExpertIndex, bits: Sequence[Sequence[int]]) -> ExpertIndex:
    said: Any = (checkpoint.packed or {}).get("nested", {}).get("checksums")
    layouts, parts, sums = [], [], []
    for layer, (site, whole, chosen) in enumerate(zip(index.sites, index.layouts, bits)):
        levels = {b: at_level(site, whole, b) for b in set(chosen)}
        sizes = tuple(levels[b].nbytes for b in chosen)
        layout = levels[max(chosen)]
        layouts.append(layout.of_sizes(sizes) if len(set(sizes)) > 1 else layout)
        parts.append(tuple(_first_bits(index, layer, e, levels[b], b) for e, b in enumerate(chosen)))
        try:
            sums.append(tuple(int(said[layer][e][LEVELS.index(b)]) for e, b in enumerate(chosen)))
        except (TypeError, IndexError, ValueError):
            raise ValueError(f"{checkpoint.folder}: checksums of layer {layer} are missing; pack again") from None
    return ExpertIndex(
        sites=index.sites,
        layouts=tuple(layouts),
        expert_keys=index.expert_keys,
        parts=tuple(parts),
        is_packed=True,
        checksums=tuple(sums),
    )


def _first_bits(index: ExpertIndex, layer: int, expert: int, layout: ExpertLayout, bits: int) -> Parts:
    (whole,) = index.segments(layer, expert)
    pieces = [piece for piece in layout.pieces if piece.name in _BITS]
    make = Source((), partial(torch.full, (1,), bits, dtype=torch.int32))
    says = tuple(Conversion(make, piece.offset, piece.shape, piece.dtype) for piece in pieces)
    return Parts((Segment(whole.path, whole.offset, layout.nbytes, 0),), says)
