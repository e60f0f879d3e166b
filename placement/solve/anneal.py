"""Simulated annealing of one layer's expert copies in compiled code (anneal.c), on the objective that is served.

A token visits its home, the ranks of experts with a single copy, and what a greedy cover adds (`choose_replicas`); its
experts are shared by the visited ranks that have them, and load above the cap costs. Homes are drawn by `home_ranks`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline, Pace
from moe.placement.helper import ANNEAL, MOST_RANKS, MOST_TOP, load_helper
from moe.placement.solve.evenness import expected_moments_of
from moe.placement.solve.moment_price import FIRST
from moe.placement.solve.program import Floats
from moe.placement.solve.schedule import Schedule
from moe.placement.wire_format import ModelSizes, WireFormat

SAMPLES = (1200, 4096)  # tokens of the hot phase and of the cooler one
PER_ROUND = (1200, 300)  # moves tried per round, in each
TEMPERATURES = ((0.5, 0.06), (0.02, 0.003))  # in uses of the mean expert
SEVERITY = ((0.5, 0.5), (0.5, 1.0))  # of the penalties, first and last in each phase
SHARES = (0.6, 1.0)  # of the time that is left, for each phase
PENALTY = 2.0  # rank visits that a pair above the cap costs
CAP = 1.05  # of the mean load, where each visited copy of an expert serves the same share; dealing levels the rest
HOME_CAP = 1.02  # the same where a copy at home serves first, which leaves dealing less to level


class Caps(NamedTuple):
    """What load costs: pairs of a rank above `load` `PENALTY` visits each, and its second moment in visits.

    moments: [E, E] symmetric, of which a rank has the sum over its experts squared, each times its share of the expert.
    """

    load: float
    moments: Floats

    @staticmethod
    def of(
        expert_ids: NDArray[np.integer[Any]],
        num_experts: int,
        num_ranks: int,
        load: float,
        moment_price: float = FIRST,
    ) -> "Caps":
        """load: of the mean. expert_ids: [N, K], -1 = none. moment_price: rank visits, times the ranks."""
        moments = expected_moments_of(expert_ids, num_experts, num_ranks)
        return Caps(load * float((expert_ids >= 0).sum()) / num_ranks, moment_price * num_ranks * moments)

    def times(self, share: float) -> "Caps":
        """For so much of the traffic."""
        return Caps(share * self.load, share * self.moments)

    @staticmethod
    def one(num_experts: int, load: float) -> "Caps":
        """Load above a cap alone."""
        return Caps(load, np.zeros((num_experts, num_experts)))


class Price(NamedTuple):
    """What is minimised beside the load: a rank visit costs 1, a pair served away from home `pair`.

    home_first: whether a copy at home serves its pair, as the run will do (`choose_replicas`).
    """

    pair: float = 0.0
    home_first: bool = False

    @staticmethod
    def of(wire: WireFormat, sizes: ModelSizes, top_k: int) -> "Price":
        """Of bytes, in rows out (and back, if sums return)."""
        row = wire.row_bytes(sizes.hidden_size, sizes.element_bytes, top_k)
        result = wire.result_bytes(sizes.hidden_size, sizes.element_bytes)
        return Price(result / row, True) if wire.is_exact else VISITS

    @property
    def cap(self) -> float:
        """Of the busiest rank's load over the mean."""
        return HOME_CAP if self.home_first else CAP


VISITS = Price()


def anneal(
    expert_ids: NDArray[np.integer[Any]],
    home: NDArray[np.integer[Any]],
    hosted: NDArray[np.bool_],
    *,
    slots: int,
    caps: Caps,
    schedule: Schedule,
    seed: int,
    price: Price = VISITS,
) -> tuple[NDArray[np.bool_], float]:
    """The best copies found from hosted [E, G], and their cost: visits besides home + price.pair x pairs served
    elsewhere + what load costs by `caps`.

    expert_ids: [N, K], -1 = none. home: [N]. slots: copies per rank. O(iterations N K / E). The start counts as found,
    so that the cost at the last severity never rises. Raises ValueError for sizes that do not
    fit, RuntimeError without the helper.
    """
    helper = load_helper()
    if helper is None:
        raise RuntimeError("the compiled helper is not there; reinstall with gcc or clang at hand")
    experts, ranks = hosted.shape
    ids = np.ascontiguousarray(expert_ids, np.int16)
    at = np.ascontiguousarray(home, np.uint8)
    if ranks > MOST_RANKS or ids.ndim != 2 or ids.shape[1] > MOST_TOP or at.shape != ids.shape[:1]:
        raise ValueError(
            f"expert_ids {ids.shape}, home {at.shape}, {ranks} ranks: need [N, K <= {MOST_TOP}], [N], <= {MOST_RANKS}"
        )
    if not hosted.any(axis=1).all() or hosted.sum(axis=0).max() > slots:
        raise ValueError(f"an expert has no copy, or a rank more than its {slots} slots; start from a whole placement")
    if ids.max(initial=-1) >= experts or at.max(initial=0) >= ranks:
        raise ValueError(f"expert {ids.max()} or home {at.max()} is out of range of {experts} experts, {ranks} ranks")
    masks = (hosted.astype(np.uint64) << np.arange(ranks, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    moments = np.ascontiguousarray(caps.moments, np.float64)
    if moments.shape != (experts, experts):
        raise ValueError(f"moments {moments.shape} need {experts} experts twice")
    pace = Pace(schedule.deadline, schedule.iterations)
    problem = ANNEAL.pack(
        *ids.shape, experts, ranks, slots, seed, price.home_first, *schedule.packed(pace), price.pair, caps.load,
        PENALTY, *(a.ctypes.data for a in (moments, ids, at, masks)),
    )  # fmt: skip
    with pace.asked():
        cost = float(helper.moe_anneal(problem))
    if cost < 0:
        raise MemoryError(f"annealing {len(ids)} tokens needs about {60 * ids.size} bytes; fit on fewer tokens")
    return (masks[:, None] >> np.arange(ranks, dtype=np.uint64) & np.uint64(1)).astype(bool), cost


def home_ranks(tokens: int, ranks: int, seed: int) -> NDArray[np.uint8]:
    """A home for each token where it is not known: uniform, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, ranks, tokens).astype(np.uint8)


def share_of_pairs(expert_ids: NDArray[np.integer[Any]], sample: NDArray[np.integer[Any]]) -> float:
    """Of all pairs, [N, K] with -1 = none, those of these tokens."""
    return float((expert_ids[sample] >= 0).sum()) / max(float((expert_ids >= 0).sum()), 1.0)


def search_layer(
    expert_ids: NDArray[np.integer[Any]],
    start: NDArray[np.bool_],
    *,
    slots: int,
    caps: Caps,
    rounds: int,
    seed: int,
    deadline: Deadline,
    price: Price = VISITS,
) -> NDArray[np.bool_]:
    """Copies [E, G] for one layer: hot on a sample of tokens, then cooler on a larger one; never worse than
    `start` on all.

    expert_ids: [N, K]. caps: of all tokens. The same seed and rounds give the same plan unless time is too short for
    them; then the search cools faster and ends with the deadline.
    """
    if deadline.is_over():
        return start
    tokens, ranks = len(expert_ids), start.shape[1]
    home = home_ranks(tokens, ranks, seed)
    order = np.random.default_rng(seed).permutation(tokens)
    hosted = start
    for few, moves, heat, severity, part in zip(SAMPLES, PER_ROUND, TEMPERATURES, SEVERITY, SHARES):
        sample = np.sort(order[:few])
        uses = max(float((expert_ids[sample] >= 0).sum()), 1.0) / len(start)
        schedule = Schedule(moves * rounds, (heat[0] * uses, heat[1] * uses), severity, deadline.part(part))
        hosted, _ = anneal(
            expert_ids[sample], home[sample], hosted, slots=slots, caps=caps.times(share_of_pairs(expert_ids, sample)),
            schedule=schedule, seed=seed, price=price,
        )  # fmt: skip

    def cost(of: NDArray[np.bool_]) -> float:
        return anneal(expert_ids, home, of, slots=slots, caps=caps, schedule=Schedule(0), seed=0, price=price)[1]

    return hosted if cost(hosted) < cost(start) else start
