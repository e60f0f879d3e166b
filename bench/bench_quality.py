"""What rounding experts costs a model's answers: loss and agreement beside the unrounded model, on several domains.

Each format is written by `moe pack`'s own functions, to the nearest or calibrated on texts of all domains (their
beginnings; what is judged begins later). Losses are those of every next token in windows of 256. No limit binds: it is
about numbers, not time.

With --budgets nested precision is judged once more within so many bytes, as shares of the unrounded experts': all
experts alike in as many slots as that buys, offload.bits=auto, and upgrade, in a run for each domain that has read the
beginning of its text, and in one run that has read those of all, window by window in turn. What is held, and read for
a token of answers of one sequence at a time, stands beside it.

    python bench/bench_quality.py MODEL TEXTS_FOLDER [--windows 12] [--out bench/results/quality.json]
    python bench/bench_quality.py MODEL TEXTS_FOLDER --only "nested, calibrated" --budgets 0.18 0.2 0.22 0.26
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import transformers

from moe.config import EngineConfig, OffloadConfig
from moe.evaluate import Evaluation, evaluate
from moe.launch.calibrate import expert_inputs
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from moe.params import SamplingParams

WINDOW = 256
ANSWER = 64  # tokens
Bits = Literal["2", "3", "4", "8", "auto", "upgrade"]
LEVELS: tuple[Bits, ...] = ("2", "3", "4", "8")


class Way(NamedTuple):
    """Experts rounded once, judged in each of `bits`: several of nested precision."""

    name: str
    target: str
    group: int | None
    is_calibrated: bool
    bits: tuple[Bits, ...] = ("8",)


WAYS = (
    Way("fp8", "fp8", None, False),
    Way("int8", "int8", None, False),
    Way("int8, calibrated", "int8", None, True),
    Way("int4, groups of 32", "int4", 32, False),
    Way("int4, groups of 32, calibrated", "int4", 32, True),
    Way("int4, groups of 64, calibrated", "int4", 64, True),
    Way("mxfp4", "mxfp4", None, False),
    Way("mxfp4, calibrated", "mxfp4", None, True),
    Way("nested", "nested", None, False, LEVELS),
    Way("nested, calibrated", "nested", None, True, LEVELS),
)


def domains(folder: Path) -> dict[str, tuple[str, str]]:
    """By name: a text to calibrate on, and one to judge on."""
    questions = " ".join(json.loads(line)["question"] for line in (folder / "gsm8k_test.jsonl").open())
    texts = {
        "stories": (folder / "tinystories_sample.txt").read_text(),
        "plays": (folder / "tinyshakespeare.txt").read_text(),
        "maths": questions,
    }
    return {name: (text[:40_000], text[len(text) // 2 :]) for name, text in texts.items()}


class InBudget(NamedTuple):
    """found: by domain; held, read: bytes of all experts, and for a token of an answer, means over the runs."""

    found: dict[str, Evaluation]
    held: float
    read: float


def in_budget(
    out: Path,
    exact: LLM,
    texts: dict[str, tuple[str, str]],
    count: int,
    offload: OffloadConfig,
    runs: Sequence[Sequence[str]],
) -> InBudget:
    """runs: which domains are one run's."""
    found: dict[str, Evaluation] = {}
    held, read = list[int](), list[float]()
    for names in runs:
        with LLM(out, EngineConfig(dtype="float32", offload=offload)) as llm:
            if offload.bits == "upgrade":
                heard = [llm.encode(texts[name][0]) for name in names]
                last = min(map(len, heard)) - WINDOW
                evaluate(llm, [of[a : a + WINDOW] for a in range(0, last, WINDOW) for of in heard])
            found |= judged(llm, exact, {name: texts[name] for name in names}, count)
            assert llm.engine.experts is not None
            cache = llm.engine.experts.cache
            held.append(cache.slot_bytes)
            cache.reset_stats()
            for name in names:
                prompt = llm.encode(texts[name][1][:400])
                llm.generate([prompt], SamplingParams(max_tokens=ANSWER, ignore_eos=True))
            read.append(sum(stats.bytes_read for stats in cache.stats) / (ANSWER * len(names)))
    return InBudget(found, sum(held) / len(held), sum(read) / len(read))


def judged(llm: LLM, exact: LLM, texts: dict[str, tuple[str, str]], count: int) -> dict[str, Evaluation]:
    found = {}
    for name, (_, text) in texts.items():
        tokens = llm.encode(text[: 8 * WINDOW * count])
        windows = [tokens[a : a + WINDOW] for a in range(0, WINDOW * count, WINDOW)]
        found[name] = evaluate(llm, windows, against=exact)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="names of ways; all without")
    parser.add_argument("--budgets", nargs="*", type=float, default=[], help="of nested precision")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}\npython {' '.join(sys.argv)}\n")
    texts, rows = domains(args.texts), []
    blueprint, config = read_blueprint(args.model), EngineConfig(dtype="float32")
    print(
        "| experts | bytes | " + " | ".join(f"{name}: loss, same token" for name in texts) + " | answers of experts |"
    )
    print("|---|---|" + "---|" * (len(texts) + 1))
    with tempfile.TemporaryDirectory() as scratch, LLM(args.model, config) as exact:
        begun = []
        for name, (text, _) in texts.items():
            begun.append(Path(scratch) / f"{name}.txt")
            begun[-1].write_text(text)
        seen = expert_inputs(args.model, begun)
        for number, way in enumerate(way for way in WAYS if not args.only or way.name in args.only):
            out = pack(
                blueprint.checkpoint,
                blueprint.index,
                Path(scratch) / str(number),
                experts=target_format(way.target, way.group),
                calibration=seen if way.is_calibrated else None,
            )
            packed = read_blueprint(out).checkpoint.packed or {}
            errors = [e for of in packed.get("output_errors", []) for e in of if e is not None]
            answers = f"{sum(errors) / len(errors):.1%}" if errors and len(way.bits) == 1 else ""
            for bits in way.bits:
                with LLM(out, replace(config, offload=OffloadConfig(bits=bits))) as llm:
                    found, nbytes = judged(llm, exact, texts, args.windows), llm.engine.blueprint.expert_bytes
                name = way.name if len(way.bits) == 1 else f"{way.name}, {bits} bits"
                cells = [f"{e.loss / e.exact_loss - 1:+.2%}, {e.agreement:.1%}" for e in found.values()]
                share = nbytes / blueprint.expert_bytes
                print(f"| {name} | {share:.0%} | {' | '.join(cells)} | {answers} |", flush=True)
                judgement = {domain: [e.loss, e.exact_loss, e.agreement, e.kl] for domain, e in found.items()}
                rows.append({"experts": name, "bytes": nbytes, "judged": judgement, "answers": answers})
            for share in args.budgets if way.target == "nested" else ():
                budget = int(share * blueprint.expert_bytes)
                together, apart = [list(texts)], [[name] for name in texts]
                ways: tuple[tuple[Bits, str, list[list[str]]], ...] = (
                    *((bits, f"{bits} bits", together) for bits in LEVELS[:-1]),
                    ("auto", "auto", together),
                    ("upgrade", "upgrade", apart),
                    ("upgrade", "upgrade for all", together),
                )
                for bits, said, runs in ways:
                    offload = OffloadConfig(bits=bits, budget=f"{budget}B", prefetch="off")
                    one = in_budget(out, exact, texts, args.windows, offload, runs)
                    name = f"{way.name}, {said}, within {share:.0%}"
                    cells = [f"{e.loss / e.exact_loss - 1:+.2%}, {e.agreement:.1%}" for e in one.found.values()]
                    held = one.held / blueprint.expert_bytes
                    print(f"| {name} | {held:.1%} | {' | '.join(cells)} | {one.read / 2**10:.0f} KiB |", flush=True)
                    judgement = {domain: [e.loss, e.exact_loss, e.agreement, e.kl] for domain, e in one.found.items()}
                    rows.append({"experts": name, "bytes": one.held, "judged": judgement, "read": one.read})
            shutil.rmtree(out)
    losses = ", ".join(f"{domain} {exact_loss[1]:.4f}" for domain, exact_loss in rows[0]["judged"].items())
    print(f"\nunrounded: {blueprint.expert_bytes} bytes of experts, loss {losses}")
    document = {"model": args.model.name, "windows": args.windows, "versions": versions, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
