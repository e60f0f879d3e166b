"""What an expert cache does for one layer of a step, on the device: hits, misses, victims, and copies.

    ids [T, K] ─▶ route: asked, scores aged, a slot for each missing expert ─▶ gather: host memory ─▶ slots ─▶ slot ids

No decision is the host's, so that a step with misses can be one graph. The policy is offload/policy.py's, number for
number: scores are fp64, ties go to the smallest key, free slots go first. Experts must lie in host memory that the
device can address, and one layer's must fit the slots together.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import is_interpreted, launch_options

MOST_SLOTS = 16384  # one program holds a score for each


class SlotState(NamedTuple):
    """What is where, on the device. Keys number the experts of all layers.

    slot_of: int32 [keys], -1 = none; key_of: int32 [S], -1 = free; scores: fp64 [2, keys], whose sum p, at most 1, is
    how likely each visit of its layer asks for it: the smallest p / (1 + p far) goes first, where `far` is the part
    of a cycle over all layers until its layer comes; layer_of: int32 [keys]; rule: fp64 [5]: what the first and the
    second score are multiplied by when their layer is visited, what an asked expert's first gains, what its second
    becomes, and whether the first becomes the clock instead, and the smallest of these goes first; clock: fp64 [1],
    visits so far; counts: int64 [L, 2], hits and misses.
    """

    slot_of: Tensor
    key_of: Tensor
    scores: Tensor
    layer_of: Tensor
    rule: Tensor
    clock: Tensor
    counts: Tensor


class Scratch(NamedTuple):
    """asked: int32 [E, or more]; copies: int32 [2, E, or more]: keys and slots; num_copies: int32 [1]."""

    asked: Tensor
    copies: Tensor
    num_copies: Tensor


def route(ids: Tensor, layer: int, first_key: int, num_experts: int, state: SlotState, scratch: Scratch) -> Tensor:
    """Slots of `ids`, int32 of their shape, -1 where the id is; `scratch` says which experts are still to be copied.

    ids: int64, at least one. There must be as many slots as distinct ids. One program.
    """
    num_slots = len(state.key_of)
    assert num_experts <= num_slots <= MOST_SLOTS, (num_experts, num_slots)
    slot_ids = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    _route_kernel[(1,)](
        ids.contiguous(),
        slot_ids,
        *state,
        scratch.asked,
        scratch.copies,
        scratch.num_copies,
        ids.numel(),
        layer,
        first_key,
        num_experts,
        len(state.counts),
        num_slots,
        state.scores.stride(0),
        scratch.copies.stride(0),
        EXPERTS_P=triton.next_power_of_2(num_experts),
        SLOTS_P=triton.next_power_of_2(num_slots),
        BLOCK=1024,
        **launch_options(8, 1),
    )
    return slot_ids


def gather(scratch: Scratch, most: int, sources: Tensor, rows: Tensor, nbytes: int) -> None:
    """Copies what `route` found missing, at most `most` experts. sources: int64 [keys], addresses of their blobs.

    rows: uint8 [S, ≥ nbytes], the slots; nbytes: of a blob, a multiple of 16.
    """
    words, stride = nbytes // 8, rows.stride(0) // 8
    block = triton.next_power_of_2(words) if is_interpreted() else 2048
    _gather_kernel[(min(32, triton.cdiv(words, block)), most)](
        scratch.copies,
        scratch.num_copies,
        sources,
        rows,
        words,
        stride,
        scratch.copies.stride(0),
        BLOCK=block,
        **launch_options(8, 1),
    )


@triton.jit(
    do_not_specialize=[
        "num_ids",
        "layer",
        "first_key",
        "num_experts",
        "num_layers",
        "num_slots",
        "stride_scores",
        "stride_copies",
    ]
)
def _route_kernel(
    ids_ptr,
    slot_ids_ptr,
    slot_of_ptr,
    key_of_ptr,
    scores_ptr,
    layer_of_ptr,
    rule_ptr,
    clock_ptr,
    counts_ptr,
    asked_ptr,
    copies_ptr,
    num_copies_ptr,
    num_ids,
    layer,
    first_key,
    num_experts,
    num_layers,
    num_slots,
    stride_scores,
    stride_copies,
    EXPERTS_P: tl.constexpr,
    SLOTS_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.arange(0, EXPERTS_P)
    exists = e < num_experts
    tl.store(asked_ptr + e, tl.zeros((EXPERTS_P,), tl.int32), mask=exists)
    tl.debug_barrier()
    start = 0
    while start < num_ids:
        at = start + tl.arange(0, BLOCK)
        expert = tl.load(ids_ptr + at, mask=at < num_ids, other=-1)
        tl.store(asked_ptr + expert, tl.full((BLOCK,), 1, tl.int32), mask=expert >= 0)
        start += BLOCK
    tl.debug_barrier()
    is_asked = tl.load(asked_ptr + e, mask=exists, other=0) > 0
    num_asked = tl.sum(is_asked.to(tl.int32), 0)
    slot = tl.load(slot_of_ptr + first_key + e, mask=exists, other=-1)
    is_missing = is_asked & (slot < 0)
    num_missing = tl.sum(is_missing.to(tl.int32), 0)
    tl.store(num_copies_ptr, num_missing)
    if num_asked > 0:
        now = tl.load(clock_ptr) + 1.0
        first = tl.load(scores_ptr + first_key + e, mask=exists, other=0.0) * tl.load(rule_ptr)
        second = tl.load(scores_ptr + stride_scores + first_key + e, mask=exists, other=0.0) * tl.load(rule_ptr + 1)
        gained = tl.where(tl.load(rule_ptr + 4) > 0, now, first + tl.load(rule_ptr + 2))
        second = tl.where(is_asked, tl.load(rule_ptr + 3), second)
        tl.store(scores_ptr + first_key + e, tl.where(is_asked, gained, first), mask=exists)
        tl.store(scores_ptr + stride_scores + first_key + e, second, mask=exists)
        hits = tl.load(counts_ptr + 2 * layer) + (num_asked - num_missing)
        misses = tl.load(counts_ptr + 2 * layer + 1) + num_missing
        tl.debug_barrier()
        tl.store(clock_ptr, now)
        tl.store(counts_ptr + 2 * layer, hits)
        tl.store(counts_ptr + 2 * layer + 1, misses)
    if num_missing > 0:
        s = tl.arange(0, SLOTS_P)
        key = tl.load(key_of_ptr + s, mask=s < num_slots, other=-1)
        is_full = key >= 0
        score = tl.load(scores_ptr + key, mask=is_full, other=0.0)
        score += tl.load(scores_ptr + stride_scores + key, mask=is_full, other=0.0)
        ahead = tl.load(layer_of_ptr + key, mask=is_full, other=0) - (layer + 1)
        far = tl.where(ahead < 0, ahead + num_layers, ahead).to(tl.float64) / num_layers.to(tl.float64)
        likely = tl.minimum(score, 1.0)
        score = tl.where(tl.load(rule_ptr + 4) > 0, score, likely / (1.0 + likely * far))
        own = is_full & (key >= first_key) & (key < first_key + num_experts)
        is_used = tl.load(asked_ptr + key - first_key, mask=own, other=0) > 0
        score = tl.where(is_full, score, -float("inf"))
        score = tl.where(is_used | (s >= num_slots), float("inf"), score)
        tie = tl.where(is_full, key, s - 1073741824)  # free slots before full ones, in their order
        done = 0
        while done < num_missing:
            expert = tl.min(tl.where(is_missing, e, 1073741824), 0)
            is_missing = is_missing & (e != expert)
            is_least = score == tl.min(score, 0)
            old = tl.min(tl.where(is_least, tie, 1073741824), 0)
            victim = tl.sum(tl.where(is_least & (tie == old), s, 0), 0)
            score = tl.where(s == victim, float("inf"), score)
            if old >= 0:
                tl.store(slot_of_ptr + old, -1)
            tl.store(slot_of_ptr + first_key + expert, victim)
            tl.store(key_of_ptr + victim, first_key + expert)
            tl.store(copies_ptr + done, first_key + expert)
            tl.store(copies_ptr + stride_copies + done, victim)
            done += 1
    tl.debug_barrier()
    start = 0
    while start < num_ids:
        at = start + tl.arange(0, BLOCK)
        expert = tl.load(ids_ptr + at, mask=at < num_ids, other=-1)
        found = tl.load(slot_of_ptr + first_key + expert, mask=expert >= 0, other=-1)
        tl.store(slot_ids_ptr + at, found, mask=at < num_ids)
        start += BLOCK


@triton.jit(do_not_specialize=["words", "stride", "stride_copies"])
def _gather_kernel(
    copies_ptr, num_copies_ptr, sources_ptr, rows_ptr, words, stride, stride_copies, BLOCK: tl.constexpr
):
    number = tl.program_id(1)
    if number < tl.load(num_copies_ptr):
        key = tl.load(copies_ptr + number)
        slot = tl.load(copies_ptr + stride_copies + number).to(tl.int64)
        source = tl.multiple_of(tl.load(sources_ptr + key).to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(rows_ptr.to(tl.pointer_type(tl.int64)) + slot * stride, 16)
        at = tl.program_id(0) * BLOCK
        while at < words:
            word = at + tl.arange(0, BLOCK)
            tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)
            at += tl.num_programs(0) * BLOCK
