"""What text configs call the same thing, declared: a name that is not here is an error, never a default.

Checked by tests/moe/test_fields.py against every Mixture-of-Experts config class of the installed transformers.
"""

from collections.abc import Sequence
from typing import Any, Final

TOP_K: Final = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
# Of architectures that have no such field; DBRX keeps it in a config of its own.
FIXED_TOP_K: Final = {"switch_transformers": 1, "nllb-moe": 2}
SIZES: Final = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")  # 1 at least
CONTEXT: Final = ("max_position_embeddings", "max_seq_len", "n_positions")


def top_k(text: Any) -> int:
    """Experts of a token, the most where layers differ. Raises ValueError if the config has none of these fields."""
    if text.model_type in FIXED_TOP_K:
        return FIXED_TOP_K[text.model_type]
    said = [getattr(text, name, None) for name in TOP_K]
    said.append(getattr(getattr(text, "ffn_config", None), "moe_top_k", None))
    for value in said:
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if numbers and all(isinstance(n, int) for n in numbers):
            return int(max(numbers))
    raise ValueError(
        f"{type(text).__name__} says in none of {', '.join(TOP_K)} how many experts a token takes; set one of them in "
        "config.json"
    )


def max_context(text: Any) -> int | None:
    """Tokens that the positions allow; None where the architecture sets no limit."""
    for name in CONTEXT:
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    return None
