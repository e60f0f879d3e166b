"""What a plan costs on held-out tokens, counted token by token; no code of the solvers or of the simulator."""

from typing import NamedTuple

import numpy as np

from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.trace import RoutingTrace


class Score(NamedTuple):
    """Per token and layer: copies that leave home, bytes both ways; busiest / mean load, mean over layers."""

    copies: float
    load: float
    num_bytes: float


def in_turn(ids: np.ndarray, table: ServingTable) -> np.ndarray:
    """Each copy of an expert takes the expert's tokens in turn, blind to ranks, as EPLB deals: [T, K] physical ids."""
    copies = [[int(p) for p in row if p >= 0] for row in table.physical]
    seen = [0] * len(copies)
    out = np.full(ids.shape, -1, np.int64)
    for at, expert in np.ndenumerate(ids):
        if expert >= 0:
            out[at] = copies[expert][seen[expert] % len(copies[expert])]
            seen[expert] += 1
    return out


def score(
    held: RoutingTrace,
    plan: Plan,
    *,
    is_exact: bool = False,
    rotations: tuple[int, ...] | None = None,
    dealt_in_turn: bool = False,
) -> Score:
    """Served by the engine's rule, homes dealt by sequence in turn from each of `rotations` on; None = from every rank.

    Loads are summed over the rotations: with few sequences, of unequal length, one rotation says which rank has the
    longest and not how even the plan is (five sequences are at home on 5 of 16 ranks).

    dealt_in_turn: copies are chosen by `in_turn` instead.

    is_exact: a result per pair comes home, else one per rank. Raises ValueError for tokens of unknown size.
    """
    sequence = np.repeat(np.arange(held.num_sequences), held.sequence_lengths)
    if held.sizes is None:
        raise ValueError("the trace does not say the model's sizes")
    vector = held.sizes.hidden_size * held.sizes.element_bytes
    copies, load, sent = [], [], []
    for layer in range(held.num_layers):
        table, ids = ServingTable.of(plan, layer), held.expert_ids[:, layer]
        served = np.zeros(plan.num_ranks)
        for turn in range(plan.num_ranks) if rotations is None else rotations:
            home = (sequence + turn) % plan.num_ranks
            chosen = in_turn(ids, table) if dealt_in_turn else choose_replicas(ids, home, table, home_first=is_exact)
            rank = chosen // plan.physical_per_rank
            away = [[r for r in row if r != at] for row, at in zip(rank.tolist(), home.tolist())]
            rows, pairs = np.mean([len(set(row)) for row in away]), np.mean([len(row) for row in away])
            words = ids.shape[1] * (1 if is_exact else 2)  # ids, and weights where a rank sums
            sent.append(rows * (vector + 4 * words) + vector * (pairs if is_exact else rows))
            copies.append(rows)
            served += np.bincount(rank.ravel(), minlength=plan.num_ranks)
        load.append(served.max() / served.mean())
    return Score(float(np.mean(copies)), float(np.mean(load)), float(np.mean(sent)))
