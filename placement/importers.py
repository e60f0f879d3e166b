"""Traces written by others, made into `RoutingTrace`: DeepSeek's ESFT logs, SGLang's recorder, vLLM's routed experts.

SGLang saves its records with `torch.save`; load them with `torch.load(path, weights_only=True)` where torch is at
hand and pass the dictionaries: this folder imports no torch and unpickles nothing.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.trace import DECODE, PREFILL, RoutingTrace, read_npz
from moe.placement.wire_format import ModelSizes

# The model of ESFT's logs: experts of 3 x 2048 x 1408 in bfloat16.
DEEPSEEK_V2_LITE = ModelSizes(hidden_size=2048, dtype="bfloat16", expert_bytes=17_301_504)
SGLANG_DECODE_MODE = 2  # value of SGLang's ForwardMode.DECODE; everything else extends a prompt


def from_deepseek_esft_npz(path: str | PathLike[str], *, model: str = "deepseek-v2-lite") -> RoutingTrace:
    """Read an array copy of ESFT's expert logs (`expert_ids`, `gate_weights_e4`, `seq_lens`): 64 experts, top-6.

    The domain is the last word of the file's name. Raises ValueError if the file holds other arrays.
    """
    path = Path(path)
    arrays = _arrays(path, {"expert_ids", "gate_weights_e4", "seq_lens"})
    return RoutingTrace(
        expert_ids=arrays["expert_ids"].astype(np.int16),
        sequence_lengths=arrays["seq_lens"].astype(np.int32),
        num_experts=64,
        model=model,
        weights=(arrays["gate_weights_e4"].astype(np.float64) / 1e4).astype(np.float32),
        domain=path.stem.rsplit("_", 1)[-1],
        sizes=DEEPSEEK_V2_LITE,
    )


def from_vllm_routed_experts(
    requests: Sequence[NDArray[np.integer[Any]]],
    num_experts: int,
    *,
    model: str,
    prompt_lengths: Sequence[int] | None = None,
) -> RoutingTrace:
    """One sequence per request from vLLM's `routed_experts` arrays, each integer [tokens, layers, K].

    prompt_lengths: tokens of each request that were prefill; with it the trace knows its phases. Layers without
    experts, which vLLM leaves at 0 in all K places, are dropped.
    """
    arrays = [np.asarray(request) for request in requests]
    arrays = [array for array in arrays if array.shape[0]] if all(a.ndim == 3 for a in arrays) else arrays
    if not arrays:
        raise ValueError("no request has a routed token")
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) != 1 or any(array.ndim != 3 for array in arrays):
        raise ValueError(f"requests must all be [tokens, layers, K] with equal layers and K; got {sorted(shapes)}")
    phase = None
    if prompt_lengths is not None:
        if len(prompt_lengths) != len(requests):
            raise ValueError(f"{len(prompt_lengths)} prompt lengths for {len(requests)} requests; give one per request")
        kept = [p for p, request in zip(prompt_lengths, requests, strict=True) if len(request)]
        phase = np.concatenate(
            [
                np.where(np.arange(len(a)) < p, PREFILL, DECODE).astype(np.uint8)
                for a, p in zip(arrays, kept, strict=True)
            ]
        )
    joined = np.concatenate(arrays)
    return RoutingTrace(
        expert_ids=joined[:, _routed_layers(joined)].astype(np.int16),
        sequence_lengths=np.array([len(a) for a in arrays], np.int32),
        num_experts=num_experts,
        model=model,
        phase=phase,
    )


def from_sglang_records(
    records: Sequence[Mapping[str, Any]],
    num_experts: int,
    *,
    model: str,
    physical_to_logical: NDArray[np.integer[Any]] | None = None,
) -> RoutingTrace:
    """Read SGLang's `per_token` records: one mapping per forward pass with `topk_ids_of_layer` [layers, tokens, K].

    physical_to_logical: [layers, P], the map that the run used, since SGLang records physical ids. Prompts become
    sequences by `extend_seq_lens`; decode passes name no request, so each of their tokens is a sequence of its own.
    Dense layers, which the recorder leaves at one value for all K slots of every token, are dropped.
    """
    ids: list[NDArray[np.int64]] = []
    lengths: list[int] = []
    phases: list[NDArray[np.uint8]] = []
    for number, record in enumerate(records):
        if "topk_ids_of_layer" not in record:
            raise ValueError(f"record {number} has no topk_ids_of_layer; start SGLang's recorder in mode per_token")
        block = np.asarray(record["topk_ids_of_layer"]).astype(np.int64)
        if block.ndim != 3:
            raise ValueError(f"record {number}: topk_ids_of_layer has shape {block.shape}, not [layers, tokens, K]")
        tokens = block.shape[1]
        decode = int(record.get("forward_mode", 1)) == SGLANG_DECODE_MODE
        spans = [1] * tokens if decode else [int(n) for n in record.get("extend_seq_lens") or [tokens]]
        if sum(spans) != tokens:
            raise ValueError(f"record {number}: extend_seq_lens sum to {sum(spans)} but {tokens} tokens were recorded")
        ids.append(block.transpose(1, 0, 2))
        lengths += [n for n in spans if n]
        phases.append(np.full(tokens, DECODE if decode else PREFILL, np.uint8))
    if not ids:
        raise ValueError("there are no records to read")
    joined = np.concatenate(ids)
    routed = _routed_layers(joined)
    if physical_to_logical is not None:
        table = np.asarray(physical_to_logical)
        if table.ndim != 2 or table.shape[0] != joined.shape[1] or int(joined.max(initial=-1)) >= table.shape[1]:
            raise ValueError(
                f"physical_to_logical {table.shape} does not cover ids up to {joined.max()} in {joined.shape[1]} layers"
            )
        layer = np.arange(joined.shape[1])[None, :, None]
        joined = np.where(joined >= 0, table[layer, np.maximum(joined, 0)], -1)
    return RoutingTrace(
        expert_ids=joined[:, routed].astype(np.int16),
        sequence_lengths=np.array(lengths, np.int32),
        num_experts=num_experts,
        model=model,
        phase=np.concatenate(phases),
    )


def _routed_layers(ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Of ids [N, L, K], the layers that chose experts: not -1 throughout, not one value in all K places throughout.

    Raises ValueError if there is none.
    """
    routed = np.asarray((ids >= 0).any(axis=(0, 2)))
    if ids.shape[2] > 1:
        routed = np.logical_and(routed, (ids != ids[:, :, :1]).any(axis=(0, 2)))
    if not routed.any():
        raise ValueError("no layer of these records routed a token")
    return routed


def _arrays(path: Path, names: set[str]) -> dict[str, NDArray[Any]]:
    arrays = read_npz(path)
    if missing := names - set(arrays):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays)}")
    return {name: arrays[name] for name in names}
