"""The paged KV cache: blocks, who uses them, and prompts that share their beginning."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe.models.attention import LARGE, Alone, PagedLayer, StepLayout
from moe.offload.stores import LARGE_PAGE, give_back

# What this version of transformers calls a forward's cache, as an argument and in its output (`cache` from 5.24 on).
CACHE_NAME: Final = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in {"cache", "past_key_values"})

LayOut = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[int]], Alone | None]  # arguments as `PagedKV.begin`
_Key = tuple[int, tuple[int, ...]]  # (identity of the block before, -1 at the start; the block's tokens)


class BlockPool:
    """Numbers of blocks: free, used by sequences (counted), or kept for a prompt that begins the same way.

    A full block may be shared: its key is its tokens and the identity of the block before it, so that equal keys mean
    equal prefixes (no hashes to collide). A kept block is given up, oldest first, when no free one is left.
    room: how many blocks there may ever be; None: as many as there are.
    """

    def __init__(self, num_blocks: int, block_size: int, sharing: bool = True, room: int | None = None) -> None:
        self.num_blocks, self.block_size, self.sharing = num_blocks, block_size, sharing
        self.room = num_blocks if room is None else room
        assert num_blocks <= self.room, (num_blocks, room)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * self.room
        self._key_of: dict[int, _Key] = {}
        self._shared: dict[_Key, int] = {}
        self._identity: dict[int, int] = {}  # of a keyed block; never used twice
        self._next_identity = 0
        self._kept: OrderedDict[int, None] = OrderedDict()  # keyed, no user

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """For a prompt that begins the same way."""
        return len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_to_have(self) -> int:
        """Blocks that no sequence uses, of all that there may ever be."""
        return self.room - self.num_used

    def take(self, count: int) -> list[int]:
        """`count` blocks, each with one user. The caller has looked at `num_available`."""
        assert count <= self.num_available, (count, self.num_available)
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the end of a prefix goes before its beginning
            self._users[block] -= 1
            assert self._users[block] >= 0, block
            if self._users[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of full blocks that holds a proper prefix of `tokens`; they get one user more."""
        blocks: list[int] = []
        before = -1
        size = self.block_size
        for start in range(0, len(tokens) - size, size):  # at least one token is left to compute
            block = self._shared.get((before, tuple(tokens[start : start + size])))
            if block is None or not self.sharing:
                break
            blocks.append(block)
            before = self._identity[block]
        for block in blocks:
            self._users[block] += 1
            self._kept.pop(block, None)
        return blocks

    def publish(self, blocks: Sequence[int], index: int, tokens: Sequence[int]) -> None:
        """Blocks[index] is full with `tokens`: later prompts may share it, if all before it are shared too."""
        if not self.sharing or blocks[index] in self._key_of:
            return
        before = -1 if index == 0 else self._identity.get(blocks[index - 1])
        key = None if before is None else (before, tuple(tokens))
        if key is None or key in self._shared:  # computed twice at the same time: the first stays
            return
        self._key_of[blocks[index]] = key
        self._shared[key] = blocks[index]
        self._identity[blocks[index]] = self._next_identity
        self._next_identity += 1

    def resize(self, num_blocks: int) -> dict[int, int]:
        """As many blocks from now on, no fewer than are used. Those beyond get other numbers: returns new by old, whose
        tokens the caller copies. Kept blocks are given up where there is no place for them.
        """
        assert self.num_used <= num_blocks <= self.room, (self.num_used, num_blocks, self.room)
        while self.num_used + len(self._kept) > num_blocks:
            self._free.append(self._evict())
        before, self.num_blocks = self.num_blocks, num_blocks
        self._free = [*range(num_blocks - 1, before - 1, -1), *(b for b in self._free if b < num_blocks)]
        beyond = [b for b in range(num_blocks, before) if self._users[b] or b in self._kept]
        moved = {block: self._free.pop() for block in beyond}
        for old, new in moved.items():
            self._users[new], self._users[old] = self._users[old], 0
            if old in self._key_of:
                key = self._key_of[new] = self._key_of.pop(old)
                self._shared[key], self._identity[new] = new, self._identity.pop(old)
        self._kept = OrderedDict((moved.get(block, block), None) for block in self._kept)
        return moved

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._shared[self._key_of.pop(block)], self._identity[block]
        return block

    def check(self) -> None:
        """Every block is free, kept or used, and in one of these only."""
        used = {b for b, n in enumerate(self._users) if n}
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free)
        assert not used & (free | kept), (used, free, kept)
        assert not free & kept, (free, kept)
        assert len(used) + len(free) + len(kept) == self.num_blocks
        assert max(used | free | kept, default=-1) < self.num_blocks, "a block that there is no more"
        assert {self._shared[k]: k for k in self._shared} == self._key_of


class PagedKV:
    """Keys and values of all layers in blocks of one pool; `cache` is what transformers' models take."""

    def __init__(self, num_layers: int, pool: BlockPool, device: torch.device) -> None:
        self.pool = pool
        self.device = device
        self.layers = [PagedLayer(pool.room * pool.block_size) for _ in range(num_layers)]
        self.cache: Any = Cache(layers=list(self.layers))
        self.alone: LayOut | None = None  # who attends for tokens that are their sequence's only new one

    def prepare(self, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Makes the pools of all layers now: rows that other ranks computed may be the first. like: K, V of a token."""
        for layer, (keys, values) in zip(self.layers, like):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)

    def taken_by(self, num_blocks: int) -> int:
        """Bytes of memory that so many blocks take, in whole pages. On the host, after `prepare`."""
        taken, room = 0, max(1, self.pool.room)
        for pool in (t for layer in self.layers for t in (layer.keys, layer.values)):
            used = pool.nbytes * num_blocks // room
            taken += used if pool.nbytes < LARGE else min(pool.nbytes, (used // LARGE_PAGE + 1) * LARGE_PAGE)
        return taken

    @torch.inference_mode()  # which the pools may have been made in
    def resize(self, num_blocks: int) -> dict[int, int]:
        """As `BlockPool.resize`, tokens and all: memory of blocks that are no more is the system's. On the host."""
        moved, size = self.pool.resize(num_blocks), self.pool.block_size
        for tensor in (t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)):
            if moved:
                blocks = tensor.view(self.pool.room, size, *tensor.shape[1:])
                blocks[list(moved.values())] = blocks[list(moved)]
            give_back(tensor[num_blocks * size :])
        return moved

    def empty(self) -> None:
        """All memory is the system's until it is written again. No block may be used; on the host."""
        blocks = self.pool.num_blocks
        self.resize(0)
        self.resize(blocks)

    def begin(self, blocks: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]) -> StepLayout:
        """Lays out a step that computes the tokens [start, end) of each sequence with these blocks."""
        alone = None if self.alone is None else self.alone(blocks, starts, ends)
        rows = [self.rows(own, end) for own, end in zip(blocks, ends)]
        if alone is None:
            layout = self.layout(rows, starts)
        else:  # what each reads, it reads by itself
            own_rows = np.concatenate([own[start:] for own, start in zip(rows, starts)])
            lengths = [end - start for start, end in zip(starts, ends)]
            layout = StepLayout(lengths, list(ends), self._rows(own_rows), slice(0, 0), alone)
        return self.take(layout)

    def take(self, layout: StepLayout) -> StepLayout:
        """The next forward is of this step."""
        for layer in self.layers:
            layer.step = layout
        return layout

    def rows(self, blocks: Sequence[int], end: int) -> npt.NDArray[np.int64]:
        """Rows of the pool where a sequence with these blocks has its tokens [0, end)."""
        size = self.pool.block_size
        return (np.array(blocks[: -(-end // size)])[:, None] * size + np.arange(size)).reshape(-1)[:end]

    def layout(self, rows: Sequence[npt.NDArray[np.int64]], starts: Sequence[int]) -> StepLayout:
        """A step in which each sequence reads `rows` and writes those from `start` on; for one layer or for all."""
        return StepLayout(
            [len(own) - start for own, start in zip(rows, starts)],
            [len(own) for own in rows],
            self._rows(np.concatenate([own[start:] for own, start in zip(rows, starts)])),
            self._rows(np.concatenate(rows)),
        )

    def _rows(self, rows: npt.NDArray[np.int64]) -> Tensor | slice:
        """A slice where the rows follow each other: it is written and read without a gather."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and (rows[1:] - rows[:-1] == 1).all():
            return slice(first, last + 1)
        return torch.from_numpy(rows).to(self.device)
