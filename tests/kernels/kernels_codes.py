"""Experts stored as random codes, for tests of the kernels that decode them."""

import math

import torch

from moe.kernels.formats import CODE_DTYPES, NIBBLE_CODES, CodeName, Coding, bytes_per_row
from moe.kernels.weights import Activation, ExpertWeights


def random_codes(code: CodeName, shape: tuple[int, ...], columns: int) -> torch.Tensor:
    raw = torch.randint(0, 256, (*shape, bytes_per_row(code, columns)), dtype=torch.uint8)
    if code == "e4m3":
        raw[raw & 127 == 127] = 0  # not a number
    return raw.view(CODE_DTYPES[code])


def apart(t: torch.Tensor, gap: int = 13) -> torch.Tensor:
    """The same with slots further apart than they are long; what lies between is not finite, or -1."""
    slab = torch.full((len(t), math.prod(t.shape[1:]) + gap), 255, dtype=torch.uint8)
    if t.is_floating_point() and t.itemsize > 1:
        slab = torch.full(slab.shape, math.nan, dtype=t.dtype)
    slab = slab.view(t.dtype) if t.itemsize == 1 else slab.to(t.dtype)
    view = slab[:, : math.prod(t.shape[1:])].view(t.shape)
    view.copy_(t)
    return view


def random_scales(grid: tuple[int, ...], dtype: torch.dtype, size: float) -> torch.Tensor:
    """Positive scales of about `size`, within a factor of four."""
    values = size * 4 ** (torch.rand(grid) - 0.5)
    if dtype == torch.float8_e8m0fnu:
        return (values.log2().round() + 127).clamp(0, 254).to(torch.uint8).view(dtype)
    return values.to(dtype)


def random_coding(
    code: CodeName,
    shape: tuple[int, int, int, int],
    block: tuple[int, int],
    *,
    scale_dtype: torch.dtype = torch.float32,
    with_zeros: bool = False,
    with_factor: bool = False,
    with_groups: bool = False,
) -> Coding:
    """shape: slots, parts, rows of a part, columns. Weights are of about columns ** -0.5."""
    slots, parts, rows, columns = shape
    grid = (slots, parts, -(-rows // block[0]), -(-columns // block[1]))
    size = columns**-0.5 / {"e4m3": 100, "int8": 74, "int4": 4.6, "e2m1": 3, "lut4": 1}[code]
    if with_factor:
        size *= 1000  # scales in e4m3 are no smaller than 2 ** -9
    zeros = torch.tensor([-8, 7, 0, 3, -1]) if code in NIBBLE_CODES else torch.tensor([-128, 127, 0, 5, -7])
    return Coding(
        code,
        block,
        apart(random_scales(grid, scale_dtype, size)),
        apart(zeros[torch.randint(0, 5, grid)].to(torch.int8)) if with_zeros else None,
        apart((1 + torch.rand(slots, parts)) / 1000) if with_factor else None,
        apart(torch.randn(slots, parts, 16)) if code == "lut4" else None,
        apart(torch.randint(0, grid[3], (slots, parts, columns), dtype=torch.int32)) if with_groups else None,
    )


def coded_experts(
    codes: tuple[CodeName | None, CodeName | None],
    sizes: tuple[int, int, int],
    blocks: tuple[tuple[int, int], tuple[int, int]],
    *,
    activation: Activation | None = None,
    bias_dtype: torch.dtype | None = None,
    **how: object,
) -> ExpertWeights:
    """codes: of gate_up and down, None = bfloat16. sizes: slots, H, I. `how`: of `random_coding`."""
    slots, hidden, inter = sizes
    act = activation or Activation()
    parts = 2 if act.gated else 1
    tensors: list[torch.Tensor] = []
    codings: list[Coding | None] = []
    for code, block, (p, n, k) in zip(codes, blocks, ((parts, inter, hidden), (1, hidden, inter))):
        if code is None:
            tensors.append(apart((torch.randn(slots, p * n, k) * k**-0.5).bfloat16()))
            codings.append(None)
        else:
            tensors.append(apart(random_codes(code, (slots, p * n), k)))
            codings.append(random_coding(code, (slots, p, n, k), block, **how))  # type: ignore[arg-type]
    biases = (
        [None, None] if bias_dtype is None else [apart(torch.randn(slots, t.shape[1]).to(bias_dtype)) for t in tensors]
    )
    return ExpertWeights(tensors[0], tensors[1], biases[0], biases[1], act, codings[0], codings[1])
