"""`moe fit-lookahead` and `moe evaluate`: what foretells routing, and what routing by it costs."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.table import Table

from moe import evaluate as evaluation
from moe.config import OffloadConfig, RoutingConfig
from moe.fit import fit_lookahead
from moe.launch.commands import loaded
from moe.launch.console import out
from moe.launch.options import engine_config
from moe.launch.progress import batch_progress
from moe.llm import LLM
from moe.texts import read_windows


@contextmanager
def _shown(figures: str) -> Iterator[Callable[[int, int], None]]:
    with batch_progress() as progress:
        task = progress.add_task("", total=None, figures=figures)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _against(args: argparse.Namespace) -> int:
    """A line for each text: rounding costs one domain more than another."""
    config = engine_config(args)
    # What is lossy belongs to the run that is judged.
    exact_offload = replace(config.offload, bits=OffloadConfig().bits)
    exact_config = replace(config, offload=exact_offload, routing=RoutingConfig())
    with loaded(args, config) as llm, LLM(args.against, exact_config) as exact:
        for text in args.texts:
            with _shown("windows") as show:
                windows = read_windows(llm, [text], args.window, args.limit)
                found = evaluation.evaluate(llm, windows, show, against=exact)
            out.print(f"{text.stem}: {found}", markup=False)
    return 0


def fit(args: argparse.Namespace) -> int:
    sums = args.out.with_name(args.out.name + ".sums")
    with loaded(args, engine_config(args)) as llm, _shown("windows") as show:
        windows = read_windows(llm, args.texts, args.window, args.limit)
        forecast, recalls = fit_lookahead(
            llm, windows, distances=args.distances, ridge=args.ridge, steps=args.steps, sums=sums, progress=show
        )
    forecast.save(args.out)
    sums.unlink(missing_ok=True)
    table = Table("layers ahead", "in the first K", "in the first 2K", box=None)
    for distance in sorted({one.distance for one in recalls}):
        own = [one for one in recalls if one.distance == distance]
        means = [sum(values) / len(own) for values in ([o.first for o in own], [o.first_two for o in own])]
        table.add_row(str(distance), *(f"{mean:.1%}" for mean in means))
    if recalls:
        out.print(table)
    judged = "every fifth kept apart to judge" if recalls else "fewer than five: none is left to judge it by"
    out.print(f"{args.out}: {len(windows)} windows, {judged}; foretells {forecast.kind}", markup=False)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    if args.against is not None:
        return _against(args)
    with loaded(args, engine_config(args)) as llm, _shown("windows") as show:
        found = evaluation.evaluate(llm, read_windows(llm, args.texts, args.window, args.limit), show)
        mode = llm.engine.config.routing.pregate
    if mode == "off":
        out.print(
            f"{found.num_tokens} tokens: loss {found.exact_loss:.4f}. This is the exact run itself, so there is none "
            "to compare it with: set routing.pregate=restrict:M and routing.lookahead, or give --against MODEL",
            markup=False,
        )
        return 0
    out.print(f"routing.pregate={mode}: {found}", markup=False)
    return 0
