"""What offline scripts for vLLM pass to `LLM`, `generate` and `chat`, argument by argument (docs/porting.md).

An argument becomes a setting of ours, is ignored with a note because it cannot change an answer here, or is refused
with a sentence unless its value asks for nothing.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe.config import EngineConfig

SETTINGS = {
    "dtype": "dtype",
    "max_model_len": "max_context",
    "max_num_seqs": "batch.max_sequences",
    "max_num_batched_tokens": "batch.max_tokens",
    "block_size": "batch.block_size",
    "enable_prefix_caching": "batch.prefix_sharing",
    "trust_remote_code": "trust_remote_code",
}
IGNORED = {
    "seed": "a request without a seed draws its own; give seeds in SamplingParams",
    "gpu_memory_utilization": "experts_in_memory and batch.kv_tokens say what memory is used",
    "cpu_offload_gb": "experts beyond experts_in_memory are read as they are needed",
    "swap_space": "there is no swap of KV blocks",
    "enforce_eager": "there are no graphs to leave out",
    "max_seq_len_to_capture": "there are no graphs to capture",
    "compilation_config": "there is nothing to compile",
    "enable_chunked_prefill": "prompts are always computed in chunks of batch.max_tokens",
    "enable_expert_parallel": "experts are shared by all ranks of a run under torchrun",
    "distributed_executor_backend": "ranks are started by torchrun",
    "disable_custom_all_reduce": "there is no all-reduce",
    "disable_log_stats": "there is no log",
    "disable_log_requests": "there is no log",
    "download_dir": "the model is a folder",
    "tokenizer_mode": "the tokenizer is the one that transformers loads",
    "load_format": "weights are read from safetensors",
    "config_format": "the config is read as transformers does",
    "kv_cache_dtype": "keys and values are kept in the model's dtype",
    "async_scheduling": "steps follow each other",
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), "attention is not split over ranks; share experts: torchrun -m moe.launch.torchrun"),
    "pipeline_parallel_size": ((1,), "layers are not split over ranks"),
    "data_parallel_size": ((1,), "start ranks with torchrun -m moe.launch.torchrun"),
    "quantization": ((None,), "what a checkpoint is stored in is read from its config; leave it out"),
    "tokenizer": ((None,), "the tokenizer is that of the model's folder"),
    "revision": ((None,), "the model is a folder; download the revision that you want"),
    "code_revision": ((None,), "the model is a folder"),
    "tokenizer_revision": ((None,), "the tokenizer is that of the model's folder"),
    "hf_overrides": ((None, {}), "change config.json in the folder"),
    "rope_scaling": ((None, {}), "change rope_scaling in config.json"),
    "skip_tokenizer_init": ((False, None), "a folder without a tokenizer takes token ids"),
    "enable_lora": ((False, None), "adapters are not served; merge them into the checkpoint"),
    "speculative_config": ((None,), "speculative decoding is not offered"),
    "limit_mm_per_prompt": ((None, {}), "only text is served"),
    "task": (("auto", "generate", None), "only generation is served"),
    "runner": (("auto", "generate", None), "only generation is served"),
}
CALL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_request": ((None,), "adapters are not served; merge them into the checkpoint"),
    "prompt_adapter_request": ((None,), "adapters are not served"),
    "priority": ((None,), "requests are served in their order"),
    "tokenization_kwargs": ((None, {}), "give token ids"),
    "mm_processor_kwargs": ((None, {}), "only text is served"),
    "guided_options_request": ((None,), "give structured_outputs in SamplingParams"),
    "chat_template_content_format": (("auto", "string", None), "parts of text are joined"),
}
_DTYPES = {"half": "float16", "float": "float32"}


def with_options(config: EngineConfig, options: Mapping[str, Any]) -> tuple[EngineConfig, list[str]]:
    """The config with what `options` set, and notes on those that do nothing. Raises ValueError, TypeError."""
    notes, settings = [], {}
    for name, value in options.items():
        if name in SETTINGS:
            if value is not None:
                settings[SETTINGS[name]] = value
        elif name in IGNORED:
            notes.append(f"{name} is ignored: {IGNORED[name]}")
        elif name in REFUSED:
            _refuse_unless_neutral("LLM", name, value, REFUSED[name])
        else:
            raise TypeError(f"LLM has no argument {name!r}; docs/porting.md lists what it takes")
    if (dtype := settings.get("dtype")) is not None:
        said = str(dtype).removeprefix("torch.")  # it may be torch's own
        settings["dtype"] = _DTYPES.get(said, said)
    return _with_settings(config, settings), notes


def check_options(call: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of `generate` or `chat` that asks for something, TypeError for an unknown one."""
    for name, value in options.items():
        if name not in CALL_OPTIONS:
            raise TypeError(f"{call} has no argument {name!r}; docs/porting.md lists what it takes")
        _refuse_unless_neutral(call, name, value, CALL_OPTIONS[name])


def _refuse_unless_neutral(call: str, name: str, value: Any, rule: tuple[tuple[Any, ...], str]) -> None:
    neutral, why = rule
    if value not in neutral:
        raise ValueError(f"{call}: {name}={value!r} is not offered: {why}")


def _with_settings(config: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """All at once: what one of them may be depends on the others."""
    groups: dict[str, dict[str, Any]] = {"": {}}
    for key, value in settings.items():
        folder, _, name = key.rpartition(".")
        groups.setdefault(folder, {})[name] = value
    own = groups.pop("")
    made = {folder: dataclasses.replace(getattr(config, folder), **values) for folder, values in groups.items()}
    return dataclasses.replace(config, **own, **made)


@contextmanager
def progress(total: int, wanted: bool | None) -> Iterator[Callable[[int, str], None]]:
    """A bar on standard error; `advance(finished, figures)` moves it. wanted: None shows it on a terminal."""
    shown = sys.stderr.isatty() if wanted is None else bool(wanted)
    if not shown:
        yield lambda finished, figures: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True)) as bar:
        task = bar.add_task("", total=total, figures="")
        yield lambda finished, figures: bar.update(task, advance=finished, figures=figures)
