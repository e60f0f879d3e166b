"""Simulated annealing of one layer's expert copies in compiled code (anneal.c), on the objective that is served.

A token visits its home, the ranks of experts with a single copy, and what a greedy cover adds (`choose_replicas`); its
experts are shared by the visited ranks that have them, and load above the cap costs. Homes are drawn by `home_ranks`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline, Pace
from moe.placement.helper import ANNEAL, MOST_RANKS, MOST_TOP, load_helper
from moe.placement.solve.schedule import Schedule
from moe.placement.wire_format import ModelSizes, WireFormat

SAMPLES = (1200, 16384)  # tokens of the hot phase and of the cooler one
PER_ROUND = (1200, 300)  # moves tried per round, in each
TEMPERATURES = ((60.0, 6.0), (6.0, 1.0))  # rank visits
SEVERITY = ((0.5, 0.5), (0.5, 1.0))  # of the penalties, first and last in each phase
SHARES = (0.6, 1.0)  # of the time that is left, for each phase
PENALTY = 2.0  # rank visits that a pair above the cap costs
CAP = 1.05  # of the mean load, where each visited copy of an expert serves the same share; dealing levels the rest
HOME_CAP = 1.02  # the same where a copy at home serves first, which leaves dealing less to level
FOLDS = 16  # parts of the traffic that keep the cap, too: what is even in each of them is even in the next
FOLD_CAP = 1.0  # of the cap, within a fold
FOLD_PENALTY = 0.4


class Caps(NamedTuple):
    """What a rank may serve. fold: [N], the part of the traffic that a token is of.

    caps: [1 + folds] pairs, of all tokens and of each fold's; penalties: [1 + folds], visits that a pair above costs.
    """

    fold: NDArray[np.uint8]
    caps: NDArray[np.float64]
    penalties: NDArray[np.float64]

    def of(self, sample: NDArray[np.integer[Any]], expert_ids: NDArray[np.integer[Any]]) -> "Caps":
        """For these tokens alone, at their share of the pairs. expert_ids: [N, K] of all."""
        pairs, fold = (expert_ids >= 0).sum(axis=1), self.fold[sample]
        parts = len(self.caps) - 1
        have, all_of = (
            np.bincount(f, weights=p, minlength=parts) for f, p in ((fold, pairs[sample]), (self.fold, pairs))
        )
        share = np.append(have.sum() / max(all_of.sum(), 1), have / np.maximum(all_of, 1))
        return Caps(fold, self.caps * share, self.penalties)

    @staticmethod
    def one(tokens: int, cap: float, penalty: float = PENALTY) -> "Caps":
        """A cap on all tokens, none within parts."""
        return Caps(np.zeros(tokens, np.uint8), np.array([cap, cap]), np.array([penalty, 0.0]))


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
    elsewhere + the penalties of load above the caps.

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
    fold = np.ascontiguousarray(caps.fold, np.uint8)
    limits, penalties = (np.ascontiguousarray(a, np.float64) for a in caps[1:])
    if fold.shape != at.shape or limits.shape != penalties.shape or fold.max(initial=0) + 2 > len(limits):
        raise ValueError(f"folds {fold.shape} up to {fold.max(initial=0)} need [N] and {limits.shape} caps, one more")
    pace = Pace(schedule.deadline, schedule.iterations)
    problem = ANNEAL.pack(
        *ids.shape, experts, ranks, slots, seed, price.home_first, *schedule.packed(pace), price.pair,
        len(limits) - 1,
        *(a.ctypes.data for a in (limits, penalties, ids, at, fold, masks)),
    )  # fmt: skip
    cost = float(helper.moe_anneal(problem))
    if cost < 0:
        raise MemoryError(f"annealing {len(ids)} tokens needs about {60 * ids.size} bytes; fit on fewer tokens")
    return (masks[:, None] >> np.arange(ranks, dtype=np.uint64) & np.uint64(1)).astype(bool), cost


def home_ranks(tokens: int, ranks: int, seed: int) -> NDArray[np.uint8]:
    """A home for each token where it is not known: uniform, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, ranks, tokens).astype(np.uint8)


def folds_of(sequence_lengths: NDArray[np.integer[Any]], folds: int = FOLDS) -> NDArray[np.uint8]:
    """The part of the traffic of each token, [N]: about equal parts, cut between sequences."""
    ends = np.cumsum(sequence_lengths)
    middle = ends - sequence_lengths / 2
    return np.repeat((middle * folds / max(int(ends[-1]), 1)).astype(np.uint8), sequence_lengths)


def caps_of(expert_ids: NDArray[np.integer[Any]], fold: NDArray[np.uint8], cap: float) -> Caps:
    """Up to `cap` pairs of all tokens and FOLD_CAP of the fold's share of it within each. expert_ids: [N, K]."""
    pairs = np.bincount(fold, weights=(expert_ids >= 0).sum(axis=1))
    caps = np.append(cap, FOLD_CAP * cap * pairs / max(pairs.sum(), 1))
    return Caps(fold, caps, np.append(PENALTY, np.full(len(pairs), FOLD_PENALTY)))


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
        schedule = Schedule(moves * rounds, heat, severity, deadline.part(part))
        hosted, _ = anneal(
            expert_ids[sample], home[sample], hosted, slots=slots, caps=caps.of(sample, expert_ids), schedule=schedule,
            seed=seed, price=price,
        )  # fmt: skip

    def cost(of: NDArray[np.bool_]) -> float:
        return anneal(expert_ids, home, of, slots=slots, caps=caps, schedule=Schedule(0), seed=0, price=price)[1]

    return hosted if cost(hosted) < cost(start) else start
