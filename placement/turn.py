"""One turn of re-balancing: from a window of routing and the present plan to few moves, judged before they are made.

Moves are found on the older half of the window and judged by the simulator on the newer one: what only fits noise gains
nothing there. If they pay, they are found again on the whole window, or on a longer one that has come since, and
scheduled under the byte budget per step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.loop_options import LoopOptions
from moe.placement.migrate import Migration, plan_migration, relabel
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.simulate import Simulation, Workload, simulate
from moe.placement.solve.few_moves import LayerWindow, Rates, few_moves
from moe.placement.solve.program import Ints
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes, WireFormat

LEAST_FALL = 0.05  # of the load over the mean, on the newer half
STEP_TOKENS = 32  # of the steps in which a window is replayed


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What predictions are made of, by default of an H200.

    pair_seconds: of one expert's work on one token; fast_slots: experts per rank in fast memory, of all layers, None =
    all.
    """

    sizes: ModelSizes
    wire: WireFormat
    topology: Topology
    pair_seconds: float = 2e-7
    fast_slots: int | None = None

    def rates(self, top_k: int, num_layers: int = 1) -> Rates:
        """Of a model of so many layers, which share fast memory alike."""
        topology, sizes = self.topology, self.sizes
        link = topology.inter if topology.num_nodes > 1 else topology.intra
        return Rates(
            self.pair_seconds,
            1 / link.bandwidth,
            self.wire.row_bytes(sizes.hidden_size, sizes.element_bytes, top_k),
            self.wire.result_bytes(sizes.hidden_size, sizes.element_bytes),
            self.wire.is_exact,
            sizes.expert_bytes / topology.host.bandwidth,
            None if self.fast_slots is None else max(1, self.fast_slots // num_layers),
            STEP_TOKENS,
        )


class Window(NamedTuple):
    """Routing of tokens, oldest first: ids int16 [N, L, K], -1 = none; home: the rank of each, int64 [N]."""

    ids: NDArray[np.int16]
    home: NDArray[np.int64]

    def layers(self, rates: Rates) -> list[LayerWindow]:
        return [LayerWindow(self.ids[:, layer], self.home, rates) for layer in range(self.ids.shape[1])]

    def part(self, rows: slice) -> "Window":
        return Window(self.ids[rows], self.home[rows])

    @staticmethod
    def joined(parts: "Sequence[Window]") -> "Window":
        """At least one."""
        return Window(np.concatenate([one.ids for one in parts]), np.concatenate([one.home for one in parts]))

    def counts(self, num_experts: int) -> Ints:
        """How often each expert was chosen: [L, E]."""
        num_layers = self.ids.shape[1]
        places = np.where(self.ids >= 0, self.ids, num_experts) + np.arange(num_layers)[:, None] * (num_experts + 1)
        counted = np.bincount(places.ravel(), minlength=num_layers * (num_experts + 1))
        return np.asarray(counted.reshape(num_layers, -1)[:, :num_experts], np.int64)

    def imbalance(self, plan: Plan, rates: Rates) -> float:
        """Busiest rank's pairs over the mean as the plan serves them, mean over layers."""
        layers = zip(self.layers(rates), plan.hosted, strict=True)
        return float(np.mean([one.cost(one.served(hosted), plan.num_ranks).imbalance for one, hosted in layers]))


class Serving:
    """Who serves what as a plan places it; its tables are made once."""

    def __init__(self, plan: Plan, *, is_exact: bool) -> None:
        self.plan, self.is_exact = plan, is_exact
        copied = np.flatnonzero((plan.hosted.sum(axis=2) > 1).any(axis=1)).tolist()
        self._tables = {layer: ServingTable.of(plan, layer) for layer in copied}

    def busy(self, window: Window, cuts: Sequence[int], counts: Ints) -> Ints:
        """Pairs that each rank serves of each of P parts, which end at the cuts and at the end: [P, L, G].

        counts: [P, L, E] of the parts, which say it but for layers with copies; there token by token.
        """
        busy = np.einsum("ple,leg->plg", counts, self.plan.hosted)
        number, ranks = len(counts), self.plan.num_ranks
        first = np.searchsorted(np.asarray(cuts), np.arange(len(window.ids)), side="right")[:, None] * ranks
        for layer, table in self._tables.items():
            served = choose_replicas(window.ids[:, layer], window.home, table, home_first=self.is_exact)
            at = (first + served // self.plan.physical_per_rank)[served >= 0]
            busy[:, layer] = np.bincount(at, minlength=number * ranks).reshape(number, ranks)
        return np.asarray(busy, np.int64)


class Figures(NamedTuple):
    """imbalance: busiest over mean load, over layers; bytes: per token and layer; seconds: per token."""

    imbalance: float
    bytes: float
    seconds: float

    @staticmethod
    def of(found: Simulation, tokens: int) -> "Figures":
        return Figures(found.imbalance, found.bytes, found.step_seconds * found.num_steps / tokens)

    def __str__(self) -> str:
        return f"load {self.imbalance:.3f}, {self.bytes:.0f} bytes/token/layer, {self.seconds * 1e6:.3g} us/token"


class Verdict(NamedTuple):
    """Whether few moves help traffic that they were not found on. reason: why not, empty if they do; before, after:
    predicted on the newer half of the window, for the present plan and for moves found on the older; seconds: CPU."""

    reason: str
    before: Figures
    after: Figures
    seconds: float


class Question(NamedTuple):
    """What a turn is about. verdict: what is known of earlier tokens of this traffic, else the window says it."""

    present: Plan
    window: Window
    machine: Machine
    options: LoopOptions
    verdict: Verdict | None = None


class Turn(NamedTuple):
    """What came of it. migration: None if the present plan stays, for `reason`. before, after: predicted on the newer
    half of the window, for the present plan and for moves found on the older; seconds: CPU time that it took."""

    migration: Migration | None
    reason: str
    before: Figures
    after: Figures
    seconds: float

    @property
    def num_moved(self) -> int:
        """Copies that come to a rank."""
        if self.migration is None:
            return 0
        return int((self.migration.target.hosted & ~self.migration.start.hosted).sum())


def judge(question: Question) -> Verdict:
    """Moves that are found on the older half of the window, on the newer. Raises ValueError for a window of another
    shape."""
    began = time.process_time()
    shape, num_layers = question.window.ids.shape, question.present.num_layers
    if shape[1] != num_layers or shape[0] < 8:
        raise ValueError(f"the window is {shape} [N >= 8, L, K], the plan has {num_layers} layers")
    half = shape[0] // 2
    newer = question.window.part(slice(half, None))
    before = predict(newer, question.present, question.machine)
    after = predict(newer, _near(question, question.window.part(slice(0, half))), question.machine)
    reason = ""
    if before.imbalance - after.imbalance < LEAST_FALL:
        reason = f"on tokens that they were not found on, the best moves take {before} to {after}"
    return Verdict(reason, before, after, time.process_time() - began)


def answer(question: Question) -> Verdict | Turn:
    """A loop asks twice: for a verdict, and with it, once more tokens are there, for moves."""
    return judge(question) if question.verdict is None else take_turn(question)


def take_turn(question: Question) -> Turn:
    """Looks for a better plan near the present one; seconds of CPU. Raises ValueError for a window of another shape."""
    began = time.process_time()
    present, window, machine, options, verdict = question
    earlier = 0.0 if verdict is None else verdict.seconds
    verdict = judge(question) if verdict is None else verdict

    def turn(migration: Migration | None, reason: str) -> Turn:
        return Turn(migration, reason, verdict.before, verdict.after, earlier + time.process_time() - began)

    if verdict.reason:
        return turn(None, verdict.reason)
    try:
        migration = plan_migration(
            present,
            relabel(present, _near(question, window)),
            machine.topology,
            expert_bytes=machine.sizes.expert_bytes,
            bytes_per_step=options.bytes_per_step,
            seconds_per_step=(verdict.before.seconds, verdict.after.seconds),
            horizon_steps=options.payback,
        )
    except ValueError as error:  # it does not pay, or a swap does not fit the budget: the answer is no, and why
        return turn(None, str(error))
    if not migration.steps:
        return turn(None, "nothing near the present plan is better on the whole window")
    return turn(migration, "")


def _near(question: Question, part: Window) -> Plan:
    """A plan few moves from the present one, found on a part of the window."""
    present, _, machine, options, _ = question
    rates = machine.rates(part.ids.shape[2], present.num_layers)
    per_step = options.bytes_per_step // machine.sizes.expert_bytes
    most = whole_steps(int(options.most_moved * present.hosted.sum()), per_step)
    hosted = few_moves(part.layers(rates), present.hosted, most)
    return Plan.from_hosted(hosted, model=present.model, solver="few moves", sizes=present.sizes)


def whole_steps(most: int, per_step: int) -> int:
    """Moves, but for a rest that would take one more step and fill less than a tenth of it."""
    rest = most % max(per_step, 1)
    return most - rest if rest < most and 10 * rest < per_step else most


def predict(window: Window, plan: Plan, machine: Machine) -> Figures:
    """What the simulator says of these tokens on the plan, misses of fast memory included."""
    trace = RoutingTrace(
        expert_ids=window.ids,
        sequence_lengths=np.array([len(window.ids)], np.int32),
        num_experts=plan.num_experts,
        model=plan.model,
        sizes=machine.sizes,
    )
    work = Workload(
        batch=min(STEP_TOKENS, len(window.ids)),
        steps="prefill",  # consecutive tokens: those of one step came one after another
        wire=machine.wire,
        expert_token_seconds=machine.pair_seconds,
        fast_slots=machine.fast_slots,
    )
    return Figures.of(simulate(trace, plan, machine.topology, work, home=window.home), len(window.ids))
