"""What the commands do; `cli.py` reads their arguments and loads this file when one runs."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moe.batch import batch_workload, first_requests, lines_done
from moe.config import EngineConfig, OffloadConfig
from moe.engine.layer_major import Workload
from moe.launch.calibrate import expert_inputs
from moe.launch.console import err, out
from moe.launch.demo import run_demo
from moe.launch.first_run import measure_first_run
from moe.launch.jobs import is_served, serve_file
from moe.launch.live import live_state
from moe.launch.options import engine_config, sampling_params
from moe.launch.plan_check import checked_state
from moe.launch.progress import batch_progress
from moe.launch.prompts import read_prompts
from moe.launch.recording import recording
from moe.launch.report import print_choices, print_report, print_rounding
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.dense_packed import roundable
from moe.models.gguf import open_gguf
from moe.offload.budget import format_bytes
from moe.offload.checkpoint import Checkpoint
from moe.offload.pack import pack as pack_experts
from moe.offload.requantise import target_format
from moe.offload.rounded_dense import RoundedDense
from moe.offload.segments import ExpertIndex
from moe.params import SamplingParams
from moe.prompts import Prompt
from moe.verify import check_verifiable, verify


@contextmanager
def loaded(args: argparse.Namespace, config: EngineConfig, workload: Workload | None = None) -> Iterator[LLM]:
    if args.show_config:
        err.print(config.describe(), style="dim", markup=False)
    measure_first_run(args.model, config)
    with LLM(args.model, config, workload=workload) as llm:
        if args.show_config:
            print_choices(llm.engine)
        for note in llm.notes:
            err.print(f"note: {note}", style="yellow", markup=False)
        yield llm


def generate(args: argparse.Namespace) -> int:
    config = engine_config(args)
    if args.verify:
        check_verifiable(config)
    with loaded(args, config) as llm:
        params = sampling_params(args, llm.recommended)
        if len(args.prompt) == 1 and not args.no_stream:
            llm.check_request(llm.encode(args.prompt[0]), params)  # before anything is printed
            out.print(args.prompt[0], end="", style="bold", markup=False)
            for piece in llm.stream(args.prompt[0], params):
                _write(piece)
            _write("\n")
        else:
            for answer in llm.generate(args.prompt, params, use_tqdm=False):
                out.print(answer.prompt, end="", style="bold", markup=False)
                _write(answer.outputs[0].text + "\n")
        print_report(llm.engine, err, args.per_layer)
    return _verified(args, config, args.prompt, params) if args.verify else 0


def _verified(args: argparse.Namespace, config: EngineConfig, prompts: Sequence[Prompt], params: SamplingParams) -> int:
    """Exit status: 1 if a token differs."""
    result = verify(args.model, config, prompts, params)
    err.print(str(result), markup=False)
    return 0 if result.num_equal == result.num_tokens else 1


def _write(text: str) -> None:
    """What the model said, character for character: a console would widen tabs and drop control characters."""
    out.file.write(text)
    out.file.flush()


def batch(args: argparse.Namespace) -> int:
    config = engine_config(args)
    if args.verify:
        check_verifiable(config)
    if not args.verify and args.record is None and is_served(args.model, config, args.input, args.output):
        return 0
    is_planned = config.batch.schedule == "layer_major"
    work = batch_workload(args.model, config, args.input, lines_done(args.output)) if is_planned else None
    with loaded(args, config, work) as llm:
        config = llm.engine.config
        with recording(args.record, lambda: {**live_state(llm), **checked_state(llm.engine)}):
            serve_file(llm, args.input, args.output)
        print_report(llm.engine, err, args.per_layer)
        prompts = first_requests(llm, args.input, args.verify)
    if args.verify and not prompts:
        err.print("nothing to verify: no line of the input can be served")
    elif args.verify:
        return _verified(args, config, prompts, SamplingParams(max_tokens=32))
    return 0


def trace(args: argparse.Namespace) -> int:
    prompts = read_prompts(args.prompts, args.limit)
    if args.trace.suffix not in {".npz", ".safetensors"}:
        raise ValueError(f"{args.trace} must end in .npz or .safetensors")
    with loaded(args, engine_config(args)) as llm:
        recorder = llm.engine.record()
        llm.generate(prompts, SamplingParams(max_tokens=args.max_tokens), use_tqdm=False)
        recorded = recorder.trace()
        recorded.save(args.trace)
        out.print(
            f"{args.trace}: {recorded.num_sequences} sequences, {recorded.num_tokens} tokens, "
            f"{recorded.num_layers} layers, top-{recorded.top_k} of {recorded.num_experts}",
            markup=False,
        )
        print_report(llm.engine, err, args.per_layer)
    return 0


def pack(args: argparse.Namespace) -> int:
    if args.model.suffix == ".gguf":
        if args.config is None:
            raise ValueError(f"{args.model}: --config must name a folder with config.json and tokenizer of its model")
        if args.calibrate:
            raise ValueError(f"{args.model} cannot be run to calibrate; pack it first, then the packed folder again")
        with open_gguf(args.model, args.config) as source:
            if args.dense:
                raise ValueError(f"{args.model}: --dense rounds the layers of a folder of safetensors, not of a .gguf")
            return _pack(args, source.checkpoint, source.experts, None)
    if args.config is not None:
        raise ValueError(f"--config belongs to a .gguf; {args.model} has its own configuration")
    blueprint = read_blueprint(args.model, trust_remote_code=args.trust_remote_code)
    dense = RoundedDense(blueprint.checkpoint, roundable(blueprint), args.dense) if args.dense else None
    if dense is not None and not dense.names and args.dense != "bf12":  # which loses nothing, so nothing is promised
        raise ValueError(f"{args.model}: no weight in floats is a linear layer of its own; leave --dense out")
    return _pack(args, blueprint.checkpoint, blueprint.index, dense)


def _pack(args: argparse.Namespace, checkpoint: Checkpoint, index: ExpertIndex, dense: RoundedDense | None) -> int:
    num_experts = sum(site.num_experts for site in index.sites)
    if not num_experts:
        raise ValueError(f"{args.model} has no experts to pack")
    if args.group is not None and args.experts is None:
        raise ValueError("--group says how experts are rounded; say to what with --experts int4 or int8")
    if args.calibrate and args.experts in (None, "bf12", "fp8"):
        raise ValueError(
            "--calibrate says how experts are rounded; say to what with --experts int4, int8, mxfp4 or nested"
        )
    to = None if args.experts is None else target_format(args.experts, args.group)
    seen = None
    if args.calibrate:
        seen = expert_inputs(args.model, args.calibrate, trust_remote_code=args.trust_remote_code)
    with batch_progress() as progress:
        task = progress.add_task("", total=None, figures="")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, figures=format_bytes(done))

        pack_experts(checkpoint, index, args.out, experts=to, calibration=seen, dense=dense, progress=show)
    out.print(f"{args.out}: {num_experts} experts packed", markup=False)
    if dense is not None:
        errors = dense.errors.values()
        lost = "nothing is lost"
        if errors:
            lost = f"|rounded - original| / |original| is {sum(errors) / len(errors):.3%}, at most {max(errors):.3%}"
        out.print(f"{len(dense.names)} other weights became {dense.format}; {lost}", markup=False)
    if to is not None:
        print_rounding(args.out, index, out)
    return 0


def demo(args: argparse.Namespace) -> int:
    if not args.model.is_dir():
        raise ValueError(
            f"the demo's model is not in {args.model}: it comes with the source, not with the package; run this in a "
            "clone of the repository, or give the folder of any Mixture-of-Experts checkpoint with --model"
        )
    # One thread: the matrices of this model are too small to share.
    config = EngineConfig(dtype="float32", threads=1, offload=OffloadConfig(budget="0.25"))
    return run_demo(args.model, config, out)
