"""The command line: `moe info|generate|batch|serve|report|trace|pack|analyze|place|simulate|demo …`.

Reads the arguments and loads only what the command needs: `moe --help` loads neither torch nor a solver.
"""

import argparse
import atexit
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from moe import __version__
from moe.launch import place_options, plan_options, predict_options
from moe.launch.interrupts import interrupts_end_imports
from moe.launch.lean import import_only_what_runs
from moe.launch.options import (
    add_batch_options,
    add_cluster_options,
    add_engine_options,
    add_overwrite_option,
    add_record_option,
    add_sampling_options,
    add_serve_options,
    add_trust_option,
    check_inputs,
    check_outputs,
    named_path,
    whole,
)
from moe.uncollected import uncollected


def command() -> None:
    """The process `moe`."""
    run_process(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. What a user can fix ends with one sentence on standard error and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = _parsed(sys.argv[1:] if arguments is None else arguments)
    return run_guarded(f"moe {args.command}", args, lambda: _function(args.run)(args))


def run_process(main: Callable[[], int]) -> None:
    """Runs `main`, and ends this process with its status once threads and whatever is registered for the end are done.

    Python's own end, which takes every module of torch and transformers apart, is half a second more of every command.
    """
    import_only_what_runs()
    ended: list[int] = []

    def leave() -> None:
        if ended:
            sys.stderr.flush()
            os._exit(ended[0])

    atexit.register(leave)  # before all others, which are called first
    ended.append(main())
    sys.exit(ended[0])


def run_guarded(name: str, args: argparse.Namespace, run: Callable[[], int], is_first: bool = True) -> int:
    """`run`'s exit status, after a look at the files that `args` names.

    2 and one sentence for what a user can cause, 130 for Ctrl-C, 1 for a fault of ours. is_first: whether this process
    speaks for its job where all would say the same.
    """
    try:
        if is_first:
            check_outputs(args)
            check_inputs(args)
        with interrupts_end_imports(f"{name}: interrupted" if is_first else None):
            status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        if is_first:
            print(f"{name}: interrupted{f'; {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if _is_users(error) or _is_of_memory(error):
            print(f"{name}: {_said(error)}", file=sys.stderr)
            return 2
        print(
            f"{name}: a fault of the program, {type(error).__name__}: {error}; please report it with what "
            f"`--debug` prints",
            file=sys.stderr,
        )
        return 1


def _said(error: Exception) -> str:
    """One sentence; the system's own errors begin with a number and have no remedy, Python's of memory say nothing."""
    if _is_of_memory(error):
        return f"not enough memory{f' ({error})' if str(error) else ''}; allow this process more, or free some"
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return str(error)
    if error.errno == errno.ENOENT:
        return f"there is no {error.filename}; name what is there"
    if error.errno == errno.EISDIR:
        return f"{error.filename} is a folder; give the name of a file"
    return f"{error.filename}: {error.strerror}"


def _is_users(error: Exception) -> bool:
    """Whether a setting, a file, the machine or another rank can cause it."""
    ours = {"CommError", "MissingPeers", "LostPeer", "UnusableError", "OutOfMemoryError"}
    names = {cls.__name__ for cls in type(error).__mro__}
    says_disk = "SafetensorError" in names and "I/O error" in str(error)
    says_memory = isinstance(error, RuntimeError) and "memory" in str(error)
    return isinstance(error, (ValueError, OSError)) or bool(names & ours) or says_memory or says_disk


def _is_of_memory(error: Exception) -> bool:
    """Python's own, and that of a library which the limits of this process leave no room to load."""
    is_unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)
    return isinstance(error, MemoryError) or is_unmapped


def _function(name: str) -> Callable[[argparse.Namespace], int]:
    """ "module:function" of this folder."""
    module, _, function = name.partition(":")
    with uncollected():
        found: Callable[[argparse.Namespace], int] = getattr(import_module(f"moe.launch.{module}"), function)
    return found


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    try:
        return parser.parse_args(place_options.with_file(words))
    except (OSError, ValueError) as error:
        parser.error(_said(error))


def _parser() -> argparse.ArgumentParser:
    description = "Serves Mixture-of-Experts models that are larger than fast memory, exactly; records and places them."
    parser = argparse.ArgumentParser(prog="moe", description=description)
    parser.add_argument("--version", action="version", version=f"moe {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error, too")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="architecture, bytes, smallest and recommended budgets; reads no weights")
    info.add_argument("model", type=named_path, help="folder of a Hugging Face checkpoint, original or packed")
    add_trust_option(info)
    info.add_argument("--check", action="store_true", help="read everything and say what is damaged")
    info.set_defaults(run="info:info")

    generate = commands.add_parser("generate", help="answer prompts")
    add_engine_options(generate)
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    add_sampling_options(generate)
    generate.add_argument("--no-stream", action="store_true", help="print each answer when it is complete")
    generate.add_argument("--verify", action="store_true", help="answer again with all experts in memory and compare")
    generate.set_defaults(run="commands:generate")

    batch = commands.add_parser("batch", help="serve a batch file (OpenAI format); continues where it was stopped")
    add_batch_options(batch)
    batch.add_argument(
        "--verify", type=whole(0), default=0, metavar="N", help="replay the first N prompts, greedy, all in memory"
    )
    add_record_option(batch)
    batch.set_defaults(run="commands:batch")

    serve = commands.add_parser("serve", help="answer HTTP: OpenAI's endpoints, batches, metrics, a live page")
    add_engine_options(serve)
    add_serve_options(serve)
    serve.set_defaults(run="serve:serve")

    top = commands.add_parser("top", help="what a running service does, in the terminal")
    top.add_argument("url", help="such as http://127.0.0.1:8000")
    top.add_argument("--api-key", help="if the service asks for one")
    top.add_argument("--once", action="store_true", help="print it once")
    top.set_defaults(run="live:top")

    report = commands.add_parser("report", help="a recorded run as one HTML file")
    report.add_argument("run_file", metavar="RUN", type=named_path, help="what serve or batch wrote with --record")
    report.add_argument("-o", "--out", type=named_path, help="the page (default: RUN.html)")
    add_overwrite_option(report)
    report.set_defaults(run="recording:report")

    ray = commands.add_parser("ray", help="what the controller of a Ray cluster does; more hosts or fewer")
    verbs = ray.add_subparsers(dest="verb", required=True, metavar="VERB")
    status = verbs.add_parser("status", help="hosts, generation, plan, load, and what happened last")
    status.add_argument("--json", action="store_true", help="as one JSON document")
    scale = verbs.add_parser("scale", help="serve with so many hosts from now on; requests go on")
    scale.add_argument("num_hosts", type=whole(1), metavar="N", help="hosts from now on")
    scale.add_argument("--no-wait", action="store_true", help="do not wait until they serve")
    stop = verbs.add_parser("stop", help="end a controller that its server left behind, and its hosts")
    for verb in (status, scale, stop):
        add_cluster_options(verb)
    ray.set_defaults(run="ray_commands:run")

    trace = commands.add_parser("trace", help="record the routing of prompts, and of greedy answers to them")
    add_engine_options(trace)
    trace.add_argument("prompts", type=named_path, help='JSON lines with a "prompt" each, or plain text lines')
    trace.add_argument("trace", type=named_path, help=".npz or .safetensors")
    trace.add_argument("--max-tokens", type=int, default=32, help="of each answer (default %(default)s)")
    trace.add_argument("--limit", type=whole(1), help="prompts to use")
    add_overwrite_option(trace)
    trace.set_defaults(run="commands:trace")

    pack = commands.add_parser("pack", help="write each expert as one aligned blob: faster reads")
    pack.add_argument("model", type=named_path, help="folder of a Hugging Face checkpoint, or a .gguf file")
    add_trust_option(pack)
    pack.add_argument("out", type=named_path, help="folder to make, with all that the model needs")
    pack.add_argument(
        "--config", type=named_path, metavar="FOLDER", help="of a .gguf: config.json and tokenizer of its model"
    )
    pack.add_argument(
        "--experts",
        metavar="FORMAT",
        help="bf12: bf16 in 12 bits, nothing lost; or round to int8, int4, mxfp4, fp8, nested: lossy",
    )
    pack.add_argument(
        "--dense",
        metavar="FORMAT",
        help="other linear layers: bf12, nothing lost; or round to int8 or int4: lossy, run with dense=packed",
    )
    pack.add_argument(
        "--group", type=whole(1), help="columns that share a scale, of int8 (a row), int4 (32), nested (64)"
    )
    pack.add_argument(
        "--calibrate",
        type=named_path,
        nargs="+",
        metavar="TEXT",
        help="round so that answers to these texts change least (int8, int4, mxfp4, nested), not to the nearest",
    )
    pack.set_defaults(run="commands:pack")

    plan_options.add_parsers(commands)
    place_options.add_parsers(commands)
    predict_options.add_parsers(commands)

    demo = commands.add_parser(
        "demo", help="the small model of this repository with a quarter of its experts in memory"
    )
    demo.add_argument(
        "--model", type=named_path, default=Path("examples/tinymoe"), help="another folder (default %(default)s)"
    )
    demo.set_defaults(run="commands:demo")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
