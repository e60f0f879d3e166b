"""What a step costs, from figures of the machine alone: sizes, figures and uses in, seconds by term out. Pure.

    overhead    what a step and its layers cost whatever the weights
    dense       weights outside of the experts, read and multiplied
    attention   keys and values of all sequences
    experts     weights of the distinct experts that the step's tokens take
    waiting     for reads: what is read while the rest of the layer is computed is free, the last expert to come is not;
                nor is what was foreseen and fits the time that the layer before leaves its readers
    exchange    between ranks: two rounds a layer, and the lock step

Ranks of one machine (no link) share its cores and its memory: with more threads than cores all takes so many times
longer, and weights come no faster than memory gives them to so many at once. Nothing here is fitted to a run.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.machine import How, Machine, Overhead, Work
from moe.placement.topology import Link

WIDTHS = {"float32": 4, "bf12": 1.53}  # bytes of an element; others have 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a model. dense_weights: numbers that every token is multiplied with; dense_bytes: all that is not in slots.

    expert_weights, expert_bytes: of one; reads: that bring it; copied_bytes: of it, that a read cannot put where they
    belong; stored_bytes: of it in its file. dense_format: of linear layers. kv_bytes: of a token, all layers.
    query_size: heads x elements of a head.
    """

    num_layers: int
    num_experts: int  # of a layer
    top_k: int
    hidden_size: int
    query_size: int
    dense_weights: int
    dense_bytes: int
    dtype: str
    expert_weights: int
    expert_bytes: int
    expert_format: str
    kv_bytes: int
    reads: int = 1
    copied_bytes: int = 0
    stored_bytes: int | None = None  # as in slots
    dense_format: str = ""  # as dtype

    @property
    def read_bytes(self) -> int:
        """Of an expert."""
        return self.expert_bytes if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """How it is served. sequences, slots: of all ranks together; context: tokens of a sequence so far.

    link: between ranks, None where all are on this machine. beside: replicas on this machine, this one included.
    ahead: share of the steps in which is read ahead. away: share of the pairs whose expert is on another rank than
    their token, None: all ranks are as likely.
    """

    sequences: int
    context: int
    slots: int
    threads: int = 1
    readers: int = 2
    how: How = "direct"
    disk: str = ""
    ranks: int = 1
    link: Link | None = None
    beside: int = 1
    ahead: float = 0.0
    away: float | None = None

    @property
    def local_ranks(self) -> int:
        """Processes of one machine that compute at the same time."""
        return self.ranks * self.beside if self.link is None else 1


class Visits(NamedTuple):
    """Of each rank [G] in every layer of some steps [N]: its distinct experts, those not in a slot, its pairs.

    foreseen: of the misses, those that the layer before told of.
    """

    distinct: NDArray[Any]
    misses: NDArray[Any]
    pairs: NDArray[Any]
    foreseen: NDArray[Any]


class Terms(NamedTuple):
    """Seconds of a step."""

    overhead: float
    dense: float
    attention: float
    experts: float
    waiting: float
    exchange: float

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def binds(self) -> str:
        """The largest term."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


def decode_step(sizes: Sizes, machine: Machine, use: Use, visits: Visits) -> Terms:
    """The mean step of `visits`, every sequence a token. Raises ValueError for what was not measured."""
    own = -(-use.sequences // use.ranks)
    attention, over = machine.step_costs()
    own_work = Terms(
        overhead=_overhead(over, sizes, use, own),
        dense=sizes.dense_weights * _per_weight(sizes, machine, use, "dense", own),
        attention=own * use.context * sizes.kv_bytes / attention.kv_bytes_per_s,
        experts=0.0,
        waiting=0.0,
        exchange=_exchange(sizes, machine, use, own),
    )
    return _with_experts(own_work, sizes, machine, use, visits)


def prefill_step(sizes: Sizes, machine: Machine, use: Use, tokens: int) -> Terms:
    """One prompt's `tokens` at once; experts as if all were equally likely, and in slots by their share."""
    (attention, over), layers = machine.step_costs(), sizes.num_layers
    distinct = sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** tokens)
    absent = 1 - min(1.0, use.slots / (layers * sizes.num_experts))
    one = np.ones((1, 1))
    misses = np.ceil(one * distinct * absent).astype(np.int64)
    visits = Visits(one * distinct, misses, one * tokens * sizes.top_k, 0 * misses)
    own_work = Terms(
        overhead=_overhead(over, sizes, use, 1),
        dense=sizes.dense_weights * _per_weight(sizes, machine, use, "dense", tokens),
        attention=layers * tokens**2 * sizes.query_size / attention.prompt_macs_per_s,
        experts=0.0,
        waiting=0.0,
        exchange=_exchange(sizes, machine, use, tokens),
    )
    return _with_experts(own_work, sizes, machine, use, visits)


def _overhead(over: Overhead, sizes: Sizes, use: Use, sequences: int) -> float:
    """Of a step of one rank, but for reads."""
    layer = over.layer + sequences * over.layer_sequence
    if use.ranks > 1 or _can_miss(sizes, use):
        layer += over.apart + sequences * over.apart_sequence
    return over.step + sequences * over.step_sequence + sizes.num_layers * layer


def _can_miss(sizes: Sizes, use: Use) -> bool:
    return use.slots < sizes.num_layers * sizes.num_experts


def _with_experts(rest: Terms, sizes: Sizes, machine: Machine, use: Use, visits: Visits) -> Terms:
    """`rest` is of all layers together, but for their experts."""
    layers = sizes.num_layers
    experts, waiting, handing = _visit_seconds(sizes, machine, use, visits, (rest.total - rest.exchange) / layers)
    crowd = max(1.0, use.local_ranks * use.threads / machine.cores)
    return Terms(
        overhead=crowd * (rest.overhead + handing * layers),
        dense=crowd * rest.dense,
        attention=crowd * rest.attention,
        experts=crowd * experts * layers,
        waiting=waiting * layers,
        exchange=crowd * rest.exchange,
    )


def _per_weight(sizes: Sizes, machine: Machine, use: Use, work: Work, rows: float) -> float:
    """Seconds, alone or as fast as memory gives it to all ranks of the machine."""
    kind = sizes.expert_format
    if work == "dense":
        is_measured = any((r.work, r.format) == ("dense", sizes.dense_format) for r in machine.rates)
        kind = sizes.dense_format if is_measured else sizes.dtype
    alone = machine.seconds_per_weight(work, kind, rows, use.threads)
    readers = use.local_ranks * use.threads
    if use.local_ranks == 1:
        return alone
    nbytes = WIDTHS.get(kind, 2) if work == "dense" else sizes.expert_bytes / sizes.expert_weights
    return max(alone, nbytes * use.local_ranks / machine.memory_bytes_per_s(readers))


class _Reading(NamedTuple):
    """Seconds of an expert: one that is read alone, and each of those that `readers` threads read at once."""

    alone: float
    each: float
    readers: int

    def seconds(self, misses: float) -> float:
        """As many at once as there are readers, the rest after them."""
        whole = math.floor(misses)
        return self._whole(whole) + (misses - whole) * (self._whole(whole + 1) - self._whole(whole))

    def _whole(self, misses: int) -> float:
        times, rest = divmod(misses, self.readers)
        return times * self.readers * self.each + (self.alone if rest == 1 else rest * self.each)


def _reading(sizes: Sizes, machine: Machine, use: Use) -> _Reading:
    size = sizes.read_bytes // sizes.reads
    rate = machine.read_bytes_per_s(use.disk, use.how, size, use.readers)
    single = machine.read_bytes_per_s(use.disk, use.how, size, 1)
    if rate is None or single is None:
        raise ValueError(f"{use.how} reads of {use.disk or 'this disk'} were not measured; `moe probe` it")
    alone = sizes.read_bytes / single + sizes.copied_bytes / machine.copy_bytes_per_s
    # ranks of one machine share its disk; a reader's own copy keeps it from its next read
    return _Reading(alone, max(sizes.read_bytes * use.local_ranks / rate, alone / use.readers), use.readers)


def _visit_seconds(sizes: Sizes, machine: Machine, use: Use, visits: Visits, rest: float) -> tuple[float, float, float]:
    """Means over layers and steps, the slowest rank's each: (computing, waiting, handing reads over).

    rest: of a layer without its experts, in which what was foreseen can be read.
    """
    _, over = machine.step_costs()
    reading = _reading(sizes, machine, use) if visits.misses.any() else _Reading(0.0, 0.0, 1)
    known: dict[tuple[float, float], float] = {}
    compute, wait, hand = (np.zeros(visits.distinct.shape) for _ in range(3))
    can_miss = _can_miss(sizes, use)
    for at, distinct in np.ndenumerate(visits.distinct):
        if not distinct:
            continue
        misses, rows = int(visits.misses[at]), float(visits.pairs[at] / distinct)
        key = float(distinct), rows
        if key not in known:
            known[key] = float(distinct) * sizes.expert_weights * _per_weight(sizes, machine, use, "expert", rows)
        compute[at] = known[key]
        hand[at] = over.waves if can_miss else 0.0
        if misses:
            last = float(compute[at]) / distinct
            plain = max(0.0, reading.seconds(misses) - float(compute[at]) + last)
            # the layer before took as long, and its own misses were read meanwhile
            room = max(0.0, rest + float(compute[at]) - misses * reading.each) / reading.alone
            early = min(float(visits.foreseen[at]), room)
            ahead = max(0.0, reading.seconds(misses - early) - float(compute[at]) + last)
            wait[at] = plain + use.ahead * (min(plain, ahead) - plain)
            tokens = visits.pairs[at] / sizes.top_k
            wave = over.wave + rows * over.wave_row
            further = _further_waves(misses, reading, float(compute[at]) - misses * last, last, wave)
            hand[at] += over.miss + tokens * over.miss_row + further * wave
    slowest = (compute + wait + hand).argmax(axis=0)
    return tuple(float(np.take_along_axis(a, slowest[None], 0).mean()) for a in (compute, wait, hand))  # type: ignore[return-value]


def _further_waves(misses: int, reading: _Reading, before: float, each: float, wave: float) -> int:
    """Waves after the first that brings experts: what has arrived while one is computed comes together in the next.

    before: seconds until the hits are computed; each: of an expert's computing; wave: what one costs beyond that.
    """
    clock, taken, waves = before, 0, 0
    while taken < misses:
        clock = max(clock, reading.alone + taken * reading.each)
        come = (
            misses if not reading.each else min(misses, math.floor((clock - reading.alone) / reading.each + 1e-9) + 1)
        )
        come = max(come, taken + 1)
        clock += (come - taken) * each + (wave if waves else 0.0)
        taken, waves = come, waves + 1
    return waves - 1


def _exchange(sizes: Sizes, machine: Machine, use: Use, tokens: int) -> float:
    """Out a row for each token and rank that has one of its experts, back a row for each pair, from other ranks."""
    if use.ranks == 1:
        return 0.0
    share = (use.ranks - 1) / use.ranks if use.away is None else use.away
    away = tokens * sizes.top_k * share  # pairs; rows out are at most as many
    nbytes = away * sizes.hidden_size * WIDTHS.get(sizes.dtype, 2)
    found = min(machine.exchange, key=lambda e: abs(e.ranks - use.ranks), default=None)
    if found is None and use.link is None:
        raise ValueError(f"{use.ranks} ranks need a link; give --link BYTES/s,SECONDS, or `moe probe` this machine")
    work = 0.0
    if found is not None:  # a message for every peer
        peers = (use.ranks - 1) / (found.ranks - 1)
        layer = peers * (found.layer + tokens * found.layer_sequence)
        work = peers * found.step + sizes.num_layers * (layer + (2 * nbytes * found.byte if use.link is None else 0))
    return work + (0.0 if use.link is None else sizes.num_layers * 2 * use.link.seconds(nbytes))
