"""Every automatic choice from fake figures: what is chosen, why, and that no bit changes with it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.walk_model import WalkModel, write
from moe.config import EngineConfig, OffloadConfig
from moe.engine.choices import (
    AutoChoice,
    choose_threads,
    compute_time,
    pack_offer,
    read_time,
    told_choices,
    why_not_ahead,
)
from moe.engine.known import this_machine
from moe.engine.runner import why_threads_count
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from moe.params import SamplingParams
from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads, disk_of, save_machine

TINYMOE = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
SIZE = 3 * 192 * 128 * 2  # bytes of an expert of tinymoe, bf16
READ = OffloadConfig(direct=True, readers=2)


def machine(threads=(1e-10, 4e-11), weight=1e-9, disk=1e9, copy=1e12):
    """threads: seconds of a dense weight by one thread and by two; weight: of an expert's."""
    rates = [Rate("dense", "bfloat16", n, 1, seconds) for n, seconds in enumerate(threads, 1)]
    return Machine(
        name=this_machine(),
        when="today",
        cores=2,
        memory={1: 1e10},
        rates=(*rates, Rate("expert", "bfloat16", 1, 1, weight)),
        attention=Attention(1e9, 1e9),
        overhead=Overhead(*[1e-4] * 9),
        copy_bytes_per_s=copy,
        disks={disk_of(TINYMOE): tuple(Reads(how, SIZE, 1, disk) for how in ("direct", "cached"))},
    )


@pytest.fixture
def no_omp(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_the_fewest_near_the_best(no_omp):
    told = EngineConfig()
    assert choose_threads(told, machine(), None).value == 2
    few = choose_threads(told, machine(threads=(1e-10, 9.5e-11)), None)
    assert (few.value, few.setting) == (1, "threads")
    assert "10.0 with 1, 10.5 with 2" in few.reason
    assert choose_threads(EngineConfig(threads=1), machine(), None) is None


@pytest.mark.parametrize(
    ("known", "why_not", "words"),
    [(None, None, "was not probed"), (machine(), "ranks share the cores", "ranks share"), (None, "torch", "torch")],
)
def test_threads_stay_torchs_own_and_the_reason_is_told(no_omp, known, why_not, words):
    found = choose_threads(EngineConfig(), known, why_not)
    assert found.value == torch.get_num_threads()
    assert words in found.reason


def test_what_the_environment_says_of_threads_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    found = choose_threads(EngineConfig(), machine(), None)
    assert found == AutoChoice("threads", torch.get_num_threads(), "as OMP_NUM_THREADS says")


def test_reading_ahead_is_left_out_where_no_read_waits():
    blueprint = read_blueprint(TINYMOE)  # top-2: one other expert of 74 µs at 1 ns a weight
    slow, quick = machine(disk=1e9), machine(disk=1e11)
    assert read_time(blueprint, slow, READ).stored == pytest.approx(SIZE / 1e9, rel=0.01)
    assert why_not_ahead(blueprint, slow, READ) is None
    assert "a miss waits for nothing" in why_not_ahead(blueprint, quick, READ)
    assert why_not_ahead(blueprint, None, READ) is None
    jammed = replace(slow, rates=(*slow.rates, Rate("expert", "bfloat16", 2, 1, 1e-6)))  # two threads of a busy machine
    assert compute_time(blueprint, jammed, 2) == compute_time(blueprint, slow, 2)
    assert why_not_ahead(blueprint, jammed, READ) is None
    assert why_not_ahead(blueprint, replace(quick, rates=quick.rates[:2]), READ) is None  # bf16 was not measured


def test_the_engine_follows_what_figures_say_of_reading_ahead(tmp_path):
    model = write(tmp_path / "model", WalkModel(layers=2, experts=8, hidden=256, width=512, vocab=1024))
    for number, (disk, expected) in enumerate([(1e6, "router"), (1e12, "off")]):
        file, known = tmp_path / f"{number}.json", machine(disk=disk)
        save_machine(file, replace(known, disks={disk_of(model): known.disks[disk_of(TINYMOE)]}))
        config = EngineConfig(threads=1, probe_file=str(file))
        with LLM(model, config, experts_in_memory=0.5) as llm:
            (told,) = [choice for choice in llm.engine.choices if choice.setting == "offload.prefetch"]
            assert told.value == expected, told
            assert (llm.engine.experts.lookahead is not None) == (expected == "router")


def test_packing_is_offered_in_one_line_where_it_pays(tmp_path):
    original = read_blueprint(TINYMOE)
    (line,) = pack_offer(original, machine(copy=1e9), READ)
    assert f"`moe pack {TINYMOE} OUT` would pay" in line
    assert "\n" not in line
    assert pack_offer(original, machine(copy=1e12), READ) == []
    assert pack_offer(original, None, READ) == []
    pack(original.checkpoint, original.index, tmp_path / "packed")
    packed = read_blueprint(tmp_path / "packed")
    (line,) = pack_offer(original, machine(copy=1e9), READ, may_be_short=True)
    assert f"`moe pack {TINYMOE} OUT --experts bf12 --dense bf12` would pay, and loses nothing" in line
    known = replace(machine(copy=1e3), disks={disk_of(tmp_path): machine().disks[disk_of(TINYMOE)]})
    assert read_time(packed, known, READ).stored == pytest.approx(read_time(packed, known, READ).packed)
    assert pack_offer(packed, known, READ) == []
    wide = read_blueprint(write(tmp_path / "wide", WalkModel(layers=1, experts=4, hidden=1024, width=512, vocab=256)))
    for name, source, target in (("as it is", wide, None), ("short", wide, target_format("bf12", None))):
        pack(source.checkpoint, source.index, tmp_path / name, experts=target)
    for name, num_lines in (("as it is", 1), ("short", 0)):  # also what is packed becomes shorter, once
        assert len(pack_offer(read_blueprint(tmp_path / name), known, READ, may_be_short=True)) == num_lines


def test_the_offer_is_a_note_of_runs_that_read(tmp_path):
    file = tmp_path / "probe.json"
    save_machine(file, machine(copy=1e6))
    config = EngineConfig(dtype="float32", threads=1, probe_file=str(file), offload=READ)
    for budget, is_told in ((0.25, True), (1.0, False)):
        with LLM(TINYMOE, config, experts_in_memory=budget) as llm:
            assert any("moe pack" in note for note in llm.notes) == is_told
    with LLM(TINYMOE, replace(config, dtype="bfloat16", kernel="grouped"), experts_in_memory=0.25) as llm:
        assert any("--experts bf12" in note for note in llm.notes)  # the kernels of GPUs read it too


def test_what_no_figure_chooses_is_told_with_its_reason():
    cpu = told_choices(EngineConfig(), torch.device("cpu"), None, "cpu", "a reason")
    assert [(c.setting, c.value) for c in cpu] == [("offload.prefetch", "off"), ("kernel", "cpu"), ("dense", "decoded")]
    assert cpu[0].reason == "a reason"
    assert "round otherwise" in cpu[2].reason
    assert "timed on this GPU" in told_choices(EngineConfig(), torch.device("cuda"), None, "measured")[1].reason


def test_bits_are_equal_at_any_number_of_threads_where_figures_choose_it(tmp_path, no_omp):
    logits = []
    for chosen, threads in ((1, (1e-10, 1e-10)), (2, (1e-10, 1e-11))):
        file = tmp_path / f"{chosen}.json"
        save_machine(file, machine(threads=threads))
        config = EngineConfig(dtype="bfloat16", probe_file=str(file))
        with LLM(TINYMOE, config, experts_in_memory=0.5) as llm:
            assert why_threads_count(llm.engine.loaded.memory.runner) is None
            assert llm.engine.choices[0].value == chosen == torch.get_num_threads()
            kept = llm.engine.keep_logits()
            llm.generate(["Once upon a time " * 20, "The"], SamplingParams(max_tokens=6), use_tqdm=False)
            logits.append([row for rows in kept.values() for row in rows])
    assert len(logits[0]) == len(logits[1]) > 6
    assert all(a.equal(b) for a, b in zip(*logits))


def test_threads_are_not_chosen_where_torch_sums():
    for config, words in (
        (EngineConfig(dtype="float32", threads=1), "fp32"),
        (EngineConfig(dtype="bfloat16", threads=1, kernel="reference"), "transformers' modules"),
    ):
        with LLM(TINYMOE, config, experts_in_memory=1.0) as llm:
            assert words in why_threads_count(llm.engine.loaded.memory.runner)
