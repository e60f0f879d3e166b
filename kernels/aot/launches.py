"""What the engine launches on one rank, compiled by its own host code through a driver that launches nothing."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
import triton

from moe.kernels.aot.assembler import cubin_facts
from moe.kernels.aot.cases import weights_stored
from moe.kernels.aot.fake import Binary, FakeDriver
from moe.kernels.block_kernels import Turn, add_norm, turned
from moe.kernels.gate import GateConfig, gate
from moe.kernels.latent_attention import latent_attention
from moe.kernels.paged_attention import Pages, Scores, paged_attention
from moe.kernels.slot_lookup import Scratch, SlotState, gather, route
from moe.kernels.triton_experts import FusedLayerExperts, GroupedExperts, SingleLaunch, serving_tokens
from moe.kernels.weights import Activation, ExpertWeights

PLAIN = Activation()
MAX_TOKENS = 256  # of the engine's single launch


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer as the engine has it. slots: of the whole slab; its tensors take no memory, since nothing runs."""

    name: str
    slots: int
    experts: int
    top_k: int
    hidden: int
    inter: int
    dtype: torch.dtype = torch.bfloat16
    stored: str = ""
    activation: Activation = PLAIN
    biased: bool = False


GPT_OSS = Activation(kind="gpt_oss", interleaved=True, alpha=1.702, limit=7.0)
SHAPES = (
    Shape("tiny", 40, 8, 2, 256, 128),
    Shape("tinier", 40, 8, 2, 64, 32),
    Shape("Qwen3-30B-A3B", 6144, 128, 8, 2048, 768),
    Shape("Qwen3-30B-A3B, one layer", 128, 128, 8, 2048, 768),
    Shape("Qwen3-30B-A3B, 8 slots", 8, 128, 8, 2048, 768),
    Shape("Mixtral-8x7B", 256, 8, 2, 4096, 14336),
    Shape("OLMoE fp16", 1024, 64, 8, 2048, 1024, torch.float16),
    Shape("OLMoE fp32", 1024, 64, 8, 2048, 1024, torch.float32),
    Shape("gpt-oss-20b", 768, 32, 4, 2880, 2880, torch.bfloat16, "", GPT_OSS, True),
    Shape("Qwen3-30B-A3B fp8", 4, 128, 8, 2048, 768, torch.bfloat16, "fp8"),
    Shape("Qwen3-30B-A3B int8", 4, 128, 8, 2048, 768, torch.bfloat16, "int8"),
    Shape("Qwen3-30B-A3B int4", 4, 128, 8, 2048, 768, torch.bfloat16, "int4"),
    Shape("Kimi-K2", 2, 384, 8, 7168, 2048, torch.bfloat16, "int4 of 32"),
    Shape("gpt-oss-20b mxfp4", 4, 32, 4, 2880, 2880, torch.bfloat16, "mxfp4", GPT_OSS, True),
    Shape("Qwen3-30B-A3B nvfp4", 4, 128, 8, 2048, 768, torch.bfloat16, "nvfp4"),
    Shape("Qwen3-30B-A3B nf4", 4, 128, 8, 2048, 768, torch.bfloat16, "nf4"),
    Shape("Qwen3-30B-A3B bf12", 4, 128, 8, 2048, 768, torch.bfloat16, "bf12"),
    Shape("Qwen3-30B-A3B nf4 fp16", 4, 128, 8, 2048, 768, torch.float16, "nf4"),
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that a layer's launches needed."""

    shape: str
    arch: str
    path: str
    tokens: int
    kernel: str
    registers: int
    spills: int
    spills_in_matrix_loops: int
    shared_bytes: int
    problem: str = ""


def launched(chip: FakeDriver, shape: Shape, tokens: Sequence[int] | None = None) -> Iterator[Compiled]:
    """Calls both paths with every number of tokens (None: those that compile) and yields what was compiled."""
    arch, weights = f"sm_{chip.target.arch}", _weights(shape)
    grouped = GroupedExperts(weights, shape.experts)
    single = FusedLayerExperts(weights, SingleLaunch(MAX_TOKENS), shape.experts)
    counts = serving_tokens(shape.top_k, min(shape.experts, shape.slots), shape.dtype, chip.target.arch)
    for path, layer in (("grouped", grouped), ("single", single)):
        for count in tokens or sorted({*counts, *((16, MAX_TOKENS) if path == "single" else ())}):
            before = len(chip.loaded)
            try:
                layer.combine(
                    torch.zeros(count, shape.hidden, dtype=shape.dtype),
                    torch.zeros(count, shape.top_k, dtype=torch.int32),
                    torch.zeros(count, shape.top_k),
                )
            except RuntimeError as error:
                yield Compiled(shape.name, arch, path, count, "", 0, 0, 0, 0, str(error).splitlines()[0][:80])
            for binary in chip.loaded[before:]:
                yield _examined(binary, shape.name, arch, path, count)


def launched_gate(chip: FakeDriver) -> Iterator[Compiled]:
    """The router's kernel at few and many tokens."""
    before = len(chip.loaded)
    for count in (1, 16, 17, 1024):
        gate(torch.zeros(count, 128), GateConfig(top_k=8))
    for binary in chip.loaded[before:]:
        yield _examined(binary, "gate", f"sm_{chip.target.arch}", "gate", 1)


PLAIN_SCORES = Scores(0.1)


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's attention as the engine has it."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    scores: Scores = PLAIN_SCORES
    dtype: torch.dtype = torch.bfloat16


HEADS = (
    Heads("tiny attention", 4, 2, 32),
    Heads("Qwen3-30B-A3B attention", 32, 4, 128),
    Heads("Mixtral-8x7B attention, fp16", 32, 8, 128, PLAIN_SCORES, torch.float16),
    Heads("gpt-oss-20b attention", 64, 8, 64, Scores(0.1, 128, 0.0, torch.zeros(64))),
    Heads("256 wide attention, capped", 8, 4, 256, Scores(0.1, 4096, 50.0)),
    Heads("OLMoE attention fp32", 16, 16, 128, PLAIN_SCORES, torch.float32),
)


def launched_attention(chip: FakeDriver, shape: Heads) -> Iterator[Compiled]:
    """Decoding steps of one and of many sequences, short and long, in blocks of two sizes: two kernels in all."""
    before = len(chip.loaded)
    for count, longest, block_size in ((1, 1, 16), (16, 17, 16), (3, 40960, 32)):
        tables = torch.zeros(count, -(-longest // block_size), dtype=torch.int32)
        pages = Pages(tables, torch.ones(count, dtype=torch.int32), block_size, longest)
        new = torch.zeros(count, shape.kv_heads, shape.dim, dtype=shape.dtype)
        pool = torch.zeros(block_size, shape.kv_heads, shape.dim, dtype=shape.dtype)
        q = torch.zeros(count, shape.heads, shape.dim, dtype=shape.dtype)
        paged_attention(q, (new, new), (pool, pool), pages, shape.scores)
    for binary in chip.loaded[before:]:
        yield _examined(binary, shape.name, f"sm_{chip.target.arch}", "attention", 1)


def launched_latents(chip: FakeDriver, dtype: torch.dtype) -> Iterator[Compiled]:
    """DeepSeek-V3's attention over latents: one kernel for all lengths, and one that sums."""
    before = len(chip.loaded)
    for count, longest in ((1, 1), (3, 40960)):
        tables = torch.zeros(count, -(-longest // 16), dtype=torch.int32)
        pages = Pages(tables, torch.ones(count, dtype=torch.int32), 16, longest)
        pool, new, q = (
            tuple(torch.zeros(*shape, width, dtype=dtype) for width in (512, 64))
            for shape in ((16, 1), (count,), (count, 128))
        )
        latent_attention(q, new, pool, pages, 0.1)  # type: ignore[arg-type]
    for binary in chip.loaded[before:]:
        yield _examined(binary, f"latents {dtype}", f"sm_{chip.target.arch}", "attention", 1)


def launched_lookup(chip: FakeDriver, num_slots: int) -> Iterator[Compiled]:
    """What keeps a cache of so many slots, of layers of 128 experts: few ids and many, a kernel each."""
    before, keys = len(chip.loaded), 48 * 128
    flat = [torch.zeros(size, dtype=torch.int32) for size in (keys, num_slots)]
    flat += [torch.zeros(size, dtype=torch.float64) for size in (2 * keys, 5, 1)]
    state = SlotState(
        flat[0], flat[1], flat[2].view(2, -1), flat[0], flat[3], flat[4], torch.zeros(48, 2, dtype=torch.int64)
    )
    scratch = Scratch(*(torch.zeros(shape, dtype=torch.int32) for shape in ((128,), (2, 128), (1,))))
    for layer, count in ((0, 1), (1, 16), (47, 1024)):
        route(torch.zeros(count, 8, dtype=torch.int64), layer, 128 * layer, 128, state, scratch)
        gather(scratch, min(128, 8 * count), flat[0].long(), torch.zeros(1, 4096, dtype=torch.uint8), 4096)
    for binary in chip.loaded[before:]:
        yield _examined(binary, f"lookup in {num_slots} slots", f"sm_{chip.target.arch}", "lookup", 1)


def launched_block(chip: FakeDriver, shape: Heads) -> Iterator[Compiled]:
    """What lies between a decoding layer's products, for one token and several: two or three kernels of each kind."""
    before = len(chip.loaded)
    weight, hidden = torch.zeros(shape.dim, dtype=shape.dtype), torch.zeros(64 * shape.heads, dtype=shape.dtype)
    turn = Turn(shape.heads, shape.kv_heads, shape.dim, shape.dim, weight, weight, 1e-6)
    for count in (1, 17):
        h, cos = hidden.repeat(count, 1), weight.repeat(count, 1)
        for add in (None, h):
            add_norm(h, add, hidden, 1e-6)
        q, k = weight.repeat(count, shape.heads), weight.repeat(count, shape.kv_heads)
        turned(q, k, cos, cos, turn)
        turned(q, k, cos, cos, turn._replace(q_norm=None, k_norm=None))
        add_norm(h, h, hidden, 1e-6, round_once=True)
        turned(q, k, cos, cos, turn._replace(round_once=True))
    for binary in chip.loaded[before:]:
        yield _examined(binary, shape.name.replace("attention", "block"), f"sm_{chip.target.arch}", "block", 1)


def _examined(binary: Binary, shape: str, arch: str, path: str, tokens: int) -> Compiled:
    registers, spills, in_loops = cubin_facts(binary.code)
    problem = f"{in_loops} spills inside a matrix loop" if in_loops else ""
    return Compiled(shape, arch, path, tokens, binary.name, registers, spills, in_loops, binary.shared_bytes, problem)


def _weights(shape: Shape) -> ExpertWeights:
    dtype = shape.dtype
    weights = weights_stored(shape.stored or "bf16", shape.hidden, shape.inter, shape.slots, dtype)
    first = second = None
    if shape.biased:
        first = torch.empty(shape.slots, 2 * shape.inter, dtype=dtype)
        second = torch.empty(shape.slots, shape.hidden, dtype=dtype)
    return weights._replace(gate_up_bias=first, down_bias=second, activation=shape.activation)


def show_launches(archs: Sequence[str], only: str, out: Path | None) -> int:
    """Prints a row a kernel; 1 if one did not compile or spills inside a matrix loop."""
    rows: list[Compiled] = []
    print("arch    layer                      path     T     kernel                      regs spills(loop) shared")
    start = time.perf_counter()
    for arch in archs:
        if not arch.startswith("sm_"):
            raise ValueError(f"the driver that launches nothing plays NVIDIA's chips, not {arch}")
        chip = FakeDriver(int(arch[3:])).install()
        heads = [shape for shape in HEADS if only in shape.name]
        runs = [of(chip, shape) for shape in heads for of in (launched_attention, launched_block)]
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        runs += [launched_latents(chip, dtype) for dtype in dtypes if only in f"latents {dtype}"]
        runs += [launched_lookup(chip, slots) for slots in (192, 3072) if only in f"lookup in {slots} slots"]
        runs += [launched(chip, shape) for shape in SHAPES if only in shape.name]
        for row in chain(launched_gate(chip), *runs):
            rows.append(row)
            print(
                f"{row.arch:7s} {row.shape:26s} {row.path:8s} {row.tokens:<5d} {row.kernel:28s}{row.registers:4d}"
                f" {row.spills:6d} ({row.spills_in_matrix_loops}) {row.shared_bytes:8d}  {row.problem or 'ok'}",
                flush=True,
            )
    failed = sum(bool(row.problem) for row in rows)
    print(f"{len(rows)} kernels, {failed} with problems, {time.perf_counter() - start:.0f} s")
    if out is not None:
        document = {"triton": triton.__version__, "torch": torch.__version__, "kernels": [asdict(row) for row in rows]}
        out.write_text(json.dumps(document, indent=1))
    return 1 if failed or not rows else 0
