"""Mixture-of-Experts inference from expert slots: models larger than fast memory, exact by default.

`import moe` is cheap: torch and transformers are loaded when `LLM` is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.client import AsyncClient as AsyncClient
    from moe.client import Client as Client
    from moe.config import EngineConfig as EngineConfig
    from moe.llm import LLM as LLM
    from moe.params import GuidedDecodingParams as GuidedDecodingParams
    from moe.params import SamplingParams as SamplingParams
    from moe.params import StructuredOutputsParams as StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "EngineConfig",
    "GuidedDecodingParams",
    "SamplingParams",
    "StructuredOutputsParams",
]
__version__ = "0.1.0"

# Before torch is loaded: threads that spin while another process has their core make a step 3 to 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOME = {
    "LLM": "moe.llm",
    "SamplingParams": "moe.params",
    "StructuredOutputsParams": "moe.params",
    "GuidedDecodingParams": "moe.params",
    "EngineConfig": "moe.config",
    "Client": "moe.client",
    "AsyncClient": "moe.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
