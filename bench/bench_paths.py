"""What can be told of routing before a layer has run: from token ids alone (ExpertFlow's path predictor), or a profile.

A lookahead needs hidden states, so it says nothing of the first layer, and nothing of prompts that wait. Ways:

popular     how often the texts that were fitted chose an expert
profile     what the sequence chose so far, later tokens more, with popularity as a prior
token       how often this token id chose it, with popularity as a prior: a table [vocabulary, L, E]
encoder     causal convolutions over token ids, 15 tokens wide, one head of L x E, binary cross-entropy as in ExpertFlow
learned     the lookahead of the layer before, for comparison; not for the first layer

Decode: of the K experts that a token's layer takes, the share among the K (and 2K) likeliest. Queued prompts: a quarter
of each layer's experts, those likeliest for the whole prompt before it runs: the share of what its tokens then ask for.
Judged on windows that nothing was fitted to.

    python bench/bench_paths.py MODEL TEXTS [--windows 16] [--epochs 30]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from bench_lookahead import WINDOW, Seen, fitted, recall, texts, watch
from torch import Tensor, nn

from moe.config import EngineConfig, OffloadConfig
from moe.llm import LLM

PRIOR_TOKENS, DECAY, DOMAINS = 4.0, 0.95, ("stories", "plays", "maths", "code")


def hot(seen: Seen, num_experts: int) -> Tensor:
    """[T, L, E], 0 or 1."""
    rows = [torch.zeros(len(ids), num_experts).scatter_(1, ids, 1.0) for ids in seen.ids]
    return torch.stack(rows, dim=1)


class Encoder(nn.Module):
    """[B, N] token ids -> [B, N, L * E] logits; a place sees itself and 14 before."""

    def __init__(self, vocabulary: int, outputs: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=d) for d in (1, 2, 4))
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for layer in self.layers:
            before = (layer.kernel_size[0] - 1) * layer.dilation[0]
            x = x + nn.functional.gelu(layer(nn.functional.pad(x, (before, 0))))
        return self.head(x.transpose(1, 2))


def train(ids: Tensor, wanted: Tensor, vocabulary: int, epochs: int) -> Encoder:
    """ids: [W, N]; wanted: [W, N, L * E]."""
    torch.manual_seed(0)
    model = Encoder(vocabulary, wanted.shape[2])
    share = wanted.mean(dim=(0, 1)).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        model.head.bias.copy_(torch.log(share / (1 - share)))
    steps = epochs * -(-len(ids) // 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(ids)).split(8):
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids[part]), wanted[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def profile(rows: Tensor, popular: Tensor) -> Tensor:
    """rows: [N, L, E] of one window; what is said of each token by those before it."""
    said, counts, weight = [], torch.zeros_like(popular), 0.0
    for row in rows:
        said.append((counts + PRIOR_TOKENS * popular) / (weight + PRIOR_TOKENS))
        counts, weight = DECAY * counts + row, DECAY * weight + 1
    return torch.stack(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--windows", type=int, default=16, help="of each domain, to fit and to judge each")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, tuple[Seen, Seen]] = {}
    ids: dict[str, Tensor] = {}
    with LLM(args.model, EngineConfig(threads=1, offload=OffloadConfig(budget="1.0"))) as llm:
        for name, text in texts(args.texts).items():
            tokens = llm.encode(text[: 8 * 2 * args.windows * WINDOW])
            cut = [tokens[a : a + WINDOW] for a in range(0, len(tokens) - WINDOW, WINDOW)][: 2 * args.windows]
            parts[name], ids[name] = watch(llm, text, args.windows), torch.tensor(cut)
        learned = fitted(llm, [fit for fit, _ in parts.values()])
        vocabulary, sites = len(llm.tokenizer), llm.engine.blueprint.index.sites
    num_experts, num_layers, top_k = sites[0].num_experts, len(sites), parts["code"][0].ids[0].shape[1]
    half = {name: len(one) // 2 for name, one in ids.items()}
    fit_ids = torch.cat([ids[name][: half[name]] for name in parts])
    fit_rows = torch.cat([hot(fit, num_experts) for fit, _ in parts.values()])
    popular = fit_rows.mean(0)
    flat = fit_ids.flatten()
    seen = torch.zeros(vocabulary).index_add_(0, flat, torch.ones(len(flat)))
    table = PRIOR_TOKENS * popular + torch.zeros(vocabulary, num_layers, num_experts).index_add_(0, flat, fit_rows)
    table /= (seen + PRIOR_TOKENS)[:, None, None]
    began = time.process_time()
    wanted = fit_rows.view(*fit_ids.shape, -1)
    encoder = train(fit_ids, wanted, vocabulary, args.epochs).eval()
    seconds = time.process_time() - began
    nbytes = sum(p.numel() for p in encoder.parameters()) * 4
    print(f"{args.model.name}: {len(flat)} tokens fitted, {num_layers} layers of {num_experts} experts, top {top_k}; ")
    print(f"encoder of {nbytes / 2**20:.1f} MiB trained in {seconds:.0f} CPU seconds, {args.epochs} epochs\n")
    print("| judged on | layers | popular | profile | token | encoder | learned |\n" + "|---" * 7 + "|")
    results, prompts = [], []
    for name, (_, judged) in parts.items():
        rows = hot(judged, num_experts)
        own = ids[name][half[name] : half[name] + len(rows) // WINDOW]
        with torch.no_grad():
            by_encoder = encoder(own).sigmoid().view(len(rows), num_layers, num_experts)
        said = {
            "popular": popular.expand(len(rows), -1, -1),
            "profile": torch.cat([profile(one, popular) for one in rows.split(WINDOW)]),
            "token": table[own.flatten()],
            "encoder": by_encoder,
        }
        of_layer: dict[str, list[np.ndarray]] = {}
        for n in range(num_layers):
            for way, scores in said.items():
                of_layer.setdefault(way, []).append(recall(scores[:, n], judged.ids[n]))
            ahead = recall(learned.scores(n - 1, 1, judged.x[n - 1]), judged.ids[n]) if n else np.full(2, np.nan)
            of_layer.setdefault("learned", []).append(ahead)
        for which, group in (("first", [0]), ("second", [1]), ("others", list(range(2, num_layers)))):
            means = {way: np.mean([each[n] for n in group], axis=0) for way, each in of_layer.items()}
            results.append({"domain": name, "layers": which} | {way: mean.tolist() for way, mean in means.items()})
            cells = ["" if np.isnan(m[0]) else f"{m[0]:.1%} / {m[1]:.1%}" for m in means.values()]
            print(f"| {name} | {which} | " + " | ".join(cells) + " |", flush=True)
        quarter, covered = num_experts // 4, {}
        for way in ("popular", "token", "encoder"):
            found = []
            for window, expected in zip(rows.split(WINDOW), said[way].split(WINDOW)):
                first = expected.sum(0).topk(quarter).indices  # [L, quarter]
                found.append(float(window.sum(0).gather(1, first).sum() / window.sum()))
            covered[way] = float(np.mean(found))
        best = [float(w.sum(0).topk(quarter).values.sum() / w.sum()) for w in rows.split(WINDOW)]
        prompts.append({"domain": name} | covered | {"known": float(np.mean(best))})
    print("\nQueued prompts: what a quarter of each layer's experts, chosen before, covers of a prompt's choices\n")
    print("| judged on | popular | token | encoder | known afterwards |\n|---|---|---|---|---|")
    for row in prompts:
        print("| {domain} | {popular:.1%} | {token:.1%} | {encoder:.1%} | {known:.1%} |".format(**row))
    print(json.dumps({"decode": results, "prompts": prompts}))


if __name__ == "__main__":
    main()
