"""Every kernel with the arguments that it is compiled for, written by hand for chips of all makers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe.kernels.combine import _combine_kernel
from moe.kernels.fused import fused_constants
from moe.kernels.fused_kernel import fused_experts_kernel
from moe.kernels.gate import _gate_kernel
from moe.kernels.grouped_gemm import _down_kernel, _gate_up_kernel
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import tl_dtype
from moe.kernels.permute import _small_dense_routing_kernel, _small_routing_kernel
from moe.kernels.tiles import TileConfig, pick_tiles, tiles_in_blocks

LOW_BIT = {"sm_80": ("int8",), "sm_90": ("fp8", "int8"), "sm_100": ("fp8", "int8"), "gfx942": ("fp8", "int8")}


@dataclass(frozen=True)
class Case:
    """A kernel with the arguments that it is compiled for. sync: (acquires, releases) that must be there at least."""

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool = False
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
            yield from _grouped_cases(f"{phase}{'_tma' if tma else ''}", config, hidden, inter, top_k, tma)
            for stored in LOW_BIT[arch] if phase != "mid" else ():
                name = f"{phase}_{stored}{'_tma' if tma else ''}"
                yield from _grouped_cases(name, config, hidden, inter, top_k, tma, stored)
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
            for stored in ("bf16", *LOW_BIT[arch]):
                if not (tma and stored == "fp8"):  # the launcher takes pointers for scales in blocks
                    yield _fused_case(phase, config, shape, tma, stored)


def _weights(config: TileConfig, tma: bool, stored: str = "bf16") -> tuple[dict[str, str], dict[str, str]]:
    kind = {"bf16": "bf16", "fp8": "fp8e4nv", "int8": "i8"}[stored]
    first, second = f"*{kind}", f"*{kind}"
    if tma:
        first, second = (f"tensordesc<{kind}[1,{n},{config.block_k}]>" for n in (config.block_n1, config.block_n2))
    gate_up = {"gate": first, "up": first, "gate_bias": "*bf16", "up_bias": "*bf16"}
    gate_up |= {"gate_scale": "*fp32", "up_scale": "*fp32"}
    return gate_up, {"down": second, "down_bias": "*bf16", "down_scale": "*fp32"}


def _block(stored: str, hidden: int, inter: int) -> tuple[int, int] | None:
    return {"bf16": None, "fp8": (128, 128), "int8": (1, max(hidden, inter))}[stored]


def _grouped_cases(
    phase: str, config: TileConfig, hidden: int, inter: int, top_k: int, tma: bool, stored: str = "bf16"
) -> Iterator[Case]:
    block = _block(stored, hidden, inter)
    config = tiles_in_blocks(config, block, hidden, inter)
    gate_up, down = _weights(config, tma, stored)
    walk = {"order_ptr": "*i32", "table_ptr": "*i32", "num_tiles_ptr": "*i32", "max_tiles": "i32"}
    strides = {"stride_slot": "i64", "stride_row": "i64", "stride_bias": "i64", "stride_scale": "i64"}
    shared = {"H": hidden, "I": inter, "HAS_BIAS": False, "TMA": tma, "GROUP_M": 8}
    shared |= dict(zip(("SCALE_N", "SCALE_K"), block or (0, 0)))
    shared |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    yield Case(
        f"grouped_gate_up_{phase}",
        _gate_up_kernel,
        {"x_ptr": "*bf16", "stride_x": "i64", "h_ptr": "*bf16", **walk, **gate_up, **strides}
        | {"bias_step": "i32", "alpha": "fp32", "limit": "fp32"},
        shared
        | {"TOP_K": top_k, "KIND": "silu", "GATED": True, "DTYPE": tl_dtype(torch.bfloat16)}
        | {"BLOCK_N": config.block_n1},
        config.num_warps,
        config.num_stages,
        matrix=True,
    )
    yield Case(
        f"grouped_down_{phase}",
        _down_kernel,
        {"h_ptr": "*bf16", "y_ptr": "*fp32", **walk, **down, **strides},
        shared | {"Y_DTYPE": tl_dtype(torch.float32), "BLOCK_N": config.block_n2},
        config.num_warps,
        config.num_stages,
        matrix=True,
    )


def _fused_case(phase: str, config: TileConfig, shape: FusedShape, tma: bool, stored: str) -> Case:
    block = _block(stored, shape.hidden_size, shape.intermediate_size)
    config = tiles_in_blocks(config, block, shape.hidden_size, shape.intermediate_size)
    gate_up, down = _weights(config, tma, stored)
    ints = ("ids", "order", "offsets", "slots", "tile_flag", "tickets", "state")
    scalars = ("num_programs", "first_rank", "num_ranks", "G", "num_tokens", "lag", "split", "limit", "bias_step")
    strides = [f"stride_{of}{gemm}" for of in ("slot", "row", "bias", "scale") for gemm in (1, 2)]
    types = {"bases": "*i64", "x": "*bf16", "topk_weights": "*fp32", "out": "*bf16", "inter": "*bf16"}
    types |= dict.fromkeys(ints, "*i32") | dict.fromkeys(scalars, "i32") | dict.fromkeys(strides, "i64")
    types |= {"alpha": "fp32", "act_limit": "fp32", **gate_up, **down}
    rows = shape.world_size * shape.max_tokens * shape.top_k
    tiles = rows // config.block_m + 2 * shape.experts_per_rank
    constants = fused_constants(shape, config, shape.experts_per_rank, tiles, HeapLayout.of(shape))
    constants |= {"KIND": "silu", "GATED": True, "HAS_BIAS": False, "TMA": tma, "ALIGNED": True}
    constants |= dict(zip(("SCALE_N", "SCALE_K"), block or (0, 0)))
    return Case(
        f"fused_{phase}{'' if stored == 'bf16' else '_' + stored}{'_tma' if tma else ''}",
        fused_experts_kernel,
        types,
        constants,
        config.num_warps,
        config.num_stages,
        matrix=True,
        sync=(5, 5),  # counts, tokens, first GEMM, results, exit; row numbers, tokens, first GEMM, results, exit
    )
