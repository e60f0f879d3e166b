"""What a model's folder says of generating with it: end tokens, and the sampling that its makers recommend."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.offload.json_object import read_object
from moe.params import SamplingParams

# As vLLM and SGLang take them over: by name, whether or not `do_sample` is set.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What `generation_config.json` says, end tokens else by config.json. `sampling`: by transformers' names."""

    eos_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float] = field(default_factory=dict)
    decoder_start_token_id: int | None = None

    @property
    def recommended(self) -> dict[str, Any]:
        """`sampling` by the names of SamplingParams."""
        said: dict[str, Any] = dict(self.sampling)
        if "max_new_tokens" in said:
            said["max_tokens"] = said.pop("max_new_tokens")
        kinds = {"top_k": int, "max_tokens": int}
        return {name: kinds.get(name, float)(value) for name, value in said.items()}


def read_generation(folder: Path, config: Any) -> GenerationDefaults:
    """Raises ValueError for a file that is no JSON object, or has values that sampling does not take."""
    path = folder / "generation_config.json"
    said: Any = {}
    if path.is_file():
        said = read_object(path)
    text = config.get_text_config()
    eos = said.get("eos_token_id")
    for fallback in (text, config):
        eos = getattr(fallback, "eos_token_id", None) if eos is None else eos
    start = said.get("decoder_start_token_id")
    defaults = GenerationDefaults(
        eos_ids=frozenset(_token_ids(eos, path)),
        sampling={name: _number(said[name], name, path) for name in _SAMPLING if said.get(name) is not None},
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None) if start is None else start,
    )
    try:
        SamplingParams(**defaults.recommended)
    except ValueError as error:  # else every request that is silent would be refused for it
        raise ValueError(f"{path}: {error}; mend it there") from None
    return defaults


def _token_ids(said: Any, path: Path) -> list[int]:
    ids = [] if said is None else said if isinstance(said, list) else [said]
    if bad := [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]:
        raise ValueError(f"{path}: eos_token_id ({bad[0]!r}) must be a token id or a list of them")
    return [i for i in ids if i >= 0]  # -1 is "none" in some configs


def _number(said: Any, name: str, path: Path) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        raise ValueError(f"{path}: {name} ({said!r}) must be a number")
    return said
