"""Train a small Mixture-of-Experts language model on a folder of texts, on a CPU.

    python examples/train_tiny_moe.py TEXTS OUT --steps 1600

TEXTS holds one file or folder per domain: `.txt`, `.md` and `.py` files are one document each, every line of a
`.jsonl` file is one (its field `text`, or all its strings). OUT becomes a Hugging Face folder in Mixtral format with a
byte-level BPE tokenizer and a model card, and keeps `checkpoint.safetensors`: run the same command again after a stop
and it goes on from there, step for step as if it had not stopped. About 2,700 tokens/s on one core at the default
sizes, where transformers' own training step is several times slower.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_moe_model import (
    SEPARATOR,
    Shape,
    TinyMoE,
    balance_loss,
    grown,
    load_hugging_face,
    read_shape,
    save_hugging_face,
)
from tiny_moe_text import Encoded, draw_batch, encode, read_domains, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One training run. When it is resumed, only `out` and the last four may differ."""

    texts: Path
    out: Path
    shape: Shape = field(default_factory=Shape)
    start_from: Path | None = None
    steps: int = 1600
    batch_size: int = 12
    accumulate: int = 1
    sequence_length: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    seed: int = 0
    dtype: str = "bfloat16"
    eval_every: int = 200
    save_every: int = 200
    stop_at: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise ValueError("steps, batch_size and accumulate must be at least 1")
        if not 1 <= self.sequence_length <= self.shape.max_positions:
            raise ValueError(f"sequence_length ({self.sequence_length}) must be 1 to {self.shape.max_positions}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, not {self.dtype}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.sequence_length

    def fingerprint(self) -> str:
        """Everything that a resumed run must share with the run that it goes on with."""
        free = ("out", "eval_every", "save_every", "stop_at", "dtype")
        return json.dumps({k: v for k, v in asdict(self).items() if k not in free}, default=str, sort_keys=True)


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


class Score(NamedTuple):
    """How one domain's held-out text fares: loss per token, and entropy of expert usage / log(E), mean over layers."""

    loss: float
    usage_entropy: float


@torch.no_grad()
def evaluate(model: TinyMoE, ids: Tensor, length: int, max_windows: int = 48) -> Score:
    """Score the first windows of `ids` ([tokens], more than `length`)."""
    count = min(max_windows, (len(ids) - 1) // length)
    losses, usage = [], torch.zeros(model.shape.num_layers, model.shape.num_experts)
    for i in range(count):
        window = ids[i * length : (i + 1) * length + 1].unsqueeze(0)
        logits, routing = model(window[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()))
        for layer, routed in enumerate(routing):
            usage[layer] += torch.bincount(routed.topk_ids.flatten(), minlength=model.shape.num_experts)
    share = usage / usage.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(dim=1).mean() / math.log(max(2, model.shape.num_experts))
    return Score(float(torch.stack(losses).mean()), float(entropy))


def save_checkpoint(file: Path, model: TinyMoE, optimizer: torch.optim.Optimizer, step: int, fingerprint: str) -> None:
    """Weights and AdamW's moments in one safetensors file, replaced in one move."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight/{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value
    half_written = file.with_suffix(".part")
    save_file(tensors, half_written, metadata={"step": str(step), "settings": fingerprint})
    os.replace(half_written, file)


def load_checkpoint(file: Path, model: TinyMoE, optimizer: torch.optim.Optimizer, fingerprint: str) -> int:
    """Put the run's state back and return the step to go on with."""
    with safe_open(file, "pt") as stored, torch.no_grad():
        metadata = stored.metadata()
        if metadata["settings"] != fingerprint:
            raise ValueError(
                f"{file} is of a run with other settings ({metadata['settings']}); use them or a new folder"
            )
        names = set(stored.keys())
        for name, p in model.named_parameters():
            p.copy_(stored.get_tensor(f"weight/{name}"))
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in names]
            optimizer.state[p] = {k: stored.get_tensor(f"{k}/{name}") for k in keys}
    return int(metadata["step"])


def build(settings: Settings, domains: dict[str, str]) -> tuple[Tokenizer, TinyMoE]:
    """A fresh model and tokenizer, or those to start from; a run that is resumed keeps the tokenizer it has."""
    if settings.start_from is not None:
        model = load_hugging_face(settings.start_from)
        if model.shape != settings.shape:
            model = grown(model, settings.shape, settings.seed)
        return Tokenizer.from_file(str(settings.start_from / "tokenizer.json")), model
    model = TinyMoE(settings.shape)
    model.initialise(settings.seed)
    if (settings.out / "checkpoint.safetensors").exists():
        return Tokenizer.from_file(str(settings.out / "tokenizer.json")), model
    return train_tokenizer(domains, settings.shape.vocab_size), model


def train_step(
    model: TinyMoE, optimizer: torch.optim.Optimizer, data: dict[str, Encoded], step: int, settings: Settings
) -> float:
    """One update from `accumulate` batches; returns their mean loss per token."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, settings)
    total = 0.0
    for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
        batch = draw_batch(data, number, size=settings.batch_size, length=settings.sequence_length, seed=settings.seed)
        logits, routing = model(batch[:, :-1])
        text_loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = text_loss + settings.balance_weight * balance_loss(routing)
        torch.autograd.backward(loss / settings.accumulate)
        total += text_loss.item() / settings.accumulate
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(settings: Settings) -> dict[str, Score]:
    """Train or go on training and write the model; returns every domain's score."""
    domains = read_domains(settings.texts)
    tokenizer, model = build(settings, domains)
    data = encode(domains, tokenizer, settings.sequence_length)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint = settings.out / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer, settings.fingerprint()) if checkpoint.exists() else 0
    last = settings.steps if settings.stop_at is None else min(settings.steps, settings.stop_at)
    tokenizer.save(str(settings.out / "tokenizer.json"))
    print(f"domains: {', '.join(f'{name} {len(ids.train):,} tokens' for name, ids in data.items())}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, step {first} of {settings.steps}", flush=True)

    def scores() -> dict[str, Score]:
        return {name: evaluate(model, ids.held_out, settings.sequence_length) for name, ids in data.items()}

    started, report = time.monotonic(), scores() if first >= last else {}
    for done in range(first + 1, last + 1):
        loss = train_step(model, optimizer, data, done - 1, settings)
        if done % 20 == 0 or done == last:
            speed = (done - first) * settings.tokens_per_step / (time.monotonic() - started)
            print(f"step {done}: loss {loss:.3f}, {speed:,.0f} tokens/s", flush=True)
        if done % settings.eval_every == 0 or done == last:
            report = scores()
            for name, score in report.items():
                print(f"  {name}: held-out loss {score.loss:.3f}, usage entropy {score.usage_entropy:.3f}", flush=True)
        if done % settings.save_every == 0 or done == last:
            save_checkpoint(checkpoint, model, optimizer, done, settings.fingerprint())
    save_hugging_face(model, settings.out, getattr(torch, settings.dtype))
    write_card(settings, data, report, max(first, last))
    return report


def write_card(settings: Settings, data: dict[str, Encoded], report: dict[str, Score], steps: int) -> None:
    """The tokenizer's configuration and a model card to complete: what the script cannot know is marked so."""
    shape = settings.shape
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
    }
    (settings.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    rows = "\n".join(
        f"| {name} | {len(data[name].train):,} | {score.loss:.3f} | {score.usage_entropy:.3f} |"
        for name, score in report.items()
    )
    begin = f", beginning from {settings.start_from.name}" if settings.start_from is not None else ""
    (settings.out / "README.md").write_text(
        f"# {settings.out.name}: a small Mixture-of-Experts language model\n\n"
        f"Mixtral format: {shape.num_layers} layers of {shape.num_experts} experts, top-{shape.top_k}, width "
        f"{shape.hidden_size}, expert width {shape.expert_size}, vocabulary {shape.vocab_size}. Trained on "
        f"{steps * settings.tokens_per_step:,} tokens{begin}, sequences of {settings.sequence_length}.\n\n"
        f"| domain | training tokens | held-out loss per token | usage entropy / log({shape.num_experts}) |\n"
        f"|---|---|---|---|\n{rows}\n\n"
        "Sources of the texts and their licences: (to be named by whoever publishes this)\n\n"
        "Licence of the weights: (to be chosen)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Mixture-of-Experts model on a folder of texts.")
    parser.add_argument("texts", type=Path, help="a folder with one file or folder of texts per domain")
    parser.add_argument("out", type=Path, help="the folder to write; holds a checkpoint to go on from")
    parser.add_argument(
        "--start-from",
        type=Path,
        help="a folder written by this script: train its model further, or a larger one that begins from it "
        "(--num-layers, --num-experts, --expert-size)",
    )
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on another time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    for record in (Settings, Shape):
        for f in fields(record):
            if isinstance(f.default, int | float | str):
                option = "--" + f.name.replace("_", "-")
                parser.add_argument(option, type=type(f.default), default=argparse.SUPPRESS, help=f"({f.default})")
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    sizes = {f.name: given.pop(f.name) for f in fields(Shape) if f.name in given}
    try:
        shape = Shape() if given["start_from"] is None else read_shape(given["start_from"])
        train(Settings(shape=replace(shape, **sizes), **given))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
