"""Absurd settings, from a seed: on the command line, in TOML, in a config in Python, and as arguments of `LLM`.

    python -m tests.launch.fuzz_settings --runs 500 --out bench/results/settings.md

Right means: the demo model answers, or one sentence says what is wrong (status 2, or a ValueError, TypeError or OSError
of one line); never a traceback, a fault of the program, or a run that does not end.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import resource
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.config import EngineConfig
from moe.launch.cli import main as moe
from moe.llm import LLM
from moe.params import SamplingParams
from moe.porting import IGNORED, REFUSED, SETTINGS

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "examples" / "tinymoe"
SLOW_S = 60.0  # the demo model answers in one or two
MEMORY = 24 << 30  # of address space
WAYS = ("command line", "TOML", "Python", "argument of LLM")

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 64, -1, -(2**31), 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**9, 10**30, 10**400),
    *(0.0, -0.0, 0.25, 0.5, 1.0, 1.5, -2.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "none", "None", "null", "true", "false", "yes", "auto", "0", "1", "01", "1_000", "0x10", "1e3", "nan"),
    *("64 experts", "1 expert", "25%", "101%", "6GiB", "1B", "-1GiB", "1e9GiB", "9" * 400, "9" * 5000, "½", "٣", "é"),
    *("💥" * 9, "\ud800", "a\0b", "\n", "../..", "/", "/dev/null", "/nonexistent/x", str(DEMO / "config.json")),
    *("cpu", "cpu:7", "cuda", "cuda:99", "cuda:-1", "meta", "mps", "xla", "hip", "vulkan", "privateuseone", "abacus"),
    *("restrict:2", "restrict:0", "restrict:999999", "replace", "${HOME}", "$(id)", "; ls", "'", '"', "[1]", "{}"),
)
OBJECTS: tuple[Any, ...] = (None, True, False, [], [1], {}, {"x": 1}, (), b"", b"12", object, 1j)


class Case(NamedTuple):
    seed: int
    way: str
    settings: dict[str, Any]


class Seen(NamedTuple):
    case: Case
    outcome: str  # "runs", "refused", or what is wrong
    said: str
    seconds: float


def fields_of(cls: type[Any] = EngineConfig, prefix: str = "") -> dict[str, Any]:
    """Every setting and its type."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= fields_of(typing.cast(type[Any], hint), f"{field.name}.")
        else:
            found[prefix + field.name] = hint
    return found


def case_of(seed: int) -> Case:
    draw = random.Random(seed)
    way = WAYS[seed % len(WAYS)]
    hints = fields_of()
    names = list(hints)
    if way == "argument of LLM":
        names = ["experts_in_memory", *SETTINGS, *IGNORED, *REFUSED]
    hints_of = {"experts_in_memory": "offload.budget"} | SETTINGS
    settings = {}
    for name in draw.sample(names, draw.choice((1, 1, 1, 2, 3))):
        settings[name] = draw.choice(draw.choice(_pools(way, hints.get(hints_of.get(name, name)))))
    return Case(seed, way, settings)


def _pools(way: str, hint: Any) -> list[Any]:
    """What values are drawn from: mostly of a type that passes the first look."""
    pools: list[Any] = [NUMBERS, TEXTS] if way == "command line" else [NUMBERS, TEXTS, OBJECTS]
    options = typing.get_args(hint) or (hint,)
    fit: list[Any] = [[o for o in options if isinstance(o, str)], NUMBERS[:15] if int in options else ()]
    fit += [TEXTS] if str in options else []
    return pools + [pool for pool in fit if pool] * 3


def run(case: Case, folder: Path) -> Seen:
    begin = time.monotonic()
    outcome, said = _python(case) if case.way in WAYS[2:] else _command(case, folder)
    seconds = time.monotonic() - begin
    torch.set_num_threads(1)
    return Seen(case, outcome if seconds < SLOW_S else f"took {seconds:.0f} s", said, seconds)


def _command(case: Case, folder: Path) -> tuple[str, str]:
    arguments = ["generate", str(DEMO), "--prompt", "Once upon a time", "--max-tokens", "2", "--no-stream"]
    if case.way == "TOML":
        (folder / "run.toml").write_text(_toml(case.settings), errors="surrogatepass")
        arguments += ["--config", str(folder / "run.toml")]
    else:
        for name, value in case.settings.items():
            arguments += ["--set", f"{name}={value!s}"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = moe(arguments)
        except BaseException as error:  # of any kind: none may come
            return f"raises {type(error).__name__}", str(error)
    said = [line for line in err.getvalue().splitlines() if line.startswith("moe generate: ")]
    sentence = said[-1] if said else ""
    if "Traceback" in err.getvalue():
        return "a traceback", err.getvalue()
    if status == 2:
        return ("refused" if len(said) == 1 else f"{len(said)} sentences"), sentence
    return ("runs" if status == 0 else f"status {status}"), sentence


def _python(case: Case) -> tuple[str, str]:
    try:
        if case.way == "Python":
            groups: dict[str, dict[str, Any]] = {"": {}}
            for name, value in case.settings.items():
                group, _, own = name.rpartition(".")
                groups.setdefault(group, {})[own] = value
            hints = typing.get_type_hints(EngineConfig)
            made = {group: hints[group](**values) for group, values in groups.items() if group}
            llm = LLM(DEMO, EngineConfig(**groups[""], **made))
        else:
            llm = LLM(DEMO, **case.settings)
        with llm:
            (answer,) = llm.generate("Once upon a time", SamplingParams(max_tokens=2))
        assert len(answer.outputs[0].token_ids) == 2, answer
        return "runs", ""
    except (ValueError, TypeError, OSError) as error:
        said = str(error)
        return ("refused" if said.strip() and "\n" not in said else "more than a line"), said
    except BaseException as error:  # of any kind: none may come
        return f"raises {type(error).__name__}", str(error)


def _toml(settings: dict[str, Any]) -> str:
    """What TOML cannot say is written as Python says it: a file that is no TOML is a case, too."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = str(value) if not isinstance(value, dict) else "{x = 1}" if value else "{}"
        lines.append(f"{name} = {text}\n")
    return "".join(lines)


def table(seen: list[Seen]) -> str:
    rows = ["| written in | cases | runs | refused in one sentence | anything else |", "|---|---|---|---|---|"]
    for way in WAYS:
        counts = Counter(s.outcome for s in seen if s.case.way == way)
        other = counts.total() - counts["runs"] - counts["refused"]
        rows.append(f"| {way} | {counts.total()} | {counts['runs']} | {counts['refused']} | {other} |")
    slowest = max(seen, key=lambda s: s.seconds)
    rows.append(f"\nThe slowest took {slowest.seconds:.1f} s. Ten of the sentences:\n")
    told = [s for s in seen if s.outcome == "refused"]
    rows += [f"- `{s.said[:220]}`" for s in random.Random(0).sample(told, min(10, len(told)))]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.first_seed, args.first_seed + args.runs):
            seen.append(run(case_of(seed), Path(folder)))
            if seen[-1].outcome not in ("runs", "refused"):
                print(seen[-1], flush=True)
    text = table(seen)
    print(text)
    if args.out:
        args.out.write_text(
            f"# Absurd settings\n\nCommand: `python -m tests.launch.fuzz_settings --runs {args.runs}`\n\n{text}"
        )


if __name__ == "__main__":
    main()
