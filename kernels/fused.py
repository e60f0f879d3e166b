"""The single launch from the host: dispatch, experts and combine of one layer in one kernel (see fused_kernel.py).

Wins for few tokens, where launches and waits are the cost, and overlaps puts with matrix work where experts are small;
`crossover.py` measures where it stops winning on this machine.
"""

import math

import torch
import triton
from torch import Tensor

from moe.kernels.fused_kernel import fused_experts_kernel
from moe.kernels.grouped_gemm import num_programs as programs_of
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import check_device, is_interpreted, launch_options, tl_dtype
from moe.kernels.permute import (
    SMALL_ROWS,
    dense_routing,
    expert_offsets,
    small_dense_routing,
    small_routing,
    sort_rows,
)
from moe.kernels.reference import check_expert_weights
from moe.kernels.tiles import (
    TileConfig,
    can_use_tma,
    device_capability,
    is_decoded,
    matrices,
    pick_tiles,
    tiles_for,
)
from moe.kernels.weights import ExpertWeights

ERRORS = {
    1: "tokens of a peer did not arrive",
    2: "row counts of a peer did not arrive",
    4: "a first GEMM did not finish",
    8: "results did not come back",
    16: "an expert that has rows is in no slot",
}


def polls_within(seconds: float) -> int:
    """About as many polls of a peer as fit: a microsecond each on a GPU, some milliseconds in the interpreter.

    Polls and not time, because a rank that gets no processor then does not give up on others that get none either.
    """
    return min(1 << 30, max(1, int(seconds * (1 << 8 if is_interpreted() else 1 << 20))))


class FusedExperts:
    """One rank's side of the single launch (or all virtual ranks' sides): scratch, tickets and the epoch.

    bases: int64 [G] on the device, the address of every rank's heap (`HeapLayout.of(shape).nbytes` zeroed bytes) as
    this process maps it. All ranks must pass the same shape, config and split, and must all call, in the same order,
    even with no tokens; no other kernel that waits for a peer may run beside it.
    first_rank, num_ranks: the ranks that this object plays; more than one for virtual ranks on one device.
    split: own rows as a wave of their own, so that matrix work hides the puts (None: when the experts are compute bound
    anyway, since it reads the weights twice). poll_limit: polls of one wait before it ends in an error
    (None: `polls_within` 30 s).
    programs: of the launch, any number is right (None: two per multiprocessor). players: processes that share one
    launch of this rank, for tests of the protocol.
    """

    def __init__(
        self,
        shape: FusedShape,
        bases: Tensor,
        *,
        first_rank: int = 0,
        num_ranks: int = 1,
        config: TileConfig | None = None,
        split: bool | None = None,
        poll_limit: int | None = None,
        programs: int | None = None,
        players: int = 1,
    ) -> None:
        check_device(bases)
        if bases.shape != (shape.world_size,) or bases.dtype != torch.int64:
            raise ValueError(f"bases must be int64 [{shape.world_size}], not {bases.dtype} {tuple(bases.shape)}")
        device, rows = bases.device, shape.world_size * shape.max_tokens * shape.top_k
        own_rows = shape.max_tokens * shape.top_k / shape.num_experts  # of this rank, per expert
        self.shape, self.bases, self.first_rank, self.num_ranks = shape, bases, first_rank, num_ranks
        self.capability = device_capability(device)
        self.config = config or pick_tiles(own_rows * shape.world_size, shape.dtype, self.capability)
        self.split = (own_rows >= 128 if split is None else split) and shape.world_size > 1
        self.poll_limit = poll_limit or polls_within(30)
        self.programs = programs or (1 if is_interpreted() else programs_of(device))
        self.players = players
        self.lag = min(
            shape.experts_per_rank,
            math.ceil(self.programs / triton.cdiv(shape.intermediate_size, self.config.block_n1)),
        )
        self.max_tiles = rows // self.config.block_m + shape.experts_per_rank * (2 if self.split else 1)
        self.inter = torch.empty(
            num_ranks, self.max_tiles * self.config.block_m, shape.intermediate_size, dtype=shape.dtype, device=device
        )
        self.tile_flag = torch.zeros(num_ranks, 2, self.max_tiles, dtype=torch.int32, device=device)
        self.tickets = torch.zeros(num_ranks, 2, 4, dtype=torch.int32, device=device)
        self.state = torch.tensor([1, 0, 0], dtype=torch.int32, device=device)

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        topk_weights: Tensor,
        slots: Tensor,
        weights: ExpertWeights,
        out: Tensor | None = None,
    ) -> Tensor:
        """out[t] = Σ_k topk_weights[t, k] · expert(ids[t, k])(x[t]), summed in the order of k, rounded once.

        x: [T, H] of the shape's dtype, T <= max_tokens, may be 0; ids: int [T, K] physical experts of all ranks,
        -1 = none; topk_weights: [T, K]; slots: int [E_local], where this rank's experts lie in `weights`, -1 = not
        resident (an error if it has rows). Virtual ranks: one more leading dimension, num_ranks, on all four.
        Costs two launches up to 1024 rows (sort, experts), a dozen beyond; no host sync. `check` tells of errors.
        """
        shape_out = x.shape
        x, ids, topk_weights, slots = self._checked(x, ids, topk_weights, slots)
        order, offsets = self._routing(ids)
        return self._launch(x, ids, topk_weights, order, offsets, slots, weights, out).view(shape_out)

    def run_slots(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> Tensor:
        """The same for one rank without peers, by slot: out[t] = Σ_k topk_weights[t, k] · expert(slot_ids[t, k])(x[t]).

        slot_ids: int [T, K], -1 = none, in a slab of any size; the shape's num_experts bounds only the slots in use, so
        that max_tokens * top_k is always enough.
        """
        shape = self.shape
        assert shape.world_size == 1, shape.world_size
        if slot_ids.numel() == 0:
            return torch.empty_like(x)
        route = small_dense_routing if slot_ids.numel() <= SMALL_ROWS else dense_routing
        dense = route(slot_ids.to(torch.int32), shape.num_experts)
        x, ids, topk_weights, slots = self._checked(x, dense.ids.view(slot_ids.shape), topk_weights, dense.slots)
        return self._launch(x, ids, topk_weights, dense.order, dense.offsets, slots, weights, None)[0]

    def _launch(
        self,
        x: Tensor,
        ids: Tensor,
        topk_weights: Tensor,
        order: Tensor,
        offsets: Tensor,
        slots: Tensor,
        weights: ExpertWeights,
        out: Tensor | None,
    ) -> Tensor:
        check_expert_weights(weights)
        if weights.activation.kind == "custom":
            raise ValueError("a custom activation function runs only in the torch reference; use experts_reference")
        shape, layout = self.shape, HeapLayout.of(self.shape)
        config = tiles_for(self.config, weights, shape.dtype)
        num_tokens = x.shape[1]
        out = torch.empty_like(x) if out is None else out
        # Decoding beside TMA spills inside the matrix loop (sm_100, triton 3.6).
        tma = not is_decoded(weights, shape.dtype) and can_use_tma(
            weights, shape.dtype, self.capability, config.block_k
        )
        gate, up, down = matrices(weights, shape.dtype, config, self.capability, tma=tma)
        act = weights.activation
        fused_experts_kernel[(self.programs,)](
            self.bases,
            self.state,
            self.programs * self.players,
            self.first_rank,
            self.num_ranks,
            shape.world_size,
            x,
            ids,
            topk_weights,
            order,
            offsets,
            slots,
            out,
            self.inter,
            self.tile_flag,
            self.tickets,
            num_tokens,
            self.lag,
            int(self.split),
            self.poll_limit,
            gate,
            up,
            down,
            act.alpha,
            act.limit,
            **fused_constants(shape, config, self.lag, self.max_tiles, layout),
            KIND=act.kind,
            GATED=act.gated,
            ALIGNED=shape.hidden_size * shape.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0,
            **launch_options(config.num_warps, config.num_stages),
        )
        return out

    def check(self) -> None:
        """`RuntimeError` if a launch so far ended in an error; then the heaps must be rebuilt. Costs a host sync."""
        bits = int(self.state[2])
        if bits:
            what = "; ".join(text for bit, text in ERRORS.items() if bits & bit)
            raise RuntimeError(
                f"single launch failed: {what} (waits end after {self.poll_limit} polls); look for a lost rank or one "
                "that did not call, then rebuild the symmetric heap on all ranks"
            )

    def _checked(self, x: Tensor, ids: Tensor, topk_weights: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        shape = self.shape
        if x.dim() == 2 and self.num_ranks == 1:
            x, ids, topk_weights, slots = x[None], ids[None], topk_weights[None], slots[None]
        lead, num_tokens = self.num_ranks, x.shape[1] if x.dim() == 3 else -1
        want = [
            (lead, num_tokens, shape.hidden_size),
            *[(lead, num_tokens, shape.top_k)] * 2,
            (lead, shape.experts_per_rank),
        ]
        got = [tuple(t.shape) for t in (x, ids, topk_weights, slots)]
        if got != want:
            raise ValueError(f"x, ids, topk_weights, slots have shapes {got}, this heap was made for {want}")
        if num_tokens > shape.max_tokens:
            raise ValueError(f"{num_tokens} tokens exceed max_tokens ({shape.max_tokens}); make a larger heap")
        if x.dtype != shape.dtype:
            raise ValueError(f"x is {x.dtype}, this heap was made for {shape.dtype}; convert x or make another heap")
        ids, slots = ids.to(torch.int32), slots.to(torch.int32)
        return x.contiguous(), ids.contiguous(), topk_weights.float().contiguous(), slots.contiguous()

    def _routing(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Per rank played: rows sorted by physical expert [ranks, T * K], and where each expert's begin [.., E + 1]."""
        orders, offsets = [], []
        for of_rank in ids:
            if 0 < of_rank.numel() <= SMALL_ROWS:
                routing = small_routing(of_rank, self.shape.num_experts, self.config.block_m, with_offsets=True)
                orders.append(routing.rows.order)
                offsets.append(routing.offsets)
            else:
                rows = sort_rows(of_rank)
                orders.append(rows.order)
                offsets.append(expert_offsets(rows.ids, self.shape.num_experts))
        if len(orders) == 1:
            return orders[0], offsets[0]
        return torch.stack(orders), torch.stack(offsets)


def fused_constants(
    shape: FusedShape, config: TileConfig, lag: int, max_tiles: int, layout: HeapLayout
) -> dict[str, object]:
    """The compile-time sizes of the kernel; shared with the ahead-of-time check."""
    return {
        "O_COUNT_FLAG": layout.count_flag,
        "O_DATA_FLAG": layout.data_flag,
        "O_RET_FLAG": layout.ret_flag,
        "O_OFFSETS": layout.offsets,
        "O_ROWS": layout.rows,
        "O_RECV_X": layout.recv_x,
        "O_RET_Y": layout.ret_y,
        "DATA_BLOCKS": triton.cdiv(shape.max_tokens, shape.dispatch_block),
        "RET_BLOCKS": triton.cdiv(shape.max_tokens, shape.return_block),
        "T_MAX": shape.max_tokens,
        "EL": shape.experts_per_rank,
        "EP": triton.next_power_of_2(shape.experts_per_rank + lag),
        "GP": triton.next_power_of_2(shape.world_size),
        "SCOPE": "gpu" if shape.world_size == 1 else "sys",
        "TOP_K": shape.top_k,
        "TOP_K_P": triton.next_power_of_2(shape.top_k),
        "H": shape.hidden_size,
        "I": shape.intermediate_size,
        "MAX_TILES": max_tiles,
        "DTYPE": tl_dtype(shape.dtype),
        "Y_DTYPE": tl_dtype(shape.dtype),
        "BLOCK_D": shape.dispatch_block,
        "BLOCK_R": shape.return_block,
        "BLOCK_H": min(1024 // shape.dispatch_block * 4, triton.next_power_of_2(shape.hidden_size)),
        "BLOCK_M": config.block_m,
        "BLOCK_N1": config.block_n1,
        "BLOCK_N2": config.block_n2,
        "BLOCK_K": config.block_k,
    }
