"""Simulated annealing of one layer's expert copies in compiled code (anneal.c), on the objective that is served.

A token visits its home, the ranks of experts with a single copy, and what a greedy cover adds (`choose_replicas`); its
experts are shared by the visited ranks that have them, and load above the cap costs. Homes are drawn by `home_ranks`.
"""

import ctypes
import logging
import time
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_PROBLEM = Struct("=7q4d3q")  # struct Problem
MOST_RANKS = 64
MOST_TOP = 64
SAMPLE = 1200  # tokens of the hot phase
PER_ROUND = (1200, 300)  # moves tried per round: on the sample, then on all tokens
TEMPERATURES = ((60.0, 6.0), (6.0, 1.0))  # rank visits
SHARES = (0.6, 1.0)  # of the time that is left, for each phase
PIECES = 20  # of a phase; between them the clock is read
PENALTY = 1.0  # rank visits that a token above the cap costs
CAP = 1.01  # of the mean load


@cache
def load_helper() -> ctypes.CDLL | None:
    """The compiled helper, or None where it is absent or of other sources; the reason is logged, once."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_anneal*.so"))
    try:
        if not files:
            raise OSError(f"no _anneal*.so in {folder}; it is compiled at installation, which needs gcc or clang")
        helper = ctypes.CDLL(str(files[0]))
        if helper.moe_anneal_abi() != _PROBLEM.size:
            raise OSError(f"{files[0].name} was compiled from other sources; reinstall")
    except OSError as error:
        log.warning("replicas are searched in numpy, with less gain: %s", error)
        return None
    helper.moe_anneal.argtypes, helper.moe_anneal.restype = [ctypes.c_char_p], ctypes.c_double
    return helper


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
) -> tuple[NDArray[np.bool_], float]:
    """The best copies found from hosted [E, G], and their cost: visits besides home + penalty x load above the cap.

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
    problem = _PROBLEM.pack(
        *ids.shape, experts, ranks, slots, iterations, seed, *temperatures, penalty, cap,
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
                temperatures=(float(steps[piece]), float(steps[piece + 1])), seed=seed + piece,
            )  # fmt: skip
    cap = slack * CAP * float((expert_ids >= 0).sum()) / ranks
    costs = [
        anneal(expert_ids, home, h, slots=slots, cap=cap, penalty=PENALTY, iterations=0, temperatures=(1, 1), seed=0)[1]
        for h in (hosted, start)
    ]
    return hosted if costs[0] < costs[1] else start
