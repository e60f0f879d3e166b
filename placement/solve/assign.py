"""Simulated annealing of one layer's experts, one copy each, in compiled code (assign.c).

What keeps the load on other traffic are second moments (`evenness`), capped by what the EPLB-style greedy's ranks have.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline, Pace
from moe.placement.helper import ASSIGN, load_helper
from moe.placement.solve.evenness import moments_of, moments_of_ranks
from moe.placement.solve.program import Floats, Ints
from moe.placement.solve.schedule import Schedule
from moe.placement.solve.swaps import CopyOptions

MOMENT_PRICE = 0.25  # rank visits, times the ranks: of a pair in a piece's mean load squared over the load
MOMENT_CAP = 0.9  # of the greedy's greatest
CAP_PRICE = 10.0  # of a pair above the cap of all tokens
SEVERITY = (0.1, 1.0)  # of the prices, first and last
TEMPERATURES = (0.2, 0.01)  # first and last, in uses of the mean expert
PER_ROUND = 600  # moves tried per round and expert
MOST_TOKENS = 16384  # that are annealed; loads are of all
SKETCH = 4096  # tokens of a first, short search
SKETCH_PART = 0.1  # of the rounds, and at most of the time
SKETCH_SECONDS = 4.5  # at most, of all layers: a first plan is there after 5 s however much time there is


class Limits(NamedTuple):
    """What a rank may serve: pairs of all tokens, and their second moment over pieces of them.

    load: [E] pairs of each expert; cap: above it a pair costs `CAP_PRICE` rank visits. moments: [E, E] rank visits,
    symmetric, of which a rank has the sum over its experts squared; moment_cap: up to here they cost nothing.
    """

    load: Floats
    cap: float
    moments: Floats
    moment_cap: float

    @staticmethod
    def of(expert_ids: NDArray[np.integer[Any]], greedy: Ints, num_ranks: int, slack: float) -> "Limits":
        """Of a layer's tokens, [N, K] with -1 = none, by what the greedy's assignment [E] has."""
        hosted = greedy[:, None] == np.arange(num_ranks)  # [E, G]
        load = np.bincount(expert_ids[expert_ids >= 0], minlength=len(greedy)).astype(np.float64)
        moments = MOMENT_PRICE * num_ranks * moments_of(expert_ids, len(greedy), num_ranks)
        moment_cap = MOMENT_CAP * float(moments_of_ranks(moments, hosted).max())
        return Limits(load, slack * float((load @ hosted).max()), moments, slack * moment_cap)

    def times(self, share: float) -> "Limits":
        """For so much of the traffic."""
        return Limits(share * self.load, share * self.cap, share * self.moments, share * self.moment_cap)


class Layer(NamedTuple):
    """What is placed: expert_ids [N, K], -1 = none; pin [N], a rank that the token touches anyway, -1 = none."""

    expert_ids: NDArray[np.integer[Any]]
    pin: NDArray[np.integer[Any]] | None
    limits: Limits

    def sample(self, count: int, seed: int) -> "Layer":
        """`count` of the tokens, with the limits at their share of the pairs."""
        tokens = len(self.expert_ids)
        if tokens <= count:
            return self
        few = np.sort(np.random.default_rng(seed).permutation(tokens)[:count])
        ids = self.expert_ids[few]
        share = (ids >= 0).sum() / max((self.expert_ids >= 0).sum(), 1)
        return Layer(ids, None if self.pin is None else self.pin[few], self.limits.times(share))


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

    Cost: ranks touched (pins among them) + node_weight x nodes touched + the prices of load and second moments above
    their caps. A move swaps two experts, or an expert and an empty place. O(iterations (N / 64 + E / G)). Raises
    ValueError for sizes that do not fit, RuntimeError without the helper.
    """
    helper = load_helper()
    if helper is None:
        raise RuntimeError("the compiled helper is not there; reinstall with gcc or clang at hand")
    experts, limits = len(now), layer.limits
    places = -(-experts // num_ranks)
    tokens, top = layer.expert_ids.shape
    ids = np.ascontiguousarray(layer.expert_ids, np.int16)
    pin = np.full(tokens, -1, np.int32) if layer.pin is None else np.ascontiguousarray(layer.pin, np.int32)
    node = np.ascontiguousarray(options.nodes or np.zeros(num_ranks), np.int32)
    nodes = int(node.max()) + 1 if options.node_weight else 0
    if limits.load.shape != (experts,) or limits.moments.shape != (experts, experts) or pin.shape != (tokens,):
        raise ValueError(f"loads {limits.load.shape}, moments {limits.moments.shape}, pins {pin.shape} do not fit")
    if ids.max(initial=-1) >= experts or pin.max(initial=-1) >= num_ranks or node.shape != (num_ranks,):
        raise ValueError(f"expert {ids.max(initial=-1)} or rank {pin.max(initial=-1)} is out of range, or {node.shape}")
    empty = num_ranks * places - experts
    loads, moments = np.pad(limits.load, (0, empty)), np.pad(limits.moments, (0, empty))
    state = [_places(ranks, num_ranks, places) for ranks in (now, best)]
    arrays: list[NDArray[Any]] = [loads, moments, ids, pin, node, *state]
    pace = Pace(schedule.deadline, schedule.iterations)
    call = ASSIGN.pack(
        tokens, top, num_ranks * places, num_ranks, places, nodes, seed, options.node_weight, limits.cap, CAP_PRICE,
        limits.moment_cap, *schedule.packed(pace), *(a.ctypes.data for a in arrays),
    )  # fmt: skip
    with pace.asked():
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
