"""What a token dispatcher is, and the one for a single rank."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe.comm.groups import Groups
from moe.comm.wire import Meanwhile, Traffic, nothing, traffic_of
from moe.kernels.reference import combine_reference


class Dispatched(NamedTuple):
    """The rows that this rank computes.

    rows: [R, H], by source, within it in the order of its tokens. local_ids: int64 [R, K], index among this rank's
    physical experts, -1 = not here (a row may have none). weights: float32 [R, K], only where the way back needs them.
    handle: for `combine` alone. num_first: rows whose results others may wait for; those after them are this rank's own
    tokens, and stay.
    """

    rows: Tensor
    local_ids: Tensor
    weights: Tensor | None
    handle: object
    num_first: int


class TokenDispatcher(Protocol):
    """Tokens to the ranks of their experts and home again."""

    traffic: Traffic

    def dispatch(
        self,
        x: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        *,
        layer: int = 0,
        tokens_per_rank: tuple[int, ...] | None = None,
    ) -> Dispatched:
        """Send every token once to each rank that holds one of its experts. All ranks must call, also with T = 0.

        x: [T, H]; physical_ids: int [T, K], -1 = no expert; topk_weights: [T, K]. layer: named in errors.
        tokens_per_rank: T of all ranks, where the caller knows them; it may save the exchange of counts.
        """
        ...

    def combine(self, y: Tensor, handle: object, meanwhile: Meanwhile = nothing) -> Tensor:
        """Bring the results home. Returns out[t] = Σ_k topk_weights[t, k] · y[t, k] as [T, H] in x's dtype.

        y: [R, K, H], 0 where local_ids is -1, or [M, H], only the pairs of `local_pairs`, in that order. It is rounded
        to x's dtype before it is weighted, as the kernels have done. meanwhile: called when the results of the first
        `num_first` rows are on their way; those of the others need not be in y before it ends.
        """
        ...


class ExpertRanks:
    """Where physical experts live. rank_of: int [P]; a rank's experts are numbered locally in ascending physical id."""

    def __init__(self, rank_of: Tensor, groups: Groups):
        rank_of = torch.as_tensor(rank_of, dtype=torch.int64, device="cpu")
        if rank_of.ndim != 1 or not len(rank_of):
            raise ValueError(f"rank_of has shape {tuple(rank_of.shape)}; it must be [P] with P >= 1")
        low, high = int(rank_of.min()), int(rank_of.max())
        if low < 0 or high >= groups.world_size:
            raise ValueError(f"rank_of holds ranks {low} to {high}; the run has ranks 0 to {groups.world_size - 1}")
        self.num_physical = len(rank_of)
        self.num_local = [int((rank_of == r).sum()) for r in range(groups.world_size)]
        local_of = torch.full_like(rank_of, -1)
        mine = rank_of == groups.rank
        local_of[mine] = torch.arange(self.num_local[groups.rank])
        self.rank_of = table_with_none(rank_of, groups.device)
        self.local_of = table_with_none(local_of, groups.device)


def contiguous_ranks(num_physical: int, world_size: int) -> Tensor:
    """rank_of [P] = p // P_local, as a plan numbers its physical experts. P must be a multiple of the world size."""
    if num_physical % world_size:
        raise ValueError(f"{num_physical} physical experts do not divide over {world_size} ranks; pad the plan")
    return torch.arange(num_physical) // (num_physical // world_size)


def table_with_none(table: Tensor, device: torch.device) -> Tensor:
    """[P + 1] with -1 at the end, so that the id -1 reads it without a branch."""
    return torch.cat([table, table.new_full((1,), -1)]).to(device)


def check_tokens(x: Tensor, physical_ids: Tensor, topk_weights: Tensor, num_physical: int) -> None:
    """Raises ValueError for shapes that do not fit; ids are checked only on the CPU, where it costs no sync."""
    if x.ndim != 2 or physical_ids.ndim != 2 or len(x) != len(physical_ids) or physical_ids.shape != topk_weights.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, physical_ids {tuple(physical_ids.shape)} and topk_weights "
            f"{tuple(topk_weights.shape)} must be [T, H], [T, K] and [T, K] of one T"
        )
    if physical_ids.is_floating_point() or physical_ids.dtype == torch.bool:
        raise ValueError(f"physical_ids is {physical_ids.dtype}; it must be an integer tensor")
    if physical_ids.device.type == "cpu" and physical_ids.numel():
        low, high = int(physical_ids.min()), int(physical_ids.max())
        if low < -1 or high >= num_physical:
            raise ValueError(f"physical ids {low} to {high} must be -1 or lie in [0, {num_physical})")


def local_pairs(local_ids: Tensor, num_pairs: int | None = None) -> Tensor:
    """Flat positions r * K + k of the pairs computed here, ascending, int64 [M]. Without num_pairs: a host sync."""
    here = local_ids.reshape(-1) >= 0
    return (here.nonzero() if num_pairs is None else here.nonzero_static(size=num_pairs))[:, 0]


def pair_values(y: Tensor, local_ids: Tensor, num_pairs: int | None = None) -> Tensor:
    """y [R, K, H] or [M, H] as [M, H]."""
    check_results(y, local_ids)
    return y if y.ndim == 2 else y.flatten(0, 1).index_select(0, local_pairs(local_ids, num_pairs))


def row_values(y: Tensor, local_ids: Tensor) -> Tensor:
    """y [R, K, H] or [M, H] as [R, K, H], 0 where local_ids is -1."""
    check_results(y, local_ids)
    return y if y.ndim == 3 else placed(y, local_pairs(local_ids, len(y)), local_ids.shape)


def placed(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """[N, K, H] of zeros with values [M, H] at the flat positions [M]."""
    y = values.new_zeros(shape.numel(), values.shape[1])
    y.index_copy_(0, positions, values)
    return y.view(*shape, values.shape[1])


def weighted_sum(y: Tensor, topk_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`combine_reference`, by its kernel (bit-equal) on a GPU. y: [T, K, H]. Returns [T, H]."""
    if y.device.type != "cuda":
        return combine_reference(y, topk_weights, dtype)
    from moe.kernels.combine import combine  # triton is an optional extra on the CPU

    out: Tensor = combine(y, topk_weights, dtype)
    return out


def weighted_sum_of_pairs(values: Tensor, positions: Tensor, topk_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`weighted_sum(placed(values, positions, ...))`, bit for bit, without the [T, K, H] in between on the CPU.

    values: [M, H]; positions: int64 [M], flat t * K + k, none twice; topk_weights: [T, K]. Returns [T, H].
    """
    if values.device.type != "cpu":
        return weighted_sum(placed(values, positions, topk_weights.shape), topk_weights, dtype)
    num_tokens, top_k = topk_weights.shape
    where = torch.full((num_tokens * top_k,), -1)
    where[positions] = torch.arange(len(positions))
    where = where.view(num_tokens, top_k)
    out = torch.zeros(num_tokens, values.shape[1])
    for k in range(top_k):
        row = (where[:, k] >= 0).nonzero()[:, 0]
        term = values.index_select(0, where[row, k]).float()
        term *= topk_weights[row, k, None].float()
        if len(row) == num_tokens:
            out += term
        else:
            out.index_add_(0, row, term)
    return out.to(dtype)


def row_sums(y: Tensor, local_ids: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w·y over the pairs computed here, float32 [R, H]. y: [R, K, H] or [M, H]; weights: [R, K]."""
    if y.device.type != "cpu":
        return weighted_sum(row_values(y, local_ids), weights, torch.float32)
    # Of K ids of a row about K / G are here: reading only those beats adding the zeros of the others.
    values = pair_values(y, local_ids)
    return weighted_sum_of_pairs(values, local_pairs(local_ids, len(values)), weights, torch.float32)


def check_results(y: Tensor, local_ids: Tensor) -> None:
    """Raises ValueError for y that is neither [R, K, H] nor [M, H]."""
    if y.ndim not in (2, 3) or (y.ndim == 3 and y.shape[:2] != local_ids.shape):
        raise ValueError(f"y {tuple(y.shape)} must be [R, K, H] or [M, H] for local_ids {tuple(local_ids.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class LocalHandle:
    local_ids: Tensor
    topk_weights: Tensor
    dtype: torch.dtype


class LocalDispatcher:
    """World size 1: rows are the tokens themselves, nothing is copied; the twin of every other dispatcher."""

    def __init__(self, groups: Groups, rank_of: Tensor):
        if groups.world_size != 1:
            raise ValueError(f"a LocalDispatcher serves one rank, this run has {groups.world_size}")
        self.experts = ExpertRanks(rank_of, groups)
        self.traffic = traffic_of(groups)

    def dispatch(
        self,
        x: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        *,
        layer: int = 0,
        tokens_per_rank: tuple[int, ...] | None = None,
    ) -> Dispatched:
        """See `TokenDispatcher`. Costs nothing."""
        check_tokens(x, physical_ids, topk_weights, self.experts.num_physical)
        self.traffic.calls += 1
        local_ids = self.experts.local_of[physical_ids.long()]
        return Dispatched(x, local_ids, None, LocalHandle(local_ids, topk_weights, x.dtype), len(x))

    def combine(self, y: Tensor, handle: object, meanwhile: Meanwhile = nothing) -> Tensor:
        """See `TokenDispatcher`."""
        if not isinstance(handle, LocalHandle):
            raise ValueError(f"the handle is a {type(handle).__name__}; pass the one that dispatch returned")
        return weighted_sum(row_values(y.to(handle.dtype), handle.local_ids), handle.topk_weights, handle.dtype)
