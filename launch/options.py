"""Arguments that several commands share, and what they mean; loads neither torch nor a solver."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moe.config import EngineConfig
from moe.params import SamplingParams


def named_path(text: str) -> Path:
    """Of an argument: `Path("")` would be the folder that we happen to be in."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or a folder ('.' is the present one)")
    if text == "-":  # which would be taken for a file of that name, not for a pipe
        raise argparse.ArgumentTypeError("pipes are not read or written; name a file (./- if it is called that)")
    return Path(text)


_MOST = 2**31 - 1  # of what has no limit of its own
_Number = TypeVar("_Number", int, float)


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Of an argument that is a whole number from `least` to `most`."""
    return _within(int, "whole number", least, most)


def real(least: float, most: float = _MOST) -> Callable[[str], float]:
    """Of an argument that is a number from `least` to `most`, and so no NaN."""
    return _within(float, "number", least, most)


def _within(parse: Callable[[str], _Number], said: str, least: float, most: float) -> Callable[[str], _Number]:
    def read(text: str) -> _Number:
        try:
            number = parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {said}") from None
        if not least <= number <= most:  # nor is NaN
            wanted = f"be >= {least:g}" if most == _MOST and not number > most else f"lie in [{least:g}, {most}]"
            raise argparse.ArgumentTypeError(f"{text} must {wanted}")
        return number

    return read


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=named_path, help="folder of a Hugging Face checkpoint, original or packed")
    parser.add_argument("--experts-in-memory", metavar="BUDGET", help="0.25 (fraction), 64 (experts) or 6GiB")
    parser.add_argument("--config", type=named_path, help="TOML file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, over the file's")
    parser.add_argument("--show-config", action="store_true", help="print every setting of the run")
    parser.add_argument("--per-layer", action="store_true", help="print hits, bytes and stalls of every layer")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """For commands that take no settings; with them it is `--set trust_remote_code=true`."""
    text = "run Python code that the model's folder brings, where transformers has none for it"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Of a batch file, alone or over ranks."""
    add_engine_options(parser)
    parser.add_argument("input", type=named_path, help="JSON lines, one request each, in OpenAI's batch format")
    parser.add_argument(
        "output", type=named_path, help="one result a line is appended; what is there is not done again"
    )


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Of a batch file over ranks or hosts."""
    add_batch_options(parser)
    parser.add_argument("--plan", help="placement of `moe place` (parallel.plan); without one, contiguous blocks")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Without these, as the model's generation_config.json recommends, else greedy."""
    parser.add_argument("--max-tokens", type=int, help="of an answer, if the model recommends nothing 64")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw from the likeliest K tokens; 0: from all")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that have this probability together"
    )
    parser.add_argument("--seed", type=int, help="the same seed, the same answer; without one every run differs")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; may be given several times"
    )


def add_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=named_path, metavar="FILE", help="write what happens, for `moe report FILE`")
    add_overwrite_option(parser)


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    """Of every command that writes a file anew; what `moe batch` answers is added to, `moe pack` makes a folder."""
    parser.add_argument("--overwrite", action="store_true", help="write over files that are there; else refused")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine alone)"
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0: any that is free (default %(default)s)")
    parser.add_argument("--hosts", type=whole(1), help="that many actors of a Ray cluster serve, and any may be lost")
    add_cluster_options(parser)
    parser.add_argument("--state", type=named_path, help="folder of files and batches, which a restart goes on with")
    parser.add_argument("--api-key-file", type=named_path, help="callers must send its content as a bearer token")
    parser.add_argument("--api-key-env", metavar="NAME", help="the same from this environment variable")
    add_record_option(parser)
    parser.add_argument(
        "--max-open",
        type=whole(1),
        default=256,
        help="requests at a time (default %(default)s); more are told to come back",
    )
    parser.add_argument(
        "--max-body", type=whole(1), default=1 << 20, metavar="BYTES", help="of one request (default %(default)s)"
    )
    parser.add_argument(
        "--max-seconds",
        type=real(0.001),
        default=3600.0,
        help="until an unfinished answer is given up (default %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds", type=real(0), default=30.0, help="for open requests when told to end (default %(default)s)"
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="of the Ray cluster; without one, that of this job, or of this machine")
    parser.add_argument(
        "--controller", default="moe", metavar="NAME", help="of the actor that has the requests (default %(default)s)"
    )


_WRITTEN = ("html", "png", "record", "out")
_READ = ("input", "prompts", "texts", "calibrate", "files", "run_file", "api_key_file")
_READ_LATER = ("model", "config", "trace", "plan")  # whoever reads them says what is not there
_OF_A_MODEL = (
    *("model*.safetensors", "experts-*.safetensors", "dense.safetensors", "packed.json", "*.index.json"),
    *("config.json", "generation_config.json", "tokenizer*.json"),
)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Defaults, file, settings, and the two options that are settings by a shorter name."""
    settings = list(args.set)
    settings += [f"parallel.plan={args.plan}"] if getattr(args, "plan", None) else []
    settings += [f"offload.budget={args.experts_in_memory}"] if args.experts_in_memory else []
    return EngineConfig.load(args.config, settings)


def sampling_params(args: argparse.Namespace, recommended: Mapping[str, Any]) -> SamplingParams:
    """What was asked for, over what the model recommends. Raises ValueError."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return SamplingParams(**{**recommended, **given}, stop=tuple(args.stop))


def check_inputs(args: argparse.Namespace) -> None:
    """Raises ValueError for a file to be read that is not there, before anything is computed or a model is loaded."""
    for path in _paths(args, ("present", "against", *_READ)):
        if not path.exists():
            raise ValueError(f"there is no {path}; name what is there")
    for path in _paths(args, ("input",)):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} can be read only once, and a batch is read again; write it to a file first")


def _paths(args: argparse.Namespace, names: Iterable[str]) -> list[Path]:
    values = [getattr(args, name, None) for name in names]
    each = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one for one in each if isinstance(one, Path)]


def _check_not_read(path: Path, args: argparse.Namespace) -> None:
    """Raises ValueError for a file to be written over what the command reads, or over a file of a model."""
    told = "give the name of another file to write"
    is_written = "trace" if getattr(args, "command", None) == "trace" else ""  # what others read
    reads = _paths(args, (name for name in (*_READ, *_READ_LATER) if name != is_written))
    reads += [Path(args.topology)] if hasattr(args, "topology") else []  # or the name of one
    for read in reads:
        if read.exists() and path.samefile(read):
            raise ValueError(f"{path} is read by this command and would be written over; {told}")
    is_models = any(path.match(pattern) for pattern in _OF_A_MODEL)
    if is_models and (path.parent / "config.json").is_file():
        raise ValueError(f"{path} is a file of the model in {path.parent} and would be written over; {told}")


def written_anew(args: argparse.Namespace) -> list[Path]:
    """The files that a command makes, by their names on its command line."""
    command = getattr(args, "command", None)  # ranks and hosts have none
    return [] if command == "pack" else _paths(args, (*_WRITTEN, *(["trace"] if command == "trace" else [])))


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError for a file that could not be written, before hours are spent on what it should hold."""
    command, written = getattr(args, "command", None), written_anew(args)
    for path in (every := [*_paths(args, ["output"]), *written]):
        folder = path.parent
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {folder}; make it, or give another name")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file to write")
        if path.exists():
            _check_not_read(path, args)
        _check_place(path, path if path.exists() else folder)
        if path in written:
            check_free(path, args)
    if twice := [path for path in written if every.count(path) > 1]:
        raise ValueError(f"{twice[0]} is named for two files to be written; give each a name of its own")
    made = (args.out if command == "pack" else None, getattr(args, "state", None))
    for path in (path for path in made if path is not None):
        check_made(path)


def check_free(path: Path, args: argparse.Namespace) -> None:
    """Raises ValueError for a file that is there, unless the command line says to write over it."""
    if path.is_file() and not getattr(args, "overwrite", False):
        raise ValueError(f"{path} is there already; give the name of another file, or --overwrite")


def check_made(folder: Path) -> None:
    """Raises ValueError for a folder that could not be made, with those above it, or written in."""
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be written: {above} is no folder; give another name")
    _check_place(folder, above)


def _check_place(path: Path, where: Path) -> None:
    if not os.access(where, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission is missing, or its disk is read-only")
