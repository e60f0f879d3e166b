"""Decoding steps on a device by blocks of kernels: a dozen launches a layer before its experts instead of sixty.

For the models that layer_plan.py describes, if their tokens attend by block tables; used only if every block then says
what its layer says to single tokens of two sequences. Prompts, and all other models, stay with transformers' modules.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.kernels.block_kernels import add_norm
from moe.kernels.device_block import DeviceBlock, why_not
from moe.kernels.paged_attention import Pages
from moe.models.dense_cpu import rounds_once
from moe.models.kv import PagedKV
from moe.models.layer_plan import PlannedLayer, Said, Unplanned, compare_blocks, listening, tried, turns_at
from moe.models.paged import PagedDecode, Reading
from moe.models.watch import by_modules, small_cache


class DecodePlan:
    """All layers of a model over one paged cache, whose pools must be there."""

    def __init__(self, model: Any, layers: Sequence[PlannedLayer], kv: PagedKV) -> None:
        self.model, self.base, self.layers = model, model.base_model, list(layers)
        self._rounds_once = rounds_once(self.base.norm)  # None: the last norm is of another kind
        self.blocks = [DeviceBlock(one.block, cache.keys, cache.values) for one, cache in zip(layers, kv.layers)]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, pages: Pages) -> Tensor:
        """Logits [S, V] of one new token of each sequence. tokens, positions: int64 [1, S]. No sync of its own."""
        h = self.base.embed_tokens(tokens[0]).contiguous()
        cos, sin = turns_at(self.base, positions)
        add: Tensor | None = None
        for layer, block in zip(self.layers, self.blocks):
            x, ids, weights = block(h, add, cos, sin, pages)
            add = layer.after(x, ids, weights).contiguous()
        assert add is not None
        norm = self.base.norm
        if self._rounds_once is None:
            x = norm(h + add)
        else:
            x = add_norm(h, add, norm.weight, norm.variance_epsilon, round_once=self._rounds_once)
        logits: Tensor = self.model.lm_head(x)
        return logits


def plan_decoding(model: Any, max_context: int) -> list[PlannedLayer] | str:
    """The model's layers as blocks of kernels, or the reason why decoding stays with transformers' modules.

    The model runs with paged attention; its experts need not be there. Costs some forwards of a few tokens.
    """
    return tried(model, max_context, _compare)


@torch.inference_mode()
def _compare(model: Any, layers: Sequence[PlannedLayer]) -> None:
    """Raises Unplanned unless each block, given what its layer is given, says what the layer says."""
    theirs = small_cache(model)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    own = ((5, 2, 7), (1, 6, 0))
    by_modules(model, theirs, [*tokens[0][:8], *tokens[1][:3]], own, [0, 0], [8, 3])
    ours = small_cache(model)
    ours.prepare([(c.keys[None, :1].transpose(1, 2), c.values[None, :1].transpose(1, 2)) for c in theirs.layers])
    for cache, layer in zip(ours.layers, layers):
        if reason := why_not(layer.block, cache.keys, cache.values):
            raise Unplanned(reason)
    plan, steps = DecodePlan(model, layers, ours), PagedDecode(ours, [Reading(one.block.window) for one in layers])
    for which in ((0, 1), (1,), (0,)):  # each sequence's next token, twice
        for mine, cache in zip(ours.layers, theirs.layers):
            mine.keys.copy_(cache.keys)
            mine.values.copy_(cache.values)
        starts = [8 + len(which) % 2 if s == 0 else 3 + len(which) % 2 for s in which]
        ends = [start + 1 for start in starts]
        row = torch.tensor([tokens[s][start] for s, start in zip(which, starts)], device=model.device)
        with listening(list(model.base_model.layers)) as heard:
            logits = by_modules(model, theirs, row.tolist(), [own[s] for s in which], starts, ends)
        said = [Said(**one) for one in heard]
        alone = steps([own[s] for s in which], starts, ends)
        assert alone is not None, "each has one new token"
        cos, sin = turns_at(model.base_model, torch.tensor([starts], device=model.device))

        def run(number: int, h: Tensor) -> Tensor:
            return plan.blocks[number](h, None, cos, sin, alone.pages).x  # noqa: B023

        compare_blocks(model, said, row, run, (model.base_model.norm(said[-1].gave), logits))
