"""`moe plan` in words: what a model would do, from stored figures, here or with another disk, memory or link."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import EngineConfig
from moe.engine.known import probed, this_machine
from moe.launch import measure
from moe.launch.cli import main
from moe.launch.plan_inputs import even_routing, replay, settled, sizes_of
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.policy import Access, Lfu, misses_of, simulate
from moe.offload.requantise import sizes
from moe.placement.cost import Use
from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads, disk_of, save_machine
from moe.placement.plan import Plan
from tests.families import IN_SLOTS, tiny_checkpoint

UNPACKED = {
    "phimoe_longrope",
    "minimax",
    "jamba",
    "llama4",
    "switch_transformers",
}  # transformers' own cache has their KV
TINYMOE = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"


@pytest.fixture
def probe_file(tmp_path):
    rates = [Rate(work, "bfloat16", 1, 1, 1e-10) for work in ("expert", "dense")]
    reads = [Reads(how, 1 << 18, depth, 1e9) for how in ("direct", "cached") for depth in (1, 2)]
    machine = Machine(
        name=this_machine(),
        when="today",
        cores=2,
        memory={1: 1e10},
        rates=tuple(rates),
        attention=Attention(1e9, 1e10),
        overhead=Overhead(*[1e-4] * 9),
        copy_bytes_per_s=1e9,
        disks={disk_of(TINYMOE): tuple(reads)},
    )
    save_machine(tmp_path / "probe.json", machine)
    return str(tmp_path / "probe.json")


def plan(capfd, *words):
    status = main(["plan", str(TINYMOE), *map(str, words)])
    out, err = capfd.readouterr()
    return status, out, err


def test_a_slower_disk_makes_reads_bind(capfd, probe_file):
    status, out, _ = plan(capfd, "--probe-file", probe_file, "--slots", 0.25, "--against", 10)
    assert status == 0
    for words in ("24 of 96", "even routing is assumed", "reading ahead hides", "measured 10.0 tokens/s:"):
        assert words in " ".join(out.split()), out
    _, slow, _ = plan(capfd, "--probe-file", probe_file, "--slots", 0.25, "--nvme", "1MB/s")
    assert "waiting" in slow


def test_slots_are_said_as_budgets_are(capfd, probe_file):
    nbytes = read_blueprint(TINYMOE).index.layouts[0].nbytes
    for said, slots in (("24", 24), ("1 expert", 1), ("100%", 96), ("0.001", 1), ("200", 96), (f"{30 * nbytes} B", 30)):
        status, out, err = plan(capfd, "--probe-file", probe_file, "--slots", said)
        assert (status, f" {slots} of 96" in " ".join(out.split())) == (0, True), out + err


@pytest.mark.parametrize("family", IN_SLOTS)
def test_a_token_of_kv_takes_what_the_engine_sees_it_take(family, tmp_path):
    """Whether a layer keeps keys and values of its heads, or latents that they are made of."""
    folder = tiny_checkpoint(family, tmp_path / "model", torch.float32)
    with LLM(folder, EngineConfig(threads=1, dtype="float32")) as llm:
        dense = llm.engine.loaded.dense
        assert dense.tried.kv_bytes == (sizes_of(llm.engine.blueprint).kv_bytes if dense.is_packed else 0)
        assert dense.is_packed == (family not in UNPACKED)


def test_memory_holds_more_in_fewer_bits(capfd, probe_file):
    status, out, _ = plan(capfd, "--probe-file", probe_file, "--workload", "1x16+8", "--ram", "5MB")
    assert status == 0
    flat = " ".join(out.split())
    held = int(re.search(r"(\d+) of 96", flat)[1])
    shares = dict(re.findall(r"[:;] ([a-z0-9]+(?:, \d bits)?) (\d+)%", flat))
    assert "lossy but for bf12:" in out
    assert set(shares) == {"bf12", "int8", "int4", "mxfp4", "fp8", *(f"nested, {bits} bits" for bits in (2, 3, 4, 8))}
    index = read_blueprint(TINYMOE).index
    least, most = (100 * slots * index.layouts[0].nbytes for slots in (held, held + 1))
    for name, (total, _) in sizes(index).items():
        assert min(100, least / total) - 1 <= int(shares[name]) <= min(100, most / total) + 1, name  # per cent, rounded
    assert int(shares["int8"]) < int(shares["int4"]) < int(shares["nested, 2 bits"])


def test_more_ranks_or_replicas(capfd, probe_file):
    status, out, _ = plan(
        capfd,
        "--probe-file",
        probe_file,
        "--ram",
        "1GiB",
        "--ranks",
        1,
        2,
        "--workload",
        "4x64+64",
        "--link",
        "1GB,1e-4",
    )
    assert status == 0
    assert "exchange" in out
    assert "replica" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ram", "1MB"), "hold no expert"),
        (("--ram", "many"), "--ram (many) must be bytes"),
        (("--workload", "8x64"), "must be SEQUENCESxPROMPT+NEW"),
        (("--workload", "0x64+1"), "must be SEQUENCESxPROMPT+NEW"),
        (("--gpus", "4xa100"), "published figures, such as 4xh200"),
        (("--gpus", "0xh200"), "published figures, such as 4xh200"),
        (("--slots", "1.0", "--against", "fast.jsonl"), "fast.jsonl"),
        (("--slots", "1.0", "--against", "0"), "above 0"),
        (("--ranks", "2", "--slots", "1.0"), "2 ranks need a link"),
        (("--slots", "1"), "--slots 1 could be one expert or all of them"),
        (("--slots", "1.5"), "--slots '1.5' is not understood; give bytes (6GiB)"),
        (("--slots", "0"), "must hold an expert"),
        (("--slots", "10 B"), "must hold an expert"),
        (("--slots", "3", "--ranks", "4", "--link", "1GB,1e-5"), "of each rank, 4 at least"),
        (("--ranks", "17", "--link", "1GB,1e-5"), "rank 16 of 17 would have none of the 16 experts of a layer"),
        (("--link", "fast"), "must be BYTES/s,SECONDS"),
        (("--link", "1GB,nan"), "must be BYTES/s,SECONDS"),
        (("--workload", "1x1000+1000"), "is longer than the model's context, 1024 tokens"),
        (("--workload", "99999999x1+1"), "at most 4096 sequences"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capfd, probe_file, words, said):
    status, _, err = plan(capfd, "--probe-file", probe_file, *words)
    assert status == 2
    assert said in err


def test_without_figures_it_says_what_to_do(capfd, tmp_path):
    status, _, err = plan(capfd, "--probe-file", tmp_path / "none.json")
    assert status == 2
    assert "run `moe probe" in err


def test_gpus_by_published_figures(capfd, tmp_path):
    status, out, _ = plan(capfd, "--probe-file", tmp_path / "none.json", "--gpus", "2xh200", "--workload", "8x64+64")
    assert status == 0
    text = " ".join(out.split())
    for words in ("2, each a", "96 of 96", "NVIDIA H200, published", "no run will be faster", "host memory"):
        assert words in text, out
    _, short, _ = plan(capfd, "--gpus", "h200", "--slots", "0.1", "--ram", "1MB")
    assert "on disk" in " ".join(short.split())


def test_a_plan_of_moe_place_says_where_experts_are(capfd, tmp_path, probe_file):
    here = ("--probe-file", probe_file, "--slots", "1.0", "--link", "1MB,1e-4", "--workload", "4x64+64")
    blocks, replicated = Plan.contiguous(6, 16, 2), tmp_path / "all.json"
    blocks.save(tmp_path / "blocks.json")
    everywhere = np.tile(np.arange(16, dtype=np.int16), (6, 2))
    Plan(phy2log=everywhere, num_experts=16, num_ranks=2).save(replicated)
    _, plain, _ = plan(capfd, *here, "--ranks", 2)
    _, same, _ = plan(capfd, *here, "--plan", tmp_path / "blocks.json")
    assert plain.splitlines()[:-3] == same.splitlines()[:-3]
    _, none_travels, _ = plan(capfd, *here, "--plan", replicated)
    assert "exchange 1.2 ms" in " ".join(none_travels.split())  # two rounds of 0.1 ms a layer, no byte
    assert "exchange 1.2 ms" not in " ".join(plain.split())
    status, _, err = plan(capfd, *here, "--ranks", 3, "--plan", replicated)
    assert status == 2
    assert "on 2 ranks" in err


def test_here_measures_what_is_not_known(capfd, tmp_path, monkeypatch, probe_file):
    known = probed(EngineConfig(probe_file=probe_file))
    monkeypatch.setattr(measure, "probe", lambda folder, machine: known)
    file = tmp_path / "new.json"
    assert plan(capfd, "--probe-file", file, "--slots", "1.0", "--here")[0] == 0
    monkeypatch.setattr(measure, "probe", None)
    assert plan(capfd, "--probe-file", file, "--slots", "1.0", "--here")[0] == 0


@pytest.mark.parametrize(
    ("tokens", "why"),
    [(6, "5 steps of decoding are fewer than 16"), (18, r"of \d+ reads most may be the first of one of 96")],
)
def test_a_cold_run_is_not_compared(capfd, tmp_path, probe_file, tokens, why):
    line = {"custom_id": "1", "body": {"prompt": "Once upon", "max_tokens": tokens, "ignore_eos": True}}
    (tmp_path / "in.jsonl").write_text(json.dumps({"method": "POST", "url": "/v1/completions", **line}) + "\n")
    words = ["batch", TINYMOE, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--record", tmp_path / "run.jsonl"]
    settings = ["--set", f"probe_file={probe_file}", "--set", "threads=1", "--experts-in-memory", "0.5"]
    assert main([*map(str, words), *settings]) == 0
    assert re.search(rf"planned decode.*not compared:\s+{why}", " ".join(capfd.readouterr().err.split()))
    assert main(["report", str(tmp_path / "run.jsonl")]) == 0
    assert "planned" not in capfd.readouterr().out


def test_a_run_says_how_far_off_the_plan_was(capfd, tmp_path, probe_file):
    line = {"custom_id": "1", "body": {"prompt": "Once upon", "max_tokens": 200, "ignore_eos": True}}
    (tmp_path / "in.jsonl").write_text(json.dumps({"method": "POST", "url": "/v1/completions", **line}) + "\n")
    words = ["batch", TINYMOE, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--record", tmp_path / "run.jsonl"]
    settings = ["--set", f"probe_file={probe_file}", "--set", "threads=1", "--experts-in-memory", "0.5"]
    assert main([*map(str, words), *settings]) == 0
    assert re.search(r"planned decode.*% off", " ".join(capfd.readouterr().err.split()))
    assert main(["report", str(tmp_path / "run.jsonl")]) == 0
    assert "tokens/s, planned" in capfd.readouterr().out
    status, out, _ = plan(capfd, "--probe-file", probe_file, "--slots", 0.5, "--against", tmp_path / "run.jsonl")
    assert status == 0
    assert "% off" in out


def test_sizes_and_replay():
    sizes = sizes_of(read_blueprint(TINYMOE))
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k) == (6, 16, 2)
    assert sizes.expert_weights == 3 * 192 * 128
    trace = even_routing(sizes, 3)
    for ranks in (1, 2):
        found = settled(replay(trace, Use(sequences=3, context=1, slots=24, ranks=ranks))[0])
        assert found.distinct.shape == (ranks, 64 * 6)
        assert found.pairs.sum() == 64 * 3 * 6 * 2
        assert (found.misses <= found.distinct).all()
        assert found.misses.sum() > 0
    assert not replay(trace, Use(sequences=3, context=1, slots=96))[0].misses.any()


def test_misses_of_each_access_add_up():
    import numpy as np

    accesses = [Access(0, np.array(keys)) for keys in ([0, 1], [1, 2], [0, 1], [3])]
    each = misses_of(Lfu([4]), accesses, 2)
    assert each == [2, 1, 1, 1]
    assert sum(each) == simulate(Lfu([4]), accesses, 2)


def test_a_model_without_experts_in_slots_is_one_sentence(capfd, tmp_path, probe_file):
    folder = tiny_checkpoint("nllb_moe", tmp_path / "whole")
    assert main(["plan", str(folder), "--probe-file", str(probe_file)]) == 2
    assert "has no experts in slots: there is nothing to plan" in capfd.readouterr().err
