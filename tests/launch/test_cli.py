"""The command line on the demo model: what is printed, what is written, and the exit status."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from moe.launch import ray_cluster, torchrun
from moe.launch.cli import main, run_guarded
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.trace import RoutingTrace
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import ROOT, TINYMOE, config
from tests.patience import PATIENCE_S

FP32 = ["--set", "dtype=float32", "--set", "batch.max_sequences=4"]
PROMPT = "Once upon a time, there was"


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("1.0")) as llm:
        yield llm


def answer(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**params))[0].outputs[0].text


def run(capfd, *arguments):
    """Exit status, standard output and standard error of `moe …`."""
    status = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_importing_the_command_line_and_the_settings_is_cheap():
    heavy = "{'torch', 'transformers', 'scipy', 'highspy', 'numpy', 'fastapi', 'httpx'}"
    for code in ("import sys, moe.launch.cli as c; c._parser()", "import sys, moe.config, moe.params, moe.openai"):
        subprocess.run([sys.executable, "-c", f"{code}; assert not {heavy} & set(sys.modules)"], cwd=ROOT, check=True)


def test_every_command_names_a_function_that_exists():
    from moe.launch.cli import _function, _parser

    (commands,) = [a.choices for a in _parser()._actions if isinstance(a.choices, dict)]
    for command in commands.values():
        assert callable(_function(command.get_default("run")))


def test_show_config(capfd):
    _, _, err = run(capfd, "generate", TINYMOE, "--prompt", "A", "--max-tokens", 1, "--show-config", *FP32)
    assert "batch.max_sequences = 4" in err
    assert "kernel is cpu: compiled for this processor" in " ".join(err.split())


def test_a_fault_of_ours_is_told_from_a_users(capfd, monkeypatch):
    def fault(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(LLM, "stream", fault)
    status, _, err = run(capfd, "generate", TINYMOE, "--prompt", "A", *FP32)
    assert status == 1
    assert "a fault of the program, ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
    _, _, err = run(capfd, "--debug", "generate", TINYMOE, "--prompt", "A", *FP32)
    assert "Traceback" in err


@pytest.mark.parametrize("error", [MemoryError(), ImportError("libx.so: failed to map segment from shared object")])
def test_too_little_memory_is_a_sentence(capfd, monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr("moe.launch.info.info", run)
    assert main(["info", str(TINYMOE)]) == 2
    said = capfd.readouterr().err
    assert said.startswith("moe info: not enough memory")
    assert str(error) in said


def test_info(capfd, tmp_path):
    status, out, _ = run(capfd, "info", TINYMOE)
    assert status == 0
    for words in ("MixtralForCausalLM", "1024 tokens", "6 layers, 96 experts, top-2, 192 x 128, bfloat16", "144.0 KiB"):
        assert words in out, out
    assert "packed, continuous" in out
    assert "at least 24 experts" in out
    assert "1 expert (" in out
    for target in ("int8", "int4", *(f"nested, {bits} bits" for bits in (2, 3, 4, 8))):
        assert re.search(rf"as {target} +\d.* in all, \d+% of them fit here; lossy", out), (target, out)
    dense = sum(t.nbytes for n, t in tensors(TINYMOE).items() if "experts" not in n)
    assert f"{dense / 2**20:.1f} MiB" in out
    status, out, _ = run(capfd, "info", tiny_checkpoint("jamba", tmp_path))
    assert status == 0
    assert "one sequence at a time" in out


def tensors(folder):
    from moe.offload.checkpoint import Checkpoint

    return Checkpoint.open(folder).tensors


def test_generate_streams_what_generate_returns(capfd, llm):
    status, out, err = run(
        capfd, "generate", TINYMOE, "--prompt", PROMPT, "--max-tokens", 20, "--experts-in-memory", "0.25", *FP32
    )
    assert "batch.max_sequences" not in err
    assert status == 0
    assert out == PROMPT + answer(llm, PROMPT, max_tokens=20) + "\n"
    assert "24 of 96 (25.0%)" in err
    assert "hits" in err
    assert "peak" in err


def test_generate_with_everything(capfd, llm):
    prompts = ("def f(x):\n\treturn x[:a:] # ", "[bold]ROMEO:[/bold]")
    sampled = ["--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--seed", 3, "--stop", "e", "--max-tokens", 12]
    status, out, err = run(
        capfd,
        "generate",
        TINYMOE,
        *[a for p in prompts for a in ("--prompt", p)],
        *sampled,
        "--per-layer",
        "--verify",
        *FP32,
        "--set",
        "offload.budget=5",
    )
    assert status == 0
    params = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3, "stop": "e", "max_tokens": 12}
    texts = [answer(llm, p, **params) for p in prompts]
    assert out.replace(" " * 8, "\t").replace(" " * 4, "\t") == "".join(
        p + t + "\n" for p, t in zip(prompts, texts)
    ).replace(" " * 4, "\t")
    assert "(100.00%)" in err
    assert "verified 2 prompts" in err
    layers = [line.split() for line in err.splitlines() if line.strip()[:1].isdigit() and "B" in line]
    assert [row[0] for row in layers] == list("012345")


def test_a_token_that_differs_fails_a_verification(capfd, tmp_path, monkeypatch):
    from moe import verify

    right = verify.compare
    monkeypatch.setattr(verify, "compare", lambda a, b: dataclasses.replace(right(a, b), num_equal=1))
    (tmp_path / "in.jsonl").write_text((ROOT / "examples" / "batch.jsonl").read_text().splitlines()[0])
    for command in (["generate", TINYMOE, "--prompt", "A"], ["batch", TINYMOE, tmp_path / "in.jsonl", tmp_path / "o"]):
        more = ["--verify", 1] if command[0] == "batch" else ["--verify", "--max-tokens", 3]
        status, _, err = run(capfd, *command, *more, *FP32)
        assert status == 1
        assert "1 of " in err


def test_answers_are_printed_character_for_character(capfd, llm, monkeypatch):
    odd = "\ta :cat: [red]x[/red]\x0b\x1b :smile:\u2028end"
    monkeypatch.setattr(LLM, "stream", lambda *_: iter([odd[:5], odd[5:]]))
    _, out, _ = run(capfd, "generate", TINYMOE, "--prompt", "P", *FP32)
    assert out == "P" + odd + "\n"


def test_batch_and_verify(capfd, llm, tmp_path):
    lines = (ROOT / "examples" / "batch.jsonl").read_text().splitlines()[:3]
    lines += ["not json", json.dumps({"custom_id": "x", "url": "/v1/completions", "body": {"prompt": [7] * 2000}})]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["batch", TINYMOE, source, target, "--experts-in-memory", "0.25", *FP32]
    status, _, err = run(capfd, *arguments, "--verify", 4)
    assert status == 0
    assert "5 of 5 lines are in" in err
    assert "(0 from an earlier run, 2 with errors)" in err
    assert "verified 3 prompts" in err
    assert "(100.00%)" in err
    results = {r["id"]: r for r in map(json.loads, target.read_text().splitlines())}
    for number, line in enumerate(lines[:3], 1):
        body = json.loads(line)["body"]
        text = results[f"line-{number}"]["response"]["body"]["choices"][0]["text"]
        assert text == answer(llm, body["prompt"], max_tokens=body["max_tokens"])
    before = target.read_bytes()
    status, _, err = run(capfd, *arguments)
    assert status == 0
    assert "5 of 5 lines are in" in err
    assert "(5 from an earlier run, 2 with errors)" in err
    assert "experts in memory" not in err  # nothing was loaded
    assert target.read_bytes() == before
    status, _, err = run(capfd, *arguments, "--verify", 4)  # the model is loaded for it
    assert (status, "5/5" in err, "0/?" in err, target.read_bytes()) == (0, True, False, before)


def test_trace(capfd, llm, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ["Once upon a time", "line\u2028separator\x85in it", "plain text too"]
    prompts.write_text("\n".join([json.dumps({"prompt": t}, ensure_ascii=False) for t in texts[:2]] + [texts[2], ""]))
    status, out, _ = run(capfd, "trace", TINYMOE, prompts, tmp_path / "trace.npz", "--max-tokens", 4, *FP32)
    assert status == 0
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    lengths = [len(llm.encode(t)) + 3 for t in texts]
    assert trace.sequence_lengths.tolist() == lengths
    assert trace.expert_ids.shape == (sum(lengths), 6, 2)
    assert (trace.num_experts, trace.model) == (16, "tinymoe")
    assert trace.phase.sum() == 3 * 3
    assert np.allclose(trace.weights.sum(-1), 1, atol=1e-5)
    assert f"3 sequences, {sum(lengths)} tokens, 6 layers, top-2 of 16" in out
    status, _, _ = run(
        capfd, "trace", TINYMOE, prompts, tmp_path / "t.safetensors", "--max-tokens", 1, "--limit", 2, *FP32
    )
    assert status == 0
    assert RoutingTrace.load(tmp_path / "t.safetensors").num_sequences == 2


def test_pack_and_serve_it(capfd, llm, tmp_path):
    status, out, _ = run(capfd, "pack", TINYMOE, tmp_path / "packed")
    assert status == 0
    assert "96 experts packed" in out
    status, out, _ = run(capfd, "info", tmp_path / "packed")
    assert "packed" in out
    assert "original checkpoint" not in out
    status, out, _ = run(capfd, "generate", tmp_path / "packed", "--prompt", PROMPT, "--max-tokens", 9, *FP32)
    assert (status, out) == (0, PROMPT + answer(llm, PROMPT, max_tokens=9) + "\n")
    status, _, err = run(capfd, "pack", TINYMOE, tmp_path / "packed")
    assert status == 2
    assert "exists already" in err


def test_demo(capfd):
    status, out, _ = run(capfd, "demo", "--model", TINYMOE)
    assert status == 0
    assert "Once upon a time, there was a little girl named" in out
    assert "24 of 96" in out
    assert "96 of 96" in out
    assert "256 of 256 tokens equal (100.00%)" in out


def test_demo_fails_if_a_token_differs(monkeypatch, capfd):
    from moe.launch import demo

    right = demo.compare
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(demo, "compare", lambda a, b: dataclasses.replace(right(a, b), num_equal=1))
    assert run(capfd, "demo", "--model", TINYMOE)[0] == 1


def test_settings_file(capfd, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('dtype = "float32"\n[offload]\nbudget = 7\n')
    status, _, err = run(capfd, "generate", TINYMOE, "--prompt", "A", "--max-tokens", 1, "--config", file)
    assert status == 0
    assert "7 of 96" in err


def test_interrupted(capfd, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupt)
    status, _, err = run(capfd, "generate", TINYMOE, "--prompt", "A", *FP32)
    assert status == 130
    assert "interrupted" in err


def test_options_of_placing_may_stand_in_a_file(tmp_path, capfd):
    from moe.launch.cli import _parsed

    file = tmp_path / "place.toml"
    file.write_text('topology = "laptopx4"\nreplicas = 0.125\nout = "plan.json"\nseed = 1\n')
    for words in (["--config", file], [f"--config={file}"]):
        args = _parsed(["--debug", "place", "trace.npz", *map(str, words), "--seed", "3"])
        assert (args.topology, args.replicas, str(args.out), args.seed) == ("laptopx4", 0.125, "plan.json", 3)
    assert str(_parsed(["generate", "m", "--prompt", "place", "--config", "x.toml"]).config) == "x.toml"
    for text, sentence in (
        ("seed = ", "not a valid TOML file"),
        ("sed = 1", "unrecognized arguments: --sed=1"),
        ("seed = [1]", "seed must be text or a number"),
        ('objective = "all"', "invalid choice: 'all'"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(["place", "trace.npz", "--out", "p", "--config", str(file)])
        assert sentence in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", "t", "p", "--config", "absent.toml"])
    assert "there is no absent.toml; name what is there" in capfd.readouterr().err


GUARDED = (
    "import sys; from argparse import Namespace; from moe.launch.cli import run_guarded; sys.path.insert(0, {!r}); "
)
GUARDED += "sys.exit(run_guarded('moe x', Namespace(debug=False), lambda: __import__('lazy').status))"


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        # as transformers does, so that it would be a fault of ours
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\nexcept BaseException:\n    raise ImportError",
        # a thread that the end of the process would wait for
        "threading.Thread(target=threading.Event().wait).start(); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    ],
)
def test_an_interrupt_within_an_import_is_one_sentence(tmp_path, body):
    (tmp_path / "lazy.py").write_text(f"import os, signal, threading, time\n{body}\nstatus = 0\n")
    ran = subprocess.run(
        [sys.executable, "-c", GUARDED.format(str(tmp_path))], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (ran.returncode, ran.stderr) == (130, "moe x: interrupted\n")


@pytest.mark.parametrize("printed", ["print('x' * 70000)", "out.print('x' * 70000)", "out.print(Table('x' * 70000))"])
def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path, printed):
    """By whatever a command prints."""
    (tmp_path / "lazy.py").write_text(
        f"from rich.table import Table\nfrom moe.launch.console import out\n{printed}\n{printed}\nstatus = 0\n"
    )
    words = [sys.executable, "-c", GUARDED.format(str(tmp_path))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(PATIENCE_S)) == ("", 0)


def test_closed_output_is_no_failure():
    printed = ["-c", "from moe.launch.console import err, out; out.print('x'); err.print('x')"]
    for closed, ran in (("1", printed), ("2", printed), ("1 2", ["-m", "moe", "info", str(TINYMOE)])):
        words = "; ".join(f"os.close({n})" for n in closed.split())
        command = f"import os, sys; {words}; os.execv(sys.executable, [sys.executable, *{ran}])"
        assert subprocess.run([sys.executable, "-c", command], capture_output=True, timeout=PATIENCE_S).returncode == 0


def rank_runs(arguments):
    return torchrun.main(arguments)


def test_a_finished_batch_needs_no_model_no_host_and_no_rank(capfd, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('not json\n\n{"custom_id": "x"}\n')
    error = {"code": "invalid_request", "message": "m"}
    rows = [
        {"id": f"line-{n}", "custom_id": name, "response": None, "error": error} for n, name in ((3, "x"), (1, None))
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, arguments = target.read_bytes(), [str(tmp_path / "no model"), str(source), str(target)]
    said = "2 of 2 lines are in"
    status, _, err = run(capfd, "batch", *arguments)
    assert (status, said in " ".join(err.split())) == (0, True), err
    assert ray_cluster.main([*arguments, "--hosts", "2"]) == 0
    assert said in " ".join(capfd.readouterr().err.split())
    assert spawn(2, rank_runs, arguments) == [0, 0]
    assert target.read_bytes() == before


@pytest.mark.parametrize("parser", [torchrun.parser, ray_cluster.make_parser])
def test_ranks_and_hosts_look_at_their_files_too(capsys, tmp_path, parser):
    hosts = ["--hosts", "2"] if parser is ray_cluster.make_parser else []
    args = parser().parse_args(["model", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *hosts])
    assert run_guarded("ranks", args, lambda: 0) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text("{}")
    assert run_guarded("ranks", args, lambda: 0) == 0
    assert run_guarded("ranks", args, lambda: 0, is_first=False) == 0
