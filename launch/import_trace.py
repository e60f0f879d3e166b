"""`moe import-trace`: routing that other systems recorded, as a trace of ours.

vllm    .npy, one request's `routed_experts` [tokens, layers, K], or .npz of several, one array each
sglang  .pt of SGLang's expert distribution recorder in mode per_token (read without running any code in it)
esft    .npz of DeepSeek's ESFT expert logs
"""

import argparse
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.placement.importers import from_deepseek_esft_npz, from_sglang_records, from_vllm_routed_experts
from moe.placement.trace import RoutingTrace, read_npz


def run(args: argparse.Namespace) -> int:
    """Writes the trace and says what is in it."""
    if args.source != "esft" and args.experts is None:
        raise ValueError(f"--from {args.source} does not say how many experts a layer has; give --experts")
    trace = _READERS[args.source](args.files, args.experts, args.model)
    trace.save(args.out)
    print(
        f"{args.out}: {trace.num_tokens} tokens of {trace.num_sequences} sequences, {trace.num_layers} layers of "
        f"{trace.num_experts} experts, top-{trace.top_k}"
    )
    return 0


def _vllm(files: Sequence[Path], experts: int, model: str) -> RoutingTrace:
    requests: list[np.ndarray[Any, Any]] = []
    for path in files:
        if path.suffix == ".npz":
            requests += read_npz(path).values()
            continue
        try:
            with path.open("rb") as file:
                requests.append(np.lib.format.read_array(file, allow_pickle=False))
        except (ValueError, EOFError):  # their words advise to run the file's code
            raise ValueError(f"{path} is no .npy file of plain numbers, nor an .npz of several") from None
    return from_vllm_routed_experts(requests, experts, model=model)


def _sglang(files: Sequence[Path], experts: int, model: str) -> RoutingTrace:
    import torch  # the only reader that needs it, and half a second to load

    records: list[Any] = []
    table = None
    for path in files:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):  # as above
            raise ValueError(f"{path} is no .pt file of tensors and plain values, as of SGLang's recorder") from None
        found = saved.get("records", saved) if isinstance(saved, dict) else saved
        records += found if isinstance(found, list) else [found]
        if isinstance(saved, dict) and "last_physical_to_logical_map" in saved:
            table = np.asarray(saved["last_physical_to_logical_map"])
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("the files hold no records of SGLang's recorder; start it in mode per_token")
    return from_sglang_records(records, experts, model=model, physical_to_logical=table)


def _esft(files: Sequence[Path], experts: int, model: str) -> RoutingTrace:
    traces = [from_deepseek_esft_npz(path, **({"model": model} if model else {})) for path in files]
    return RoutingTrace.concat(traces) if len(traces) > 1 else traces[0]


_READERS: dict[str, Callable[[Sequence[Path], int, str], RoutingTrace]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "esft": _esft,
}
