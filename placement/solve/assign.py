"""Simulated annealing of one layer's experts, one copy each, in compiled code (assign.c).

A plan is fitted on some traffic and serves other. What keeps its load there is that the busiest rank is capped not only
over all of the fitted tokens, but over random halves of them: in none may it be far above what the EPLB-style greedy's
plan has there. A rank whose experts are hot together is over its cap in the halves that have many of these tokens.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline, Pace
from moe.placement.helper import ASSIGN, load_helper
from moe.placement.solve.program import Floats, Ints
from moe.placement.solve.schedule import Schedule
from moe.placement.solve.swaps import CopyOptions

PIECES_OF_TRAFFIC = 16  # consecutive tokens each; a half is eight of them
HALVES = 31
HALF_CAP = 0.98  # of the greedy's busiest rank in a half
HALF_PRICES = ((4, 0.15), (8, 0.3))  # from so many ranks on: rank visits that a pair above the cap of a half costs
CAP_PRICE = 10.0  # of a pair above the cap of all tokens
SEVERITY = (0.1, 1.0)  # of the prices, first and last
TEMPERATURES = (0.2, 0.01)  # first and last, in uses of the mean expert
PER_ROUND = 600  # moves tried per round and expert
LANES = 8  # what the compiled code adds at once
MOST_TOKENS = 16384  # that are annealed; loads are of all
SKETCH = 4096  # tokens of a first, short search
SKETCH_PART = 0.1  # of the rounds, and at most of the time
SKETCH_SECONDS = 4.5  # at most, of all layers: a first plan is there after 5 s however much time there is


class Limits(NamedTuple):
    """Caps on what a rank serves, over all tokens and over parts of them.

    loads: [E, F] pairs of each expert in each part; caps: [F]; prices: [F] rank visits that a pair above a cap costs.
    """

    loads: Floats
    caps: Floats
    prices: Floats

    @staticmethod
    def of(expert_ids: NDArray[np.integer[Any]], greedy: Ints, num_ranks: int, slack: float) -> "Limits":
        """Of a layer's tokens, [N, K] with -1 = none, by what the greedy's assignment [E] has: all, and the halves."""
        tokens, experts = len(expert_ids), len(greedy)
        piece = np.arange(tokens) * PIECES_OF_TRAFFIC // max(tokens, 1)
        flat = (piece[:, None] * (experts + 1) + np.where(expert_ids < 0, experts, expert_ids)).reshape(-1)
        pieces = np.bincount(flat, minlength=PIECES_OF_TRAFFIC * (experts + 1)).reshape(PIECES_OF_TRAFFIC, -1)[:, :-1]
        rng = np.random.default_rng(0)
        halves = np.stack([rng.permutation(PIECES_OF_TRAFFIC) < PIECES_OF_TRAFFIC // 2 for _ in range(HALVES)])
        loads = np.concatenate([pieces.sum(axis=0)[None], halves @ pieces]).T.astype(np.float64)
        busiest = np.stack([np.bincount(greedy, weights=part, minlength=num_ranks) for part in loads.T]).max(axis=1)
        price = max((p for ranks, p in HALF_PRICES if num_ranks >= ranks), default=HALF_PRICES[0][1])
        factors, prices = np.full(HALVES + 1, HALF_CAP), np.full(HALVES + 1, price)
        factors[0], prices[0] = 1.0, CAP_PRICE
        return Limits(loads, slack * factors * busiest, prices)

    @staticmethod
    def one(load: Floats, cap: float, price: float = CAP_PRICE) -> "Limits":
        """A cap on all tokens, none on parts of them."""
        return Limits(load[:, None].astype(np.float64), np.array([cap]), np.array([price]))


class Layer(NamedTuple):
    """What is placed: expert_ids [N, K], -1 = none; pin [N], a rank that the token touches anyway, -1 = none."""

    expert_ids: NDArray[np.integer[Any]]
    pin: NDArray[np.integer[Any]] | None
    limits: Limits

    def sample(self, count: int, seed: int) -> "Layer":
        """`count` of the tokens, with the caps at their share of the pairs."""
        tokens = len(self.expert_ids)
        if tokens <= count:
            return self
        few = np.sort(np.random.default_rng(seed).permutation(tokens)[:count])
        ids = self.expert_ids[few]
        share = (ids >= 0).sum() / max((self.expert_ids >= 0).sum(), 1)
        limits = self.limits._replace(loads=self.limits.loads * share, caps=self.limits.caps * share)
        return Layer(ids, None if self.pin is None else self.pin[few], limits)


def anneal_assignment(
    layer: Layer,
    now: Ints,
    best: Ints,
    num_ranks: int,
    *,
    schedule: Schedule,
    seed: int,
    options: CopyOptions,
) -> tuple[Ints, Ints, float]:
    """(where `now` ended, the best seen, its cost): ranks of experts, [E], with ceil(E / G) places on each.

    Cost: ranks touched (pins among them) + node_weight x nodes touched + the prices of load above the caps. A move
    swaps two experts, or an expert and an empty place. O(iterations N / 64). Raises ValueError for sizes that do not
    fit, RuntimeError without the helper.
    """
    helper = load_helper()
    if helper is None:
        raise RuntimeError("the compiled helper is not there; reinstall with gcc or clang at hand")
    experts, (loads, caps, prices) = len(now), layer.limits
    places = -(-experts // num_ranks)
    tokens, top = layer.expert_ids.shape
    lanes = -(-len(caps) // LANES) * LANES
    ids = np.ascontiguousarray(layer.expert_ids, np.int16)
    pin = np.full(tokens, -1, np.int32) if layer.pin is None else np.ascontiguousarray(layer.pin, np.int32)
    node = np.ascontiguousarray(options.nodes or np.zeros(num_ranks), np.int32)
    nodes = int(node.max()) + 1 if options.node_weight else 0
    wide = np.zeros((num_ranks * places, lanes))
    if loads.shape != (experts, len(caps)) or caps.shape != prices.shape or pin.shape != (tokens,):
        raise ValueError(f"loads {loads.shape}, {len(caps)} caps, {len(prices)} prices, pins {pin.shape} do not fit")
    if ids.max(initial=-1) >= experts or pin.max(initial=-1) >= num_ranks or node.shape != (num_ranks,):
        raise ValueError(f"expert {ids.max(initial=-1)} or rank {pin.max(initial=-1)} is out of range, or {node.shape}")
    wide[:experts, : len(caps)] = loads
    all_caps, all_prices = (np.pad(a, (0, lanes - len(caps))) for a in (caps, prices))
    state = [_places(ranks, num_ranks, places) for ranks in (now, best)]
    arrays: list[NDArray[Any]] = [all_caps, all_prices, wide, ids, pin, node, *state]
    pace = Pace(schedule.deadline, schedule.iterations)
    call = ASSIGN.pack(
        tokens, top, num_ranks * places, num_ranks, places, nodes, lanes, seed, options.node_weight,
        *schedule.packed(pace), *(a.ctypes.data for a in arrays),
    )  # fmt: skip
    cost = float(helper.moe_assign(call))
    if cost < 0:
        raise MemoryError(f"placing {tokens} tokens needs about {tokens * experts // 8} bytes; fit on fewer tokens")
    ranks_of = np.repeat(np.arange(num_ranks), places)
    out = np.empty((2, num_ranks * places), np.int64)
    for row, held in zip(out, state):
        row[held] = ranks_of
    return out[0, :experts], out[1, :experts], cost


def search_assignment(
    layer: Layer, start: Ints, num_ranks: int, *, rounds: float, seed: int, deadline: Deadline, options: CopyOptions
) -> Ints:
    """Ranks [E] for one layer, never of more cost than `start`. The same seed and rounds give the same ranks unless
    time is too short for them; then the search cools faster and ends with the deadline."""
    if deadline.is_over():
        return start
    uses = float((layer.expert_ids >= 0).sum()) / len(start)
    first, last = (heat * uses + 1e-9 for heat in TEMPERATURES)
    schedule = Schedule(int(rounds * PER_ROUND * len(start)), (first, last), SEVERITY, deadline)
    _, best, _ = anneal_assignment(layer, start, start, num_ranks, schedule=schedule, seed=seed, options=options)
    costed = Schedule(0)
    _, best, _ = anneal_assignment(layer, start, best, num_ranks, schedule=costed, seed=0, options=options)
    return best


def _places(ranks: Ints, num_ranks: int, places: int) -> NDArray[np.int32]:
    """Items by place, [G * places]: each rank's experts in order, then empty places (numbered from E on)."""
    free = places - np.bincount(ranks, minlength=num_ranks)
    if len(free) > num_ranks or free.min() < 0:
        raise ValueError(f"ranks hold {places - free} experts, they have {places} places each")
    return np.argsort(np.concatenate([ranks, np.repeat(np.arange(num_ranks), free)]), kind="stable").astype(np.int32)
