"""bitsandbytes' 4 bits: indices into a table of 16, and one absolute maximum for 64 weights in a row.

The flattened matrix, the even element in the HIGH half of a byte; other halves than in a slot. `absmax` is F32, or
itself in 8 bits: nested_quant_map[absmax] * nested_absmax[i / 256] + offset. In a slot the maxima are F32.
"""

import json
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from moe.offload.checkpoint import read_tensor
from moe.offload.formats.slot import FLOATS, MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix


def nf4(group: Group, said: Quantisation) -> StoredMatrix | None:
    weight, absmax, state = (group.tensors.get(role) for role in ("weight", "absmax", "quant_state"))
    if weight is None or absmax is None:
        return None
    if state is None or "quant_map" not in group.tensors:
        raise ValueError(f"{group.name} has absmax but not both of quant_state and quant_map")
    group.elements("quant_state", (torch.uint8,))
    group.elements("quant_map", (torch.float32,), 16)
    maxima = group.elements("absmax", (*FLOATS, torch.uint8))
    about = _json(read_tensor(state), group.keys["quant_state"])
    *shape, size = _numbers(about, group.keys["quant_state"], "shape", "blocksize")
    n, k = shape if len(shape) == 2 else (0, 0)
    if n * k != 2 * weight.nbytes or k % 2 or size < 2 or -(-n * k // size) != maxima:
        raise ValueError(
            f"{group.name} has {weight.nbytes} bytes and {maxima} maxima, which its quant_state "
            f"(shape {[n, k]}, blocks of {size}) does not explain; only even rows are read"
        )
    columns = gcd(k, size)  # a run of these lies in one block
    layout = MatrixFormat.coded("lut4", (1, columns), torch.float32)
    spread = partial(_spread, shape=(n, k), block=size, columns=columns)
    nested = [group.tensors[role] for role in ("nested_absmax", "nested_quant_map") if role in group.tensors]
    if absmax.dtype == torch.uint8:
        if len(nested) != 2:
            raise ValueError(f"{group.name} has absmax in 8 bits but no nested_absmax and nested_quant_map")
        (block,), offset = _numbers(about, group.keys["quant_state"], "nested_blocksize"), about.get("nested_offset")
        if not isinstance(offset, float):
            raise ValueError(f"{group.keys['quant_state']} says no nested_offset")
        group.elements("nested_quant_map", FLOATS, 256)
        group.elements("nested_absmax", FLOATS, -(-maxima // block))
        unnest = partial(_unnested, offset=offset, block=block, spread=spread)
        scale = Source((absmax, *nested), unnest)
    else:
        scale = Source((absmax,), spread)
    sources = {"": Source((weight,), _swapped), ".scale": scale, ".table": Source((group.tensors["quant_map"],))}
    return group.matrix(f"bitsandbytes {about.get('quant_type', '4 bits')}", (n, k), layout, sources)


def _json(data: Tensor, key: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data.view(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{key} holds no JSON object")
    return value


def _numbers(about: dict[str, Any], key: str, *names: str) -> list[int]:
    """Whole numbers above 0; those of a list one after another."""
    said = [about.get(name) for name in names]
    each = [number for value in said for number in (value if isinstance(value, list) else [value])]
    numbers = [number for number in each if type(number) is int and number > 0]
    if len(numbers) != len(each):
        raise ValueError(f"{key} says {said} of {', '.join(names)}, which must be whole numbers above 0")
    return numbers


def _swapped(codes: Tensor) -> Tensor:
    codes = codes.view(torch.uint8)
    return codes << 4 | codes >> 4


def _spread(absmax: Tensor, shape: tuple[int, int], block: int, columns: int) -> Tensor:
    """One maximum per run of `columns` weights: [n, k / columns]."""
    starts = torch.arange(shape[0] * shape[1] // columns) * columns
    return absmax.float().view(-1)[starts // block].view(shape[0], -1)


def _unnested(absmax: Tensor, nested: Tensor, table: Tensor, offset: float, block: int, spread: Any) -> Tensor:
    which = torch.arange(absmax.numel()) // block
    made: Tensor = spread(table.view(-1)[absmax.view(-1).int()] * nested.view(-1)[which] + offset)
    return made
