"""Inputs that every rank computes whole from a seed, and stand-in experts whose result does not depend on the batch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One layer's tokens on all ranks. tokens_of: T by rank; rank_of: [P]; skew: how ids are drawn."""

    tokens_of: tuple[int, ...]
    hidden: int
    top_k: int
    rank_of: tuple[int, ...]
    skew: str = "random"
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Tokens(NamedTuple):
    """x: [T, H]; ids: [T, K]; weights: [T, K]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    def of_rank(self, case: Case, rank: int) -> "Tokens":
        begin = sum(case.tokens_of[:rank])
        return Tokens(*(t[begin : begin + case.tokens_of[rank]] for t in self))


def draw(case: Case) -> Tokens:
    """The tokens of all ranks, rank after rank."""
    generator = torch.Generator().manual_seed(case.seed)
    total, num_physical = sum(case.tokens_of), len(case.rank_of)
    x = torch.randn(total, case.hidden, generator=generator).to(case.dtype)
    ids = torch.rand(total, num_physical, generator=generator).argsort(1)[:, : case.top_k]
    if case.skew == "one":
        ids = torch.full_like(ids, num_physical - 1)
    if case.skew == "holes":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -1, ids)
    if case.skew == "none":
        ids = torch.full_like(ids, -1)
    weights = torch.rand(total, case.top_k, generator=generator)
    return Tokens(x, ids.to(torch.int32), weights / weights.sum(1, keepdim=True))


def expert_values(x: Tensor, ids: Tensor) -> Tensor:
    """y [N, K, H] float32 of physical experts: elementwise, so that no bit depends on the other rows; 0 where -1."""
    scale = 1.0 + 0.37 * ids.unsqueeze(-1).float()
    y = torch.tanh(x.float().unsqueeze(1) * scale) * scale - 0.01 * scale
    return torch.where(ids.unsqueeze(-1) >= 0, y, 0.0)


def physical_of(rank_of: tuple[int, ...], rank: int) -> Tensor:
    """Global ids of a rank's local experts, with -1 at the end for the local id -1."""
    return torch.tensor([p for p, r in enumerate(rank_of) if r == rank] + [-1])
