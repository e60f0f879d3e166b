"""Arguments of `moe analyze`, `moe place`, `moe simulate` and `moe import-trace`; loads no solver."""

import argparse
import tomllib
from collections.abc import Sequence
from typing import get_args

from moe.launch.options import add_overwrite_option, named_path, real, whole
from moe.placement.wire_format import CombineMode, DispatcherName, StepKind
from moe.plain_text import read_text


def with_file(words: Sequence[str]) -> list[str]:
    """A command line in which `--config FILE` of `moe place` and `moe simulate` is what the TOML file says.

    Its keys are the options' names; what the command line itself says comes after them, and so counts. Raises
    ValueError for a file that is no such TOML.
    """
    at = next((at for at, word in enumerate(words) if word in ("place", "simulate")), None)
    if at is None or not all(word.startswith("-") for word in words[:at]):
        return [*words]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=named_path)
    found, rest = finder.parse_known_args(words[at + 1 :])
    if found.config is None:
        return [*words]
    try:
        options = tomllib.loads(read_text(found.config))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{found.config} is not a valid TOML file: {error}") from None
    if bad := [key for key, value in options.items() if not isinstance(value, str | int | float)]:
        raise ValueError(f"{found.config}: {bad[0]} must be text or a number, as the option --{bad[0]} is")
    return [*words[: at + 1]] + [f"--{key.replace('_', '-')}={value}" for key, value in options.items()] + rest


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `analyze`, `place`, `simulate` and `import-trace`; each names what `run`s it."""
    parser = subparsers.add_parser("analyze", help="does this model suit offloading, and how much affinity is there")
    parser.add_argument("trace", type=named_path, metavar="TRACE|MODEL", help="routing trace, or a model's folder")
    parser.add_argument("--prompts", type=named_path, help="of a model: prompts whose routing is recorded first")
    parser.add_argument(
        "--against", type=named_path, nargs="*", default=[], help="other traces: how far the load shifts"
    )
    parser.add_argument("--segment", type=whole(1), default=16, help="m of SRP and SCH, tokens (default 16)")
    _add_pictures(parser)
    parser.set_defaults(run="analyze:run_analyze")

    parser = subparsers.add_parser("place", help="decide where every expert lives")
    parser.add_argument("trace", type=named_path, help="routing as `moe trace` recorded it")
    _add_topology(parser)
    parser.add_argument("--out", type=named_path, required=True, help="plan to write (.json)")
    parser.add_argument(
        "--objective", choices=("auto", "bytes", "copies", "coherent", "transitions", "exflow"), default="auto",
        help="bytes: what --dispatcher and --combine send, attention at home; copies: ranks a token touches, the same "
        "without replicas; coherent: attention moves with the heaviest expert; auto: by --dispatcher; "
        "transitions: rank changes between consecutive layers, each at its link's cost, with a proven bound; "
        "exflow: ExFlow's own program, the same with every change alike and no load",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=real(0), default=0.0, help="spare slots as a share of the experts, e.g. 0.125"
    )
    parser.add_argument(
        "--load-weight", type=real(0), default=0.0, help="weight of imbalance for --objective transitions"
    )
    parser.add_argument(
        "--fit", type=real(0, 1), default=0.8, help="share of sequences to fit; the rest judges (default 0.8)"
    )
    parser.add_argument(
        "--seconds", type=real(0), default=30.0, help="limit on solver and bound together (default %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=whole(0),
        default=200,
        help="perturbations per layer (default %(default)s); the same give the same plan",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the perturbations (default %(default)s)")
    parser.add_argument(
        "--present", type=named_path, help="running plan: rename ranks to move little, report the migration"
    )
    parser.add_argument(
        "--window", type=whole(1), metavar="TOKENS",
        help="one turn of placement.online on the trace's last tokens: few "
        "moves from --present, if they pay",
    )  # fmt: skip
    parser.add_argument(
        "--bytes-per-step",
        type=whole(1, 1 << 50),
        default=1 << 28,
        help="migration budget between two steps (default %(default)s)",
    )
    _add_workload(parser)
    _add_pictures(parser)
    parser.set_defaults(run="place:run_place")

    parser = subparsers.add_parser("simulate", help="predict bytes, load, misses and time of a plan on a trace")
    parser.add_argument("trace", type=named_path, help="routing as `moe trace` recorded it")
    parser.add_argument("plan", type=named_path, help="what `moe place` wrote")
    _add_topology(parser)
    _add_workload(parser)
    _add_pictures(parser)
    parser.set_defaults(run="place:run_simulate")

    parser = subparsers.add_parser("import-trace", help="read the routing that vLLM, SGLang or ESFT recorded")
    parser.add_argument("files", type=named_path, nargs="+", help="as the recorder wrote them")
    parser.add_argument("--from", dest="source", choices=("vllm", "sglang", "esft"), required=True, help="who recorded")
    parser.add_argument("--experts", type=whole(1), help="experts of a layer; needed for vllm and sglang")
    parser.add_argument("--model", default="", help="name of the model that was recorded")
    parser.add_argument("--out", "-o", type=named_path, required=True, help="trace to write (.npz or .safetensors)")
    add_overwrite_option(parser)
    parser.set_defaults(run="import_trace:run")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=named_path, help="TOML file of these options; the command line's are over it")
    parser.add_argument("--topology", default="h200x8", help="JSON file or preset such as h200x8, 2xh200x4, laptopx4")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=whole(1),
        default=256,
        help="tokens of a prefill step, sequences of a decode step (default %(default)s)",
    )
    parser.add_argument(
        "--steps", choices=get_args(StepKind), default="recorded",
        help="how tokens come: as the trace recorded them (decode if it does not say), or all of one kind",
    )  # fmt: skip
    parser.add_argument(
        "--dispatcher", choices=get_args(DispatcherName), default="all_to_all",
        help="as parallel.dispatcher will be (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--combine",
        choices=get_args(CombineMode),
        default="exact",
        help="as parallel.combine will be (default %(default)s)",
    )
    parser.add_argument(
        "--sizes",
        metavar="HIDDEN,DTYPE,EXPERT_BYTES",
        help="of the model, where the trace does not say; saved with the plan",
    )
    parser.add_argument("--fast-slots", type=whole(1), help="experts per rank in fast memory, all layers; default all")


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=named_path, help="write a self-contained page with pictures")
    parser.add_argument("--png", type=named_path, help="write pictures as PNG (needs matplotlib)")
    add_overwrite_option(parser)
