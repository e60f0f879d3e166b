"""The semidefinite bound: a doubly nonnegative relaxation over the layer chain, with triangle cuts, without labels.

Variables say "i and j share a rank": s within a layer, w between consecutive layers. For each pair of layers the
matrix [[s, w], [w', s']] is positive semidefinite, has unit diagonal, entries in [0, 1], rows summing to the
capacity; s is shared by neighbouring pairs, and since the chain's blocks overlap like a path this is as strong as
one matrix over all layers. No rank labels, hence no symmetry, which is why it beats every labelled program.

Solved by ADMM: eigenvalue projections against box projections. The bound does not rely on convergence: any
multipliers split the problem into an eigenvalue sum and box-constrained matchings that are solved from below.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from moe.placement.deadline import NEVER, Deadline

Floats = NDArray[np.float64]
PARTIAL_FROM = 256  # matrices at least this wide get only their leading eigenpairs
CUT_EVERY = 30


class Relaxation(NamedTuple):
    """A valid lower bound on the crossing fraction, and the (nearly feasible) fractional co-location behind it.

    within: [L, E, E], between: [L - 1, E, E], in [0, 1]; iterations, active triangle cuts, seconds.
    """

    bound: float
    within: Floats
    between: Floats
    iterations: int
    cuts: int
    seconds: float


class Cuts(NamedTuple):
    """Triangle inequalities y[a] + y[b] - y[c] <= 1 on the flat variables (w first, then s), and their multipliers."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    c: NDArray[np.int64]
    price: Floats

    @staticmethod
    def none() -> "Cuts":
        empty = np.zeros(0, np.int64)
        return Cuts(empty, empty, empty, np.zeros(0))


def relax(
    transitions: Floats,
    num_ranks: int,
    *,
    time_limit: float | Deadline,
    max_cuts: int = 0,
    iterations: float = np.inf,
    progress: Callable[[float], None] = lambda share: None,
) -> Relaxation:
    """Bound the crossing fraction of equal-capacity placements: transitions [L - 1, E, E] of total 1, E = G * capacity.

    max_cuts: how many triangle cuts may be active; 0 = the plain relaxation. Stops after the iterations, at the time
    limit, or when the bound no longer rises; if time did not end it, the same input gives the
    same result. progress: called with the share of the iterations or of the time. One iteration costs L
    eigendecompositions of [2E, 2E].
    """
    return _Admm(transitions, num_ranks, max_cuts).run(Deadline.of(time_limit), iterations, progress)


class _Admm:
    def __init__(self, transitions: Floats, num_ranks: int, max_cuts: int) -> None:
        self.mass, self.ranks, self.max_cuts = transitions, num_ranks, max_cuts
        self.pairs, self.experts = transitions.shape[0], transitions.shape[1]
        assert self.experts % num_ranks == 0, (self.experts, num_ranks)
        self.capacity = self.experts // num_ranks
        n, e = self.pairs, self.experts
        scale = float(np.sqrt(0.5 * (transitions**2).sum(axis=(1, 2))).mean())
        self.rho = max(scale, 1e-12) / (e / np.sqrt(num_ranks))
        self.between = np.full((n, e, e), 1 / num_ranks)
        self.within = np.full((n + 1, e, e), 1 / num_ranks)
        self.within[:, np.arange(e), np.arange(e)] = 1.0
        self.dual = np.zeros((n, 2 * e, 2 * e))
        self.cuts = Cuts.none()
        self.leading = np.full(n, 2 * num_ranks)

    def run(self, deadline: Deadline, iterations: float, progress: Callable[[float], None]) -> Relaxation:
        began = deadline.spent()
        best, count, check_cost, step_cost, next_check = -np.inf, 0, 0.0, 0.0, 8
        history: list[float] = []
        while not deadline.is_over():
            tick = deadline.spent()
            if not self.step(deadline):
                break
            count += 1
            step_cost = deadline.spent() - tick
            check_cost = check_cost or step_cost
            settled = len(history) > 3 and history[-1] - history[-2] < 1e-4
            if self.max_cuts and settled and count % CUT_EVERY == 0:
                self.separate()
            progress(max(count / max(iterations, 1), deadline.share()))
            short = deadline.left() < step_cost + 2 * check_cost
            last = count >= iterations or short
            if short and count < iterations:
                deadline.cut()
            if count < next_check and not last:
                continue
            if deadline.left() < check_cost:
                break
            tick = deadline.spent()
            best = max(best, self.bound(deadline))
            check_cost = deadline.spent() - tick
            next_check = count + (25 if self.experts < 128 else 8)
            history.append(best)
            patience = 40 if self.max_cuts else 12  # cuts first disturb, then lift the bound
            stalled = len(history) > patience and best - history[-patience] < 2e-6
            if last or stalled:
                break
        return Relaxation(best, self.within, self.between, count, len(self.cuts.price), deadline.spent() - began)

    def step(self, deadline: Deadline = NEVER) -> bool:
        """One ADMM iteration, over-relaxed by 1.6; False where time ended it."""
        e, n = self.experts, self.pairs
        sums = np.zeros_like(self.within)
        between = np.empty_like(self.between)
        for k in range(n):
            if deadline.is_over():
                return False
            block = self.block(k)
            x = self.project(k, self.tilted(k, block - self.dual[k], -1 / self.rho))
            self.dual[k] += 1.6 * x - 0.6 * block  # the point to project onto the box
            z = self.dual[k]
            sums[k] += z[:e, :e]
            sums[k + 1] += z[e:, e:]
            between[k] = (z[:e, e:] + z[e:, :e].T) / 2
        sums[1:-1] /= 2
        if self.cuts.price.size:
            pull_between, pull_within = self.cut_forces(self.cuts.price)
            between -= pull_between / (2 * self.rho)
            sums -= pull_within / self.rho
            sums[1:-1] += pull_within[1:-1] / (2 * self.rho)
        old = self.flat() if self.cuts.price.size else None
        self.between = np.clip(between, 0, 1)
        self.within = np.clip(sums, 0, 1)
        self.within[:, np.arange(e), np.arange(e)] = 1.0
        for k in range(n):
            self.dual[k] -= self.block(k)
        if old is not None:
            ahead = 2 * self.flat() - old
            a, b, c, price = self.cuts
            excess = ahead[a] + ahead[b] - ahead[c] - 1
            self.cuts = self.cuts._replace(price=np.maximum(price + self.stride * excess, 0))
        return True

    def tilted(self, k: int, matrix: Floats, factor: float) -> Floats:
        """matrix + factor x (cost of pair k), where the cost is -mass/2 in both off-diagonal blocks; in place."""
        e = self.experts
        matrix[:e, e:] -= factor * self.mass[k] / 2
        matrix[e:, :e] -= factor * self.mass[k].T / 2
        return matrix

    def block(self, k: int) -> Floats:
        e = self.experts
        out = np.empty((2 * e, 2 * e))
        out[:e, :e], out[e:, e:] = self.within[k], self.within[k + 1]
        out[:e, e:], out[e:, :e] = self.between[k], self.between[k].T
        return out

    def project(self, k: int, matrix: Floats) -> Floats:
        """Nearest matrix J/G + R with R centred, eigenvalues in [0, 2c], trace 2c(G - 1)."""
        centred = _centre(matrix, self.experts)
        cap, total, width = 2.0 * self.capacity, 2.0 * self.capacity * (self.ranks - 1), 2 * self.experts
        count = min(int(self.leading[k]), width)
        while True:
            if width < PARTIAL_FROM or count > width // 2:
                values, vectors = np.linalg.eigh(centred)
                count = width
            else:
                values, vectors = scipy.linalg.eigh(
                    centred,
                    subset_by_index=[width - count, width - 1],
                    driver="evr",
                    check_finite=False,
                    overwrite_a=False,
                )
            shift = _shift(values, cap, total)
            if count == width or shift >= values[0]:  # all eigenvalues left out would be clipped to 0
                break
            count *= 2
        kept = np.clip(values - shift, 0, cap)
        used = kept > 0
        self.leading[k] = max(int(used.sum() * 1.3) + 4, self.ranks)
        factor = vectors[:, used] * np.sqrt(kept[used])
        return np.asarray(factor @ factor.T + 1 / self.ranks)

    def bound(self, deadline: Deadline = NEVER) -> float:
        """Lower bound on the crossing fraction from the present multipliers, valid whatever they are; -inf where time
        ended it."""
        e, c = self.experts, self.capacity
        spectral = 0.0
        gain_between = np.empty_like(self.between)
        gain_within = np.zeros_like(self.within)
        for k in range(self.pairs):
            if deadline.is_over():
                return -np.inf
            multiplier = self.rho * (self.dual[k] + self.dual[k].T) / 2
            gain_between[k] = multiplier[:e, e:] + multiplier[e:, :e].T
            gain_within[k] += multiplier[:e, :e]
            gain_within[k + 1] += multiplier[e:, e:]
            matrix = self.tilted(k, multiplier, 1.0)
            spectral += float(matrix.sum()) / self.ranks
            if self.ranks > 1:
                values = scipy.linalg.eigh(
                    _centre(matrix, e), eigvals_only=True, subset_by_index=[0, self.ranks - 2], check_finite=False
                )
                spectral += 2 * c * float(values.sum())
        cost_between, cost_within = -gain_between, -(gain_within + gain_within.transpose(0, 2, 1)) / 2
        if self.cuts.price.size:
            pull_between, pull_within = self.cut_forces(self.cuts.price)
            cost_between, cost_within = cost_between + pull_between, cost_within + pull_within
        diagonal = float(cost_within[:, np.arange(e), np.arange(e)].sum())
        cost_within = cost_within.copy()
        cost_within[:, np.arange(e), np.arange(e)] = 1e3 * max(float(np.abs(cost_within).max()), 1e-12)
        boxes = matching_bound(cost_between, c).sum() + (matching_bound(cost_within, c - 1).sum() if c > 1 else 0.0)
        constant = float(self.mass.sum()) - float(self.cuts.price.sum())
        return constant + spectral + diagonal + float(boxes) - 1e-10

    def flat(self) -> Floats:
        return np.concatenate([self.between.reshape(-1), self.within.reshape(-1)])

    def cut_forces(self, price: Floats) -> tuple[Floats, Floats]:
        """Derivative of price . (cuts) by w [n, E, E] and by s as a symmetric matrix [L, E, E]."""
        a, b, c, _ = self.cuts
        size = self.between.size + self.within.size
        force: Floats = np.zeros(size)
        for sign, flat in ((1.0, a), (1.0, b), (-1.0, c)):
            force += sign * np.bincount(flat, price, size)
        within = force[self.between.size :].reshape(self.within.shape)
        return force[: self.between.size].reshape(self.between.shape), (within + within.transpose(0, 2, 1)) / 2

    def separate(self) -> None:
        """Drop cuts without a price, add the most violated triangles, and set the price step."""
        keep = self.cuts.price > 0
        a, b, c = (x[keep] for x in self.cuts[:3])
        price: Floats = self.cuts.price[keep]
        fresh = violated_triangles(self.between, self.within, max(self.max_cuts - keep.sum(), 0))
        size = self.between.size + self.within.size
        triple = np.concatenate([np.stack([a, b, c]), fresh], axis=1)
        price = np.concatenate([price, np.zeros(fresh.shape[1])])
        low, high = np.minimum(triple[0], triple[1]), np.maximum(triple[0], triple[1])
        _, first = np.unique((low * size + high) * 1.0 * size + triple[2], return_index=True)
        first.sort()
        self.cuts = Cuts(low[first], high[first], triple[2][first], price[first])
        if first.size:
            degree = np.bincount(np.concatenate([low, high, triple[2]]), minlength=1).max()
            self.stride = self.rho / float(degree)


def violated_triangles(between: Floats, within: Floats, limit: int) -> NDArray[np.int64]:
    """The most violated triangle inequalities: [3, n] flat indices (a, b, c) of y[a] + y[b] - y[c] <= 1.

    Of a pair of layers: w_ij + w_ik - s_jk and w_ij + s_jk - w_ik, both ways round; inside a layer s_ij + s_jk - s_ik.
    """
    if limit <= 0:
        return np.zeros((3, 0), np.int64)
    e = between.shape[1]
    base = between.size
    found: list[NDArray[np.int64]] = []
    amount: list[Floats] = []
    share = max(limit // max(len(between), 1), 8)
    index = np.arange(e)
    upper = index[:, None] < index[None, :]
    distinct = index[:, None] != index[None, :]

    def take(excess: Floats, allowed: NDArray[np.bool_], flat: tuple[NDArray[np.int64], ...]) -> None:
        excess = np.where(allowed, excess, 0.0).reshape(-1)
        top = np.argpartition(-excess, min(share, excess.size - 1))[:share]
        top = top[excess[top] > 1e-3]
        found.append(np.stack([np.broadcast_to(f, (e, e, e)).reshape(-1)[top] for f in flat]).astype(np.int64))
        amount.append(excess[top])

    def s_index(layer: int) -> NDArray[np.int64]:
        low, high = np.minimum(index[:, None], index[None, :]), np.maximum(index[:, None], index[None, :])
        return np.asarray(base + layer * e * e + low * e + high)

    for k in range(len(between)):
        w_index = k * e * e + index[:, None] * e + index[None, :]
        for w, wi, s, si in (
            (between[k], w_index, within[k + 1], s_index(k + 1)),
            (between[k].T, w_index.T, within[k], s_index(k)),
        ):
            both = w[:, :, None] + w[:, None, :] - s[None] - 1
            take(both, upper[None] & np.ones((e, 1, 1), bool), (wi[:, :, None], wi[:, None, :], si[None]))
            chain = w[:, :, None] + s[None] - w[:, None, :] - 1
            take(chain, distinct[None] & np.ones((e, 1, 1), bool), (wi[:, :, None], si[None], wi[:, None, :]))
    three = upper[:, None, :] & distinct[:, :, None] & distinct[None, :, :]  # i < k, j apart from both
    for layer, s in enumerate(within):
        si = s_index(layer)
        take(s[:, :, None] + s[None] - s[:, None, :] - 1, three, (si[:, :, None], si[None], si[:, None, :]))
    triples, amounts = np.concatenate(found, axis=1), np.concatenate(amount)
    return triples[:, np.argsort(-amounts, kind="stable")[:limit]]


def matching_bound(cost: Floats, degree: int) -> Floats:
    """Lower bound on min <cost, Y> over 0 <= Y <= 1 with all rows and columns summing to `degree`: [n, E, E] -> [n].

    Coordinate ascent on the dual, so valid after any number of rounds; degree >= 1. Costs O(n E^2) per round.
    """
    n, e, _ = cost.shape
    if degree >= e:
        return np.asarray(cost.sum(axis=(1, 2)))
    rows, columns = np.zeros((n, e)), np.zeros((n, e))
    for _ in range(20):
        reduced = np.partition(cost - columns[:, None, :], (degree - 1, degree), axis=2)
        rows = (reduced[:, :, degree - 1] + reduced[:, :, degree]) / 2
        reduced = np.partition(cost - rows[:, :, None], (degree - 1, degree), axis=1)
        columns = (reduced[:, degree - 1] + reduced[:, degree]) / 2
    slack = np.minimum(cost - rows[:, :, None] - columns[:, None, :], 0).sum(axis=(1, 2))
    return np.asarray(slack + degree * (rows.sum(axis=1) + columns.sum(axis=1)))


def _centre(matrix: Floats, e: int) -> Floats:
    """Make rows and columns of each of the four blocks sum to zero."""
    blocks = matrix.reshape(2, e, 2, e)
    blocks = blocks - blocks.mean(axis=1, keepdims=True)
    blocks = blocks - blocks.mean(axis=3, keepdims=True)
    return np.asarray(blocks.reshape(2 * e, 2 * e))


def _shift(values: Floats, cap: float, total: float) -> float:
    """t with sum(clip(values - t, 0, cap)) = total; values ascending. Bisection."""
    low, high = float(values[0]) - cap - total / len(values), float(values[-1])
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(values - middle, 0, cap).sum() > total:
            low = middle
        else:
            high = middle
    return (low + high) / 2
