"""What a step costs, from figures of the machine alone: sizes, figures and uses in, seconds by term out. Pure.

    overhead    what a step and its layers cost whatever the weights
    dense       weights outside of the experts, read and multiplied
    attention   keys and values of all sequences
    experts     weights of the distinct experts that the step's tokens take
    waiting     for reads: what is read while the rest of the layer is computed is free, the last expert to come is not
    exchange    between ranks: two rounds a layer

Nothing here is fitted to a run. Reading ahead is not counted: it can only hide part of `waiting`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.machine import How, Machine
from moe.placement.topology import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a model. dense_weights: numbers that every token is multiplied with; dense_bytes: all that is not in slots.

    expert_weights, expert_bytes: of one. kv_bytes: of a token, all layers. query_size: heads x elements of a head.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """How it is served. sequences, slots: of all ranks together; context: tokens of a sequence so far.

    link: between ranks, None for one.
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


class Visits(NamedTuple):
    """Of each rank [G] in every layer of some steps [N]: its distinct experts, those not in a slot, its pairs."""

    distinct: NDArray[Any]
    misses: NDArray[Any]
    pairs: NDArray[Any]


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
    over, layers = machine.overhead, sizes.num_layers
    experts, waiting, handing = _visit_seconds(sizes, machine, use, visits)
    per_step = over.step + own * over.step_sequence + layers * (over.layer + own * over.layer_sequence)
    return Terms(
        overhead=per_step + handing * layers,
        dense=sizes.dense_weights * machine.seconds_per_weight("dense", sizes.dtype, own, use.threads),
        attention=own * use.context * sizes.kv_bytes / machine.attention.kv_bytes_per_s,
        experts=experts * layers,
        waiting=waiting * layers,
        exchange=layers * _round_trip(sizes, use, own),
    )


def prefill_step(sizes: Sizes, machine: Machine, use: Use, tokens: int) -> Terms:
    """One prompt's `tokens` at once; experts as if all were equally likely, and in slots by their share."""
    over, layers = machine.overhead, sizes.num_layers
    distinct = sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** tokens)
    absent = 1 - min(1.0, use.slots / (layers * sizes.num_experts))
    one = np.ones((1, 1))
    visits = Visits(one * distinct, np.ceil(one * distinct * absent).astype(np.int64), one * tokens * sizes.top_k)
    experts, waiting, handing = _visit_seconds(sizes, machine, use, visits)
    return Terms(
        overhead=over.step + over.step_sequence + layers * (over.layer + over.layer_sequence + handing),
        dense=sizes.dense_weights * machine.seconds_per_weight("dense", sizes.dtype, tokens, use.threads),
        attention=layers * tokens**2 * sizes.query_size / machine.attention.prompt_macs_per_s,
        experts=experts * layers,
        waiting=waiting * layers,
        exchange=layers * _round_trip(sizes, use, tokens),
    )


def _visit_seconds(sizes: Sizes, machine: Machine, use: Use, visits: Visits) -> tuple[float, float, float]:
    """Means over layers and steps, the slowest rank's each: (computing, waiting, handing reads over)."""
    read = 0.0
    if visits.misses.any():
        rate = machine.read_bytes_per_s(use.disk, use.how, sizes.expert_bytes, use.readers)
        alone = machine.read_bytes_per_s(use.disk, use.how, sizes.expert_bytes, 1)
        if rate is None or alone is None:
            raise ValueError(f"{use.how} reads of {use.disk or 'this disk'} were not measured; `moe probe` it")
        read, single = sizes.expert_bytes / rate, sizes.expert_bytes / alone
    known: dict[tuple[float, float], float] = {}
    compute, wait, hand = (np.zeros(visits.distinct.shape) for _ in range(3))
    for at, distinct in np.ndenumerate(visits.distinct):
        if not distinct:
            continue
        misses, rows = int(visits.misses[at]), float(visits.pairs[at] / distinct)
        key = float(distinct), rows
        if key not in known:
            each = machine.seconds_per_weight("expert", sizes.expert_format, rows, use.threads)
            known[key] = float(distinct) * sizes.expert_weights * each
        compute[at] = known[key]
        if misses:
            last = float(compute[at]) / distinct
            reading = single if misses == 1 else misses * read
            wait[at] = max(0.0, reading - (float(compute[at]) - last))
            hand[at] = machine.overhead.miss + (misses - 1) * machine.overhead.wave
    slowest = (compute + wait + hand).argmax(axis=0)
    return tuple(float(np.take_along_axis(a, slowest[None], 0).mean()) for a in (compute, wait, hand))  # type: ignore[return-value]


def _round_trip(sizes: Sizes, use: Use, tokens: int) -> float:
    """Out a row for each token and rank that has one of its experts, back a row for each pair, from other ranks."""
    if use.ranks == 1:
        return 0.0
    if use.link is None:
        raise ValueError(f"{use.ranks} ranks need a link; give --link BYTES/s,SECONDS")
    width = sizes.hidden_size * {"float32": 4}.get(sizes.dtype, 2)
    away = tokens * sizes.top_k * (use.ranks - 1) / use.ranks  # pairs; rows out are at most as many
    return 2 * use.link.seconds(away * width)
