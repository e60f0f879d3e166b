"""A random Qwen3-MoE whose greedy decoding walks a known permutation of the vocabulary, by a wide margin.

Every engine and every dtype must then give the same tokens: equal work and a strict check, also for engines that share
no code. Routing follows a token's topic: skewed by a popularity term, correlated in time by topics, varied by tokens.

    python -m bench.walk_model FOLDER --layers 12 --experts 32 --hidden 1024 --width 512
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_TOPICS = 16
STAY = 24  # tokens that a walk stays in a topic
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class WalkModel:
    """Sizes, and how much of a router's logit is popularity, topic and token."""

    layers: int = 12
    experts: int = 32
    top_k: int = 4
    hidden: int = 1024
    width: int = 512
    vocab: int = 4096
    popularity: float = 0.0
    topic: float = 0.0
    token: float = 1.0
    dtype: str = "bfloat16"

    @property
    def expert_bytes(self) -> int:
        """All experts, as stored."""
        return self.layers * self.experts * 3 * self.hidden * self.width * getattr(torch, self.dtype).itemsize


# One that fits, one larger than memory with routing as skewed as real models'.
SMALL = WalkModel()
LARGE = WalkModel(experts=64, width=768, popularity=1.0, topic=1.0, token=0.7)
TINY = WalkModel(layers=2, experts=8, hidden=128, width=64, vocab=1024)


def walk_of(model: WalkModel, generator: torch.Generator) -> list[int]:
    """The tokens in the order of the walk: STAY of one topic, then of another, until all are used."""
    per = model.vocab // NUM_TOPICS
    pools = [torch.randperm(per, generator=generator).tolist() for _ in range(NUM_TOPICS)]
    order: list[int] = []
    last = -1
    while any(pools):
        left = [i for i, pool in enumerate(pools) if pool and i != last] or [i for i, pool in enumerate(pools) if pool]
        topic = left[int(torch.randint(len(left), (1,), generator=generator))]
        order += [topic * per + pools[topic].pop() for _ in range(min(STAY, len(pools[topic])))]
        last = topic
    return order


def prompts_of(folder: Path, num: int, length: int, seed: int) -> list[list[int]]:
    order = json.loads((folder / "walk.json").read_text())["order"]
    return [[order[(seed * 997 + i * 811 + j) % len(order)] for j in range(length)] for i in range(num)]


def answers_to(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    order = json.loads((folder / "walk.json").read_text())["order"]
    place = {token: i for i, token in enumerate(order)}
    return [[order[(place[p[-1]] + 1 + j) % len(order)] for j in range(new)] for p in prompts]


def write(folder: Path, model: WalkModel) -> Path:
    """The checkpoint in Hugging Face's form; nothing if it is there."""
    if (folder / "walk.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(model), indent=1))
    (folder / "generation_config.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    order = walk_of(model, generator)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _tensors(model, order, generator):
        if size > SHARD_BYTES:
            _flush(folder, shards)
            size = 0
        shards[-1][name] = tensor.to(getattr(torch, model.dtype)).contiguous()
        size += shards[-1][name].nbytes
    _flush(folder, shards)
    files = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: file.name for names, file in zip(shards[:-1], files) for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "walk.json").write_text(json.dumps({"order": order, "model": asdict(model)}))
    return folder


def _flush(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    """Writes the last shard and keeps its names alone."""
    save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))
    shards.append({})


def _config(model: WalkModel) -> dict[str, object]:
    heads = max(model.hidden // 64, 1)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.width * model.top_k,
        "moe_intermediate_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "head_dim": 64,
        "num_experts": model.experts,
        "num_experts_per_tok": model.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "torch_dtype": model.dtype,
        "use_sliding_window": False,
    }


def _tensors(model: WalkModel, order: Sequence[int], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    hidden, per, heads = model.hidden, model.vocab // NUM_TOPICS, max(model.hidden // 64, 1)
    kv_heads = max(heads // 4, 1)
    noise = torch.randn((1 << 22) + 65537, generator=generator) * 0.02
    drawn = 0

    def random(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        nonlocal drawn
        drawn += 1
        part = noise[drawn * 7919 % 65537 :]
        flat = part.repeat(-(-rows * columns // len(part)))[: rows * columns]
        return (flat * scale).view(rows, columns)

    # One constant direction and one per topic, orthonormal; embeddings hold both, the head sees neither.
    axes = torch.linalg.qr(torch.randn(hidden, NUM_TOPICS + 1, generator=generator))[0].T
    embedding = torch.randn(model.vocab, hidden, generator=generator)
    embedding -= (embedding @ axes.T) @ axes
    following = torch.arange(model.vocab)
    following[torch.tensor(order)] = torch.tensor(order).roll(-1)
    head = torch.empty_like(embedding)
    head[following] = embedding / hidden**0.5
    topics = (torch.arange(model.vocab) // per).clamp(max=NUM_TOPICS - 1)
    embedding = embedding + 0.5 * hidden**0.5 * (axes[0] + axes[1:][topics])
    yield "model.embed_tokens.weight", embedding
    yield "lm_head.weight", head
    yield "model.norm.weight", torch.ones(hidden)
    for layer in range(model.layers):
        at = f"model.layers.{layer}."
        for norm, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
            yield f"{at}{norm}.weight", torch.ones(size)
        for norm in ("q_norm", "k_norm"):
            yield f"{at}self_attn.{norm}.weight", torch.ones(64)
        yield f"{at}self_attn.q_proj.weight", random(heads * 64, hidden)
        yield f"{at}self_attn.k_proj.weight", random(kv_heads * 64, hidden)
        yield f"{at}self_attn.v_proj.weight", random(kv_heads * 64, hidden)
        yield f"{at}self_attn.o_proj.weight", random(hidden, heads * 64, scale=0.4)
        router = torch.randn(model.experts, hidden, generator=generator)
        router = model.token * (router - (router @ axes.T) @ axes) / hidden**0.5
        popular = torch.randn(model.experts, 1, generator=generator) * axes[0]
        liked = torch.randn(model.experts, NUM_TOPICS, generator=generator) @ axes[1:]
        yield f"{at}mlp.gate.weight", router + (model.popularity * popular + model.topic * liked) * (2 / hidden**0.5)
        for expert in range(model.experts):
            one = f"{at}mlp.experts.{expert}."
            yield f"{one}gate_proj.weight", random(model.width, hidden)
            yield f"{one}up_proj.weight", random(model.width, hidden)
            yield f"{one}down_proj.weight", random(hidden, model.width, scale=0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in asdict(WalkModel()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    print(write(args.pop("folder"), WalkModel(**args)))


if __name__ == "__main__":
    main()
