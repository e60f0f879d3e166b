"""What the GPU session computes: layers of known models, routings of tokens, and everything that can run them.

Limits of a row: weights of the active experts over 4.3 TB/s for few tokens, 790 TFLOP/s bf16 for many (measured rates
of an H200); "floor" is the larger of the two. The session also measures both rates itself (phase machine).
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_measure import Run
from bench.two_launch import two_launch
from moe.comm.symmetric import VirtualHeap
from moe.kernels.bf12 import encode_bf12, most_rare
from moe.kernels.combine import combine
from moe.kernels.formats import Coding
from moe.kernels.fused import FusedExperts
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.quantize import quantize_experts
from moe.kernels.reference import dequantized
from moe.kernels.tiles import TileConfig, device_capability
from moe.kernels.weights import Activation, ExpertWeights

BANDWIDTH, MATRIX_RATE = 4.3e12, 790e12
PUBLISHED = Path(__file__).parent / "data" / "h200_fused_moe.csv"
GPT_OSS = Activation(kind="gpt_oss", interleaved=True, alpha=1.702, limit=7.0)
PLAIN = Activation()
UNGATED = Activation(kind="gelu", gated=False)


@dataclass(frozen=True)
class Layer:
    """experts: resident here. of: experts that tokens choose among; ids of the others are -1 (one rank's share).

    slots: of the slab, of which the layer's experts take some, spread over all; None: as many as experts.
    """

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    of: int
    activation: Activation = PLAIN
    biased: bool = False
    slots: int | None = None


QWEN = Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, 128)
MIXTRAL = Layer("Mixtral-8x7B", 4096, 14336, 8, 2, 8)
LAYERS = (
    QWEN,
    Layer("OLMoE", 2048, 1024, 64, 8, 64),
    MIXTRAL,
    Layer("DeepSeek-V3 1/8", 7168, 2048, 32, 8, 256),
)
ODD = Layer("odd", 37, 19, 5, 3, 7)
GPT = Layer("gpt-oss-20b", 2880, 2880, 32, 4, 32, GPT_OSS, biased=True)
FLASH = Layer("FlashMoE's shape", 2048, 2048, 32, 2, 32, UNGATED)
TINY = (Layer("tiny", 32, 16, 4, 2, 4), Layer("tiny 1/2", 32, 16, 4, 2, 8))
TINY_GPT = Layer("tiny gpt-oss", 32, 16, 4, 2, 4, GPT_OSS, biased=True)
TINY_SLAB = Layer("tiny slab", 32, 16, 4, 2, 4, slots=40)


class Case:
    """A layer with weights, and routings of T tokens."""

    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
        self.layer, self.device, self.dtype = layer, device, dtype
        act, slots = layer.activation, layer.slots or layer.experts
        width = layer.inter * (2 if act.gated else 1)
        gate_up = torch.empty(slots, width, layer.hidden, dtype=dtype, device=device)
        down = torch.empty(slots, layer.hidden, layer.inter, dtype=dtype, device=device)
        gate_up.normal_(std=layer.hidden**-0.5)
        down.normal_(std=layer.inter**-0.5)
        biases = [
            torch.randn(slots, n, device=device).to(dtype) if layer.biased else None for n in (width, layer.hidden)
        ]
        self.weights = ExpertWeights(gate_up, down, *biases, act)
        self.slots = (torch.arange(layer.experts, device=device) * (slots // layer.experts)).to(torch.int32)

    def stored(self) -> dict[str, ExpertWeights]:
        """The same experts in 8 bits, as far as this chip widens them; the first four of them, in turn, in bf12."""
        chip = device_capability(self.device)
        kinds: tuple[Literal["fp8", "int8"], ...] = ("fp8", "int8") if chip == 0 or chip >= 89 else ("int8",)
        return {kind: quantize_experts(self.weights, kind) for kind in kinds} | {"bf12": in_12_bits(self.weights)}

    def inputs(self, tokens: int, routing: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, slot ids and weights. routing: "balanced", "power_law" (popularity of expert r is r ** -1.2) or "one"."""
        layer, generator = self.layer, torch.Generator(self.device).manual_seed(seed)
        scores = torch.rand(tokens, layer.of, generator=generator, device=self.device)
        if routing == "power_law":  # Gumbel top-k: without replacement, in proportion to the popularity
            rank = torch.arange(1, layer.of + 1, device=self.device)
            scores = -1.2 * rank.log() - (-scores.clamp(1e-9, 1 - 1e-6).log()).log()
        elif routing == "one":
            scores[:, 0] += 1
        ids = scores.topk(layer.top_k, dim=-1).indices
        ids = torch.where(ids < layer.experts, self.slots[ids.clamp(max=layer.experts - 1)], -1)
        x = torch.randn(tokens, layer.hidden, generator=generator, device=self.device).to(self.dtype)
        topk_weights = torch.softmax(torch.randn(ids.shape, generator=generator, device=self.device), -1)
        return x, ids, topk_weights

    def limits(self, ids: Tensor) -> tuple[float, float, float]:
        """FLOPs, bytes, and the floor in microseconds. Host sync."""
        layer = self.layer
        rows, active = int((ids >= 0).sum()), int(ids[ids >= 0].unique().numel())
        matrices = 3 if layer.activation.gated else 2
        flops = 2.0 * matrices * layer.hidden * layer.inter * rows
        itemsize = self.dtype.itemsize
        nbytes = float(matrices * layer.hidden * layer.inter * itemsize * active + 4 * rows * layer.hidden * itemsize)
        return flops, nbytes, max(flops / MATRIX_RATE, nbytes / BANDWIDTH) * 1e6


def in_12_bits(weights: ExpertWeights, number: int = 4) -> ExpertWeights:
    """In slot i expert i % number, which is enough to tell slots apart; encoding all would take a minute."""
    made: list[Tensor] = []
    for stored, parts in ((weights.gate_up, 2 if weights.activation.gated else 1), (weights.down, 1)):
        few = [w.bfloat16().cpu() for w in stored[:number]]
        rare = max(map(most_rare, few))
        codes, words = zip(*(encode_bf12(w, rare) for w in few))
        each = torch.arange(len(stored)) % len(few)
        made += [torch.stack(codes)[each], torch.stack(words)[each].unflatten(1, (parts, -1))]
    first, first_words, second, second_words = (t.to(weights.down.device) for t in made)
    codings = (Coding("bf12", (1, 1 << 30), words) for words in (first_words, second_words))
    return ExpertWeights(first, second, None, None, weights.activation, *codings)


def grouped(case: Case, weights: ExpertWeights | None = None, config: TileConfig | None = None) -> Run:
    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        own = case.weights if weights is None else weights
        y = grouped_experts(x, ids, own, num_experts=case.layer.experts, config=config)
        return combine(y, w, x.dtype)

    return run


def usual_tile(case: Case) -> Run:
    return lambda x, ids, w: two_launch(x, ids, w, case.weights, case.layer.experts)


def grouped_mm(case: Case) -> Run:
    """What torch offers without a loop: sort, a grouped product twice, undo the sort, weighted sum. Slots = experts."""
    product: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm
    gate_up, down = case.weights.gate_up, case.weights.down

    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = torch.where(ids >= 0, ids, case.layer.experts).flatten()
        sorted_ids, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(sorted_ids, case.slots, right=True, out_int32=True)
        h = product(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends)
        h = F.silu(h[:, : case.layer.inter]) * h[:, case.layer.inter :] if case.layer.activation.gated else F.gelu(h)
        y = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
        y[order] = product(h, down.transpose(1, 2), offs=ends)
        y = torch.where((ids >= 0)[..., None], y.view(*ids.shape, -1), 0)
        return (y.float() * w[..., None]).sum(1).to(x.dtype)

    return run


def loop(case: Case) -> Run:
    """The loop over experts that model code contains; it syncs for every expert."""

    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(case.layer.experts):
            token, k = torch.where(ids == expert)
            if len(token):
                h = F.linear(x[token], case.weights.gate_up[expert])
                inter = case.layer.inter
                h = F.silu(h[:, :inter]) * h[:, inter:] if case.layer.activation.gated else F.gelu(h)
                y = F.linear(h, case.weights.down[expert])
                out.index_add_(0, token, y.float() * w[token, k, None])
        return out.to(x.dtype)

    return run


class Single:
    """The single launch; over virtual ranks rank r plays tokens [r * T, (r + 1) * T)."""

    def __init__(
        self,
        case: Case,
        world_size: int,
        max_tokens: int,
        *,
        config: TileConfig | None = None,
        programs: int | None = None,
        poll_limit: int | None = None,
        weights: ExpertWeights | None = None,
    ) -> None:
        layer = case.layer
        self.weights, self.world_size = case.weights if weights is None else weights, world_size
        shape = FusedShape(
            world_size=world_size,
            num_experts=layer.experts,
            top_k=layer.top_k,
            hidden_size=layer.hidden,
            intermediate_size=layer.inter,
            max_tokens=max(1, max_tokens),
            dtype=case.dtype,
        )
        self.heap = VirtualHeap(world_size, HeapLayout.of(shape).nbytes, case.device)
        options = {"config": config, "programs": programs, "poll_limit": poll_limit}
        self.fused = FusedExperts(shape, self.heap.bases, num_ranks=world_size, **options)  # type: ignore[arg-type]
        self.slots = case.slots.view(world_size, -1)

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        if self.world_size == 1:
            return self.fused.run_slots(x, ids, w, self.weights)
        x, ids, w = (t.view(self.world_size, -1, t.shape[-1]) for t in (x, ids, w))
        return self.fused(x, ids, w, self.slots, self.weights).flatten(0, 1)


def candidates(case: Case, tokens: int) -> dict[str, Callable[[], Run]]:
    """What can run this many tokens, made when called: a failure is then of one of them."""
    made: dict[str, Callable[[], Run]] = {
        "grouped": partial(grouped, case),
        "usual tile": partial(usual_tile, case),
        "torch grouped_mm": partial(grouped_mm, case),
    }
    if tokens <= 1024:
        made["single"] = partial(Single, case, 1, tokens)
    return made


def exactly(weights: ExpertWeights, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Σ_k w·expert(x) [T, H] in fp64 without any rounding between. Written apart from the kernels' specification."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    act = weights.activation
    for slot in ids[ids >= 0].unique().tolist():
        token, k = torch.where(ids == slot)
        first, second = (t.double() for t in dequantized(weights, slot))
        h = x[token].double() @ first.T
        if weights.gate_up_bias is not None:
            h = h + weights.gate_up_bias[slot].double()
        if act.gated:
            gate, up = (h[:, ::2], h[:, 1::2]) if act.interleaved else h.chunk(2, dim=-1)
            if act.kind == "gpt_oss":
                gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
                h = (up + 1) * gate * torch.sigmoid(act.alpha * gate)
            else:
                h = gate * torch.sigmoid(gate) * up
        else:
            h = F.gelu(h)
        y = h @ second.T
        if weights.down_bias is not None:
            y = y + weights.down_bias[slot].double()
        out.index_add_(0, token, y * w[token, k, None].double())
    return out


def error_of(weights: ExpertWeights, out: Tensor, x: Tensor, ids: Tensor, w: Tensor) -> float:
    want = exactly(weights, x, ids, w)
    return float((out.double() - want).norm() / want.norm().clamp(min=1e-30))


def published(layer: Layer) -> Iterator[tuple[int, str, float]]:
    """(tokens, distribution, microseconds) of vLLM's fused MoE for a layer on one H200, where the table has it."""
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    for row in csv.DictReader(lines):
        if row["layer"] == layer.name:
            yield int(row["tokens"]), row["distribution"], float(row["us"])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
