"""Packed experts in nested precision: which bits each is served in, and the part of its blob that this takes.

A blob's planes lie level by level (offload/layout.py), so that an expert in fewer bits is a prefix of the file's bytes:
fewer are read, fewer are held. How many is fixed before anything is read, of each expert by itself: an answer depends
neither on what is asked beside it nor on what was asked before. But for `upgrade`: there experts get more bits while
the model runs (offload/more_bits.py).

    2, 3, 4, 8   all experts alike, in slots as of any other format, evicted where there are fewer slots than experts
    auto         all experts stay in memory, each in as many bits as a budget in bytes buys: D2MoE's order, hottest
                 expert, lowest bit first, where what counts is the error that a plane takes from answers, per byte
    upgrade      all experts stay in memory, in 2 bits at first; the budget is spent on those that are asked most

Over ranks the budget is that of each. All make the same plan of bits: a plane is bought where every rank that holds the
expert has room for it, so that copies of an expert are alike, and an answer does not depend on who computes it.
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
BY_BUDGET = ("auto", "upgrade")  # settings with which a budget in bytes says how many bits experts have


class Sensitivity(NamedTuple):
    """What one expert's bits are worth, as `moe pack` measured it; squares, summed over what the expert was asked."""

    energy: float  # of its answers to the calibration text, or of its weights where there was none
    losses: tuple[float, ...]  # of the same, read at each of LEVELS
    uses: int = 1  # how often that text asked it; 1 where there was none


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
    """Of what is read at each of LEVELS, as it lies in a slot. blob: of 8 bits."""
    return [checksum_at(layout, blob[: at_level(site, layout, bits).nbytes], bits) for bits in LEVELS]


def checksum_at(layout: ExpertLayout, blob: Tensor, bits: int) -> int:
    """What a blob's will be once `bits` bits of it mean something. blob: uint8, a beginning of it; not written to."""
    said, found, at = torch.tensor([bits], dtype=torch.int32).view(torch.uint8), 0, 0
    for begin in sorted(piece.offset for piece in layout.pieces if piece.name in _BITS):
        found = checksum(said, checksum(blob[at:begin], found))
        at = begin + len(said)
    return checksum(blob[at:], found)


class Held(NamedTuple):
    """Which experts ranks hold, by rank and layer, and which rank this is."""

    of_rank: Sequence[Sequence[Sequence[int]]]
    rank: int

    @property
    def own(self) -> Sequence[Sequence[int]]:
        return self.of_rank[self.rank]


def serve(
    checkpoint: Checkpoint, index: ExpertIndex, bits: str, budget: str | None, held: Held | None = None
) -> ExpertIndex:
    """`index` with every expert in as many bits as it is served in. bits, budget: settings. held: None = all.

    Experts that others hold are in as many as the most of this rank's. Raises ValueError where nothing here is in
    nested precision, and for a budget that does not hold 2 bits of all that a rank holds.
    """
    if bits == "8":
        return index
    if not index.layouts or not all(map(is_nested, index.layouts)):
        raise ValueError(
            f"offload.bits ({bits}) is for experts in nested precision; make them with `moe pack MODEL OUT --experts "
            "nested`"
        )
    of_rank = None if held is None else held.of_rank
    if bits == "auto":
        chosen = plan_bits(read_sensitivity(checkpoint), sizes_of(index), bytes_of(bits, budget), of_rank)
    elif bits == "upgrade":
        bytes_left(sizes_of(index), first_bits(index), bytes_of(bits, budget), of_rank)
        chosen = first_bits(index)
    else:
        chosen = [[int(bits)] * site.num_experts for site in index.sites]
    if held is not None and bits in BY_BUDGET:
        for layer, own in enumerate(held.own):
            most = max((chosen[layer][expert] for expert in own), default=LEVELS[0])
            most = LEVELS[-1] if bits == "upgrade" else most  # as large as its slot, which there is not
            chosen[layer] = [b if expert in own else most for expert, b in enumerate(chosen[layer])]
    return _cut(checkpoint, index, chosen, is_growing=bits == "upgrade")


def first_bits(index: ExpertIndex) -> list[list[int]]:
    """Two bits of each expert, by layer, or what costs no further page."""
    found = []
    for site, of in zip(index.sites, sizes_of(index)):
        found.append([max(bits for bits, nbytes in zip(LEVELS, of) if nbytes == of[0])] * site.num_experts)
    return found


def describe(index: ExpertIndex, own: Sequence[Sequence[int]] | None = None) -> str | None:
    """What a user should know of the bits that experts are served in; None where none is in nested precision.

    own: a rank's experts, by layer; None = all. A plan takes what costs no further page, so that a size tells the bits.
    """
    count: Counter[int] = Counter()
    for n, (site, layout) in enumerate(zip(index.sites, index.layouts)):
        if is_nested(layout):
            experts = range(site.num_experts) if own is None else own[n]
            of_size = {
                at_level(site, layout, bits).nbytes: bits for bits in LEVELS if bits <= layout.gate_up_format.bits
            }
            count.update(of_size[layout.size_of(expert)] for expert in experts)
    if not count:
        return None
    each = ", ".join(f"{number} in {bits} bits" for bits, number in sorted(count.items()))
    return f"experts are in nested precision, which is lossy: {each}; `moe evaluate` measures what it changes"


def bytes_of(bits: str, budget: str | None) -> int:
    """What offload.bits=auto or upgrade may spend. Raises ValueError for a budget that is no number of bytes."""
    parsed = None if budget is None else parse_budget(budget)
    if parsed is None or parsed.kind != "bytes":
        raise ValueError(f"offload.bits={bits} shares out a number of bytes; set offload.budget=6GiB, not {budget}")
    return int(parsed.value)


def check_bits(bits: str, store: str, device: torch.device, *, is_fixed: bool) -> None:
    """Raises ValueError where bits cannot be what a budget buys. is_fixed: no rank will hold other experts later."""
    if device.type != "cpu":
        why_not = "a slot on a GPU takes the memory of the largest expert, whatever lies in it"
    elif store == "ram":
        why_not = "all experts stay in slots, beside which offload.store=ram would hold each a second time"
    elif not is_fixed:
        why_not = "a cluster's hosts and placement.online move experts to ranks whose budget bought them other bits"
    else:
        return
    if bits in BY_BUDGET:
        raise ValueError(f"offload.bits={bits} cannot be served: {why_not}; set offload.bits=2, 3, 4 or 8")


def slots_for(bits: str, budget: str | None, index: ExpertIndex, own: Sequence[Sequence[int]], room: int) -> int:
    """Slots that `budget` buys; where experts differ in size, one each. own: experts by layer that ask for slots.

    room: bytes that are free. Slots stand as far apart as the largest; on a host what a smaller expert leaves of its
    own is never touched, and so takes no memory. Raises ValueError where they do not fit.
    """
    if not index.is_mixed:
        sizes = [layout.nbytes for layout in index.layouts]
        return resolve_slots(budget, sizes=sizes, counts=[len(of) for of in own], available_bytes=room)
    nbytes = sum(layout.size_of(expert) for layout, of in zip(index.layouts, own) for expert in of)
    if bits == "upgrade":  # what they will take
        most = sum(layout.nbytes * len(of) for layout, of in zip(index.layouts, own))
        nbytes = min(bytes_of(bits, budget), most)
    if nbytes > room:
        raise ValueError(f"experts take {format_bytes(nbytes)}, free are {format_bytes(room)}; lower offload.budget")
    return sum(map(len, own))


def sizes_of(index: ExpertIndex) -> list[list[int]]:
    """Bytes of an expert at each of LEVELS, by layer."""
    return [[at_level(s, l, bits).nbytes for bits in LEVELS] for s, l in zip(index.sites, index.layouts)]


def read_sensitivity(checkpoint: Checkpoint) -> list[list[Sensitivity]]:
    """By layer and expert, from packed.json."""
    said = (checkpoint.packed or {}).get("nested", {})
    try:
        return [
            [Sensitivity(float(e), tuple(map(float, of)), int(uses)) for (e, of), uses in zip(*layer, strict=True)]
            for layer in zip(said["losses"], said["uses"], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.folder} does not say what bits are worth; pack the original again") from error


def plan_bits(
    worth: Sequence[Sequence[Sensitivity]],
    sizes: Sequence[Sequence[int]],
    budget: int,
    held: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[list[int]]:
    """Bits of each expert, by layer, that take no more than `budget` bytes of any rank. sizes: as `sizes_of` returns
    them; held: experts by rank and layer, each at least once; None = one has all.

    Begins with 2 bits of all and buys, one by one, the plane that takes most error from answers per byte: the error of
    an expert counts as a share of its layer's answers, and so as often as it is asked. What no longer fits is passed
    over. Deterministic: ties go to the first layer and expert. Raises ValueError where 2 bits of all are too much.
    """
    bits = [[LEVELS[0]] * len(layer) for layer in worth]
    left = bytes_left(sizes, bits, budget, held)
    _buy(worth, sizes, bits, left, held, is_frugal=False)
    return bits


def bytes_left(
    sizes: Sequence[Sequence[int]],
    bits: Sequence[Sequence[int]],
    budget: int,
    held: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[int]:
    """Of each rank's budget beside experts in so many bits. Raises ValueError where they are too much."""
    held = _held(bits, held)
    left = [
        budget - sum(size[LEVELS.index(of[expert])] for size, of, own in zip(sizes, bits, layers) for expert in own)
        for layers in held
    ]
    if min(left) < 0:
        raise ValueError(
            f"offload.budget ({format_bytes(budget)}) must hold 2 bits of every expert "
            f"({format_bytes(budget - min(left))}), as all stay in memory; raise it, or set offload.bits=2, which "
            "keeps the rest on disk"
        )
    return left


def _held(
    of: Sequence[Sequence[Any]], held: Sequence[Sequence[Sequence[int]]] | None
) -> Sequence[Sequence[Sequence[int]]]:
    """Experts by rank and layer; where nobody says them, one rank has all. of: something of each, by layer."""
    return [[range(len(layer)) for layer in of]] if held is None else held


def more_bits(
    counts: Sequence[Sequence[int]],
    worth: Sequence[Sequence[Sensitivity]],
    sizes: Sequence[Sequence[int]],
    bits: Sequence[Sequence[int]],
    budget: int,
    held: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[list[int]]:
    """Bits of each expert from now on, no fewer than `bits`, by how often they were asked; as `plan_bits` else.

    counts: uses by layer and expert. Spends half of what a budget has left, so that what is asked later finds some; all
    of it where half buys no plane. An expert that was never asked, or that a plane would not make better, gets none but
    what costs no further page.
    """
    used = _worth_now(counts, worth)
    left = bytes_left(sizes, bits, budget, held)
    for room in ([nbytes // 2 for nbytes in left], left):
        more = [list(of) for of in bits]
        _buy(used, sizes, more, room, held, is_frugal=True)
        if more != bits:
            break
    return more


def _worth_now(counts: Sequence[Sequence[int]], worth: Sequence[Sequence[Sensitivity]]) -> list[list[Sensitivity]]:
    """The same where each expert was asked `counts` times. Those that calibration never asked are like the others of
    their layer."""
    found = []
    for layer, asked in zip(worth, counts):
        each = [None if not of.uses else (of.energy / of.uses, *(loss / of.uses for loss in of.losses)) for of in layer]
        known = [of for of in each if of is not None] or [(0.0,) * (1 + len(LEVELS))]
        mean = tuple(sum(values) / len(known) for values in zip(*known))
        found.append([_times(n, mean if of is None else of) for n, of in zip(asked, each)])
    return found


def _times(count: int, of: tuple[float, ...]) -> Sensitivity:
    """of: energy and losses of one use."""
    energy, *losses = (count * value for value in of)
    return Sensitivity(energy, tuple(losses), count)


def _buy(
    worth: Sequence[Sequence[Sensitivity]],
    sizes: Sequence[Sequence[int]],
    bits: list[list[int]],
    left: list[int],
    held: Sequence[Sequence[Sequence[int]]] | None,
    is_frugal: bool,
) -> None:
    """Raises `bits`, plane by plane, and lowers `left`, bytes of each rank.

    is_frugal: planes that take nothing from the error are not bought, but those that cost no further page.
    """
    holders: list[list[list[int]]] = [[[] for _ in layer] for layer in worth]
    for rank, layers in enumerate(_held(worth, held)):
        for of, own in zip(holders, layers):
            for expert in own:
                of[expert].append(rank)
    energy = [sum(expert.energy for expert in layer) or 1.0 for layer in worth]
    heads: list[tuple[float, int, int]] = []

    def offer(layer: int, expert: int) -> None:
        at = LEVELS.index(bits[layer][expert])
        if at + 1 < len(LEVELS):
            of, cost = worth[layer][expert].losses, sizes[layer][at + 1] - sizes[layer][at]
            gain = (of[at] - of[at + 1]) / energy[layer] / max(1, cost)
            if gain > 0 or not (is_frugal and cost):
                heapq.heappush(heads, (-gain, layer, expert))

    for layer, experts in enumerate(worth):
        for expert in range(len(experts)):
            offer(layer, expert)
    while heads:
        _, layer, expert = heapq.heappop(heads)
        at = LEVELS.index(bits[layer][expert])
        cost = sizes[layer][at + 1] - sizes[layer][at]
        ranks = holders[layer][expert]
        if all(cost <= left[rank] for rank in ranks):
            for rank in ranks:
                left[rank] -= cost
            bits[layer][expert] = LEVELS[at + 1]
            offer(layer, expert)


def written_checksum(checkpoint: Checkpoint, layer: int, expert: int, bits: int) -> int:
    """Of the expert's first `bits` bits, as `pack` wrote it. Raises ValueError where it did not."""
    said: Any = (checkpoint.packed or {}).get("nested", {}).get("checksums")
    try:
        return int(said[layer][expert][LEVELS.index(bits)])
    except (TypeError, IndexError, ValueError):
        raise ValueError(f"{checkpoint.folder}: checksums of layer {layer} are missing; pack again") from None


def _cut(checkpoint: Checkpoint, index: ExpertIndex, bits: Sequence[Sequence[int]], is_growing: bool) -> ExpertIndex:
    """is_growing: slots have places for all bits."""
    layouts, parts, sums = [], [], []
    for layer, (site, whole, chosen) in enumerate(zip(index.sites, index.layouts, bits)):
        levels = {b: at_level(site, whole, b) for b in set(chosen)}
        sizes = tuple(levels[b].nbytes for b in chosen)
        layout = whole if is_growing else levels[max(chosen)]
        layouts.append(layout.of_sizes(sizes) if set(sizes) != {layout.nbytes} else layout)
        parts.append(tuple(_first_bits(index, layer, e, levels[b], b) for e, b in enumerate(chosen)))
        sums.append(tuple(written_checksum(checkpoint, layer, e, b) for e, b in enumerate(chosen)))
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
