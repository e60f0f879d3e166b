"""What a model's attention is called with, seen by running a token of it through a small cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from moe.models.attention import ATTENTION_NAME, MaskRule, mask_rule, paged_attention
from moe.models.kv import CACHE_NAME, BlockPool, PagedKV

_WATCH_NAME = "moe_paged_watched"
_MOST_POSITIONS = 1 << 17  # that a mask rule is tried on

Call = Callable[[Any, Tensor, Tensor, Tensor, Any, dict[str, Any]], None]


def window_of(rule: Any, max_context: int) -> int | None:
    """How many keys a query sees, 0 for all before it; None if that depends on more than the distance."""
    if not isinstance(rule, MaskRule):
        return None
    if rule.is_causal:
        return 0
    windows = set()
    zero = torch.zeros((), dtype=torch.int64)
    most = min(max_context, _MOST_POSITIONS)
    keys = torch.arange(most)
    for query in {most - 1, most - 2, most // 2, most // 3}:
        sees = rule.function(zero, zero, torch.tensor([[query]]), keys[None])[0]
        num = int(sees.sum())
        if not bool(sees[query - num + 1 : query + 1].all()):
            return None
        windows.add(0 if num == query + 1 else num)
    finite = windows - {0}
    return 0 if not finite else finite.pop() if len(finite) == 1 else None


def small_cache(model: Any) -> PagedKV:
    return PagedKV(model.config.get_text_config().num_hidden_layers, BlockPool(8, 4, sharing=False), model.device)


@torch.inference_mode()
def by_modules(
    model: Any, kv: PagedKV, tokens: Sequence[int], blocks: Any, starts: Sequence[int], ends: Sequence[int]
) -> Tensor:
    """Logits of each sequence's last new token [S, V], fp32, by transformers' own modules."""
    step = kv.begin(blocks, starts, ends)
    device = kv.device
    positions = [p for start, end in zip(starts, ends) for p in range(start, end)]
    last = list(accumulate(end - start for start, end in zip(starts, ends)))
    out = model(
        input_ids=torch.tensor([list(tokens)], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=True,
        logits_to_keep=torch.tensor(last, device=device) - 1,
        step=step,
        **{CACHE_NAME: kv.cache},
    )
    logits: Tensor = out.logits[0].float()
    return logits


def watch_attention(model: Any, kv: PagedKV, call: Call) -> None:
    """Runs one token; `call(module, query, key, value, rule, options)` for every layer's attention.

    The model runs with paged attention before and after.
    """

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Any, **options: Any) -> Any:
        call(module, query, key, value, rule, options)
        return paged_attention(module, query, key, value, rule, **options)

    AttentionInterface.register(_WATCH_NAME, watched)
    AttentionMaskInterface.register(_WATCH_NAME, mask_rule)
    model.set_attn_implementation(_WATCH_NAME)
    try:
        by_modules(model, kv, [7], [[0]], [0], [1])
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


@contextmanager
def stand_in_experts(model: Any) -> Iterator[set[int]]:
    """Inside, an expert multiplies its rows by a number of its own, so that routing can be seen without any weights.

    Yields the ids of the modules whose experts are computed from slots.
    """

    def compute(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, scale_input: bool) -> Tensor:
        factors = (topk_ids * 37 % 11 - 5).float() / 5
        return (x.float() * (factors * topk_weights.float()).sum(-1, keepdim=True)).to(x.dtype)

    modules = [m for m in model.modules() if hasattr(m, "compute")]
    before = [m.compute for m in modules]
    for module in modules:
        module.compute = compute
    try:
        yield {id(m) for m in modules}
    finally:
        for module, was in zip(modules, before):
            module.compute = was
