"""The draw of a token from logits, for many rows at once and wherever they lie; the same on every device.

What decides is exact: a row's probabilities become integers (the likeliest gets 2^S), their sums have no order, and the
number that picks one of them comes from a counter: Philox of (seed, place in the answer). So a token depends neither on
the rows beside it nor on the device, but for the last bit of `exp`, which moves a probability by 2^-S of the largest;
S is at least 44 for a vocabulary of 2^18. A token less likely than that is never drawn.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

_MASK: Final = 0xFFFFFFFF
NOT_FINITE, NONE_LEFT = -1, -2  # instead of a token


class Draws(NamedTuple):
    """How one row is drawn. top_k: 0 keeps all; uniform: in [0, 1)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four 32-bit words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & _MASK, first >> 32 ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, place: int) -> float:
    """In [0, 1), 53 bits: the number of token `place` of an answer. seed: below 2^64."""
    high, low, *_ = philox((seed & _MASK, seed >> 32), (place & _MASK, place >> 32, 0, 0))
    return (high << 21 | low >> 11) * 2.0**-53


def draw(scores: Tensor, draws: list[Draws]) -> Tensor:
    """int64 [B]: a token of each row of scores [B, V], or NONE_LEFT where all are -inf. No host sync.

    scores: floats, -inf = forbidden, no NaN; draws: a row's own. Temperature divides first, then top-k (ties with the
    last one stay), top-p of what is left, and min-p. Costs a sort of the rows if one has top-k or top-p.
    """
    table = torch.tensor(draws, dtype=torch.float64).to(scores.device, non_blocking=True)
    temperature, _, _, min_p, number = table.T[..., None]  # [B, 1] each
    wide = scores.double() / temperature
    # the largest is taken off before anything overflows, and a row of nothing but -inf gives NaN: weight 0
    ratios = (wide - wide.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    weights = (ratios * 2.0 ** (62 - (scores.shape[1] - 1).bit_length())).long()
    if any(one.top_k or one.top_p < 1 for one in draws):
        weights = _of_the_likeliest(weights, draws, table)
    weights = weights.where(ratios >= min_p, 0)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    chosen = torch.minimum((total.double() * number).long(), total - 1)  # the product may be rounded up to the total
    token = torch.searchsorted(sums, chosen, right=True)
    return token.where(total > 0, NONE_LEFT)[:, 0]


def _of_the_likeliest(weights: Tensor, draws: list[Draws], table: Tensor) -> Tensor:
    """Weights [B, V], 0 for what top-k or top-p leave out."""
    vocabulary = weights.shape[1]
    ordered, places = weights.sort(dim=-1, descending=True, stable=True)
    last = [[(one.top_k or vocabulary) - 1] for one in draws]
    least = ordered.gather(1, torch.tensor(last).clamp(max=vocabulary - 1).to(weights.device, non_blocking=True))
    ordered = ordered.where(ordered >= least, 0)
    before = ordered.cumsum(-1) - ordered
    total, top_p = ordered.sum(-1, keepdim=True), table[:, 2:3]
    enough = (total.double() * top_p).ceil().long().clamp(min=1).where(top_p < 1, total)
    ordered = ordered.where(before < enough, 0)
    return torch.zeros_like(weights).scatter_(1, places, ordered)
