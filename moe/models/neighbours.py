"""Where a forward looks at more than one sequence's own tokens, and what keeps neighbours out of each other's results.

A packed row is exact only if a token's result depends on its own sequence alone, at whatever step it is computed.
Rotary embeddings of kind `longrope` choose between two tables of frequencies by the largest position in the whole
row: beside a longer neighbour, in a chunk, or after the switch while decoding they are others. Such a model runs one
sequence at a time, unless its context ends before the switch; of `dynamic` ones the context ends there always.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of every rotary embedding in a text config: one, or one for each kind of layer."""
    said = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(said, Mapping):
        return
    if "rope_type" in said or "rope_theta" in said:
        yield said
    else:
        yield from (one for one in said.values() if isinstance(one, Mapping))


def why_not_packed(model: Any, context: int | None) -> str | None:
    """The reason why sequences of this model cannot share one packed row; None if they can.

    model: with its weights or on the meta device; context: the most tokens that a sequence will have, None if unknown.
    """
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or getattr(model, "_is_stateful", False):
        return "some of its layers keep a recurrent state"
    if any(getattr(m, "attn_temperature_tuning", False) for m in model.modules()):
        return "its attention counts positions from the cache's length"
    if any(hasattr(m, "prepare_dynamic_mask") for m in model.modules()):  # Doge
        return "its attention makes a mask of its own"
    switch = _frequencies_change_at(config)
    if switch is not None and (context is None or context > switch):
        return (
            f"its rotary frequencies change for all tokens of a sequence longer than {switch}; "
            f"max_context={switch} lets sequences share a step"
        )
    return None


def _frequencies_change_at(config: Any) -> int | None:
    """The length up to which a sequence's frequencies are those of every shorter one; None if they never change."""
    text = config.get_text_config()
    lengths = []
    for rope in rope_parameters(config):
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope":
            lengths.append(rope.get("original_max_position_embeddings", text.max_position_embeddings))
        elif "dynamic" in kind:
            lengths.append(text.max_position_embeddings)
    return int(min(lengths)) if lengths else None


def recomputed_beyond(model: Any) -> int | None:
    """The length that a sequence outgrows only by being computed anew, its cache thrown away; None for most models.

    Phi-3's family does so in its own `prepare_inputs_for_generation`; others with the same embedding go on with keys
    of both frequencies in one cache, and so does this engine.
    """
    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    length = getattr(model.config, "original_max_position_embeddings", None)
    return int(length) if own and isinstance(length, int) else None
