"""FP8 (e4m3) weights with scales per block, row or matrix.

DeepSeek-V3 and Qwen3 (`weight_scale_inv`: multiply, "inv" is only a name), DeepSeek-V4 (`scale`), compressed-tensors
and ModelOpt (`weight_scale`). Blocks at the edges are partial: the block is the configured one, never the rows of the
matrix divided by those of its scales.
"""

import torch

from moe.offload.formats.slot import FLOATS, WHOLE, MatrixFormat
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix

_E8M0 = {torch.float8_e8m0fnu, torch.uint8}  # some files hold the same bytes as U8


def fp8(group: Group, said: Quantisation) -> StoredMatrix | None:
    weight, scale = group.tensors.get("weight"), group.tensors.get("scale")
    if weight is None or weight.dtype != torch.float8_e4m3fn or "packed" in group.tensors:
        return None
    if scale is None:
        raise ValueError(f"{group.name} is stored as F8_E4M3 without scales: {group.name}_scale_inv is missing")
    if scale.dtype not in FLOATS and scale.dtype not in _E8M0:
        raise ValueError(f"{group.keys['scale']} is stored as {str(scale.dtype)[6:]}; scales are F32, BF16, F16, E8M0")
    if len(weight.shape) not in (2, 3):
        raise ValueError(f"{group.name} has shape {list(weight.shape)}, expected a matrix or a stack of them")
    *lead, n, k = weight.shape
    block = _block(group, (n, k), group.grid("scale", tuple(lead)), said)
    dtype = scale.dtype if scale.dtype in FLOATS else torch.float8_e8m0fnu
    sources = {"": Source((weight,)), ".scale": Source((scale,))}
    return group.matrix("FP8", weight.shape, MatrixFormat.coded("e4m3", block, dtype), sources)


def _block(group: Group, shape: tuple[int, int], grid: tuple[int, int], said: Quantisation) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    (n, k), block = shape, said.block
    if block is not None:
        rows = {-(-n // block[0]), 2 * -(-(n // 2) // block[0])}  # of gate and up stored as one, each has its own
        if grid[0] in rows and grid[1] == -(-k // block[1]):
            return block
    is_matrix = len(group.tensors["scale"].shape) == len(group.tensors["weight"].shape)
    is_free = not (is_matrix and said.method == "fp8" and block is not None)  # else only the configured blocks
    if grid == (1, 1) and is_free:
        return WHOLE, WHOLE
    if grid == (n, 1) and is_free:
        return 1, WHOLE
    if block is None and grid[0] == n and k % grid[1] == 0 and k // grid[1] in (16, 32, 64, 128):
        return 1, k // grid[1]
    what = "row or matrix" if block is None else f"{block[0]} x {block[1]} weights"
    raise ValueError(f"{group.name} {list(shape)} has scales {list(grid)}, not one for each {what}")
