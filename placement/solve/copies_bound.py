"""How few ranks tokens can touch at all: a lower bound for every placement without replicas of equal capacity.

Where a rank's possible groups of experts can be listed (`groups_bound.py`: 64 experts on 16 ranks, 16 on 4) their
linear program bounds it. Else by co-location of pairs:

A token touches sum over its experts of 1 / (1 + q) ranks, q = its other experts on the same rank. 1 / (1 + q) is
convex, so tangents bound it from below by a linear function of "i and j share a rank", and the best linear value
over all placements is bounded by the semidefinite relaxation of `relaxation.py`, used on one layer against itself.
Any tangents give a valid bound; they are taken where the relaxation's own optimum lies, and the best is kept.

Plans keep the busiest rank under a cap, and what a cap costs may be more than what search leaves. Under a cap c the
ranks' squared loads sum to c times all pairs at most, and that sum is linear in co-location as well: any price of what
is above proves a bound (Lagrange), and the price rises where the relaxation's optimum is above.
"""

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import NEVER, Deadline
from moe.placement.solve.copies import k_hot
from moe.placement.solve.groups_bound import can_list, groups_bound
from moe.placement.solve.program import Floats
from moe.placement.solve.relaxation import relax
from moe.placement.trace import RoutingTrace

ROUNDS = 4
PRICE, STEP = 1.0, 4.0  # first, and for what is above: rank visits of all tokens, of squared loads over their even sum
CHUNK = 4096  # tokens between two looks at the clock


def copies_bound(
    trace: RoutingTrace,
    num_ranks: int,
    *,
    seconds: float | Deadline = 30.0,
    hint: NDArray[np.bool_] | None = None,
    iterations: float = np.inf,
    most_pairs: Floats | None = None,
) -> Floats:
    """Lower bound on the mean ranks touched per token in each layer, [L], for any placement with ceil(E/G) per rank.

    most_pairs: [L], what the busiest rank serves at most in the placements that count, of which `hint` must be one
    where groups are listed (ValueError); None = anything.

    hint: hosted [L, E, G] of a good plan, where the first tangents are taken. Better bounds need more seconds.
    iterations: of each relaxation, ROUNDS of them a layer.
    """
    deadline, capacity = Deadline.of(seconds), -(-trace.num_experts // num_ranks)
    pairs = (trace.expert_ids >= 0).sum(axis=2)
    bounds: Floats = np.ceil(pairs / capacity).mean(axis=0)  # a rank holds `capacity` experts at most
    for layer in range(trace.num_layers):
        if deadline.is_over():
            break
        until = deadline.part(1 / (trace.num_layers - layer))
        if can_list(trace.num_experts, num_ranks):
            single = hint is not None and bool((hint[layer].sum(axis=1) == 1).all())
            start = hint[layer].argmax(axis=1) if hint is not None and single else None
            found = groups_bound(
                trace.expert_ids[:, layer], trace.num_experts, num_ranks, until, start,
                most_pairs=np.inf if most_pairs is None else float(most_pairs[layer]),
            )  # fmt: skip
            bounds[layer] = max(bounds[layer], found)
            continue
        hits = k_hot(trace.expert_ids[:, layer], trace.num_experts).astype(np.float64)
        together = None
        if hint is not None:
            together = (hint[layer].astype(float) @ hint[layer].T.astype(float)) > 0
        cap = None if most_pairs is None else float(most_pairs[layer])
        bounds[layer] = layer_bound(hits, num_ranks, until, together, iterations, most_pairs=cap)
    return bounds


def layer_bound(
    hits: Floats,
    num_ranks: int,
    seconds: float | Deadline,
    together: NDArray[np.bool_] | None = None,
    iterations: float = np.inf,
    *,
    most_pairs: float | None = None,
) -> float:
    """The bound of one layer: hits [N, E] K-hot; together [E, E] who shares a rank in a good placement; most_pairs: as
    above."""
    experts = hits.shape[1]
    capacity = -(-experts // num_ranks)
    floor = float((np.ceil(hits.sum(axis=1) / capacity)).mean())  # a rank holds `capacity` experts at most
    if num_ranks == 1 or not hits.any():
        return floor
    average = (capacity - 1) / max(num_ranks * capacity - 1, 1)
    shared = np.full((experts, experts), average)
    if together is not None:
        shared = 0.5 * shared + 0.5 * together
    pairs = hits.sum(axis=0)
    squares = np.outer(pairs, pairs)
    most = 0.0 if most_pairs is None else most_pairs * float(pairs.sum())  # that squared loads sum to
    price = 0.0 if most_pairs is None else PRICE * len(hits) * num_ranks / float(pairs.sum()) ** 2
    best, deadline = floor, Deadline.of(seconds)
    for attempt in range(ROUNDS):
        np.fill_diagonal(shared, 0.0)
        try:
            constant, weight = tangents(hits, shared, deadline)
        except TimeoutError:
            break
        constant -= price * (most - float((pairs**2).sum()))
        weight -= 2 * price * squares
        np.fill_diagonal(weight, 0.0)
        value, found = most_shared(weight, num_ranks, capacity, deadline.part(1 / (ROUNDS - attempt)), iterations)
        best = max(best, (constant - value) / len(hits))
        if deadline.is_over():
            break
        if most_pairs is not None:
            np.fill_diagonal(found, 1.0)
            price = max(0.0, price * (1 + STEP * (float((squares * found).sum()) / most - 1)))
        shared = 0.5 * shared + 0.5 * found
    return float(best)


def tangents(hits: Floats, shared: Floats, deadline: Deadline = NEVER) -> tuple[float, Floats]:
    """(constant, weight [E, E] symmetric): ranks touched >= constant - <weight, s> / 2 for every 0/1 co-location s.

    The tangents are taken at `shared`, [E, E] in [0, 1] with a zero diagonal. Raises TimeoutError.
    """
    constant, half = 0.0, np.zeros_like(shared)
    for start in range(0, len(hits), CHUNK):
        if deadline.is_over():
            raise TimeoutError(f"time ended after {start} of {len(hits)} tokens")
        rows = hits[start : start + CHUNK]
        near = rows @ shared
        piece = np.floor(near)
        slope = rows / ((piece + 1) * (piece + 2))  # 1/(k+1) - 1/(k+2)
        constant += float((rows / (piece + 1) + slope * piece).sum())
        half += slope.T @ rows
    weight = half + half.T
    np.fill_diagonal(weight, 0.0)
    return constant, weight


def most_shared(
    weight: Floats, num_ranks: int, capacity: int, seconds: float | Deadline, iterations: float = np.inf
) -> tuple[float, Floats]:
    """(upper bound on <weight, s> / 2 over placements, the relaxation's s). weight: [E, E], symmetric, of any sign.

    Every expert shares its rank with as many others, silent ones among them, so that all weights may be raised alike.
    One layer against a copy of itself; a reward D for sharing with oneself, paid in full by every true placement,
    ties the two copies together.
    """
    experts = len(weight)
    missing = num_ranks * capacity - experts
    places = experts + missing
    raised = -min(0.0, float(weight.min(initial=0.0)))
    mass = (np.pad(weight, ((0, missing), (0, missing))) + raised) * (1 - np.eye(places))
    reward = float(mass.sum(axis=1).mean()) or 1.0
    mass += reward * np.eye(places)
    total = float(mass.sum())
    solved = relax(mass[None] / total, num_ranks, time_limit=seconds, iterations=iterations)
    upper = (1 - max(solved.bound, 0.0)) * total - reward * places - raised * places * (capacity - 1)
    s = (solved.within[0] + solved.within[1] + solved.between[0] + solved.between[0].T)[:experts, :experts] / 4
    return upper / 2, np.asarray(s)
