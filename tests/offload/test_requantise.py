"""`moe pack --experts`: experts in fewer bits, their errors beside them, and the same answers from kernel and twin."""

import re
from pathlib import Path

import pytest
import torch
from test_pack import opened

from moe.calibrate import ExpertInputs
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.fit import run_observed
from moe.kernels.reference import activation_reference, dequantized
from moe.kernels.weights import Activation
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.checkpoint import Checkpoint
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from moe.offload.stores import FileStore, aligned_bytes
from moe.params import SamplingParams
from tests.families import tiny_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
# Largest relative error of normal weights (tests/kernels/test_encode.py).
BOUNDS = {"int8": 0.012, "int4": 0.11, "mxfp4": 0.14, "fp8": 0.03}


def weights_of(index, layer, expert):
    site, layout = index.sites[layer], index.layouts[layer]
    blob = aligned_bytes(layout.nbytes)
    FileStore(index).read_into(layer, expert, blob)
    act = Activation(kind="silu" if site.gated else "relu", gated=site.gated, interleaved=site.interleaved)
    return dequantized(layout.weights(layout.views(blob[None]), act), 0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("to", BOUNDS)
def test_errors_are_as_said(family, to, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "original", torch.bfloat16)
    blueprint = read_blueprint(folder)
    pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed", experts=target_format(to, None))
    packed = read_blueprint(tmp_path / "packed")
    assert packed.index.layouts[0].nbytes <= blueprint.index.layouts[0].nbytes
    errors = Checkpoint.open(tmp_path / "packed").packed["errors"]
    for layer, site in enumerate(blueprint.index.sites):
        for expert in (0, site.num_experts - 1):
            pairs = zip(weights_of(blueprint.index, layer, expert), weights_of(packed.index, layer, expert))
            for (w, rounded), said in zip(pairs, errors[layer][expert], strict=True):
                assert float((rounded - w).norm() / w.norm()) == pytest.approx(said)
                assert 0 < said < BOUNDS[to]


def opened_demo():
    blueprint = read_blueprint(DEMO)
    return blueprint.checkpoint, blueprint.index


def says(folder, kernel):
    config = EngineConfig(
        dtype="float32", kernel=kernel, offload=OffloadConfig(budget="3"), batch=BatchConfig(kv_tokens=256)
    )
    with LLM(folder, config) as llm:
        outputs = llm.generate([[5, 9, 30], [7]], SamplingParams(max_tokens=6, ignore_eos=True))
        return [o.outputs[0].token_ids for o in outputs]


@pytest.mark.parametrize("to", BOUNDS)
def test_the_kernel_says_what_its_twin_says(to, tmp_path):
    folder = tiny_checkpoint("qwen3_moe", tmp_path / "original")
    pack(*opened(folder, "qwen3_moe"), tmp_path / "packed", experts=target_format(to, None))
    assert says(tmp_path / "packed", "auto") == says(tmp_path / "packed", "reference")


def test_a_packed_folder_can_be_rounded_and_bad_requests(tmp_path, capsys):
    folder = tiny_checkpoint("mixtral", tmp_path / "original")
    assert main(["pack", str(folder), str(tmp_path / "packed")]) == 0
    arguments = ["pack", str(tmp_path / "packed"), str(tmp_path / "small"), "--experts", "int4", "--group", "8"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "worst expert" in said
    assert "this is lossy" in said
    assert read_blueprint(tmp_path / "small").index.layouts[0].gate_up_format.block == (1, 8)
    for options, message in (
        (["--experts", "int3"], "must be one of bf12, int8, int4, mxfp4, fp8, nested"),
        (["--experts", "mxfp4", "--group", "16"], "cannot be chosen for mxfp4"),
        (["--group", "16"], "--group says how experts are rounded"),
        (["--experts", "int4", "--group", "1"], "must be at least 8"),
    ):
        assert main(["pack", str(folder), str(tmp_path / "x"), *options]) == 2
        assert message in capsys.readouterr().err


def test_what_rounding_costs_is_measured_against_the_original(tmp_path, capsys):
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 8)
    packed = pack(*opened_demo(), tmp_path / "packed", experts=target_format("int4", None))
    assert main(["evaluate", str(packed), str(text), "--against", str(DEMO), "--window", "64", "--limit", "1"]) == 0
    said = capsys.readouterr().out
    assert "story: 63 tokens: loss" in said
    assert "KL 0.0000" not in said  # a control: the two runs are of two models


def test_the_exact_run_has_nothing_that_is_lossy(tmp_path, capsys):
    """Neither fewer bits nor guessed routes: those are of the run that is judged."""
    text, ahead = tmp_path / "story.txt", tmp_path / "ahead.safetensors"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 8)
    assert main(["fit-lookahead", str(DEMO), str(text), "--out", str(ahead), "--window", "64"]) == 0
    pack(*opened_demo(), tmp_path / "nested", experts=target_format("nested", None))
    exact = set()
    for model, settings in (
        (DEMO, [f"routing.lookahead={ahead}", "routing.pregate=restrict:2"]),
        (tmp_path / "nested", ["offload.bits=2"]),
    ):
        options = [word for setting in ["dtype=float32", *settings] for word in ("--set", setting)]
        command = ["evaluate", str(model), str(text), "--against", str(DEMO), "--window", "64", "--limit", "1"]
        assert main([*command, *options]) == 0
        said = capsys.readouterr().out
        assert "KL 0.0000" not in said
        exact.add(re.search(r"exact ([\d.]+)", said)[1])
    assert len(exact) == 1


def answers(index, layer, expert, x, activation):
    gate_up, down = weights_of(index, layer, expert)
    return activation_reference(x @ gate_up.T, activation) @ down.T


@pytest.mark.parametrize(("family", "to"), [("qwen3_moe", "int4"), ("gpt_oss", "mxfp4")])
def test_calibrated_on_a_text(family, to, tmp_path):
    """Answers to the text change less than by rounding to nearest, and the errors beside the experts are these."""
    torch.manual_seed(0)
    folder = tiny_checkpoint(family, tmp_path / "original")
    blueprint = read_blueprint(folder)
    seen = ExpertInputs([found.activation for found in blueprint.experts])
    with LLM(folder, EngineConfig(dtype="float32", batch=BatchConfig(kv_tokens=256))) as llm:
        run_observed(llm, torch.randint(0, 60, (4, 40)).tolist(), seen)
    experts = blueprint.index.sites[0].num_experts
    assert sum(len(seen.inputs(0, e)) for e in range(experts)) == 160 * blueprint.top_k
    errors = {}
    for name, calibration in (("nearest", None), ("calibrated", seen)):
        pack(*opened(folder, family), tmp_path / name, experts=target_format(to, None), calibration=calibration)
        packed, errors[name] = read_blueprint(tmp_path / name).index, []
        for expert in range(experts):
            x, act = seen.inputs(1, expert), seen.activation(1)
            y, rounded = (answers(index, 1, expert, x, act) for index in (blueprint.index, packed))
            errors[name].append(float((rounded - y).norm() / y.norm()) if len(x) else None)
    assert says(tmp_path / "calibrated", "auto") == says(tmp_path / "calibrated", "reference")
    said = Checkpoint.open(tmp_path / "calibrated").packed["output_errors"][1]
    if family == "qwen3_moe":  # without biases
        assert said == pytest.approx(errors["calibrated"], rel=1e-4)
    means = {name: sum(e for e in of if e is not None) for name, of in errors.items()}
    assert 0 < means["calibrated"] < means["nearest"], means


def test_calibration_by_the_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Once upon a time there was a small dog. " * 40)
    arguments = ["pack", str(DEMO), str(tmp_path / "int4"), "--calibrate", str(tmp_path / "text.txt"), "--experts"]
    assert main([*arguments, "int4"]) == 0
    said = capsys.readouterr().out
    assert "answers to the text" in said
    assert main([*arguments, "fp8"]) == 2
    assert "--calibrate says how experts are rounded" in capsys.readouterr().err
