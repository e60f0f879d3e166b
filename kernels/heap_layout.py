"""Where everything lies in a rank's symmetric heap for the single launch: the same byte offsets on every rank.

G ranks, T_max tokens and R_max = T_max * K rows per rank, P = parity of the epoch, s = source rank:

    count_flag int32 [G]                 epoch whose counts and row numbers have arrived from s
    data_flag  int32 [G, blocks]         epoch whose tokens of a block of s have arrived
    ret_flag   int32 [2, blocks']        results that came back for a block of my tokens: rows times column tiles
    offsets    int32 [2, G, E_local + 1] where the rows of s for each of my experts begin and end
    rows       int32 [2, G, R_max]       their numbers t * K + k at s, sorted by expert
    recv_x     x     [G, T_max, H]       token t of s, put once however many of my experts it wants
    ret_y      y     [R_max, H]          results for my rows, put by the owners of the experts

Two parities suffice: nobody ends epoch n before it has everyone's counts of n and all its results, so that a rank which
is one epoch ahead of another only writes what the slower one no longer reads. FlashMoE (arXiv 2506.04667, section 3)
keeps one cell per (source, expert) padded to a tile; here nothing is padded and nothing can overflow.
"""

from dataclasses import dataclass

import torch

ALIGNMENT = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedShape:
    """What a heap is made for. num_experts counts the physical experts of all ranks: rank = id // experts_per_rank.

    max_tokens: of one rank and launch; worst-case memory is kept, so that no token is ever dropped.
    dtype: of tokens and of results.
    """

    world_size: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.num_experts % self.world_size:
            raise ValueError(f"{self.num_experts} experts do not split over {self.world_size} ranks; pad the placement")
        if min(self.max_tokens, self.top_k, self.world_size, self.num_experts) < 1:
            raise ValueError(f"every size must be at least 1: {self}")

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.world_size

    @property
    def dispatch_block(self) -> int:
        """Tokens that share one arrival flag: one while they are fewer than the programs of a GPU."""
        return 1 if self.max_tokens <= 128 else 16

    @property
    def return_block(self) -> int:
        """Tokens that share one counter of results."""
        return 1 if self.max_tokens <= 128 else 16


@dataclass(frozen=True, kw_only=True, slots=True)
class HeapLayout:
    """Byte offsets of the parts, and the size of the whole."""

    count_flag: int
    data_flag: int
    ret_flag: int
    offsets: int
    rows: int
    recv_x: int
    ret_y: int
    nbytes: int

    @staticmethod
    def of(shape: FusedShape) -> "HeapLayout":
        world, tokens, rows = shape.world_size, shape.max_tokens, shape.max_tokens * shape.top_k
        sizes = {
            "count_flag": 4 * world,
            "data_flag": 4 * world * -(-tokens // shape.dispatch_block),
            "ret_flag": 8 * -(-tokens // shape.return_block),
            "offsets": 8 * world * (shape.experts_per_rank + 1),
            "rows": 8 * world * rows,
            "recv_x": shape.dtype.itemsize * world * tokens * shape.hidden_size,
            "ret_y": shape.dtype.itemsize * rows * shape.hidden_size,
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return HeapLayout(**starts, nbytes=end)
