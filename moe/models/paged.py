"""Decoding tokens attend by a kernel over block tables that lie on the device; nothing is gathered.

    update ─▶ new keys and values wait ─▶ attention ─▶ kernel: writes them, reads the sequence's blocks
                                            └─ sequences with several new tokens: as ever (moe/models/attention.py)

For models whose attention takes keys and values as they are cached, on every layer, and masks by distance alone;
`paged` looks at a token's forward and says why not otherwise. The kernel and its twin: moe/kernels/paged_attention.py.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.kernels.paged_attention import Pages, Scores, paged_attention, why_not
from moe.models.attention import StepLayout
from moe.models.kv import PagedKV
from moe.models.watch import small_cache, stand_in_experts, watch_attention, window_of


class AloneTokens:
    """Those of a step that are their sequence's only new token, ready to attend.

    at, others_at: int64, their tokens in the step and those of the other sequences; None where there are no others.
    """

    def __init__(self, kv: PagedKV, windows: Sequence[int], pages: Pages) -> None:
        self._layers, self._windows, self.pages = kv.layers, windows, pages
        self.others: StepLayout | None = None
        self.others_at: Tensor | None = None
        self.at: Tensor | None = None

    def attend(
        self, module: Any, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query: [1, heads, T, D] of the whole step. Returns [S, heads, D] of these tokens."""
        layer = self._layers[module.layer_idx]
        assert layer.waiting is not None, "attention follows the cache's update"
        rows = [t[0].transpose(0, 1) for t in (query, *layer.waiting)]  # [T, heads, D]
        if self.at is not None:
            rows = [t.index_select(0, self.at) for t in rows]
        q, keys, values = rows
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        scores = Scores(scale, self._windows[module.layer_idx], softcap or 0.0, sinks)
        layer.waiting = None
        return paged_attention(q, (keys, values), (layer.keys, layer.values), self.pages, scores)


class PagedDecode:
    """Lays out the steps of one cache. windows: of every layer, 0 = sees all."""

    def __init__(self, kv: PagedKV, windows: Sequence[int]) -> None:
        self.kv, self.windows = kv, list(windows)

    def __call__(
        self, blocks: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]
    ) -> AloneTokens | None:
        """None if every sequence has several new tokens. Arguments as `PagedKV.begin`."""
        alone = [s for s, (start, end) in enumerate(zip(starts, ends)) if end - start == 1]
        if not alone:
            return None
        size = self.kv.pool.block_size
        lengths = [ends[s] for s in alone]
        tables = np.zeros((len(alone), -(-max(lengths) // size)), np.int32)
        for row, s in zip(tables, alone):
            count = -(-ends[s] // size)
            row[:count] = blocks[s][:count]
        pages = Pages(self._to_device(tables), self._to_device(np.array(lengths, np.int32)), size, max(lengths))
        tokens = AloneTokens(self.kv, self.windows, pages)
        if len(alone) < len(starts):
            others = [s for s in range(len(starts)) if s not in set(alone)]
            first = [0, *accumulate(end - start for start, end in zip(starts, ends))]
            tokens.others = self.kv.layout(
                [self.kv.rows(blocks[s], ends[s]) for s in others], [starts[s] for s in others]
            )
            tokens.at = self._to_device(np.array([first[s] for s in alone], np.int64))
            tokens.others_at = self._to_device(np.concatenate([np.arange(first[s], first[s + 1]) for s in others]))
        return tokens

    def static(self, pages: Pages) -> StepLayout:
        """A step of one token of each sequence, whose places and lengths are wherever `pages` says when it runs."""
        return StepLayout(
            [1] * len(pages.lengths), [], slice(0, 0), slice(0, 0), AloneTokens(self.kv, self.windows, pages)
        )

    def _to_device(self, numbers: Any) -> Tensor:
        return torch.from_numpy(numbers).to(self.kv.device, non_blocking=True)


def paged(model: Any, max_context: int) -> list[int] | str:
    """Every layer's window, or the reason why the model's tokens cannot attend by the kernel.

    The model runs with paged attention; its experts need not be there. Costs a forward of one token.
    """
    kv, windows, reasons = small_cache(model), {}, []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Any, options: dict[str, Any]) -> None:
        number = getattr(module, "layer_idx", None)
        layer = kv.layers[number] if isinstance(number, int) and number < len(kv.layers) else None
        if layer is None or not layer.is_initialized:
            reasons.append(f"{type(module).__name__} does not say which layer's cache it reads")
            return
        cached = [t[None, :1].transpose(1, 2) for t in (layer.keys, layer.values)]
        if any(a.data_ptr() != b.data_ptr() or a.shape != b.shape for a, b in zip((key, value), cached)):
            reasons.append(f"{type(module).__name__} attends over what it makes of the cache (latents)")
            return
        window = window_of(rule, max_context)
        if window is None or options.get("position_bias") is not None:
            reasons.append(f"{type(module).__name__} masks by something else than distance, or biases scores")
            return
        if reason := why_not(query.dtype, query.shape[1], layer.keys.shape, layer.values.shape):
            reasons.append(reason)
        windows[number] = window

    try:
        with stand_in_experts(model):
            watch_attention(model, kv, look)
    except Exception as error:  # of any kind: modules of every architecture are tried, and may be called otherwise
        return f"its layers cannot be tried: {type(error).__name__}: {error}"[:300]
    if not reasons and len(windows) != len(kv.layers):
        reasons.append(f"{len(kv.layers) - len(windows)} of its layers have no attention")
    return reasons[0] if reasons else [windows[n] for n in range(len(kv.layers))]
