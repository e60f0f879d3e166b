"""Does distilling pre-gates better the closed form? Pre-gated MoE trains its gates; here they begin where ridge ends.

Every gate of one layer ahead, W [H + 1, E], is trained on the texts that it was fitted to, by the Kullback-Leibler
divergence from the router's softmax to the gate's (moe/layer/distil.py). Judged on windows that nothing was fitted to:
of the K experts that the router takes, the share among the gate's first K and 2K; the divergence; and the model's own
loss when it routes by the gates (`replace`) or among their best K (`restrict`).

    python bench/bench_distill.py MODEL TEXTS [--windows 8] [--steps 100 300 1000]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_lookahead import WINDOW, Seen, fitted, recall, texts, watch
from torch import Tensor

from moe.config import EngineConfig, OffloadConfig, RoutingConfig
from moe.evaluate import evaluate
from moe.layer.distil import RATE, ROWS, distilled
from moe.layer.ridge import Forecast
from moe.layer.routers import plain_routers
from moe.llm import LLM


def joined(parts: list[Seen]) -> Seen:
    return Seen(*([torch.cat(layer) for layer in zip(*each)] for each in zip(*parts)))


def judge(forecast: Forecast, seen: Seen, target: list[Tensor]) -> tuple[float, float, float]:
    """Means over layers: recall among K, among 2K, divergence."""
    rows = []
    for n in range(len(seen.x) - 1):
        scores = forecast.scores(n, 1, seen.x[n])
        lost = torch.nn.functional.kl_div(scores.log_softmax(1), target[n + 1], reduction="batchmean", log_target=True)
        rows.append([*recall(scores, seen.ids[n + 1]), float(lost)])
    return tuple(np.mean(rows, axis=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="of each domain, to fit and to judge each")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = EngineConfig(threads=1, offload=OffloadConfig(budget="1.0"))
    with LLM(args.model, plain) as llm:
        parts = [watch(llm, text, args.windows) for text in texts(args.texts).values()]
        fit, seen = joined([one for one, _ in parts]), joined([one for _, one in parts])
        closed = fitted(llm, [fit])
        routers = plain_routers(llm.engine.model, llm.engine.blueprint.index.sites)
        assert routers is not None
        target = [router.logits(x).log_softmax(1) for router, x in zip(routers, seen.x)]
        windows = []
        for text in texts(args.texts).values():
            tokens = llm.encode(text[-8 * 6 * WINDOW :])
            windows += [tokens[a : a + WINDOW] for a in range(0, 6 * WINDOW, WINDOW)]
    began = time.process_time()
    gates = {0: closed} | {steps: distilled(closed, fit.x, routers, steps) for steps in args.steps}
    print(f"{args.model.name}: {len(fit.x[0])} tokens fitted, {len(seen.x[0])} judged; distilled in "
          f"{time.process_time() - began:.0f} CPU seconds, AdamW {RATE}, {ROWS} tokens a step\n")  # fmt: skip
    print("| steps | among K | among 2K | divergence | loss, replace | loss, restrict:K | exact |\n" + "|---" * 7 + "|")
    results = []
    for steps, forecast in gates.items():
        row = dict(zip(("first", "first_two", "divergence"), judge(forecast, seen, target)), steps=steps)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/gates.safetensors"
            forecast.save(file)
            for mode in ("replace", f"restrict:{forecast.top_k}"):
                told = RoutingConfig(lookahead=file, pregate=mode)
                with LLM(args.model, EngineConfig(threads=1, offload=OffloadConfig(budget="1.0"), routing=told)) as llm:
                    found = evaluate(llm, windows)
                row[mode.partition(":")[0]], row["exact"] = found.loss, found.exact_loss
        results.append(row)
        print("| {steps} | {first:.1%} | {first_two:.1%} | {divergence:.4f} | {replace:.4f} | {restrict:.4f} "
              "| {exact:.4f} |".format(**row), flush=True)  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
