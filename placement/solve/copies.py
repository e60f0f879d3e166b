"""Placement for what the dispatcher really sends: one copy per token and destination rank, not per expert.

A token's experts in one layer are a hyperedge; it costs as many copies as it touches ranks. Layers are independent
when attention stays at home, and coupled through the home rank when it moves with the token (coherent decode).
Experts and copies are annealed by compiled code (`assign.py`, `anneal.py`). Where that is absent or does not reach,
the search swaps experts: the change of all E^2 swaps is exact and comes from two matrix products; replicas are added
where a token comes anyway. The busiest rank's load is kept under a cap.
"""

import logging
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import NEVER, Deadline
from moe.placement.helper import MOST_RANKS, load_helper
from moe.placement.plan import Plan, check_capacity
from moe.placement.solve.anneal import VISITS, Caps, Price, home_ranks, search_layer, share_of_pairs
from moe.placement.solve.assign import (
    MOST_TOKENS,
    SKETCH,
    SKETCH_PART,
    SKETCH_SECONDS,
    Layer,
    Limits,
    search_assignment,
)
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.moment_price import JUDGED, MomentPrice, excess_spread, half_of
from moe.placement.solve.program import Floats, Ints
from moe.placement.solve.swaps import CopyOptions, LayerSearch, Single, Touched
from moe.placement.stats.affinity import check_routes, expert_load, heaviest_experts
from moe.placement.trace import RoutingTrace

log = logging.getLogger(__name__)


def solve_copies(
    trace: RoutingTrace,
    num_ranks: int,
    *,
    slots_per_rank: int | None = None,
    options: CopyOptions | None = None,
    price: Price = VISITS,
    progress: Callable[[float], None] = lambda share: None,
) -> Plan:
    """Place experts so that tokens touch few ranks, at a load no worse than the EPLB-style greedy at equal memory.

    Without replicas a rank holds ceil(E / G) experts at most; one may move into an empty place. A short search comes
    to every layer before the long one does.

    slots_per_rank: copies per rank and layer; None = ceil(E / G) without replicas. price: of annealed replicas; without
    replicas bytes are visits times a price and a constant, so that it changes nothing. progress: called with the share
    that is done. Interrupted (Ctrl-C), it returns the best plan so far: the greedy's layers
    where it did not come.
    """
    options = options or CopyOptions()
    deadline = Deadline.of(options.seconds)
    check_routes(trace)
    slots = -(-trace.num_experts // num_ranks) if slots_per_rank is None else slots_per_rank
    check_capacity(trace.num_experts, num_ranks, slots)
    layers = _Layers(trace, num_ranks, slots_per_rank, options, price)
    try:
        for sweep, (part, first, last) in enumerate(layers.sweeps(deadline)):
            for layer in range(trace.num_layers):
                done = first + (last - first) * (layer + 1) / trace.num_layers
                layers.search(layer, sweep, part, deadline.at(done))
                progress(done)
    except KeyboardInterrupt:
        log.warning("interrupted: this is the best plan so far")
    return Plan.from_hosted(
        layers.hosted, model=trace.model, solver="copies", objective="ranks touched / token / layer",
        value=float(np.mean(ranks_touched(trace, layers.hosted))), seconds=deadline.spent(),
    )  # fmt: skip


class _Layers:
    """The layers' plans so far, [L, E, G], and how one of them is searched."""

    def __init__(self, trace: RoutingTrace, ranks: int, slots: int | None, options: CopyOptions, price: Price) -> None:
        self.trace, self.ranks, self.slots, self.options, self.price = trace, ranks, slots, options, price
        self.load = expert_load(trace)
        self.reference = eplb_greedy(self.load, ranks, slots)
        self.single = self.reference if slots is None else eplb_greedy(self.load, ranks)  # its cap without replicas
        self.rows, self.hosted = self.single.assignment.copy(), self.reference.hosted.copy()
        self.homes = heaviest_experts(trace) if options.coherent else None
        self.moment_price = MomentPrice()
        self.rng = np.random.default_rng(options.seed)
        self.compiled = load_helper() is not None
        self.anneals = slots is not None and not options.coherent and not options.node_weight
        self.anneals = self.anneals and ranks <= MOST_RANKS and self.compiled

    def sweeps(self, deadline: Deadline = NEVER) -> list[tuple[float, float, float]]:
        """(part of the rounds, where in the time it begins, where it ends): a first plan of every layer comes early."""
        whole = 2 if self.options.coherent else 1
        early = SKETCH_PART if self.compiled else 0.0
        if deadline.until < math.inf:
            early = min(early, SKETCH_SECONDS / max(deadline.until - deadline.began, 1e-9))
        bounds = np.linspace(early, 1.0, whole + 1)
        full = [(1.0, float(a), float(b)) for a, b in pairwise(bounds)]
        return [(SKETCH_PART, 0.0, early), *full] if self.compiled else full

    def search(self, layer: int, sweep: int, part: float, until: Deadline) -> None:
        if until.is_over():
            return
        ids = self.trace.expert_ids[:, layer]
        seed = (self.options.seed * len(self.sweeps()) + sweep) * self.trace.num_layers + layer
        if self.anneals:
            self._anneal(layer, part, seed, until)
            return
        pin = None
        if self.homes is not None and layer > 0:
            pin = np.append(self.rows[layer - 1], -1)[self.homes[:, layer - 1]]  # -1: no expert, no rank
        last = sweep == len(self.sweeps()) - 1
        has_replicas = self.slots is not None and last
        middle = until.part(0.3) if has_replicas else until
        if self.compiled:
            limits = Limits.of(ids, self.single.assignment[layer], self.ranks, self.options.slack)
            todo = Layer(ids, pin, limits).sample(SKETCH if part < 1 else MOST_TOKENS, seed)
            rounds = 200 if self.options.rounds is None else self.options.rounds
            self.rows[layer] = search_assignment(
                todo,
                self.rows[layer],
                self.ranks,
                rounds=rounds * part,
                seed=seed,
                deadline=middle,
                options=self.options,
            )
        if has_replicas or not self.compiled:
            self._swap(layer, pin, middle, until, has_replicas)
        if not has_replicas:
            self.hosted[layer] = self.rows[layer][:, None] == np.arange(self.ranks)

    def _anneal(self, layer: int, part: float, seed: int, until: Deadline) -> None:
        """A sketch (part < 1) is fitted on half of the tokens; what the others say of it is learnt."""
        assert self.slots is not None
        ids, start = self.trace.expert_ids[:, layer], self.hosted[layer]
        half = half_of(self.trace.sequence_lengths, seed) if part < 1 else None
        if half is not None:
            ids, others = ids[half], ids[~half]
            pairs = np.bincount(ids[ids >= 0], minlength=len(start)).astype(np.float64)
            start = eplb_greedy(pairs[None], self.ranks, self.slots).hosted[0]
        cap = self.options.slack * self.price.cap
        caps = Caps.of(ids, len(start), self.ranks, cap, self.moment_price.value)
        if part < 1 and len(ids) > SKETCH:
            few = np.sort(np.random.default_rng(seed).permutation(len(ids))[:SKETCH])
            ids, caps = ids[few], caps.times(share_of_pairs(ids, few))
        rounds = 200 if self.options.rounds is None else self.options.rounds
        self.hosted[layer] = search_layer(
            ids, start, slots=self.slots, caps=caps,
            rounds=math.ceil(rounds * part), seed=seed, deadline=until, price=self.price,
        )  # fmt: skip
        if half is not None:
            others = others[np.sort(np.random.default_rng(seed).permutation(len(others))[:JUDGED])]
            home = home_ranks(len(others), self.ranks, seed)
            self.moment_price.learn(
                excess_spread(others, home, self.hosted[layer], start, home_first=self.price.home_first)
            )

    def _swap(self, layer: int, pin: Ints | None, middle: Deadline, until: Deadline, has_replicas: bool) -> None:
        """The search in numpy, twin of the compiled one; replicas where annealing knows no homes."""
        hits = k_hot(self.trace.expert_ids[:, layer], self.trace.num_experts)
        pins = None if pin is None else (pin[:, None] == np.arange(self.ranks)).astype(np.float32)
        cap = self.options.slack * float(busiest_load(self.single.hosted, self.load)[layer])
        if not self.compiled:
            places, start = _with_empty_places(Touched(hits, pins), self.rows[layer], self.ranks)
            loads = np.pad(self.load[layer], (0, len(start) - len(self.load[layer])))
            search = LayerSearch(places, loads, cap, self.ranks, self.options)
            self.rows[layer] = search.run(start, self.rng, middle)[: len(self.load[layer])]
        if has_replicas:
            assert self.slots is not None
            search = LayerSearch(Touched(hits, pins), self.load[layer], cap, self.ranks, self.options)
            most = self.options.slack * float(busiest_load(self.reference.hosted, self.load)[layer])
            replicas = ReplicaSearch(search, self.slots, most)
            served = replicas.served(self.reference.hosted[layer])  # our choice shares the greedy's copies unequally
            replicas.cap = max(replicas.cap, self.options.slack * float(served.max()))
            self.hosted[layer] = replicas.run(self.rows[layer], self.rng, until)


def busiest_load(hosted: NDArray[np.bool_], load: Floats) -> Floats:
    """Load of the busiest rank per layer when copies share equally: [L]."""
    return np.asarray((hosted * (load / hosted.sum(axis=2))[:, :, None]).sum(axis=1).max(axis=1))


def k_hot(expert_ids: NDArray[np.int16], num_experts: int) -> Single:
    """[N, K] ids, -1 none, to float32 rows [N, E]."""
    rows = np.zeros((len(expert_ids), num_experts + 1), np.float32)
    np.put_along_axis(rows, expert_ids.astype(np.int64) % (num_experts + 1), np.float32(1), axis=1)
    return rows[:, :-1]


def ranks_touched(trace: RoutingTrace, hosted: NDArray[np.bool_]) -> Floats:
    """Mean ranks that a token must visit per layer, [L]; with replicas by greedy cover, most needed rank first."""
    if hosted.shape[2] > MOST_RANKS:
        hits = (k_hot(trace.expert_ids[:, layer], trace.num_experts) for layer in range(trace.num_layers))
        return np.array([greedy_cover(h, one).sum(axis=1).mean() for h, one in zip(hits, hosted, strict=True)])
    bits = (hosted * (np.uint64(1) << np.arange(hosted.shape[2], dtype=np.uint64))).sum(axis=2, dtype=np.uint64)
    return np.array([visited(trace.expert_ids[:, layer], bits[layer]).mean() for layer in range(trace.num_layers)])


def visited(expert_ids: NDArray[np.int16], masks: NDArray[np.uint64]) -> Ints:
    """The sizes of `greedy_cover`, [N], of ids [N, K] with -1 = none and each expert's ranks as bits, [E]."""
    needs = np.append(masks, np.uint64(0))[expert_ids.T]  # [K, N]
    used = np.bitwise_or.reduce(np.where(np.bitwise_count(needs) == 1, needs, np.uint64(0)), axis=0)
    size, token = np.bitwise_count(used).astype(np.int64), np.arange(len(used))
    left = np.where(needs & used, np.uint64(0), needs)
    while True:
        open_pairs = (left != 0).sum(axis=0)
        size[token[open_pairs == 1]] += 1  # a visit of its own, wherever
        token, left = token[open_pairs > 1], left[:, open_pairs > 1]
        if not len(token):
            return np.asarray(size)
        one, ranks = np.uint64(1), np.arange(int(masks.max()).bit_length(), dtype=np.uint64)
        gain = np.stack([(left >> rank & one).sum(axis=0, dtype=np.uint8) for rank in ranks])  # [G, n]
        size[token] += 1
        left = np.where(left >> gain.argmax(axis=0).astype(np.uint64) & one, np.uint64(0), left)


def greedy_cover(hits: Single, hosted: NDArray[np.bool_], pins: Single | None = None) -> NDArray[np.bool_]:
    """Ranks that serve each token: [N, G]; the forced (and pinned) ones, then the rank that serves most of the rest."""
    table = hosted.astype(np.float32)
    forced = (hits @ (table * (table.sum(axis=1, keepdims=True) == 1))) > 0
    used = forced if pins is None else forced | (pins > 0)
    if (table.sum(axis=1) <= 1).all():
        return np.asarray(used)
    while True:
        reached = (used.astype(np.float32) @ table.T) > 0
        left = hits * ~reached
        gain = left @ table
        open_tokens = left.any(axis=1)
        if not open_tokens.any():
            return np.asarray(used)
        used = used | (open_tokens[:, None] & (np.arange(gain.shape[1]) == gain.argmax(axis=1)[:, None]))


class ReplicaSearch:
    """Placement of copies: split each expert's tokens over its copies, swap copies, re-split, re-choose some copies."""

    def __init__(self, base: LayerSearch, slots: int, cap: float) -> None:
        self.base, self.slots, self.cap = base, slots, cap

    def run(self, ranks: Ints, rng: np.random.Generator, deadline: Deadline) -> NDArray[np.bool_]:
        """From an assignment without replicas to hosted [E, G]; at least one greedy filling and one refinement."""
        base = self.base
        hosted = ranks[:, None] == np.arange(base.ranks)
        hosted = add_replicas(base.hits, hosted, base.load, self.slots, self.cap, deadline)
        best, best_cost = hosted, self.cost(hosted)
        trial = hosted
        rounds = np.inf if base.options.rounds is None else base.options.rounds
        while True:
            rounds -= 1
            trial = self.swap(trial, deadline)
            cost = self.cost(trial)
            if cost < best_cost:
                best, best_cost = trial, cost
            if deadline.is_over() or rounds < 0:
                return best
            trial = self.rechoose(best, rng, deadline)

    def served(self, hosted: NDArray[np.bool_]) -> Floats:
        """Tokens that each rank serves under the split: [G]."""
        items, _, hits = self.split(hosted)
        return np.bincount(items[:, 1], weights=hits.sum(axis=0), minlength=self.base.ranks).astype(np.float64)

    def cost(self, hosted: NDArray[np.bool_]) -> float:
        """Rank visits, plus the penalty for the load that the split really puts above the cap."""
        load = self.served(hosted)
        used = greedy_cover(self.base.hits, hosted, self.base.pins)
        return float(used.sum()) + self.base.penalty * float(np.maximum(load - self.cap, 0.0).sum())

    def split(self, hosted: NDArray[np.bool_]) -> tuple[Ints, Ints, Single]:
        """(copies [C, 2] of expert and rank, experts [C], K-hot rows over copies [N, C]), each token at one copy."""
        used = greedy_cover(self.base.hits, hosted, self.base.pins)
        items = np.argwhere(hosted)
        hits = np.empty((len(used), len(items)), np.float32)
        load = np.zeros(self.base.ranks)
        single = hosted.sum(axis=1) == 1
        for expert in np.argsort(~single, kind="stable"):  # those without a choice first
            mine = np.flatnonzero(items[:, 0] == expert)
            ranks = items[mine, 1]
            able = used[:, ranks] & (self.base.hits[:, expert] > 0)[:, None]
            if len(mine) > 1:
                order = np.argsort(load[ranks])
                kinds = able @ (1 << np.arange(len(mine)))
                for kind in np.unique(kinds[kinds > 0]):
                    rows = np.flatnonzero(kinds == kind)
                    allowed = np.array([k for k in order if int(kind) >> int(k) & 1])
                    counts = fill_up(load[ranks[allowed]].astype(np.int64), len(rows))
                    able[rows] = False
                    able[rows, np.repeat(allowed, counts)] = True
                    load[ranks[allowed]] += counts
            else:
                load[ranks] += able.sum(axis=0)
            hits[:, mine] = able
        return items, items[:, 0], hits

    def swap(self, hosted: NDArray[np.bool_], deadline: Deadline) -> NDArray[np.bool_]:
        """Swap copies between ranks with the token split held fixed; empty slots are items without tokens."""
        base = self.base
        items, experts, hits = self.split(hosted)
        empty = self.slots - hosted.sum(axis=0)
        owner = np.concatenate([items[:, 1], np.repeat(np.arange(base.ranks), empty)])
        experts = np.concatenate([experts, len(hosted) + np.arange(int(empty.sum()))])
        hits = np.pad(hits, ((0, 0), (0, int(empty.sum()))))
        labels = np.unique(experts, return_inverse=True)[1]
        search = LayerSearch(
            Touched(hits, base.pins), hits.sum(axis=0).astype(float), self.cap, base.ranks, base.options
        )
        owner = search.descend(owner, deadline, labels)
        out = np.zeros_like(hosted)
        real = experts < len(hosted)
        out[experts[real], owner[real]] = True
        return out

    def rechoose(self, hosted: NDArray[np.bool_], rng: np.random.Generator, deadline: Deadline) -> NDArray[np.bool_]:
        """Drop a few copies of replicated experts and fill the slots again, with noise in what counts as useful."""
        hosted = hosted.copy()
        copies = np.argwhere(hosted & (hosted.sum(axis=1) > 1)[:, None])
        for expert, rank in rng.permutation(copies)[: max(1, int(rng.random() * len(copies)))]:
            if hosted[expert].sum() > 1:
                hosted[expert, rank] = False
        keep = rng.random(len(self.base.hits)) < 0.7
        return add_replicas(self.base.hits[keep], hosted, self.base.load, self.slots, self.cap, deadline)


def add_replicas(
    hits: Single, hosted: NDArray[np.bool_], load: Floats, slots: int, cap: float, deadline: Deadline = NEVER
) -> NDArray[np.bool_]:
    """Fill the free slots of hosted [E, G]: first what brings the busiest rank under the cap, then what saves visits.

    A copy of e on rank g saves the visits of tokens that come to a rank only for e and to g anyway. Slots that
    the deadline leaves no time for stay free.
    """
    hosted = hosted.copy()
    while True:
        free = slots - hosted.sum(axis=0)
        allowed = (free > 0)[None, :] & ~hosted
        if not allowed.any() or deadline.is_over():
            return hosted
        copies = hosted.sum(axis=1)
        share, after = load / copies, load / (copies + 1)
        rank_load = hosted.T @ share
        used = greedy_cover(hits, hosted)
        counts = (hits @ hosted.astype(np.float32)) * used
        lonely = used & (counts == 1)  # a visit for one expert only
        sole = hits * (lonely.astype(np.float32) @ hosted.T.astype(np.float32) > 0)
        saved = sole.T @ used.astype(np.float32)
        top = max(cap, float(rank_load.max()))
        fits = rank_load[None, :] + after[:, None] <= top + 1e-9
        score = saved + 1e-6 * share[:, None]
        if rank_load.max() > cap:
            score = hosted[:, int(rank_load.argmax())][:, None] * (share - after)[:, None] * fits + 1e-9 * score
        choice = np.where(allowed & fits, score, np.where(allowed, score - 1e12, -np.inf))
        expert, rank = (int(i) for i in np.unravel_index(int(choice.argmax()), choice.shape))
        hosted[expert, rank] = True


def fill_up(load: Ints, count: int) -> Ints:
    """How many of `count` items each bin gets so that the fullest bin is as empty as possible: [n], ties in order."""
    order = np.argsort(load, kind="stable")
    level = load[order]
    capacity = np.arange(1, len(level) + 1) * np.append(
        level[1:], np.iinfo(np.int64).max // (2 * len(level))
    ) - np.cumsum(level)
    used = int((capacity < count).sum()) + 1  # bins that receive something
    total = int(level[:used].sum()) + count
    target = np.full(used, total // used) + (np.arange(used) < total % used)
    share = np.zeros(len(load), np.int64)
    share[order[:used]] = target - level[:used]
    return share


def _with_empty_places(touched: Touched, ranks: Ints, num_ranks: int) -> tuple[Touched, Ints]:
    """Experts that no token chooses where ranks have room, after the others: an expert moves there by a swap."""
    free = -(-len(ranks) // num_ranks) - np.bincount(ranks, minlength=num_ranks)
    hits = np.pad(touched.hits, ((0, 0), (0, int(free.sum()))))
    return touched._replace(hits=hits), np.concatenate([ranks, np.repeat(np.arange(num_ranks), free)])
