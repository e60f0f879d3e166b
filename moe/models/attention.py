"""Attention over a paged KV cache, through transformers' attention, mask and cache interfaces.

A step packs the new tokens of several sequences into one row, [1, T]. Each layer's new keys and values are written
to the pool and all that a sequence has are read back; attention then runs sequence by sequence, so that a sequence's
result cannot depend on what it was batched with.

    queries  [ seq 0: 1 | seq 1: 1 | seq 2: n … ]       T tokens
    keys     [ seq 0: m0     | seq 1: m1 | seq 2: m2 ]   everything that is cached, the new tokens included
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from moe.offload.stores import LARGE_PAGE, aligned_bytes

ATTENTION_NAME = "moe_paged"


class Alone(Protocol):
    """The tokens of a step that are their sequence's only new one, and attend by themselves (moe/models/paged.py).

    pages: where they have their keys (kernels/paged_attention.py). at, others_at: int64, these tokens and those of the
    other sequences in the step; others: how those are laid out. None where there are no others.
    """

    pages: Any
    at: Tensor | None
    others_at: Tensor | None
    others: "StepLayout | None"

    def attend(
        self, module: Any, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query: [1, heads, T, D] of the whole step. Returns [S, heads, D] of these tokens."""


class StepLayout(NamedTuple):
    """Where the tokens of one step stand. All tensors are int64; S sequences, T new tokens, N cached tokens.

    alone: those that attend by themselves; what follows `write_at` is then of nobody.
    """

    query_lengths: list[int]  # [S] new tokens; they sum to T
    key_lengths: list[int]  # [S] cached tokens, the new ones included; they sum to N
    write_at: Tensor | slice  # [T] rows of the pool; a slice where they follow each other
    read_at: Tensor | slice  # [N] rows of the pool
    alone: Alone | None = None


class MaskRule:
    """What transformers would make a mask of: `function(batch, head, query, key) -> may attend`, on positions."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.is_causal = function is causal_mask_function
        self._masks: dict[int, Tensor | None] = {}  # of this step, shared by its layers

    def mask(self, sequence: int, step: StepLayout, device: torch.device) -> Tensor | None:
        """bool [new, cached] for one sequence; None if everything may be seen."""
        if sequence not in self._masks:
            length = step.key_lengths[sequence]
            first = length - step.query_lengths[sequence]  # position of the first new token
            zero = torch.zeros((), dtype=torch.int64, device=device)
            keys = torch.arange(length, device=device)
            mask = self.function(zero, zero, keys[first:, None], keys[None, :])
            self._masks[sequence] = None if bool(mask.all()) else mask
        return self._masks[sequence]


def mask_rule(*_: Any, mask_function: Callable[..., Any], **__: Any) -> MaskRule:
    return MaskRule(mask_function)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    step: StepLayout | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query: [1, heads, T, D]; key, value: [1, kv_heads, N, D]. Returns [1, T, heads, D_v], contiguous.

    s_aux: a logit per head that takes part in the softmax and has no value (GPT-OSS's sinks).
    """
    if step is None or position_bias is not None or not isinstance(attention_mask, MaskRule):
        raise ValueError(
            f"{type(module).__name__} does not hand its step, or hands a position bias or a mask of its own, to "
            "attention; run this architecture with batch.packed=false"
        )
    if step.alone is not None:
        return _with_alone(module, query, key, value, attention_mask, step.alone, scaling, softcap, s_aux), None
    if len(step.query_lengths) == 1:
        return _attend(query, key, value, attention_mask, 0, step, scaling, softcap, s_aux).transpose(
            1, 2
        ).contiguous(), None
    queries = torch.split(query, step.query_lengths, dim=2)
    keys, values = (torch.split(x, step.key_lengths, dim=2) for x in (key, value))
    outputs = [
        _attend(q, k, v, attention_mask, s, step, scaling, softcap, s_aux)
        for s, (q, k, v) in enumerate(zip(queries, keys, values))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None  # callers view it


def _with_alone(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: MaskRule,
    alone: Alone,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[1, T, heads, D]. key, value: of the other sequences alone, if there are any."""
    own = alone.attend(module, query, scaling, softcap, s_aux)
    if alone.others is None or alone.others_at is None or alone.at is None:
        return own[None]
    rest, _ = paged_attention(
        module, query.index_select(2, alone.others_at), key, value, rule, scaling, softcap, s_aux, alone.others
    )
    out = own.new_empty(query.shape[2], *own.shape[1:])
    return out.index_copy_(0, alone.at, own).index_copy_(0, alone.others_at, rest[0])[None]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: MaskRule,
    sequence: int,
    step: StepLayout,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    new, cached = q.shape[2], k.shape[2]
    plain = s_aux is None and softcap is None
    is_causal = plain and rule.is_causal and new == cached and new > 1
    mask = None if is_causal or (rule.is_causal and new == 1) else rule.mask(sequence, step, q.device)
    repeats = q.shape[1] // k.shape[1]
    if not plain:
        return _attend_by_hand(q, k, v, mask, scaling, softcap, s_aux)
    if repeats > 1 and new == 1:  # the heads that share keys become queries: nothing is copied
        grouped = q.view(1, k.shape[1], repeats, -1)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling).view(1, q.shape[1], 1, -1)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling)


def _attend_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """What scaled_dot_product_attention has no argument for, in transformers' own order of operations."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if s_aux is None:
        return logits.float().softmax(-1).to(v.dtype) @ v
    logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(-1, -1, q.shape[2], -1).to(logits.dtype)], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1].to(v.dtype) @ v


LARGE = 8 * LARGE_PAGE  # bytes from which on a pool is in large pages, in which long contexts are read faster


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [capacity, kv_heads, D] each; what they are is the model's choice (MLA: latents)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.step: StepLayout | None = None
        self.waiting: tuple[Tensor, Tensor] | None = None  # new keys and values that attention writes itself

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def rows(like: Tensor) -> Tensor:
            shape = (self.capacity, like.shape[1], like.shape[3])
            if like.device.type == "cpu":  # takes memory as blocks are written, which torch.zeros does not
                nbytes = prod(shape) * like.itemsize
                return aligned_bytes(nbytes, huge=nbytes >= LARGE).view(like.dtype).view(shape)
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.keys, self.values = rows(key_states), rows(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [1, kv_heads, T, D]. Returns all the step's sequences have, N for T."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step
        assert step is not None, "a step begins with PagedKV.begin"
        if step.alone is not None:
            self.waiting = key_states, value_states
            if step.alone.others is None or step.alone.others_at is None:
                return key_states, value_states
            at, step = step.alone.others_at, step.alone.others
            key_states, value_states = key_states.index_select(2, at), value_states.index_select(2, at)
        return self._exchange(self.keys, key_states, step), self._exchange(self.values, value_states, step)

    @staticmethod
    def _exchange(pool: Tensor, new: Tensor, step: StepLayout) -> Tensor:
        pool[step.write_at] = new[0].transpose(0, 1)
        read = pool[step.read_at] if isinstance(step.read_at, slice) else pool.index_select(0, step.read_at)
        return read.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # masks are rules here; sizes do not matter

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.capacity


AttentionInterface.register(ATTENTION_NAME, paged_attention)
AttentionMaskInterface.register(ATTENTION_NAME, mask_rule)
