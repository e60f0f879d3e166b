"""Replay a trace on a plan: bytes per link, load per rank, all-to-all time, misses and step time.

A prediction, not a measurement: links carry what the dispatcher sends (`wire_format.py`), experts cost time by token,
misses are read from host memory, and nothing overlaps. Compare plans with it. The bytes are exact (the tests count them
on real ranks); not among them are the counts that precede rows, keys and values in coherent decode, and which replica
serves a token depends on who else is in its rank's step. Coherent decode begins where the last token ended; prompts,
and in a run all of a step that has one, go home again: a run is met exactly if no prompt comes while others decode.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan, merge_models
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.stats.affinity import check_routes, heaviest_experts
from moe.placement.steps import steps_of
from moe.placement.topology import Topology
from moe.placement.trace import PREFILL, RoutingTrace
from moe.placement.wire_format import PAYLOAD_BYTES, ModelSizes, StepKind, WireFormat

TOKEN_SECONDS = 2e-7  # of a pair, where neither topology nor workload says; not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a step is and what it sends.

    batch, steps: as `steps_of` has them. sizes: of the model, None = as the trace says. expert_token_seconds: of expert
    work, None = the topology's `experts`, or TOKEN_SECONDS where it has none. payload_bytes: what goes with a token to
    its new home in coherent decode. fast_slots: experts (all layers) per rank in fast memory, least recently used goes;
    None = all fit. split: how copies share tokens: "local" (`choose_replicas`, each rank for its own tokens) or "even"
    (each copy the same, as EPLB deals).
    """

    batch: int = 256
    steps: StepKind = "recorded"
    wire: WireFormat = field(default_factory=WireFormat)
    sizes: ModelSizes | None = None
    expert_token_seconds: float | None = None
    payload_bytes: int = PAYLOAD_BYTES
    fast_slots: int | None = None
    split: Literal["local", "even"] = "local"

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.expert_token_seconds or 0.0) < 0:
            times = self.expert_token_seconds
            raise ValueError(f"batch ({self.batch}) must be >= 1 and expert_token_seconds ({times}) >= 0")
        if self.fast_slots is not None and self.fast_slots < 1:
            raise ValueError(f"fast_slots ({self.fast_slots}) must be at least 1 per rank")


class Simulation(NamedTuple):
    """Totals over the trace. bytes, and node_bytes of them between nodes, are per token and layer, both ways.

    copies (rows that leave a rank) and node_copies are the same, out only.
    link_bytes: [G, G] sent from row to column, dispatch and combine. load: [L, G] token-expert pairs per rank.
    imbalance: mean over layers of max / mean load over the whole trace; step_imbalance: the same inside steps.
    """

    bytes: float
    node_bytes: float
    copies: float
    node_copies: float
    layer_copies: NDArray[np.float64]
    link_bytes: NDArray[np.int64]
    load: NDArray[np.int64]
    imbalance: float
    step_imbalance: float
    misses: int
    miss_rate: float
    all_to_all_seconds: float
    expert_seconds: float
    miss_seconds: float
    step_seconds: float
    num_steps: int


def simulate(
    trace: RoutingTrace,
    plan: Plan,
    topology: Topology,
    workload: Workload | None = None,
    *,
    home: NDArray[np.int64] | None = None,
) -> Simulation:
    """Replay. home: the rank of each token, [N]; None: sequences are dealt to ranks in turn.

    Raises ValueError if trace, plan and topology do not match.
    """
    work = workload or Workload()
    check_routes(trace)
    merge_models([trace.model, plan.model])
    if (trace.num_layers, trace.num_experts) != plan.hosted.shape[:2]:
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, the plan "
            f"{plan.num_layers} of {plan.num_experts}; use a plan for this model"
        )
    if topology.num_ranks != plan.num_ranks:
        raise ValueError(
            f"the plan is for {plan.num_ranks} ranks, the topology has {topology.num_ranks}; give the topology that it "
            "was solved for"
        )
    if home is None:
        home = np.repeat(np.arange(trace.num_sequences) % plan.num_ranks, trace.sequence_lengths)
    replay = _Replay(trace, plan, topology, work, home)
    for phase, tokens in steps_of(trace, work.batch, work.steps):
        replay.step(phase, tokens)
    return replay.totals()


class _Replay:
    """Sums over the steps of a trace, and where its tokens and experts are meanwhile."""

    def __init__(
        self, trace: RoutingTrace, plan: Plan, topology: Topology, work: Workload, home: NDArray[np.int64]
    ) -> None:
        self.trace, self.plan, self.topology, self.work, self.home = trace, plan, topology, work, home
        ranks, layers = plan.num_ranks, trace.num_layers
        self.same_node = topology.same_node()
        self.sizes = WireFormat.needs(work.sizes or trace.sizes, "the trace")
        self.heaviest = heaviest_experts(trace) if work.wire.dispatcher == "coherent" else None
        self.begins = np.zeros(trace.num_tokens, bool)
        self.begins[trace.sequence_starts[:-1]] = True
        self.end = np.full(trace.num_tokens, -1)  # where each token that was computed ended; -1: not yet
        self.cache = _Caches(plan, work.fast_slots)
        self.tables = [ServingTable.of(plan, layer) for layer in range(layers)]
        self.link_bytes, self.load = np.zeros((ranks, ranks), np.int64), np.zeros((layers, ranks), np.int64)
        self.layer_copies = np.zeros(layers)
        self.node_copies = self.uses = self.steps = 0
        self.step_imbalance: list[float] = []
        self.seconds = np.zeros(3)  # all-to-all, experts, misses

    def step(self, phase: int, tokens: NDArray[np.int64]) -> None:
        """tokens: their numbers in the trace."""
        moves = self.heaviest is not None and phase != PREFILL
        own = self.work.wire
        wire = own if moves or self.heaviest is None else WireFormat(combine=own.combine)
        at = self.home[tokens]
        if moves:
            at = np.where(self.begins[tokens] | (self.end[tokens - 1] < 0), at, self.end[tokens - 1])
        for layer in range(self.trace.num_layers):
            at = self._layer(layer, tokens, at, wire)
        self.end[tokens] = at
        self.steps += 1

    def _layer(
        self, layer: int, tokens: NDArray[np.int64], at: NDArray[np.int64], wire: WireFormat
    ) -> NDArray[np.int64]:
        """at: the rank of each token; returns where they are afterwards, which only coherent decode changes."""
        work, topology, sizes, ranks = self.work, self.topology, self.sizes, self.plan.num_ranks
        ids = self.trace.expert_ids[tokens, layer]
        if work.split == "local":
            physical = _chosen(ids, at, self.tables[layer], work.wire.is_exact)
        else:
            physical = deal_evenly(ids, self.plan.log2phy[layer])
        rank = np.where(physical >= 0, physical // self.plan.physical_per_rank, ranks)
        at_token = np.arange(0, len(ids) * (ranks + 1), ranks + 1)[:, None]
        pairs = np.bincount((at_token + rank).ravel(), minlength=at_token.size * (ranks + 1))
        pairs = pairs.reshape(-1, ranks + 1)[:, :-1]
        after = at
        if self.heaviest is not None and wire.dispatcher == "coherent":
            after = _homes_after(ids, rank, self.heaviest[tokens, layer], at)
        out, back = rows_sent(pairs, at, after, topology, wire)
        self.layer_copies[layer] += sum(rows.sum() for rows in out)
        self.node_copies += _node_copies(pairs > 0, at, topology.nodes)
        row_bytes = wire.row_bytes(sizes.hidden_size, sizes.element_bytes, self.trace.top_k)
        result_bytes = wire.result_bytes(sizes.hidden_size, sizes.element_bytes)
        sent = np.stack([rows * row_bytes for rows in out] + [rows * result_bytes for rows in back])
        if after is not at:
            np.add.at(sent[0], (at, after), work.payload_bytes * (at != after))
        self.link_bytes += sent.sum(axis=0)
        busy = np.bincount(rank[rank < ranks], minlength=ranks)
        self.load[layer] += busy
        self.step_imbalance.append(float(busy.max() / max(busy.mean(), 1e-12)))
        missed = self.cache.use(layer, self.plan, physical)
        self.uses += self.cache.last_uses
        host = topology.host
        self.seconds += (
            all_to_all_seconds(sent, self.same_node, topology),
            _expert_seconds(physical, busy, self.plan, topology, work, sizes),
            float(missed.max()) * sizes.expert_bytes / host.bandwidth + float(missed.any()) * host.latency,
        )
        return after

    def totals(self) -> Simulation:
        tokens, layers = self.trace.num_tokens, self.trace.num_layers
        load, misses = self.load, self.cache.misses
        return Simulation(
            bytes=float(self.link_bytes.sum() / tokens / layers),
            node_bytes=float(self.link_bytes[~self.same_node].sum() / tokens / layers),
            copies=float(self.layer_copies.sum() / tokens / layers),
            node_copies=self.node_copies / tokens / layers,
            layer_copies=self.layer_copies / tokens,
            link_bytes=self.link_bytes,
            load=load,
            imbalance=float((load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-12)).mean()),
            step_imbalance=float(np.mean(self.step_imbalance)),
            misses=misses,
            miss_rate=misses / max(self.uses, 1),
            all_to_all_seconds=float(self.seconds[0]),
            expert_seconds=float(self.seconds[1]),
            miss_seconds=float(self.seconds[2]),
            step_seconds=float(self.seconds.sum() / self.steps),
            num_steps=self.steps,
        )


def rows_sent(
    pairs: NDArray[np.int64], at: NDArray[np.int64], after: NDArray[np.int64], topology: Topology, wire: WireFormat
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Rows [G, G] of one layer's rounds, from row to column: those of tokens out, those of results back.

    pairs: [T, G], experts of a token on a rank; at, after: [T], its rank before and after the layer.
    """

    def hop(of_token: NDArray[Any], source: NDArray[np.int64], to: NDArray[np.int64]) -> NDArray[np.int64]:
        """of_token: [T, M] rows that go from `source` to `to`, each [T, M] or broadcast to it."""
        ranks = topology.num_ranks
        link = np.broadcast_to(source * ranks + to, of_token.shape)
        rows = np.bincount(link.ravel(), weights=of_token.ravel(), minlength=ranks * ranks).astype(np.int64)
        rows[:: ranks + 1] = 0  # what stays
        return np.asarray(rows.reshape(ranks, ranks))

    every, results = np.arange(topology.num_ranks), wire.results(pairs)
    if wire.dispatcher != "hierarchical":
        return [hop(pairs > 0, at[:, None], every)], [hop(results, every, after[:, None])]
    relay_of = _relays(topology)[at]  # [T, nodes]
    on_node = topology.nodes[:, None] == np.arange(topology.num_nodes)
    by_node = pairs @ on_node
    relay = relay_of[:, topology.nodes]
    crossing = wire.results(by_node)
    out = [hop(by_node > 0, at[:, None], relay_of), hop(pairs > 0, relay, every)]
    return out, [hop(results, every, relay), hop(crossing, relay_of, at[:, None])]


def _relays(topology: Topology) -> NDArray[np.int64]:
    """The rank of a node that stands where a rank stands in its own: [G, nodes]. Raises ValueError for uneven nodes."""
    ranks = [np.flatnonzero(topology.nodes == node) for node in range(topology.num_nodes)]
    if len({len(r) for r in ranks}) != 1:
        raise ValueError(
            f"nodes have {', '.join(str(len(r)) for r in ranks)} ranks; hierarchical dispatch needs equal ones"
        )
    relays = np.zeros((topology.num_ranks, topology.num_nodes), np.int64)
    for own in ranks:
        relays[own] = np.stack(ranks, axis=1)
    return relays


def all_to_all_seconds(num_bytes: NDArray[np.int64], same_node: NDArray[np.bool_], topology: Topology) -> float:
    """Time of all-to-alls [R, G, G], one after another: the busiest rank's bytes, in or out, per link class; the
    classes in parallel."""
    worst = np.zeros(len(num_bytes))
    for link, mask in ((topology.intra, same_node), (topology.inter, ~same_node)):
        if mask.any():
            part = num_bytes * mask
            most = np.maximum(part.sum(axis=1), part.sum(axis=2)).max(axis=1)
            worst = np.maximum(worst, (most > 0) * (link.latency + most / link.bandwidth))
    return float(worst.sum())


def deal_evenly(ids: NDArray[np.integer[Any]], log2phy: NDArray[np.int32]) -> NDArray[np.int64]:
    """Each copy of an expert takes its tokens in turn, blind to ranks: [T, K] physical ids."""
    copies = (log2phy >= 0).sum(axis=1)
    flat = ids.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")
    _, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
    turn = np.empty(flat.size, np.int64)
    turn[order] = np.arange(flat.size) - np.repeat(first, counts)  # how many tokens chose this expert before
    expert = np.maximum(flat, 0)
    return np.where(flat >= 0, log2phy[expert, turn % copies[expert]], -1).astype(np.int64).reshape(ids.shape)


def _chosen(
    ids: NDArray[np.integer[Any]], at: NDArray[np.int64], table: ServingTable, exact: bool
) -> NDArray[np.int64]:
    """`choose_replicas` as a run does it: each rank for its own tokens. [T, K] physical ids."""
    if not ((table.physical >= 0).sum(axis=1) > 1).any():  # no copies: whose token it is does not matter
        return choose_replicas(ids, at, table)
    physical = np.empty(ids.shape, np.int64)
    for rank in np.unique(at):
        mine = at == rank
        physical[mine] = choose_replicas(ids[mine], int(rank), table, home_first=exact)
    return physical


def _expert_seconds(
    physical: NDArray[np.int64],
    busy: NDArray[np.int64],
    plan: Plan,
    topology: Topology,
    work: Workload,
    sizes: ModelSizes,
) -> float:
    """Of the slowest rank in one layer. busy: [G] pairs."""
    if topology.experts is None or work.expert_token_seconds is not None:
        each = TOKEN_SECONDS if work.expert_token_seconds is None else work.expert_token_seconds
        return float(busy.max()) * each
    used = np.bincount(np.unique(physical[physical >= 0]) // plan.physical_per_rank, minlength=plan.num_ranks)
    return float(topology.experts.seconds(used, busy, sizes.hidden_size, sizes.expert_bytes, sizes.element_bytes).max())


def _homes_after(
    ids: NDArray[np.int16], rank: NDArray[np.int64], heaviest: NDArray[np.int64], at: NDArray[np.int64]
) -> NDArray[np.int64]:
    slot = (ids == heaviest[:, None]).argmax(axis=1)
    return np.where(heaviest >= 0, rank[np.arange(len(ids)), slot], at).astype(np.int64)


def _node_copies(visited: NDArray[np.bool_], at: NDArray[np.int64], nodes: NDArray[np.int64]) -> int:
    """Copies to other nodes, one per token and node."""
    if not nodes.any():
        return 0
    by_node = np.zeros((len(visited), int(nodes.max()) + 1), bool)
    for rank, node in enumerate(nodes):
        by_node[:, node] |= visited[:, rank]
    by_node[np.arange(len(visited)), nodes[at]] = False
    return int(by_node.sum())


class _Caches:
    """One least-recently-used set of (layer, expert) per rank."""

    def __init__(self, plan: Plan, slots: int | None) -> None:
        self.slots, self.misses, self.last_uses, self.clock = slots, 0, 0, 0
        self.last = np.full((plan.num_ranks, plan.num_layers * plan.physical_per_rank), -1, np.int64)

    def use(self, layer: int, plan: Plan, physical: NDArray[np.int64]) -> NDArray[np.int64]:
        """Touch what a batch uses in a layer; how many experts each rank had to fetch: [G]."""
        width = plan.physical_per_rank
        used = np.flatnonzero(np.bincount(physical[physical >= 0], minlength=1))
        self.last_uses = used.size
        missed = np.zeros(plan.num_ranks, np.int64)
        if self.slots is None:
            return missed
        self.clock += 1
        rank, item = used // width, layer * width + used % width
        absent = self.last[rank, item] < 0
        np.add.at(missed, rank[absent], 1)
        self.last[rank, item] = self.clock
        for g in np.flatnonzero((self.last >= 0).sum(axis=1) > self.slots):
            held = np.flatnonzero(self.last[g] >= 0)
            order = held[np.argsort(self.last[g, held], kind="stable")]
            self.last[g, order[: len(held) - self.slots]] = -1
        self.misses += int(missed.sum())
        return missed
