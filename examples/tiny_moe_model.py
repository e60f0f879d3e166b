"""A Mixtral-equivalent model in plain torch that trains fast on a CPU, and its Hugging Face format.

Tokens are sorted by expert and every expert runs one GEMM over its rows, so the cost follows the experts that are
used. The same weights give the same logits in `transformers.MixtralForCausalLM` (a test holds it to 1e-5 in fp32).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SEPARATOR = "<|doc|>"  # token 0: stands between documents, begins and ends a text


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of one model."""

    vocab_size: int = 2048
    hidden_size: int = 192
    expert_size: int = 128
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 3
    head_size: int = 32
    num_experts: int = 16
    top_k: int = 2
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")


class Routed(NamedTuple):
    """What one layer's router decided: probs [T, E] in fp32, topk_ids [T, K]."""

    probs: Tensor
    topk_ids: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions in the rotate-half layout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*x.shape[:2], -1, self.shape.head_size).transpose(1, 2)  # [B, heads, N, D]

        q, k = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, heads(self.v_proj(x)), is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, heads, N, D]; cos, sin: [N, D/2]. Turn the pair (d, d + D/2) by position times frequency d."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Experts(nn.Module):
    """Top-k routed SwiGLU experts: softmax over all, take k, renormalise (Mixtral, Jiang et al. 2024, section 2.1)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(shape.num_experts, 2 * shape.expert_size, shape.hidden_size))
        self.down = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size, shape.expert_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        """x: [T, H] → [T, H] and the routing. One host sync: the rows per expert are needed to split."""
        probs = F.softmax(self.router(x).float(), dim=-1)  # [T, E]
        topk_weights, topk_ids = probs.topk(self.top_k, dim=-1)  # [T, K]
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)

        order = topk_ids.flatten().argsort(stable=True)  # row → (token, choice)
        counts = torch.bincount(topk_ids.flatten(), minlength=self.router.out_features).tolist()
        rows = torch.split(x.index_select(0, order // self.top_k), counts)
        outs = []
        # unbind, not [e]: its gradient is one stack instead of a zero-filled slab per expert
        for r, gate_up, down in zip(rows, self.gate_up.unbind(), self.down.unbind(), strict=True):
            gate, up = F.linear(r, gate_up).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, down))
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y = torch.cat(outs).index_select(0, back).view(*topk_ids.shape, x.shape[1])  # [T, K, H]
        return (y * topk_weights.to(y.dtype).unsqueeze(-1)).sum(dim=1), Routed(probs, topk_ids)


class Layer(nn.Module):
    """Pre-norm attention and experts, each added to the residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.attention = Attention(shape)
        self.experts_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routed]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, routed = self.experts(self.experts_norm(x).flatten(0, 1))
        return x + y.view_as(x), routed


class TinyMoE(nn.Module):
    """The whole language model; input and output embeddings are one tensor."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2).float() / shape.head_size)
        angle = torch.arange(shape.max_positions).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, list[Routed]]:
        """token_ids: [B, N] → logits [B, N, vocabulary], and each layer's routing of the B*N tokens."""
        n = token_ids.shape[1]
        if n > self.shape.max_positions:
            raise ValueError(f"{n} tokens are more than max_positions ({self.shape.max_positions})")
        x, routing = self.embed(token_ids), []
        for layer in self.layers:
            x, routed = layer(x, self.cos[:n], self.sin[:n])
            routing.append(routed)
        return F.linear(self.norm(x), self.embed.weight), routing

    def initialise(self, seed: int) -> None:
        """Normal of 0.02; the projections that write into the residual are scaled by 1 / sqrt(2 L) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_residual = name.endswith(("o_proj.weight", "experts.down"))
                std = 0.02 / math.sqrt(2 * self.shape.num_layers) if into_residual else 0.02
                nn.init.normal_(p, std=std, generator=generator)


def balance_loss(routing: list[Routed]) -> Tensor:
    """E times the dot product of each expert's share of choices and mean probability, mean over the layers.

    At least K, and K when the load is even (Switch Transformers, section 2.2, with K choices per token).
    """
    total = torch.zeros(())
    for probs, topk_ids in routing:
        num_experts = probs.shape[1]
        share = torch.bincount(topk_ids.flatten(), minlength=num_experts) / probs.shape[0]
        total = total + num_experts * (share * probs.mean(dim=0)).sum()
    return total / len(routing)


def hugging_face_names(shape: Shape) -> Iterator[tuple[str, str, tuple[int, slice] | None]]:
    """Every stored tensor: its Mixtral name, our parameter, and (expert, rows) where it is a part of ours."""
    yield "model.embed_tokens.weight", "embed.weight", None
    yield "model.norm.weight", "norm.weight", None
    for i in range(shape.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", None
        yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.experts_norm.weight", None
        yield f"{theirs}.block_sparse_moe.gate.weight", f"{ours}.experts.router.weight", None
        for part in "qkvo":
            yield f"{theirs}.self_attn.{part}_proj.weight", f"{ours}.attention.{part}_proj.weight", None
        size = shape.expert_size
        for e in range(shape.num_experts):
            expert = f"{theirs}.block_sparse_moe.experts.{e}"
            yield f"{expert}.w1.weight", f"{ours}.experts.gate_up", (e, slice(0, size))
            yield f"{expert}.w3.weight", f"{ours}.experts.gate_up", (e, slice(size, 2 * size))
            yield f"{expert}.w2.weight", f"{ours}.experts.down", (e, slice(None))


def save_hugging_face(model: TinyMoE, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` as MixtralForCausalLM reads them."""
    shape, params = model.shape, dict(model.named_parameters())
    tensors = {}
    for theirs, ours, part in hugging_face_names(shape):
        tensor = params[ours].detach()
        tensors[theirs] = (tensor if part is None else tensor[part]).to(dtype, copy=True).contiguous()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "bos_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 0,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.expert_size,
        "max_position_embeddings": shape.max_positions,
        "model_type": "mixtral",
        "num_attention_heads": shape.num_heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "num_local_experts": shape.num_experts,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": shape.vocab_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text('{\n  "bos_token_id": 0,\n  "eos_token_id": 0\n}\n')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_shape(folder: Path) -> Shape:
    """The sizes in `config.json`; ValueError for another architecture."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "mixtral" or not config.get("tie_word_embeddings"):
        raise ValueError(
            f"{folder} is not a Mixtral model with tied embeddings; this script writes and reads only those"
        )
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        expert_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )


def load_hugging_face(folder: Path) -> TinyMoE:
    """Read in fp32 what `save_hugging_face` wrote."""
    model = TinyMoE(read_shape(folder))
    params = dict(model.named_parameters())
    with safe_open(folder / "model.safetensors", "pt") as file, torch.no_grad():
        for theirs, ours, part in hugging_face_names(model.shape):
            target = params[ours] if part is None else params[ours][part]
            target.copy_(file.get_tensor(theirs))
    return model


@torch.no_grad()
def grown(model: TinyMoE, shape: Shape, seed: int) -> TinyMoE:
    """A model of more layers, experts or expert width that begins from what `model` has learnt.

    Layers are repeated, each of n copies with an n-th of its output; experts too, told apart by noise of a fifth of
    their router's row; what an expert is wider by is new and adds nothing yet. Raises ValueError where another size
    differs, or one becomes smaller.
    """
    old = model.shape
    larger = ("num_layers", "num_experts", "expert_size")
    for name, size in asdict(shape).items():
        had = asdict(old)[name]
        if (size < had) if name in larger else (size != had):
            can = "only grow" if name in larger else "not change"
            raise ValueError(f"{name} can {can} from the model to start from: it has {had}, not {size}")
    generator = torch.Generator().manual_seed(seed)
    new = TinyMoE(shape)
    new.initialise(seed)
    new.embed.load_state_dict(model.embed.state_dict())
    new.norm.load_state_dict(model.norm.state_dict())
    sources = [i * old.num_layers // shape.num_layers for i in range(shape.num_layers)]
    experts = torch.arange(shape.num_experts) % old.num_experts
    for layer, source in zip(new.layers, sources):
        of, share = model.layers[source], 1 / sources.count(source)
        layer.attention_norm.load_state_dict(of.attention_norm.state_dict())
        layer.experts_norm.load_state_dict(of.experts_norm.state_dict())
        layer.attention.load_state_dict(of.attention.state_dict())
        layer.attention.o_proj.weight.mul_(share)
        rows = of.experts.router.weight[experts]
        noise = torch.randn(rows.shape, generator=generator) * rows.norm(dim=1, keepdim=True) / old.hidden_size**0.5
        noise[: old.num_experts] = 0.0
        layer.experts.router.weight.copy_(rows + 0.2 * noise)
        into = layer.experts.gate_up.view(shape.num_experts, 2, shape.expert_size, -1)
        into[:, :, : old.expert_size] = of.experts.gate_up.view(old.num_experts, 2, old.expert_size, -1)[experts]
        layer.experts.down.zero_()
        layer.experts.down[:, :, : old.expert_size] = of.experts.down[experts] * share
    return new
