"""Simulated annealing of one layer's expert copies in compiled code (anneal.c), on the objective that is served.

A token visits its home, the ranks of experts with a single copy, and what a greedy cover adds (`choose_replicas`); its
experts are shared by the visited ranks that have them, and load above the cap costs. Homes are drawn by `home_ranks`.
"""

import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.helper import ANNEAL, MOST_RANKS, MOST_TOP, load_helper
from moe.placement.wire_format import ModelSizes, WireFormat

SAMPLE = 1200  # tokens of the hot phase
PER_ROUND = (1200, 300)  # moves tried per round: on the sample, then on all tokens
TEMPERATURES = ((60.0, 6.0), (6.0, 1.0))  # rank visits
SHARES = (0.6, 1.0)  # of the time that is left, for each phase
PIECES = 20  # of a phase; between them the clock is read
PENALTY = 1.0  # rank visits that a token above the cap costs
CAP = 1.01  # of the mean load


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


VISITS = Price()


def anneal(
    expert_ids: NDArray[np.integer[Any]],
    home: NDArray[np.integer[Any]],
    hosted: NDArray[np.bool_],
    *,
    slots: int,
    cap: float,
    penalty: float,
    iterations: int,
    temperatures: tuple[float, float],
    seed: int,
    price: Price = VISITS,
) -> tuple[NDArray[np.bool_], float]:
    """The best copies found from hosted [E, G], and their cost: visits besides home + price.pair x pairs served
    elsewhere + penalty x load above the cap.

    expert_ids: [N, K], -1 = none. home: [N]. slots: copies per rank. cap: tokens that a rank may serve. temperatures:
    first and last, in visits. O(iterations N K / E). The start counts as found, so the cost never rises. Raises
    ValueError for sizes that do not fit, RuntimeError without the helper.
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
    problem = ANNEAL.pack(
        *ids.shape, experts, ranks, slots, iterations, seed, price.home_first, *temperatures, penalty,
        price.pair, cap,
        ids.ctypes.data, at.ctypes.data, masks.ctypes.data,
    )  # fmt: skip
    cost = float(helper.moe_anneal(problem))
    if cost < 0:
        raise MemoryError(f"annealing {len(ids)} tokens needs about {60 * ids.size} bytes; fit on fewer tokens")
    return (masks[:, None] >> np.arange(ranks, dtype=np.uint64) & np.uint64(1)).astype(bool), cost


def home_ranks(tokens: int, ranks: int, seed: int) -> NDArray[np.uint8]:
    """A home for each token where it is not known: uniform, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, ranks, tokens).astype(np.uint8)


def search_replicas(
    expert_ids: NDArray[np.integer[Any]],
    start: NDArray[np.bool_],
    *,
    slots: int,
    slack: float,
    rounds: int,
    seed: int,
    deadline: float,
    price: Price = VISITS,
) -> NDArray[np.bool_]:
    """Copies [E, G] for one layer: hot on a sample of tokens, then cooler on all; never worse than `start` on all.

    expert_ids: [N, K]. slack: factor on the cap. The same seed and rounds give the same plan unless the deadline
    (`time.perf_counter`) comes first; it is kept within one piece of a phase.
    """
    tokens, ranks = len(expert_ids), start.shape[1]
    home = home_ranks(tokens, ranks, seed)
    few = np.random.default_rng(seed).permutation(tokens)[:SAMPLE]
    hosted = start
    for sample, moves, (first, last), part in zip((few, np.arange(tokens)), PER_ROUND, TEMPERATURES, SHARES):
        until = time.perf_counter() + part * (deadline - time.perf_counter())
        ids, at = expert_ids[sample], home[sample]
        cap = slack * CAP * float((ids >= 0).sum()) / ranks
        pieces = min(PIECES, max(1, rounds))
        steps = first * (last / first) ** (np.arange(pieces + 1) / pieces)
        for piece in range(pieces):
            if time.perf_counter() >= until:
                break
            hosted, _ = anneal(
                ids, at, hosted, slots=slots, cap=cap, penalty=PENALTY, iterations=moves * rounds // pieces,
                temperatures=(float(steps[piece]), float(steps[piece + 1])), seed=seed + piece, price=price,
            )  # fmt: skip
    cap = slack * CAP * float((expert_ids >= 0).sum()) / ranks
    costs = [
        anneal(
            expert_ids, home, h, slots=slots, cap=cap, penalty=PENALTY, iterations=0, temperatures=(1, 1), seed=0,
            price=price,
        )[1]
        for h in (hosted, start)
    ]  # fmt: skip
    return hosted if costs[0] < costs[1] else start
