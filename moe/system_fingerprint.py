"""A short digest of all that an answer depends on beside the request: the model, and settings that are not exact.

It stands in every response (OpenAI's `system_fingerprint`), so that a resumed batch does not mix the answers of two.
"""

import hashlib
import json
from pathlib import Path

from moe.batch_results import OURS
from moe.config import EngineConfig
from moe.offload.checkpoint import Checkpoint
from moe.offload.fingerprint import fingerprint

_TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def system_fingerprint(checkpoint: Checkpoint, config: EngineConfig) -> str:
    """Costs what `fingerprint` costs, and the reading of the tokenizer. Raises OSError.

    Settings in which answers stay exact (slots, batches, ranks, kernels) are no part of it. The same weights packed are
    others: `pack` may round.
    """
    offload, routing = config.offload, config.routing
    budget = offload.budget if offload.bits in ("auto", "upgrade") else None  # which it then decides
    settings = [config.dtype, config.dense, config.max_context, config.parallel.combine, routing.pregate]
    found = hashlib.blake2b(digest_size=8)
    found.update(json.dumps([fingerprint(checkpoint), *settings, offload.bits, budget]).encode())
    files = [checkpoint.folder / name for name in _TEXTS]
    files += [Path(str(routing.lookahead))] if routing.pregate != "off" else []
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        found.update(hashlib.blake2b(content).digest())
    return OURS + found.hexdigest()
