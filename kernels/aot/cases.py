"""Every kernel with the arguments that it is compiled for, written by hand for chips of all makers."""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.combine import _combine_kernel
from moe.kernels.formats import CODE_DTYPES, CodeName, Coding, Residual, bytes_per_row
from moe.kernels.fused import fused_constants
from moe.kernels.fused_kernel import fused_experts_kernel
from moe.kernels.gate import _gate_kernel
from moe.kernels.grouped_gemm import _down_kernel, _gate_up_kernel
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import tl_dtype
from moe.kernels.matrix import Matrix, Planes
from moe.kernels.nested import PLANES, plane_bytes
from moe.kernels.permute import _small_dense_routing_kernel, _small_routing_kernel
from moe.kernels.tiles import TileConfig, is_decoded, matrices, pick_tiles, tiles_for
from moe.kernels.weights import Activation, ExpertWeights

# Between them every way in which kernels read a matrix.
STORED = ("fp8", "int8", "int4", "mxfp4", "nf4", "nested", "bf12")
_MAP_NORESERVE = 0x4000  # Linux; the module has no name for it
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments that it is compiled for. sync: (acquires, releases) that must be there at least.

    types: of arguments; of a `Matrix`, the same tuple with types in it. constants: by argument, or by argument and
    field of a matrix.
    """

    name: str
    fn: Any
    types: dict[str, str | Matrix]
    constants: dict[str | tuple[str, int], Any]
    num_warps: int
    num_stages: int
    matrix: bool = False
    scales: bool = False  # of blocks, in copies of a few bytes
    sync: tuple[int, int] = (0, 0)


def capability(arch: str) -> int:
    return int(arch[3:]) if arch.startswith("sm_") else 80  # AMD tiles: as on sm_80, shared memory is as small


def cases(arch: str) -> Iterator[Case]:
    """Every kernel as Qwen3-30B-A3B's layer would call it: decode and prefill tiles, one rank of eight."""
    hidden, inter, experts, top_k = 2048, 768, 128, 8
    tiny = {"ids_ptr": "*i32", "weights_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32", "scale": "fp32"}
    yield Case(
        "gate",
        _gate_kernel,
        {"logits_ptr": "*fp32", "num_tokens": "i32", **tiny},
        {
            "E": 256,
            "TOP_K": 8,
            "TOP_K_P": 8,
            "SCORE": "sigmoid",
            "GROUPS": 8,
            "TOPK_GROUPS": 4,
            "GROUP_SCORE": "top2",
            "RENORMALIZE": True,
            "HAS_BIAS": True,
            "BLOCK_T": 4,
            "GROUPS_P": 8,
            "GROUP": 32,
            "GROUP_P": 32,
        },
        4,
        1,
    )
    pointers = ("ids_ptr", "order_ptr", "sorted_ptr", "table_ptr", "num_tiles_ptr", "offsets_ptr", "begin_ptr")
    yield Case(
        "small_routing",
        _small_routing_kernel,
        {**dict.fromkeys(pointers, "*i32"), "num_rows": "i32", "num_ids": "i32", "capacity": "i32"},
        {"WITH_OFFSETS": True, "BLOCK_M": 16, "BLOCK": 1024, "BLOCK_ROWS": 8, "BLOCK_IDS": 8},
        8,
        1,
    )
    dense = ("ids_ptr", "order_ptr", "sorted_ptr", "dense_ptr", "slots_ptr", "offsets_ptr")
    yield Case(
        "small_dense_routing",
        _small_dense_routing_kernel,
        {**dict.fromkeys(dense, "*i32"), "num_rows": "i32", "capacity": "i32"},
        {"BLOCK": 1024, "BLOCK_ROWS": 8},
        8,
        1,
    )
    yield Case(
        "combine",
        _combine_kernel,
        {"y_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "num_tokens": "i32"},
        {"TOP_K": top_k, "H": hidden, "DTYPE": tl_dtype(torch.bfloat16), "BLOCK_T": 1, "BLOCK_H": 1024},
        4,
        1,
    )
    for phase, rows in (("decode", 4), ("mid", 40), ("prefill", 512)):
        for tma in (False, True) if capability(arch) >= 90 else (False,):
            config = pick_tiles(rows, torch.bfloat16, capability(arch), tma=tma)
            for stored in ("bf16", *STORED) if phase != "mid" else ("bf16",):
                if tma and stored in ("nested", "bf12"):  # which come by pointers
                    continue
                name = f"{phase}{'' if stored == 'bf16' else '_' + stored}{'_tma' if tma else ''}"
                yield from _grouped_cases(name, config, weights_stored(stored, hidden, inter), top_k, arch, tma)
            if phase == "mid":
                continue
            shape = FusedShape(
                world_size=8,
                num_experts=experts,
                top_k=top_k,
                hidden_size=hidden,
                intermediate_size=inter,
                max_tokens=16 if phase == "decode" else 1024,
            )
            config = pick_tiles(rows, torch.bfloat16, capability(arch))
            for stored in ("bf16", *STORED):
                weights = weights_stored(stored, hidden, inter)
                if not (tma and is_decoded(weights, torch.bfloat16)):  # the launcher takes pointers
                    name = f"fused_{phase}{'' if stored == 'bf16' else '_' + stored}{'_tma' if tma else ''}"
                    yield _fused_case(name, config, shape, weights, arch, tma)


def weights_stored(
    stored: str, hidden: int, inter: int, slots: int = 1, dtype: torch.dtype = torch.bfloat16
) -> ExpertWeights:
    """Experts of no values, as published: FP8 of DeepSeek-V3, int8, GPTQ's int4, gpt-oss, NF4; or our own."""
    if stored == "bf16":
        first, second = (_unbacked((slots, n, k), dtype) for n, k in ((2 * inter, hidden), (hidden, inter)))
        return ExpertWeights(first, second, None, None, Activation())
    formats: dict[str, tuple[CodeName, tuple[int, int], torch.dtype]] = {
        "fp8": ("e4m3", (128, 128), torch.float32),
        "int8": ("int8", (1, max(hidden, inter)), torch.float32),
        "int4": ("int4", (1, 128), torch.float16),
        "int4 of 32": ("int4", (1, 32), torch.bfloat16),
        "mxfp4": ("e2m1", (1, 32), torch.float8_e8m0fnu),
        "nvfp4": ("e2m1", (1, 16), torch.float8_e4m3fn),
        "nf4": ("lut4", (1, 64), torch.float32),
        "nested": ("nested", (1, 64), torch.float16),
        "bf12": ("bf12", (1, 1 << 30), torch.int32),
    }
    code, block, scale = formats[stored]
    codes, codings = [], []
    for parts, rows, columns in ((2, inter, hidden), (1, hidden, inter)):
        groups = 1 + 3 if stored == "bf12" else -(-columns // block[1])
        grid = (slots, parts, -(-rows // block[0]), groups)
        codes.append(_unbacked((slots, parts * rows, bytes_per_row(code, columns)), CODE_DTYPES[code]))
        codings.append(
            Coding(
                code,
                block,
                torch.empty(grid, dtype=scale),
                torch.empty(grid, dtype=torch.int8) if stored == "int4" else None,
                torch.empty(grid[:2]) if stored == "nvfp4" else None,
                torch.empty(*grid[:2], 16) if stored == "nf4" else None,
                residual=_residual(grid, rows, columns) if stored == "nested" else None,
            )
        )
    return ExpertWeights(codes[0], codes[1], None, None, Activation(), codings[0], codings[1])


def _residual(grid: tuple[int, ...], rows: int, columns: int) -> Residual:
    """Of slots of 8 bits."""
    planes = []
    for level, scale in ((3, torch.uint8), (4, torch.uint8), (8, torch.float16)):
        codes = _unbacked((grid[0], grid[1] * rows, plane_bytes(PLANES[level], columns)), torch.uint8)
        planes += [codes, torch.empty(grid, dtype=scale)]
    return Residual(torch.empty(grid[0], 1, dtype=torch.int32), *planes)


def _unbacked(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any size that nobody reads: addresses only, which the kernel does not count against its memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _argument(name: str, matrix: Matrix) -> tuple[Matrix, dict[tuple[str, int], Any]]:
    """Types of a matrix as a kernel's argument, and its constants."""
    types: list[Any] = []
    constants: dict[tuple[str, int], Any] = {}
    for i, value in enumerate(matrix):
        if isinstance(value, Planes):  # all of them are there
            types.append(Planes(*(_POINTERS[of.dtype] if isinstance(of, torch.Tensor) else "i64" for of in value)))
        elif isinstance(value, torch.Tensor):
            types.append(_POINTERS[value.dtype])
        elif isinstance(value, TensorDescriptor):
            kind = _POINTERS[value.base.dtype][1:]
            types.append(f"tensordesc<{kind}{str(list(value.block_shape)).replace(' ', '')}>")
        elif isinstance(value, int):
            types.append("i64" if Matrix._fields[i] != "step_bias" else "i32")
        else:
            types.append("constexpr")
            constants[name, i] = value.value if isinstance(value, tl.constexpr) else value
    return Matrix(*types), constants


def _grouped_cases(
    phase: str, config: TileConfig, weights: ExpertWeights, top_k: int, arch: str, tma: bool
) -> Iterator[Case]:
    config = tiles_for(config, weights, torch.bfloat16)
    made = matrices(weights, torch.bfloat16, config, _numbers(arch), tma=tma)
    types: dict[str, str | Matrix] = {}
    constants: dict[str | tuple[str, int], Any] = {}
    for name, matrix in zip(made._fields, made):
        types[name], more = _argument(name, matrix)
        constants |= more
    walk = {"order_ptr": "*i32", "table_ptr": "*i32", "num_tiles_ptr": "*i32", "max_tiles": "i32"}
    shared = {"H": weights.hidden_size, "I": weights.intermediate_size, "GROUP_M": 8}
    shared |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    yield Case(
        f"grouped_gate_up_{phase}",
        _gate_up_kernel,
        {"x_ptr": "*bf16", "stride_x": "i64", "h_ptr": "*bf16", **walk, **types, "alpha": "fp32", "limit": "fp32"},
        shared
        | {key: value for key, value in constants.items() if key[0] != "down"}
        | {"TOP_K": top_k, "KIND": "silu", "GATED": True, "DTYPE": tl_dtype(torch.bfloat16)}
        | {"BLOCK_N": config.block_n1},
        config.num_warps,
        config.num_stages,
        matrix=True,
        scales=is_decoded(weights, torch.bfloat16),
    )
    yield Case(
        f"grouped_down_{phase}",
        _down_kernel,
        {"h_ptr": "*bf16", "y_ptr": "*bf16", **walk, **types},
        shared
        | {key: value for key, value in constants.items() if key[0] == "down"}
        | {"Y_DTYPE": tl_dtype(torch.bfloat16), "BLOCK_N": config.block_n2},
        config.num_warps,
        config.num_stages,
        matrix=True,
        scales=is_decoded(weights, torch.bfloat16),
    )


def _numbers(arch: str) -> int:
    """The capability that says which numbers the chip has; AMD's fp8 is emulated by the compiler."""
    return capability(arch) if arch.startswith("sm_") else 89


def _fused_case(name: str, config: TileConfig, shape: FusedShape, weights: ExpertWeights, arch: str, tma: bool) -> Case:
    config = tiles_for(config, weights, torch.bfloat16)
    ints = ("ids", "order", "offsets", "slots", "tile_flag", "tickets", "state")
    scalars = ("num_programs", "first_rank", "num_ranks", "G", "num_tokens", "lag", "split", "limit")
    types: dict[str, str | Matrix] = {"bases": "*i64", "x": "*bf16", "topk_weights": "*fp32", "out": "*bf16"}
    types |= {"inter": "*bf16", "alpha": "fp32", "act_limit": "fp32"}
    types |= dict.fromkeys(ints, "*i32") | dict.fromkeys(scalars, "i32")
    rows = shape.world_size * shape.max_tokens * shape.top_k
    tiles = rows // config.block_m + 2 * shape.experts_per_rank
    sizes = fused_constants(shape, config, shape.experts_per_rank, tiles, HeapLayout.of(shape))
    constants: dict[str | tuple[str, int], Any] = dict(sizes.items())
    constants |= {"KIND": "silu", "GATED": True, "ALIGNED": True}
    made = matrices(weights, torch.bfloat16, config, _numbers(arch), tma=tma)
    for field, matrix in zip(made._fields, made):
        types[field], more = _argument(field, matrix)
        constants |= more
    return Case(
        name,
        fused_experts_kernel,
        types,
        constants,
        config.num_warps,
        config.num_stages,
        matrix=True,
        scales=is_decoded(weights, torch.bfloat16),
        sync=(5, 5),  # counts, tokens, first GEMM, results, exit; row numbers, tokens, first GEMM, results, exit
    )
