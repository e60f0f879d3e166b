"""Decoding steps as graphs: buffers that stay where they are, a captured forward per number of sequences and keys.

    chunks ─▶ tokens, places, lengths, block tables ─▶ one copy to the buffer of the bucket ─▶ replay ─▶ logits [S, V]
                                                        [ S sequences | places that nobody has: length 0 ]

What a step computes is then launched by the device alone: no Python, and the latency of one launch. Everything in the
captured forward has a fixed address and asks the host for nothing, which `why_not` makes sure of; who captures is
handed in, so that a test replays the same forward without a GPU.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe.engine.requests import Chunk
from moe.engine.runner import PackedRunner
from moe.kernels.paged_attention import SPLIT, Pages
from moe.kernels.triton_experts import FusedLayerExperts
from moe.layer.experts import SlotExperts
from moe.layer.runners import Resident
from moe.models.paged import PagedDecode

log = logging.getLogger(__name__)

MOST_SEQUENCES = 256  # of a bucket; larger steps are eager
_LONGER = 4  # keys of a bucket over those of the one before; programs without keys end at once


class Capture(Protocol):
    """Keeps what a function does on the device, so that it can be done again."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Calls `run` more than once. Returns what does the last call again, into the same memory, and its result.

        Raises RuntimeError, naming what cannot be captured.
        """


class CudaCapture:
    """CUDA graphs that share one pool of memory: one at a time runs."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):  # what is made at the first call is made outside of the graph
            run()
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # a sync would end the capture with less to say
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        self._pool = graph.pool()
        return graph.replay, out


class _Bucket(NamedTuple):
    """places: for sequences; numbers: int32 on the device: tokens, positions, lengths, tables; host: the same, here."""

    places: int
    numbers: Tensor
    host: Tensor
    replay: Callable[[], None]
    logits: Tensor
    visits: list[int]  # by layer, of one forward

    def fill(self, chunks: Sequence[Chunk]) -> None:
        host = self.host.numpy()
        host[:] = 0
        tables = host[3 * self.places :].reshape(self.places, -1)
        for place, (chunk, table) in enumerate(zip(chunks, tables)):
            blocks = chunk.request.blocks[: len(table)]
            host[place : 3 * self.places : self.places] = chunk.request.tokens[chunk.start], chunk.start, chunk.end
            table[: len(blocks)] = blocks
        self.numbers.copy_(self.host, non_blocking=True)


class DecodeGraphs:
    """Steps in which every sequence has one new token. max_context: no sequence is longer.

    A bucket is captured when it is first met, with places that nobody has, so that nothing is written or counted.
    """

    def __init__(self, runner: PackedRunner, experts: SlotExperts, max_context: int, capture: Capture) -> None:
        self._runner, self._experts, self._capture = runner, experts, capture
        pool = runner.kv.pool
        self._most_keys = min(max_context, pool.num_blocks * pool.block_size)
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._made_for: Resident | None = None
        self._told: set[str] = set()
        self.num_replays = 0

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits fp32 [len(chunks), V], valid until the next call; None for a step that must run eagerly."""
        if any(c.end - c.start != 1 or c.tells_prompt for c in chunks) or not 0 < len(chunks) <= MOST_SEQUENCES:
            return None
        reason = why_not(self._runner, self._experts)
        if reason is None:
            try:
                bucket = self._bucket(len(chunks), max(c.end for c in chunks))
            except RuntimeError as error:  # whatever cannot be captured of this architecture
                reason = f"its forward cannot be captured: {error}"[:300]
        if reason is not None:
            if reason not in self._told:
                self._told.add(reason)
                log.info("decoding steps run without graphs: %s", reason)
            return None
        bucket.fill(chunks)
        bucket.replay()
        self.num_replays += 1
        slots = self._resident.slots
        slots.visits = [n + more for n, more in zip(slots.visits, bucket.visits)]
        with self._unchecked() as check:
            check()
        return bucket.logits[: len(chunks)]

    @property
    def _resident(self) -> Resident:
        assert isinstance(self._experts.runner, Resident), "why_not has looked"
        return self._experts.runner

    @contextmanager
    def _unchecked(self) -> Iterator[Callable[[], None]]:
        """Inside no layer looks at the errors of launches; yields what looks, where anything is launched so."""
        with ExitStack() as stack:
            last = self._experts.kernels[-1]
            is_checked = isinstance(last, FusedLayerExperts) and last.is_last
            yield stack.enter_context(last.unchecked()) if is_checked else lambda: None  # type: ignore[attr-defined]

    def _bucket(self, num: int, longest: int) -> _Bucket:
        if self._made_for is not self._resident:  # other slots, other addresses
            self._buckets.clear()
            self._made_for = self._resident
        size, keys = self._runner.kv.pool.block_size, SPLIT
        while keys < longest:
            keys *= _LONGER
        places = 1 << (num - 1).bit_length()
        key = places, -(-min(keys, self._most_keys) // size)
        if key not in self._buckets:
            self._buckets[key] = self._captured(*key)
        return self._buckets[key]

    def _captured(self, places: int, most_blocks: int) -> _Bucket:
        kv, resident = self._runner.kv, self._resident
        shape = (3 + most_blocks) * places
        host = torch.zeros(shape, dtype=torch.int32, pin_memory=kv.device.type == "cuda")
        numbers = host.to(kv.device, copy=True)
        tokens, positions, lengths, tables = torch.split(numbers, [*[places] * 3, most_blocks * places])
        size = kv.pool.block_size
        assert isinstance(kv.alone, PagedDecode), "why_not has looked"
        layout = kv.alone.static(Pages(tables.view(places, -1), lengths, size, most_blocks * size))

        def run() -> Tensor:
            kv.take(layout)
            resident.nobody = lengths[:, None] == 0
            return self._runner.logits(tokens[None].long(), positions[None].long(), layout).float()

        before = list(resident.slots.visits)
        try:
            with self._unchecked():
                replay, logits = self._capture.capture(run)
        finally:
            resident.nobody = None
            each = [int(now > then) for now, then in zip(resident.slots.visits, before)]
            resident.slots.visits = before
        return _Bucket(places, numbers, host, replay, logits, each)


def why_not(runner: PackedRunner, experts: SlotExperts) -> str | None:
    """Why a decoding step has no fixed shape or address, or asks the host; None if it could be captured."""
    if not isinstance(runner.kv.alone, PagedDecode):
        return "its tokens do not attend by block tables"
    if experts.parallel is not None:
        return "its experts are shared with other ranks"
    if not isinstance(experts.runner, Resident):
        return "the host decides what is in slots: not all experts fit, nor are they in host memory (offload.store=ram)"
    seen_by = [*experts.routing.stages, *experts.routing.observers]
    return f"{type(seen_by[0]).__name__} looks at its routing on the host" if seen_by else None
