"""`moe analyze`: what recorded routing says of caches, of placement and of reading ahead."""

import argparse
import html

from moe.launch.gain import GAINS, GAINS_TOLD, LEARNED, TOKENS, rows_of_gains
from moe.launch.place import read_trace, show
from moe.placement.plan import merge_models
from moe.placement.stats.affinity import expert_load, transition_counts
from moe.placement.stats.report import (
    Picture,
    analyse,
    domain_distances,
    heatmap_svg,
    save_png,
    table_html,
    write_page,
)
from moe.placement.trace import RoutingTrace

SHORTEST, LONGEST = 16, 256  # tokens of an answer that is recorded


def trace_of_model(args: argparse.Namespace) -> RoutingTrace:
    """Records the model's routing of the prompts and of answers, as long as reading ahead needs to be judged."""
    from moe.launch.prompts import read_prompts
    from moe.llm import LLM
    from moe.params import SamplingParams

    if args.prompts is None:
        raise ValueError(f"{args.trace} is a model; give prompts to record its routing: --prompts prompts.jsonl")
    prompts = read_prompts(args.prompts, None)
    with LLM(args.trace) as llm:
        each = 1 + -(-(LEARNED + TOKENS) // max(1, len(prompts)))  # the last token of an answer is routed nowhere
        length = min(max(each, SHORTEST), LONGEST)
        recorder = llm.engine.record()
        llm.generate(prompts, SamplingParams(max_tokens=length, ignore_eos=True))
        return recorder.trace()


def run_analyze(args: argparse.Namespace) -> int:
    """Print the locality, affinity and cache report of a trace."""
    if args.prompts is not None and not args.trace.is_dir():
        raise ValueError(f"--prompts are for a model's folder, and {args.trace} is a recorded trace; leave them out")
    trace = trace_of_model(args) if args.trace.is_dir() else read_trace(args.trace)
    others = [read_trace(path) for path in args.against]
    found = analyse(trace, segment=args.segment)
    rows = [(key, found[key]) for key in ("model", "tokens", "layers", "experts", "top_k")]
    rows += [
        ("usage entropy / log E", found["entropy"]),
        ("hottest expert / mean", found["hottest"]),
        (f"SRP, m = {found['segment']}", found["srp"]),
        ("predicted / true activations", found["srp_ratio"]),
        ("knee of the cache, experts per layer", found["knee"]),
        ("affinity of consecutive layers (share of entropy explained)", found["affinity"]),
    ]
    show("analysis", ("", "value"), rows)
    cache = [(c["slots"], c["oracle"], c["lru"]) for c in found["cache"]]
    show("hit rate by cache size", ("slots per layer", f"oracle, {found['segment']} tokens ahead", "LRU"), cache)
    ahead, basis = rows_of_gains(trace)
    show(f"what reading ahead can win, one sequence, {basis}", GAINS, ahead)
    if others:
        merge_models([trace.model, *(other.model for other in others)])
        distances = domain_distances([trace, *others])
        names = [str(path) for path in (args.trace, *args.against)]
        shift = [(name, *row) for name, row in zip(names, distances, strict=True)]
        show("total-variation distance of the load", ("", *names), shift)
    print(f"{found['model']} {found['verdict']}")
    pictures = {"Load": Picture(expert_load(trace), "layer", "expert", "tokens")}
    if trace.num_layers > 1:
        pictures["Transitions of tokens from layer 0 to 1"] = Picture(
            transition_counts(trace)[0], "expert of layer 0", "expert of layer 1", "tokens"
        )
    if args.html:
        parts = [
            f"<p>{html.escape(found['model'])} {found['verdict']}.</p>",
            table_html(rows, ("", "value")),
            "<h2>Hit rate by size of the cache</h2>",
            f"<p>Share of the experts that a token needs which are in a slot, mean over layers; the oracle knows "
            f"{found['segment']} tokens ahead, LRU evicts what was used least recently.</p>",
            table_html(cache, ("slots per layer", "oracle", "LRU")),
            "<h2>What reading ahead can win</h2>",
            f"<p>One sequence in virtual time, {basis}. {GAINS_TOLD}</p>",
            table_html(ahead, GAINS),
        ]
        write_page(
            args.html, f"Routing of {found['model']}", parts + [heatmap_svg(m, title=t) for t, m in pictures.items()]
        )
    if args.png:
        save_png(args.png, pictures)
    return 0
