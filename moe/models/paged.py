"""Decoding tokens attend by a kernel over block tables that lie on the device; nothing is gathered.

    update ─▶ new keys and values wait ─▶ attention ─▶ kernel: writes them, reads the sequence's blocks
                                            └─ sequences with several new tokens: as ever (moe/models/attention.py)

For models whose attention takes keys and values as they are cached, or makes them of cached latents by one matrix, on
every layer, and masks by distance alone; `paged` looks at a token's forward and says why not otherwise. The kernels and
their twins: moe/kernels/paged_attention.py, and latent_attention.py, for which that matrix goes to queries and results.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.kernels.latent_attention import latent_attention
from moe.kernels.latent_attention import why_not as why_no_latents
from moe.kernels.paged_attention import Pages, Scores, paged_attention, why_not
from moe.models.attention import StepLayout
from moe.models.kv import PagedKV
from moe.models.watch import small_cache, stand_in_experts, watch_attention, window_of


class Latent(NamedTuple):
    """What makes keys and values of a latent: up_keys [heads, D_nope, L], up_values [heads, D_v, L]."""

    up_keys: Tensor
    up_values: Tensor


class Reading(NamedTuple):
    """How a layer attends. window: keys that a query sees, 0 = all; latent: of what is cached, None = as it is."""

    window: int
    latent: Latent | None = None


class AloneTokens:
    """Those of a step that are their sequence's only new token, ready to attend.

    at, others_at: int64, their tokens in the step and those of the other sequences; None where there are no others.
    """

    def __init__(self, kv: PagedKV, readings: Sequence[Reading], pages: Pages) -> None:
        self._layers, self._readings, self.pages = kv.layers, readings, pages
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
        window, latent = self._readings[module.layer_idx]
        layer.waiting, pool = None, (layer.keys, layer.values)
        if latent is None:
            scores = Scores(scale, window, softcap or 0.0, sinks)
            return paged_attention(q, (keys, values), pool, self.pages, scores)
        plain, turned = q.split([latent.up_keys.shape[1], values.shape[2]], dim=2)
        absorbed = torch.einsum("thn,hnl->thl", plain, latent.up_keys)
        mixed = latent_attention((absorbed, turned), (keys[:, 0], values[:, 0]), pool, self.pages, scale)
        return torch.einsum("thl,hvl->thv", mixed, latent.up_values)


class PagedDecode:
    """Lays out the steps of one cache. readings: of every layer."""

    def __init__(self, kv: PagedKV, readings: Sequence[Reading]) -> None:
        self.kv, self.readings = kv, list(readings)

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
        tokens = AloneTokens(self.kv, self.readings, pages)
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
            [1] * len(pages.lengths), [], slice(0, 0), slice(0, 0), AloneTokens(self.kv, self.readings, pages)
        )

    def _to_device(self, numbers: Any) -> Tensor:
        return torch.from_numpy(numbers).to(self.kv.device, non_blocking=True)


def paged(model: Any, max_context: int) -> list[Reading] | str:
    """How every layer attends, or the reason why the model's tokens cannot attend by the kernel.

    The model runs with paged attention; its experts need not be there. Costs a forward of one token.
    """
    kv, reasons = small_cache(model), list[str]()
    readings: dict[int, Reading] = {}

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Any, options: dict[str, Any]) -> None:
        number: Any = getattr(module, "layer_idx", None)
        layer = kv.layers[number] if isinstance(number, int) and number < len(kv.layers) else None
        if layer is None or not layer.is_initialized:
            reasons.append(f"{type(module).__name__} does not say which layer's cache it reads")
            return
        cached = [t[None, :1].transpose(1, 2) for t in (layer.keys, layer.values)]
        latent: Latent | None = None
        if any(a.data_ptr() != b.data_ptr() or a.shape != b.shape for a, b in zip((key, value), cached)):
            found = latent_of(module, query, (key, value), cached)
            if isinstance(found, str):
                reasons.append(found)
                return
            latent = found
        window = window_of(rule, max_context)
        if window is None or options.get("position_bias") is not None:
            reasons.append(f"{type(module).__name__} masks by something else than distance, or biases scores")
            return
        if latent is not None and (window or options.get("softcap") or options.get("s_aux") is not None):
            reasons.append(f"{type(module).__name__} has windows, caps or sinks over latents")
        reason = (
            None if latent is not None else why_not(query.dtype, query.shape[1], layer.keys.shape, layer.values.shape)
        )
        if reason:
            reasons.append(reason)
        readings[number] = Reading(window, latent)

    try:
        with stand_in_experts(model):
            watch_attention(model, kv, look)
    except Exception as error:  # of any kind: modules of every architecture are tried, and may be called otherwise
        return f"its layers cannot be tried: {type(error).__name__}: {error}"[:300]
    if not reasons and len(readings) != len(kv.layers):
        reasons.append(f"{len(kv.layers) - len(readings)} of its layers have no attention")
    return reasons[0] if reasons else [readings[n] for n in range(len(kv.layers))]


def latent_of(module: Any, query: Tensor, made: tuple[Tensor, Tensor], cached: Sequence[Tensor]) -> Latent | str:
    """What makes of cached latents [1, 1, 1, L] and [1, 1, 1, R] the keys and values [1, heads, 1, D]; or why not.

    Found by doing it: keys are `kv_b_proj`'s of the latent and then the cached positions, values the rest of its rows.
    """
    (key, value), (latent, turned) = made, cached
    why = f"{type(module).__name__} attends over what it makes of the cache (latents), and not by one matrix"
    up: Any = getattr(module, "kv_b_proj", None)
    heads, plain = key.shape[1], key.shape[3] - turned.shape[3]
    is_plain = isinstance(up, nn.Linear) and len(list(up.parameters())) == 1
    if not is_plain or latent.shape[1] != 1 or turned.shape[1] != 1:
        return why
    if tuple(up.weight.shape) != (heads * (plain + value.shape[3]), latent.shape[3]) or query.shape[1] != heads:
        return why
    if reason := why_no_latents(query.dtype, latent.shape[3], turned.shape[3]):
        return reason
    weight = up.weight.detach().view(heads, -1, latent.shape[3])
    parts = Latent(weight[:, :plain], weight[:, plain:])
    keys, values = (torch.einsum("hnl,l->hn", one.float(), latent.flatten().float()) for one in parts)
    keys = torch.cat([keys, turned.flatten().float().expand(heads, -1)], dim=1)
    bound = 1e-5 if query.dtype == torch.float32 else 2e-2  # one rounding of each element
    for ours, theirs in ((keys, key), (values, value)):
        theirs = theirs.flatten(0, 2).float()
        if not (ours - theirs).norm() <= bound * theirs.norm():
            return why
    return parts
