"""The probe measures what is there; its figures choose how experts are read, and never what they say."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe.config import EngineConfig, OffloadConfig
from moe.engine.choices import choose_reads
from moe.engine.known import this_machine
from moe.launch import first_run, measure
from moe.launch.cli import main
from moe.launch.measure import (
    computing,
    copy_bytes_per_s,
    dense_rates,
    expert_rates,
    measure_reads,
    memory_bytes_per_s,
)
from moe.launch.measure_ranks import NARROW, WIDE, exchange_of, measure_exchange
from moe.launch.measure_step import TOY_TOP_K, measure_attention, measure_overhead
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.stores import aligned_bytes
from moe.params import SamplingParams
from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads, disk_of, load_machine, save_machine

TINYMOE = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
OVERHEAD = Overhead(*[1e-4] * 9)


def figures(cached: float, direct: dict[int, float]) -> Machine:
    reads = [Reads("cached", 1 << 18, 1, cached), Reads("cached", 1 << 18, 2, cached)]
    reads += [Reads("direct", 1 << 18, depth, rate) for depth, rate in direct.items()]
    return Machine(
        name=this_machine(),
        when="today",
        cores=2,
        memory={1: 1e10},
        rates=(Rate("expert", "bfloat16", 1, 1, 1e-10),),
        attention=Attention(1e9, 1e9),
        overhead=OVERHEAD,
        copy_bytes_per_s=1e9,
        disks={disk_of(TINYMOE): tuple(reads)},
    )


def test_reads_are_measured_at_every_size_and_depth(tmp_path):
    found = list(measure_reads(tmp_path, 8 << 20, (1 << 18, 1 << 20, 1 << 30), (1, 4)))
    assert {(r.nbytes, r.depth) for r in found if r.how == "cached"} == {(1 << n, d) for n in (18, 20) for d in (1, 2)}
    assert all(r.bytes_per_s > 0 for r in found)
    assert list(tmp_path.iterdir()) == []


def test_kernels_are_measured_in_every_format():
    slab = aligned_bytes(16 << 20).fill_(0x3C)
    found = [*expert_rates(slab, torch.get_num_threads(), (64, 32)), *dense_rates(slab, 1, (32, 64))]
    kinds = {(r.work, r.format) for r in found}
    assert kinds == {("expert", f) for f in ("float32", "bfloat16", "bf12", "int8", "int4")} | {
        ("dense", f) for f in ("float32", "bfloat16", "bf12")
    }
    assert all(r.seconds > 0 for r in found)


@pytest.mark.heavy
def test_attention_and_what_is_left_without_weights():
    assert min(measure_attention()) > 0
    found = measure_overhead(aligned_bytes(64 << 20).fill_(1))
    assert min(found) >= 0  # differences of times, which noise may leave nothing of


@pytest.mark.heavy
def test_two_ranks_cost_more_than_one():
    found = measure_exchange(2)
    assert found.ranks == 2
    assert found.layer > 0
    assert min(found) >= 0


def test_an_exchange_is_told_apart_by_layers_sequences_and_bytes():
    extra = {
        (layers, batch, width): 0.5 + layers * (0.1 + batch * (0.02 + width * 1e-6))
        for layers in (2, 10)
        for batch in (1, 8)
        for width in (NARROW, WIDE)
    }
    found = exchange_of(extra, 2)
    assert found.step == pytest.approx(0.5)
    assert found.layer == pytest.approx(0.1)
    assert found.layer_sequence == pytest.approx(0.02 + NARROW * 1e-6)
    assert found.byte == pytest.approx(1e-6 / (2 * TOY_TOP_K * 2 / 2))  # a sequence's pairs, half away, out and back


def test_memory_of_threads_is_added_up():
    slab = aligned_bytes(8 << 20).fill_(1)
    assert memory_bytes_per_s(slab, 2) > 0
    assert copy_bytes_per_s(slab) > 0
    with computing(aligned_bytes(64 << 20)):
        assert any(thread.name == "probe-compute" for thread in threading.enumerate())
    assert not any(thread.name == "probe-compute" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("machine", "direct", "readers", "words"),
    [
        (None, False, 2, "was not probed"),
        (figures(2e9, {1: 5e8, 2: 1e9, 4: 1.2e9, 8: 1.2e9}), False, 2, "1.9 GiB/s from there"),
        (figures(1e9, {1: 5e8, 2: 1.4e9, 4: 2.2e9, 8: 2.3e9}), True, 4, "2.0 GiB/s with 4 at a time"),
        (figures(1e9, {1: 2e9, 2: 2e9}), True, 2, "past it"),
        (figures(1e9, {}), False, 2, "not possible"),
    ],
)
def test_how_experts_are_read_follows_the_figures(machine, direct, readers, words):
    blueprint = read_blueprint(TINYMOE)
    offload, choices = choose_reads(OffloadConfig(), blueprint, machine)
    assert (offload.direct, offload.readers) == (direct, readers)
    assert words in " ".join(map(str, choices))
    told = OffloadConfig(direct=not direct, readers=7, io="preadv")
    assert choose_reads(told, blueprint, machine) == (told, [])


@pytest.fixture
def large(monkeypatch):
    """The demo model counts as one whose reads somebody waits for, and little is measured."""
    monkeypatch.setattr(first_run, "LEAST_BYTES", 0)
    monkeypatch.setattr(measure, "FIRST_SLAB_BYTES", 32 << 20)
    monkeypatch.setattr(measure, "FIRST_RATE_BYTES", 1 << 20)


def generate(file: Path, *settings: str) -> int:
    words = ["generate", str(TINYMOE), "--prompt", "Once", "--max-tokens", "4", "--no-stream"]
    return main([*words, *(w for s in ("threads=1", f"probe_file={file}", *settings) for w in ("--set", s))])


def test_a_first_run_measures_and_the_next_one_knows(large, tmp_path, capfd, monkeypatch):
    file = tmp_path / "not there yet" / "probe.json"
    assert generate(file, "probe_first_run=false") == 0
    never = capfd.readouterr()
    assert not file.exists()
    assert generate(file) == 0
    first = capfd.readouterr()
    assert first.out == never.out
    assert "measuring this machine once" in first.err
    known = load_machine(file, this_machine())
    assert known is not None
    assert {r.how for r in known.disks[disk_of(TINYMOE)]} >= {"buffered", "cached"}
    assert {(r.work, r.rows) for r in known.rates} == {("expert", 1), ("dense", 1)}
    assert known.overhead is None
    monkeypatch.setattr(measure, "probe_first", None)  # whoever measures again fails
    assert generate(file, "offload.budget=0.25") == 0
    again = capfd.readouterr()
    assert again.out == never.out
    assert "measuring" not in again.err


def test_a_first_run_on_another_disk_measures_only_that(large, tmp_path):
    file = tmp_path / "probe.json"
    there = replace(figures(1e9, {1: 2e9}), disks={"/dev/other": (Reads("direct", 1 << 18, 8, 9e9),)})
    save_machine(file, there)
    assert generate(file) == 0
    known = load_machine(file, this_machine())
    assert known is not None
    assert set(known.disks) == {"/dev/other", disk_of(TINYMOE)}
    assert replace(known, disks=there.disks) == there


def test_small_models_measure_nothing(tmp_path, capfd):
    assert generate(tmp_path / "probe.json") == 0
    assert "measuring" not in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_figures_that_cannot_be_kept_are_told_and_the_run_goes_on(large, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert generate(tmp_path / "file" / "probe.json") == 0
    assert "nothing was measured, defaults stand" in capfd.readouterr().err


def test_a_first_runs_figures_plan_no_step(tmp_path, capfd):
    file = tmp_path / "probe.json"
    save_machine(file, replace(figures(1e9, {1: 2e9}), overhead=None, attention=None))
    assert main(["plan", str(TINYMOE), "--probe-file", str(file)]) == 2
    assert "`moe probe` measures the rest" in capfd.readouterr().err
    assert main(["probe", "--show", "--file", str(file)]) == 0


def test_another_disk_is_not_this_one():
    machine = replace(figures(1e9, {8: 9e9}), disks={"/dev/other": (Reads("direct", 1 << 18, 8, 9e9),)})
    offload, choices = choose_reads(OffloadConfig(), read_blueprint(TINYMOE), machine)
    assert (offload.direct, offload.readers) == (False, 2)
    assert "was not probed" in str(choices[0])


def test_figures_change_no_token_and_are_told(tmp_path):
    answers = []
    for number, machine in enumerate([None, figures(1e9, {1: 2e9, 2: 3e9, 4: 9e9})]):
        file = tmp_path / f"{number}.json"
        if machine is not None:
            save_machine(file, machine)
        config = EngineConfig(dtype="float32", threads=1, probe_file=str(file))
        with LLM(TINYMOE, config, experts_in_memory=0.25) as llm:
            answers.append(llm.generate("Once", SamplingParams(max_tokens=8), use_tqdm=False)[0].outputs[0].token_ids)
            said = [str(choice) for choice in llm.engine.choices]
    assert answers[0] == answers[1]
    assert said[0].startswith("offload.direct is True: ")
    assert said[1].startswith("offload.io is preadv: ")
    assert said[2].startswith("offload.readers is 4: ")
    names = {"offload.direct", "offload.io", "offload.readers", "offload.prefetch", "kernel", "dense", "offload.keep"}
    assert {line.split()[0] for line in said} == names


def test_the_command_stores_and_shows(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("moe.launch.measure.probe", lambda folder, known: figures(1e9, {1: 2e9}))
    file = str(tmp_path / "probe.json")
    assert main(["probe", "--show", "--file", file]) == 2
    assert "run `moe probe`" in capfd.readouterr().err
    assert main(["probe", str(tmp_path), "--file", file]) == 0
    assert main(["probe", "--show", "--file", file]) == 0
    shown = capfd.readouterr().out
    assert this_machine().split(",")[0] in shown
    assert "expert bfloat16" in shown
    assert main(["probe", str(tmp_path / "none"), "--file", file]) == 2
