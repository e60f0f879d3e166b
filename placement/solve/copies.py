"""Placement for what the dispatcher really sends: one copy per token and destination rank, not per expert.

A token's experts in one layer are a hyperedge; it costs as many copies as it touches ranks. Layers are independent
when attention stays at home, and coupled through the home rank when it moves with the token (coherent decode). The
search swaps experts: the change of all E^2 swaps is exact and comes from two matrix products, so a step is a table
look-up; replicas are added where a token comes anyway. The busiest rank's load is kept under a cap.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan, check_capacity
from moe.placement.replicas import fill_up
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.program import Floats, Ints
from moe.placement.stats.affinity import check_routes, expert_load, heaviest_experts
from moe.placement.trace import RoutingTrace

Single = NDArray[np.float32]
AT_ONCE = 4  # swaps applied per table
FULL = 50.0  # rank visits that a token above the load cap costs: more than a swap can ever save by it
SOFT = (0.1, 0.5, FULL, FULL)  # first penalty of a descent: half of them come from outside the cap


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyOptions:
    """How to search. slack: the busiest rank may carry this factor of the EPLB-style greedy's busiest (on the fit).

    coherent: attention follows the heaviest expert, so each layer is pinned to the one before; else homes are fixed
    and unknown. node_weight: extra cost of each node that a token touches, relative to a rank. seconds: whole search.
    rounds: instead of seconds, so many perturbations per layer, which makes the result reproducible.
    """

    slack: float = 1.0
    coherent: bool = False
    node_weight: float = 0.0
    nodes: tuple[int, ...] | None = None
    seconds: float = 30.0
    rounds: int | None = None
    seed: int = 0


class Touched(NamedTuple):
    """The swap table's ingredients for one layer: hits [N, E] K-hot, pins [N, G] (0/1) of ranks paid already."""

    hits: Single
    pins: Single | None


def solve_copies(
    trace: RoutingTrace, num_ranks: int, *, slots_per_rank: int | None = None, options: CopyOptions | None = None
) -> Plan:
    """Place experts so that tokens touch few ranks, at a load no worse than the EPLB-style greedy at equal memory.

    slots_per_rank: copies per rank and layer; None = ceil(E / G) without replicas. Costs O(N E^2) per improving swap.
    """
    options = options or CopyOptions()
    check_routes(trace)
    experts = trace.num_experts
    slots = -(-experts // num_ranks) if slots_per_rank is None else slots_per_rank
    check_capacity(experts, num_ranks, slots)
    began = time.perf_counter()
    load = expert_load(trace)
    reference = eplb_greedy(load, num_ranks, slots_per_rank)
    caps = options.slack * busiest_load(reference.hosted, load)
    # the reference without replicas is both a start and, for the unreplicated phase, its own cap
    single = reference if slots_per_rank is None else eplb_greedy(load, num_ranks)
    single_caps = options.slack * busiest_load(single.hosted, load)
    rows = single.assignment.copy()
    rng = np.random.default_rng(options.seed)
    homes = heaviest_experts(trace) if options.coherent else None
    hosted = np.zeros((trace.num_layers, experts, num_ranks), bool)
    passes = 2 if options.coherent else 1
    for sweep in range(passes):
        for layer in range(trace.num_layers):
            done = (sweep * trace.num_layers + layer + 1) / (passes * trace.num_layers)
            layer_hits = k_hot(trace.expert_ids[:, layer], experts)
            pins = None
            if homes is not None and layer > 0:
                pins = _pins(homes[:, layer - 1], rows[layer - 1], num_ranks)
            search = LayerSearch(Touched(layer_hits, pins), load[layer], single_caps[layer], num_ranks, options)
            share = 1.0 if slots_per_rank is None or sweep < passes - 1 else 0.3
            now = time.perf_counter()
            until = np.inf if options.rounds is not None else began + options.seconds * done
            rows[layer] = search.run(rows[layer], rng, until if share == 1 else now + share * (until - now))
            hosted[layer] = rows[layer][:, None] == np.arange(num_ranks)
            if slots_per_rank is not None and sweep == passes - 1:
                replicas = ReplicaSearch(search, slots, float(caps[layer]))
                served = replicas.served(
                    reference.hosted[layer]
                )  # under our choice the greedy's copies share unequally
                replicas.cap = max(replicas.cap, options.slack * float(served.max()))
                hosted[layer] = replicas.run(rows[layer], rng, until)
    return Plan.from_hosted(
        hosted, model=trace.model, solver="copies", objective="ranks touched / token / layer",
        value=float(np.mean(ranks_touched(trace, hosted))), seconds=time.perf_counter() - began,
    )  # fmt: skip


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
    out = np.zeros(trace.num_layers)
    for layer in range(trace.num_layers):
        hits = k_hot(trace.expert_ids[:, layer], trace.num_experts)
        out[layer] = greedy_cover(hits, hosted[layer]).sum(axis=1).mean()
    return out


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


class LayerSearch:
    """Swap search in one layer; the assignment [E] of ranks with counts per rank kept."""

    def __init__(self, touched: Touched, load: Floats, cap: float, num_ranks: int, options: CopyOptions) -> None:
        self.hits, self.pins, self.load = np.asfortranarray(touched.hits), touched.pins, load  # experts contiguous
        self.cap, self.ranks, self.options = cap, num_ranks, options
        self.penalty = FULL * float(self.hits.sum()) / max(float(load.sum()), 1e-12)

    def run(self, start: Ints, rng: np.random.Generator, deadline: float) -> Ints:
        """Descend from `start` and from shuffles of the best, until the deadline; at least one descent."""
        best = self.descend(start.copy())
        best_cost = self.cost(best)
        rounds = np.inf if self.options.rounds is None else self.options.rounds
        while time.perf_counter() < deadline and rounds > 0:
            rounds -= 1
            trial = best.copy()
            among = rng.choice(len(trial), int(rng.integers(2, max(3, len(trial) // 3) + 1)), replace=False)
            trial[among] = rng.permutation(trial[among])
            soft = float(rng.choice(SOFT))
            trial = self.settle(trial, soft, deadline) if soft < FULL else self.descend(trial, deadline)
            cost = self.cost(trial)
            if cost < best_cost:
                best, best_cost = trial, cost
        return best

    def settle(self, ranks: Ints, soft: float, deadline: float) -> Ints:
        """Descend with a penalty of `soft` visits per overloading token, then twice, ... up to the full penalty."""
        full = self.penalty
        self.penalty = full * soft / FULL
        while self.penalty < full and time.perf_counter() < deadline:
            ranks = self.descend(ranks, deadline)
            if np.bincount(ranks, weights=self.load, minlength=self.ranks).max() <= self.cap:
                break
            self.penalty = max(2 * self.penalty, full * 0.1 / FULL)
        self.penalty = full
        return self.descend(ranks, deadline)

    def cost(self, ranks: Ints) -> float:
        over = float(self.overload(np.bincount(ranks, weights=self.load, minlength=self.ranks)).sum())
        total = float((self.counts(ranks) > 0).sum())
        if self.options.node_weight and self.options.nodes is not None:
            nodes = np.array(self.options.nodes)[ranks]
            total += self.options.node_weight * float((self.node_counts(nodes) > 0).sum())
        return float(total + self.penalty * over)

    def counts(self, ranks: Ints) -> Single:
        counts = self.hits @ np.eye(self.ranks, dtype=np.float32)[ranks]
        return counts if self.pins is None else counts + self.pins

    def node_counts(self, nodes: Ints) -> Single:
        assert self.options.nodes is not None
        groups = np.eye(max(self.options.nodes) + 1, dtype=np.float32)
        counts = self.hits @ groups[nodes]
        return counts if self.pins is None else counts + self.pins @ groups[np.array(self.options.nodes)]

    def descend(self, ranks: Ints, deadline: float = np.inf, expert: Ints | None = None) -> Ints:
        """Best swap after best swap until none helps (or the deadline). expert: items with equal ones stay apart."""
        before: float | None = None
        while time.perf_counter() < deadline:
            table = swap_changes(self.hits, self.counts(ranks), ranks)
            if self.options.node_weight and self.options.nodes is not None:
                nodes = np.array(self.options.nodes)[ranks]
                change = swap_changes(self.hits, self.node_counts(nodes), nodes)
                table += self.options.node_weight * np.where(nodes[:, None] == nodes[None, :], 0, change)
            table += self.penalty * self.overload_changes(ranks)
            table[ranks[:, None] == ranks[None, :]] = 0
            if expert is not None:
                there = np.zeros((len(ranks), self.ranks), bool)
                np.logical_or.at(there, (expert, ranks), True)
                blocked = there[expert][:, ranks]  # item e may not go where a twin is
                table[blocked | blocked.T] = 0
            swaps = best_swaps(table, 1 if expert is not None else AT_ONCE)
            if not swaps:
                break
            trial = swapped(ranks, swaps)
            if len(swaps) > 1:  # swaps of different experts only nearly add up: keep them if they beat the best alone
                before = self.cost(ranks) if before is None else before
                alone, after = before + float(table[swaps[0]]), self.cost(trial)
                if after >= alone:
                    trial, after = swapped(ranks, swaps[:1]), alone
                before = after
            ranks = trial
        return ranks

    def overload(self, load: NDArray[Any]) -> Floats:
        """Load above the cap; summed over ranks rather than the busiest alone, so that every step towards it counts."""
        return np.maximum(load - self.cap, 0.0)

    def overload_changes(self, ranks: Ints) -> Floats:
        """Change of the total overload by every swap: [E, E]."""
        load = np.bincount(ranks, weights=self.load, minlength=self.ranks)
        change = self.load[None, :] - self.load[:, None]
        now = self.overload(load)[ranks]
        here, there = load[ranks][:, None] + change, load[ranks][None, :] - change
        return np.asarray(self.overload(here) + self.overload(there) - now[:, None] - now[None, :])


class ReplicaSearch:
    """Placement of copies: split each expert's tokens over its copies, swap copies, re-split, re-choose some copies."""

    def __init__(self, base: LayerSearch, slots: int, cap: float) -> None:
        self.base, self.slots, self.cap = base, slots, cap

    def run(self, ranks: Ints, rng: np.random.Generator, deadline: float) -> NDArray[np.bool_]:
        """From an assignment without replicas to hosted [E, G]; at least one greedy filling and one refinement."""
        base = self.base
        hosted = add_replicas(base.hits, ranks[:, None] == np.arange(base.ranks), base.load, self.slots, self.cap)
        best, best_cost = hosted, self.cost(hosted)
        trial = hosted
        rounds = np.inf if base.options.rounds is None else base.options.rounds
        while True:
            rounds -= 1
            trial = self.swap(trial, rng, deadline)
            cost = self.cost(trial)
            if cost < best_cost:
                best, best_cost = trial, cost
            if time.perf_counter() >= deadline or rounds < 0:
                return best
            trial = self.rechoose(best, rng)

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

    def swap(self, hosted: NDArray[np.bool_], rng: np.random.Generator, deadline: float) -> NDArray[np.bool_]:
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
        owner = search.descend(owner, max(deadline, time.perf_counter() + 1e-3), labels)
        out = np.zeros_like(hosted)
        real = experts < len(hosted)
        out[experts[real], owner[real]] = True
        return out

    def rechoose(self, hosted: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Drop a few copies of replicated experts and fill the slots again, with noise in what counts as useful."""
        hosted = hosted.copy()
        copies = np.argwhere(hosted & (hosted.sum(axis=1) > 1)[:, None])
        for expert, rank in rng.permutation(copies)[: max(1, int(rng.random() * len(copies)))]:
            if hosted[expert].sum() > 1:
                hosted[expert, rank] = False
        keep = rng.random(len(self.base.hits)) < 0.7
        return add_replicas(self.base.hits[keep], hosted, self.base.load, self.slots, self.cap)


def best_swaps(table: Floats, limit: int) -> list[tuple[int, int]]:
    """The best improving swaps that share no expert, best first."""
    flat = table.reshape(-1)
    few = np.argpartition(flat, min(8 * limit, flat.size - 1))[: 8 * limit]
    chosen: list[tuple[int, int]] = []
    taken: set[int] = set()
    for index in few[np.argsort(flat[few], kind="stable")]:
        e, f = divmod(int(index), len(table))
        if flat[index] > -1e-3 or len(chosen) == limit:  # float32 counts are exact far beyond any trace length
            break
        if not {e, f} & taken:
            chosen.append((e, f))
            taken |= {e, f}
    return chosen


def swapped(ranks: Ints, swaps: list[tuple[int, int]]) -> Ints:
    out = ranks.copy()
    for e, f in swaps:
        out[[e, f]] = ranks[[f, e]]
    return out


def swap_changes(hits: Single, counts: Single, ranks: Ints) -> Floats:
    """How many more rank visits every swap of two experts' ranks makes: [E, E], exact for pairs on different ranks.

    hits: [N, E]; counts: [N, G] experts (and pins) of each token on each rank.
    """
    alone = np.ascontiguousarray((counts == 1).T, np.float32)  # [G, N]
    sole = hits.T * alone[ranks]  # [E, N]: the token visits this expert's rank only for it
    arrive = hits.T @ (counts == 0).astype(np.float32)  # [E, G]
    leave = sole.sum(axis=1)
    both = sole @ hits
    table = arrive[:, ranks] - leave[:, None]
    return np.asarray(table + table.T + both + both.T, np.float64)


def add_replicas(hits: Single, hosted: NDArray[np.bool_], load: Floats, slots: int, cap: float) -> NDArray[np.bool_]:
    """Fill the free slots of hosted [E, G]: first what brings the busiest rank under the cap, then what saves visits.

    A copy of e on rank g saves the visits of tokens that come to a rank only for e and to g anyway.
    """
    hosted = hosted.copy()
    while True:
        free = slots - hosted.sum(axis=0)
        allowed = (free > 0)[None, :] & ~hosted
        if not allowed.any():
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


def _pins(heaviest: Ints, ranks: Ints, num_ranks: int) -> Single:
    pins = np.zeros((len(heaviest), num_ranks), np.float32)
    known = heaviest >= 0
    pins[np.flatnonzero(known), ranks[heaviest[known]]] = 1
    return pins
