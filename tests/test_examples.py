"""The demo model, its prompts, and the script that trains such a model."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts that stand side by side, not a package

from tiny_moe_model import Experts, Routed, Shape, TinyMoE, balance_loss, grown, load_hugging_face  # noqa: E402
from tiny_moe_text import encode, read_domains, train_tokenizer  # noqa: E402
from train_tiny_moe import Settings, evaluate, train  # noqa: E402

TINY = Shape(
    vocab_size=320,
    hidden_size=32,
    expert_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    num_experts=6,
    top_k=3,
    max_positions=64,
)
CLOSE = 1e-5  # fp32: the same sums in another order, relative to the largest logit


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def write_texts(folder: Path) -> Path:
    """Two domains of repetitive text: a plain file, and a folder with a `.jsonl` and a Python file."""
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "bird",
        "sees",
        "likes",
        "finds",
        "red",
        "small",
        "old",
        "house",
        "tree",
        "river",
        "and",
        "then",
    ]
    folder.mkdir()
    story = ". ".join(" ".join(rng.choices(words, k=7)) for _ in range(900))
    (folder / "stories.txt").write_text(story)
    (folder / "sums").mkdir()
    lines = []
    for _ in range(500):
        a, b = rng.randrange(50), rng.randrange(50)
        lines.append(json.dumps({"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}"}))
    (folder / "sums" / "train.jsonl").write_text("\n".join(lines) + "\n\n")
    (folder / "sums" / "table.py").write_text("\n".join(f"assert {i} + {i} == {2 * i}" for i in range(200)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_moe")
    settings = Settings(
        texts=write_texts(folder / "texts"),
        out=folder / "straight",
        shape=TINY,
        steps=20,
        batch_size=4,
        accumulate=2,
        sequence_length=32,
        learning_rate=1e-2,
        warmup=2,
        dtype="float32",
        save_every=10,
    )
    return settings, train(settings)


def test_the_loss_falls(trained):
    settings, report = trained
    untrained = TinyMoE(settings.shape)
    untrained.initialise(settings.seed)
    domains = read_domains(settings.texts)
    data = encode(domains, train_tokenizer(domains, 320), settings.sequence_length)
    assert set(report) == {"stories", "sums"}
    for name, score in report.items():
        before = evaluate(untrained, data[name].held_out, settings.sequence_length)
        assert before.loss == pytest.approx(math.log(320), abs=0.1)  # it knows nothing
        assert score.loss < before.loss - 1, f"{name} went from {before.loss} to {score.loss}"
        assert 0.3 < score.usage_entropy <= 1.0


def test_the_saved_folder_is_a_mixtral_model_with_the_same_logits(trained, tmp_path):
    settings, _ = trained
    ours = load_hugging_face(settings.out)
    theirs, info = MixtralForCausalLM.from_pretrained(settings.out, output_loading_info=True)
    assert not any(info.values()), info
    token_ids = torch.randint(0, 320, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, (logits, _) = theirs(token_ids).logits, ours(token_ids)
        assert relative_error(logits, expected) < CLOSE

        # control: the same experts in another order behind the same router are another model
        tensors = load_file(settings.out / "model.safetensors")
        for name in [n for n in tensors if ".experts.0." in n]:
            swapped = name.replace(".experts.0.", ".experts.1.")
            tensors[name], tensors[swapped] = tensors[swapped], tensors[name]
        (tmp_path / "config.json").write_text((settings.out / "config.json").read_text())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        permuted = MixtralForCausalLM.from_pretrained(tmp_path)(token_ids).logits
        assert relative_error(logits, permuted) > 100 * CLOSE


def test_the_checkpoint_holds_the_weights_that_were_saved(trained):
    settings, _ = trained
    stored = load_file(settings.out / "checkpoint.safetensors")
    for name, p in load_hugging_face(settings.out).named_parameters():
        assert torch.equal(stored[f"weight/{name}"], p), name


def test_the_saved_tokenizer_gives_back_every_text(trained):
    settings, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(settings.out)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text in ("the cat sees", "  two  spaces\n\n\tand , tabs .", "ünïcode 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_resumed_run_ends_with_the_same_bits(trained):
    settings, _ = trained
    resumed = replace(settings, out=settings.out.parent / "resumed", stop_at=10)
    train(resumed)
    half, straight = resumed.out / "model.safetensors", load_file(settings.out / "model.safetensors")
    assert any(not torch.equal(tensor, straight[name]) for name, tensor in load_file(half).items())
    train(replace(resumed, stop_at=None))
    for name, tensor in load_file(half).items():
        assert torch.equal(tensor, straight[name]), name

    with pytest.raises(ValueError, match="other settings"):
        train(replace(resumed, learning_rate=2e-2))


def test_training_further_starts_from_the_given_weights(trained, tmp_path):
    settings, report = trained
    further = replace(settings, out=tmp_path, start_from=settings.out, steps=1, learning_rate=0.0)
    assert train(further) == report  # a step of size 0 changes nothing
    with pytest.raises(ValueError, match=r"num_experts can only grow .* has 6, not 5"):
        train(replace(further, out=tmp_path / "other", shape=replace(TINY, num_experts=5)))
    with pytest.raises(ValueError, match="hidden_size can not change"):
        train(replace(further, out=tmp_path / "other", shape=replace(TINY, hidden_size=2 * TINY.hidden_size)))


def test_a_grown_model_begins_from_what_was_learnt(trained):
    settings, report = trained
    model = load_hugging_face(settings.out)
    domains = read_domains(settings.texts)
    data = encode(domains, train_tokenizer(domains, 320), settings.sequence_length)
    for changed in (
        {"expert_size": 2 * TINY.expert_size + 8},  # what is new adds nothing: the same model
        {"num_layers": 2 * TINY.num_layers + 1, "num_experts": TINY.num_experts + 5},
    ):
        shape = replace(TINY, **changed)
        larger = grown(model, shape, seed=1)
        assert larger.shape == shape
        for name, score in report.items():
            loss = evaluate(larger, data[name].held_out, settings.sequence_length).loss
            assert loss == pytest.approx(score.loss, rel=1e-5) if len(changed) == 1 else loss < math.log(320) - 1
        assert all((p != 0).any() for p in larger.layers[-1].experts.gate_up.unbind())  # nothing is left untold
        rows = larger.layers[0].experts.router.weight
        assert len({tuple(row) for row in rows.tolist()}) == shape.num_experts  # no two experts are chosen alike


@pytest.mark.parametrize("favoured", [range(6), range(5), range(3)])  # all, one never chosen, all tokens on three
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
def test_sorted_experts_equal_a_loop_over_tokens(num_tokens, favoured):
    generator = torch.Generator().manual_seed(num_tokens)
    layer = Experts(TINY)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    with torch.no_grad():
        x = torch.randn(num_tokens, TINY.hidden_size, generator=generator)
        x[:, 0] = 1.0
        layer.router.weight[[e for e in range(6) if e not in favoured], 0] = -50.0
        y, routed = layer(x)
        assert routed.topk_ids.shape == (num_tokens, TINY.top_k)
        assert set(routed.topk_ids.flatten().tolist()) <= set(favoured)
        for t in range(num_tokens):
            probs = torch.softmax(layer.router(x[t]).double(), dim=-1)
            weights, chosen = probs.topk(TINY.top_k)
            expected = torch.zeros(TINY.hidden_size, dtype=torch.float64)
            for weight, e in zip(weights / weights.sum(), chosen.tolist()):
                gate, up = (layer.gate_up[e].double() @ x[t].double()).chunk(2)
                expected += weight * (layer.down[e].double() @ (torch.nn.functional.silu(gate) * up))
            assert relative_error(y[t].double(), expected) < CLOSE


def test_balance_loss_is_that_of_transformers_and_least_when_even():
    logits = torch.randn(63, 6, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(dim=-1)
    ours = balance_loss([Routed(probs, probs.topk(3).indices)])
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=3)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    even = torch.arange(60).view(20, 3) % 6
    assert float(balance_loss([Routed(torch.full((20, 6), 1 / 6), even)])) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .txt"),
        ({"picture.png": "not text"}, "holds no .txt"),
        ({"a.jsonl": '{"text": "fine"}\n{"text": \n'}, "a.jsonl, line 2 is not JSON"),
        ({"a.txt": "one", "a.md": "two"}, "two entries of .* give the domain 'a'"),
    ],
)
def test_unusable_texts_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_domains(tmp_path)


def test_a_domain_shorter_than_a_sequence_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a few words")
    domains = read_domains(tmp_path)
    with pytest.raises(ValueError, match=r"domain 'a' has .* must be more than sequence_length"):
        encode(domains, train_tokenizer(domains, 300), 32)


def test_the_command_line_says_what_is_wrong(tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_tiny_moe.py"), str(tmp_path / "missing"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "missing is not a folder" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLES / "tinymoe")


def test_tinymoe_loads_whole_and_says_what_our_own_model_says(tokenizer):
    theirs, info = AutoModelForCausalLM.from_pretrained(
        EXAMPLES / "tinymoe", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    token_ids = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, routing = load_hugging_face(EXAMPLES / "tinymoe")(token_ids)
        assert relative_error(logits, theirs(token_ids).logits) < CLOSE
    assert [routed.probs.shape[1] for routed in routing] == [16] * 6
    assert sum(f.stat().st_size for f in (EXAMPLES / "tinymoe").iterdir()) < 17_000_000


def test_the_prompts_are_short_distinct_and_of_four_domains(tokenizer):
    items = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({item["prompt"] for item in items}) == len(items) >= 210
    assert {item["domain"] for item in items} == {"stories", "mathematics", "shakespeare", "code"}
    for item in items:
        assert 10 <= len(tokenizer(item["prompt"]).input_ids) <= 120, item


def test_the_batch_file_is_in_the_openai_format():
    requests = [json.loads(line) for line in (EXAMPLES / "batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({r["custom_id"] for r in requests}) == len(requests) == 12
    for request in requests:
        assert set(request) == {"custom_id", "method", "url", "body"}
        assert (request["method"], request["url"]) == ("POST", "/v1/completions")
        assert set(request["body"]) == {"model", "prompt", "max_tokens", "temperature"}


COMMANDS = {  # prints what it is asked for; more names of hosts than a pipe holds
    "torchrun": 'echo torchrun "$@"',
    "srun": 'while [ "$1" != torchrun ]; do echo srun "$1"; shift; done; "$@"',
    "scontrol": 'echo first; for n in $(seq 20000); do echo "node-$n"; done',
}


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("one_node.sh", {"RANKS": "3"}, "--nproc-per-node 3 -m moe.launch.torchrun A B --experts-in-memory 0.25"),
        ("two_nodes.sh", {"NODE": "1", "HEAD": "10.0.0.1"}, "--node-rank 1 --master-addr 10.0.0.1"),
        (
            "slurm.sbatch",
            {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NODELIST": "n[1-9]"},
            "--rdzv-endpoint first:29500 -m moe.launch.torchrun A B",
        ),
    ],
)
def test_launch_scripts_start_what_they_say(script, environment, words, tmp_path):
    for name, does in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    where = {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
    run = subprocess.run(
        ["bash", str(EXAMPLES / "launch" / script), "A", "B"], env=where, capture_output=True, text=True, check=True
    )
    assert words in run.stdout
    assert ("srun 64" in run.stdout) == (script == "slurm.sbatch")
