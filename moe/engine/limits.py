"""What one engine can take: the rules for a request, apart from the model that they were read from."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe.params import MAX_SEED, SamplingParams


class ContextExceeded(ValueError):
    """A prompt leaves no room for an answer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a loaded model. max_context, block_size: in tokens; num_blocks: of the KV cache."""

    vocabulary: int
    max_context: int
    block_size: int
    num_blocks: int
    eos_ids: frozenset[int]
    encodes_prompts: bool = False  # an encoder reads them, and predicts none of their tokens

    def check(self, tokens: Sequence[int], params: SamplingParams, num_prompt: int | None = None) -> None:
        """Raises ValueError for a prompt of token ids that cannot ever run.

        num_prompt: how many of the tokens are the prompt, None = all.
        """
        vocabulary = self.vocabulary
        if not tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        bad = next((t for t in tokens if not 0 <= t < vocabulary), None)
        if bad is not None:
            raise ValueError(f"prompt token {bad} is outside the vocabulary of {vocabulary}")
        if self.encodes_prompts and params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: this model's encoder reads the prompt, it predicts none of its tokens")
        if len(tokens) >= self.max_context:
            raise ContextExceeded(
                f"the prompt has {len(tokens)} tokens, the context holds {self.max_context} with at least one for "
                "the answer; shorten it"
            )
        forbidden = [token for word in params.bad_words_ids for token in word]
        named = {"allowed_token_ids": params.allowed_token_ids, "logit_bias": params.logit_bias}
        for name, ids in {**named, "bad_words_ids": forbidden}.items():
            bad = next((t for t in ids or () if not 0 <= t < vocabulary), None)
            if bad is not None:
                raise ValueError(f"{name} names token {bad}, outside the vocabulary of {vocabulary}")
        wanted = 1 if params.max_tokens is None else params.max_tokens
        longest = min((num_prompt or len(tokens)) + wanted, self.max_context)
        if -(-longest // self.block_size) > self.num_blocks:
            raise ValueError(
                f"prompt and answer take {longest} tokens, the KV cache holds {self.num_blocks * self.block_size}; "
                "raise batch.kv_tokens or lower max_tokens"
            )

    def resolved(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        """With a seed, and with the ends and the most tokens that this model allows."""
        room = min(self.max_context, self.num_blocks * self.block_size) - num_prompt
        seed = secrets.randbelow(MAX_SEED)
        return params.resolved(seed=seed, max_tokens=max(1, room), end_token_ids=self.eos_ids)


def context_of(wanted: int | None, own: int | None, text_config: Any) -> int:
    """Tokens of a context. Raises ValueError for more than the model's positions, or their rope scaling, allow."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    scaled = int(factor * original) if isinstance(factor, (int, float)) and isinstance(original, int) else 0
    if wanted is not None and own is not None and wanted > max(own, scaled):
        raise ValueError(
            f"max_context ({wanted}) is beyond the model's {max(own, scaled)} tokens; lower it, or give the model a "
            "rope scaling in config.json that its makers describe"
        )
    return wanted or own or 1 << 30
