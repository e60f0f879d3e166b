"""What a folder's configuration says about quantised weights: only what the tensors cannot tell, and what to refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.offload.formats.stored import Quantisation
from moe.offload.json_object import read_object

# Files that hold it where config.json does not: ModelOpt, GPTQ, AWQ.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_KNOWN = {"fp8", "mxfp8", "mxfp4", "gptq", "awq", "auto-round", "compressed-tensors", "modelopt", "bitsandbytes"}
_KNOWN |= {"modelopt_fp4"}
_LAYOUTS = {"gptq", "gptq_v2", "gemm", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:llm_compressor"}
_PACKED = {
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "dense",
}


def read_quantisation(folder: Path) -> Quantisation:
    """Reads config.json and the files beside it. Raises ValueError for what changes weights and is not understood."""
    said = _said(folder)
    if not said:
        return Quantisation()
    method = str(said.get("quant_method", said.get("quant_algo", ""))).lower()
    if said.get("producer", {}).get("name") == "modelopt" or "quantization" in said:
        said, method = said.get("quantization", said), "modelopt"
    if not method and ("w_bit" in said or said.get("version") in ("gemm", "gemv")):
        method = "awq"
    if not method and "bits" in said and "group_size" in said:
        method = "gptq"
    if method not in _KNOWN:
        raise ValueError(f"{folder}: weights are quantised by {method or said!r}, which is not read")
    _refuse(folder, method, said)
    blocks = [b for b in _values(said, "weight_block_size", "block_structure") if isinstance(b, list) and len(b) == 2]
    sizes = {n for n in _values(said, "group_size", "q_group_size") if isinstance(n, int) and n > 0}
    bits = {n for n in _values(said, "bits", "w_bit", "num_bits") if isinstance(n, int)}
    if method == "mxfp8":
        blocks = [[1, 32]]
    if not blocks and str(said.get("quant_algo", "")).upper() == "FP8_PB_WO":
        blocks = [[128, 128]]
    block = (int(blocks[0][0]), int(blocks[0][1])) if blocks else None
    if block is not None and min(block) < 1:
        raise ValueError(f"{folder}: blocks of {block[0]} x {block[1]} weights are not possible")
    return Quantisation(
        method=method,
        block=block,
        group_sizes=tuple(sorted(sizes, reverse=True)),
        bits=next(iter(bits)) if len(bits) == 1 else None,
        activations=_activations(method, said),
        zeros_less_one=said.get("checkpoint_format", said.get("format")) != "gptq_v2",
    )


def _activations(method: str, said: dict[str, Any]) -> str:
    if method in ("fp8", "mxfp8"):
        return "FP8"
    if method.startswith("modelopt"):
        algo = str(said.get("quant_algo", "")).upper()
        return "" if "W4A16" in algo or "WO" in algo else "FP4" if "NVFP4" in algo else "FP8" if "FP8" in algo else algo
    inputs = [v for v in _values(said, "input_activations") if isinstance(v, dict)]
    if method == "compressed-tensors" and inputs:
        return f"{inputs[0].get('type', '')}{inputs[0].get('num_bits', '')}"
    return ""


def _said(folder: Path) -> dict[str, Any]:
    config = read_object(folder / "config.json")
    for inner in (config, *(v for v in config.values() if isinstance(v, dict))):
        for name in ("quantization_config", "compression_config"):
            if isinstance(inner.get(name), dict) and inner[name]:
                found: dict[str, Any] = inner[name]
                return found
    for name in _FILES:
        if (folder / name).is_file():
            return read_object(folder / name)
    return {}


def _values(said: Any, *names: str) -> Iterator[Any]:
    """Every value under one of `names`, at any depth."""
    if isinstance(said, dict):
        for key, value in said.items():
            if key in names:
                yield value
            yield from _values(value, *names)
    elif isinstance(said, list):
        for value in said:
            yield from _values(value, *names)


def _refuse(folder: Path, method: str, said: dict[str, Any]) -> None:
    for key in ("transform_config", "sparsity_config"):
        value = said.get(key)
        if isinstance(value, dict) and value and value.get("format") != "dense":
            raise ValueError(f"{folder}: {key} changes the weights ({str(value)[:80]}), which is not read")
    layout = said.get("packing_format", said.get("checkpoint_format"))
    layout = layout or (said.get("version") if method == "awq" else None)
    layout = layout or (said.get("format") if method == "gptq" else None)
    if method in ("gptq", "awq", "auto-round") and layout is not None and str(layout).lower() not in _LAYOUTS:
        raise ValueError(f"{folder}: weights in the layout {layout!r} of {method} are not read; use {sorted(_LAYOUTS)}")
    if method == "compressed-tensors":
        for name in _values(said, "format"):
            if name is not None and name not in _PACKED:
                raise ValueError(f"{folder}: weights compressed as {name!r} are not read; use {sorted(_PACKED)}")
