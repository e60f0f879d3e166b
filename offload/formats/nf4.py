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
from moe.offload.formats.slot import MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix


def nf4(group: Group, said: Quantisation) -> StoredMatrix | None:
    weight, absmax, state = (group.tensors.get(role) for role in ("weight", "absmax", "quant_state"))
    if weight is None or absmax is None:
        return None
    if state is None or "quant_map" not in group.tensors:
        raise ValueError(f"{group.name} has absmax but not both of quant_state and quant_map")
    about = _json(read_tensor(state), group.keys["quant_state"])
    n, k = about["shape"] if len(about.get("shape", ())) == 2 else (0, 0)
    size = int(about.get("blocksize", 0))
    if n * k != 2 * weight.nbytes or k % 2 or size < 2 or -(-n * k // size) != absmax.shape[0]:
        raise ValueError(
            f"{group.name} has {weight.nbytes} bytes and {list(absmax.shape)} maxima, which its quant_state "
            f"(shape {[n, k]}, blocks of {size}) does not explain; only even rows are read"
        )
    columns = gcd(k, size)  # a run of these lies in one block
    layout = MatrixFormat.coded("lut4", (1, columns), torch.float32)
    spread = partial(_spread, shape=(n, k), block=size, columns=columns)
    nested = [group.tensors[role] for role in ("nested_absmax", "nested_quant_map") if role in group.tensors]
    if absmax.dtype == torch.uint8:
        if len(nested) != 2:
            raise ValueError(f"{group.name} has absmax in 8 bits but no nested_absmax and nested_quant_map")
        unnest = partial(
            _unnested, offset=float(about["nested_offset"]), block=int(about["nested_blocksize"]), spread=spread
        )
        scale = Source((absmax, *nested), unnest)
    else:
        scale = Source((absmax,), spread)
    sources = {"": Source((weight,), _swapped), ".scale": scale, ".table": Source((group.tensors["quant_map"],))}
    return group.matrix(f"bitsandbytes {about.get('quant_type', '4 bits')}", (n, k), layout, sources)


def _json(data: Tensor, key: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data.tolist()))
    except ValueError as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{key} holds no JSON object")
    return value


def _swapped(codes: Tensor) -> Tensor:
    codes = codes.view(torch.uint8)
    return codes << 4 | codes >> 4


def _spread(absmax: Tensor, shape: tuple[int, int], block: int, columns: int) -> Tensor:
    """One maximum per run of `columns` weights: [n, k / columns]."""
    starts = torch.arange(shape[0] * shape[1] // columns) * columns
    return absmax.float()[starts // block].view(shape[0], -1)


def _unnested(absmax: Tensor, nested: Tensor, table: Tensor, offset: float, block: int, spread: Any) -> Tensor:
    which = torch.arange(len(absmax)) // block
    made: Tensor = spread(table[absmax.int()] * nested[which] + offset)
    return made
