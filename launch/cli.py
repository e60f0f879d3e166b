"""The command line: `moe info|generate|batch|trace|pack|analyze|place|simulate|demo …`."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.config import EngineConfig
    from moe.models.blueprint import Blueprint

from rich.console import Console

from moe import __version__
from moe.launch import place
from moe.launch.prompts import read_prompts

out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, width=None if sys.stderr.isatty() else 120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. What a user can fix ends with one sentence on standard error and exit status 2."""
    # Before torch is loaded: threads that spin while another process has their core make a step 10 to 50 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, OSError) as error:
        err.print(f"moe {args.command}: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        err.print(f"moe {args.command}: interrupted")
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    description = "Serves Mixture-of-Experts models that are larger than fast memory, exactly; records and places them."
    parser = argparse.ArgumentParser(prog="moe", description=description)
    parser.add_argument("--version", action="version", version=f"moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="architecture, bytes, smallest and recommended budgets; reads no weights")
    info.add_argument("model", type=Path)
    info.add_argument("--check", action="store_true", help="read everything and say what is damaged")
    info.set_defaults(run=_info)

    generate = commands.add_parser("generate", help="answer prompts")
    _add_engine_options(generate)
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    _add_sampling_options(generate)
    generate.add_argument("--no-stream", action="store_true", help="print each answer when it is complete")
    generate.add_argument("--verify", action="store_true", help="answer again with all experts in memory and compare")
    generate.set_defaults(run=_generate)

    batch = commands.add_parser("batch", help="serve a batch file (OpenAI format); continues where it was stopped")
    _add_engine_options(batch)
    batch.add_argument("input", type=Path)
    batch.add_argument("output", type=Path)
    batch.add_argument(
        "--verify", type=int, default=0, metavar="N", help="replay the first N prompts, greedy, all in memory"
    )
    batch.set_defaults(run=_batch)

    trace = commands.add_parser("trace", help="record the routing of prompts, and of greedy answers to them")
    _add_engine_options(trace)
    trace.add_argument("prompts", type=Path, help='JSON lines with a "prompt" each, or plain text lines')
    trace.add_argument("trace", type=Path, help=".npz or .safetensors")
    trace.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    trace.add_argument("--limit", type=int, help="prompts to use")
    trace.set_defaults(run=_trace)

    pack = commands.add_parser("pack", help="write each expert as one aligned blob: faster reads")
    pack.add_argument("model", type=Path)
    pack.add_argument("out", type=Path)
    pack.set_defaults(run=_pack)

    place.add_parsers(commands)

    demo = commands.add_parser(
        "demo", help="the small model of this repository with a quarter of its experts in memory"
    )
    demo.add_argument("--model", type=Path, default=Path("examples/tinymoe"))
    demo.set_defaults(run=_demo)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a Hugging Face checkpoint, original or packed")
    parser.add_argument("--experts-in-memory", metavar="BUDGET", help="0.25 (fraction), 64 (experts) or 6GiB")
    parser.add_argument("--config", type=Path, help="TOML file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, over the file's")
    parser.add_argument("--per-layer", action="store_true", help="print hits, bytes and stalls of every layer")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[])


def _engine_config(args: argparse.Namespace) -> "EngineConfig":
    from moe.config import EngineConfig

    config = EngineConfig.load(args.config, args.set)
    if args.experts_in_memory is not None:
        config = config.with_budget(args.experts_in_memory)
    err.print(config.describe(), style="dim", markup=False)
    return config


@contextmanager
def _loaded(args: argparse.Namespace, config: "EngineConfig") -> Iterator[Any]:
    from moe.llm import LLM

    with LLM(args.model, config) as llm:
        for note in llm.notes:
            err.print(f"note: {note}", style="yellow", markup=False)
        yield llm


def _info(args: argparse.Namespace) -> int:
    from rich.table import Table

    from moe.models.blueprint import read_blueprint
    from moe.models.neighbours import why_not_packed
    from moe.offload.budget import format_bytes
    from moe.offload.stores import available_memory

    b = read_blueprint(args.model)
    if args.check:
        return _check(b)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("architecture", f"{type(b.skeleton).__name__} ({b.config.model_type})")
    table.add_row("context", f"{b.max_context or 'no limit'} tokens")
    decoded = b.quantised.labels(b.coded_dense)
    table.add_row("dense weights", format_bytes(b.dense_bytes) + (f", decoded from {decoded}" if decoded else ""))
    reason = why_not_packed(b.skeleton, b.max_context)
    table.add_row("batching", "packed, continuous" if reason is None else f"one sequence at a time: {reason}")
    if b.experts:
        site, blob = b.index.sites[0], max(layout.nbytes for layout in b.index.layouts)
        kinds = {(s.num_experts, s.hidden_size, s.intermediate_size) for s in b.index.sites}
        shape = f"{site.hidden_size} x {site.intermediate_size}" if len(kinds) == 1 else "of several sizes"
        table.add_row(
            "experts",
            f"{len(b.experts)} layers, {b.num_experts} experts, top-{b.top_k}, {shape}, {b.expert_formats}",
        )
        table.add_row("one expert", format_bytes(blob))
        table.add_row("all experts", format_bytes(b.expert_bytes))
        table.add_row(
            "on disk", "packed" if b.checkpoint.packed else "original checkpoint (moe pack makes reads faster)"
        )
        step = b.top_k * len(b.experts)
        free = max(0, available_memory() - b.dense_bytes) * 9 // 10
        fits = min(b.num_experts, free // blob)
        table.add_row("smallest budget", f"1 expert ({format_bytes(blob)}); slow: every layer runs in waves")
        table.add_row(
            "recommended",
            f"at least {min(2 * step, b.num_experts)} experts "
            f"({format_bytes(min(2 * step, b.num_experts) * blob)}): twice what one token uses",
        )
        table.add_row("fits here", f"{fits} experts, {fits / b.num_experts:.0%} of all, in the memory that is free now")
    else:
        table.add_row("experts", "none in slots: the whole model is kept in memory")
    out.print(table)
    return 0


def _check(blueprint: "Blueprint") -> int:
    """Prints what is damaged; 1 if anything is."""
    from moe.launch.report import batch_progress
    from moe.offload.check import check_folder

    with batch_progress() as progress:
        task = progress.add_task("", total=blueprint.num_experts, figures="experts read")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = list(check_folder(blueprint.checkpoint, blueprint.index, show))
    for sentence in found:
        err.print(sentence, style="red", markup=False)
    kind = "against their checksums" if blueprint.checkpoint.packed else "and could be read"
    out.print(
        f"{blueprint.folder}: {len(found)} faults; {blueprint.num_experts} experts were read {kind}", markup=False
    )
    return 1 if found else 0


def _generate(args: argparse.Namespace) -> int:
    from moe.launch.report import print_report
    from moe.params import SamplingParams
    from moe.verify import verify

    config = _engine_config(args)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    with _loaded(args, config) as llm:
        if len(args.prompt) == 1 and not args.no_stream:
            out.print(args.prompt[0], end="", style="bold", markup=False)
            for piece in llm.stream(args.prompt[0], params):
                _write(piece)
            _write("\n")
        else:
            for answer in llm.generate(args.prompt, params):
                out.print(answer.prompt, end="", style="bold", markup=False)
                _write(answer.outputs[0].text + "\n")
        print_report(llm.engine, err, args.per_layer)
    if args.verify:
        err.print(str(verify(args.model, config, args.prompt, params)), markup=False)
    return 0


def _write(text: str) -> None:
    """What the model said, character for character: a console would widen tabs and drop control characters."""
    out.file.write(text)
    out.file.flush()


def _batch(args: argparse.Namespace) -> int:
    from moe.batch import BatchProgress, first_requests, run_batch
    from moe.launch.report import batch_progress, print_report, progress_text
    from moe.params import SamplingParams
    from moe.verify import verify

    config = _engine_config(args)
    with _loaded(args, config) as llm, batch_progress() as progress:
        task = progress.add_task("", total=None, figures="")

        def show(state: BatchProgress) -> None:
            progress.update(task, total=state.total, completed=state.finished, figures=progress_text(llm.engine))

        state = run_batch(llm, args.input, args.output, show)
        progress.stop()
        err.print(
            f"{state.finished} of {state.total} lines are in {args.output}"
            f" ({state.resumed} from an earlier run, {state.failed} with errors)",
            markup=False,
        )
        print_report(llm.engine, err, args.per_layer)
        prompts = first_requests(llm, args.input, args.verify)
    if args.verify and not prompts:
        err.print("nothing to verify: no line of the input can be served")
    elif args.verify:
        err.print(str(verify(args.model, config, prompts, SamplingParams(max_tokens=32))), markup=False)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from moe.launch.report import print_report
    from moe.params import SamplingParams

    prompts = read_prompts(args.prompts, args.limit)
    if args.trace.suffix not in {".npz", ".safetensors"}:
        raise ValueError(f"{args.trace} must end in .npz or .safetensors")
    with _loaded(args, _engine_config(args)) as llm:
        recorder = llm.engine.record()
        llm.generate(prompts, SamplingParams(max_tokens=args.max_tokens))
        trace = recorder.trace()
        trace.save(args.trace)
        out.print(
            f"{args.trace}: {trace.num_sequences} sequences, {trace.num_tokens} tokens, {trace.num_layers} layers, "
            f"top-{trace.top_k} of {trace.num_experts}",
            markup=False,
        )
        print_report(llm.engine, err, args.per_layer)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from moe.launch.report import batch_progress
    from moe.models.blueprint import read_blueprint
    from moe.offload.budget import format_bytes
    from moe.offload.pack import pack

    blueprint = read_blueprint(args.model)
    if not blueprint.experts:
        raise ValueError(f"{args.model} has no experts to pack")
    with batch_progress() as progress:
        task = progress.add_task("", total=None, figures="")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, figures=format_bytes(done))

        pack(blueprint.checkpoint, blueprint.index, args.out, progress=show)
    out.print(f"{args.out}: {blueprint.num_experts} experts packed", markup=False)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from moe.config import EngineConfig, OffloadConfig
    from moe.launch.demo import run_demo

    if not args.model.is_dir():
        raise ValueError(
            f"the demo's model is not in {args.model}: it comes with the source, not with the package; run this in a "
            "clone of the repository, or give the folder of any Mixture-of-Experts checkpoint with --model"
        )
    # One thread: the matrices of this model are too small to share.
    config = EngineConfig(dtype="float32", threads=1, offload=OffloadConfig(budget="0.25"))
    return run_demo(args.model, config, out)


if __name__ == "__main__":
    sys.exit(main())
