"""Experts get more bits while the model runs: by what was asked, never by time, within a budget, and never fewer."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig, PlacementConfig
from moe.engine.assemble import read_model
from moe.engine.share import Share
from moe.evaluate import evaluate, every_logit
from moe.kernels.nested import LEVELS
from moe.launch.cli import main
from moe.layer.parallel import experts_of_rank
from moe.llm import LLM
from moe.metrics import exposition
from moe.models.blueprint import read_blueprint
from moe.offload.more_bits import MoreBits
from moe.offload.nested import Sensitivity, at_level, check_bits, more_bits, sizes_of
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import nested_folder

PROMPTS = [[5, 9, 30, 2, 2, 41], [7], [60, 1, 33]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = tmp_path_factory.mktemp("upgrades")
    nested_folder(made)
    return made


@pytest.fixture(scope="module")
def folder(base):
    return base / "packed"


@pytest.fixture(autouse=True)
def short_periods(monkeypatch):
    monkeypatch.setattr("moe.engine.upgrades.PERIOD", 12)


def budget_of(folder, share=0.6):
    """In bytes: 2 bits of all, and so much of the rest."""
    index = read_blueprint(folder).index
    least, most = (sum(s[i] * site.num_experts for s, site in zip(sizes_of(index), index.sites)) for i in (0, -1))
    return int(least + share * (most - least))


def opened(folder, budget, bits="upgrade", **offload):
    said = OffloadConfig(budget=f"{budget}B", bits=bits, **offload)
    return LLM(folder, EngineConfig(dtype="float32", offload=said, batch=BatchConfig(kv_tokens=512)))


def bits_in(llm):
    cache = llm.engine.experts.cache
    return [
        cache.views(n)["gate_up.bits"][cache.resident_slots(n).long(), 0].tolist()
        for n in range(len(cache.num_experts))
    ]


def answers(llm, more=lambda: None):
    """Logits of what PROMPTS are answered, asked together and then the first again; `more` after every step."""
    params, logits, found = SamplingParams(max_tokens=24, ignore_eos=True), llm.engine.keep_logits(), []
    for prompts in (PROMPTS, PROMPTS[:1]):
        requests = [llm.engine.add_request(prompt, params) for prompt in prompts]
        while llm.engine.has_work:
            llm.engine.step()
            more()
        found += [torch.stack(logits[request.id]) for request in requests]
    return torch.stack(found)  # [requests, 24, V]


def test_bits_never_fall_and_hold_within_the_budget(folder):
    budget, seen = budget_of(folder), []
    with opened(folder, budget) as llm:
        cache = llm.engine.experts.cache

        def look():
            cache.check()
            seen.append((bits_in(llm), cache.slot_bytes))

        assert bits_in(llm) == [[2] * 6] * 2
        answers(llm, look)
        assert llm.engine.why_not_whole() is None
        text = exposition(llm.engine.metric_sources())
        assert any("depend on what was asked before" in note for note in llm.engine.notes)
        more = llm.engine.loaded.experts.upgrades.more
        assert f'moe_experts_served{{bits="2"}} {sum(of.count(2) for of in more.bits)}\n' in text
        assert f"moe_upgrade_bytes_total {more.stats.upgrade_bytes}\n" in text
    index = read_blueprint(folder).index
    for (before, _), (after, nbytes) in pairwise(seen):
        assert all(a <= b for old, new in zip(before, after) for a, b in zip(old, new))
        taken = sum(size[LEVELS.index(b)] for size, of in zip(sizes_of(index), after) for b in of)
        assert nbytes == taken <= budget
    assert len({str(bits) for bits, _ in seen}) >= 4  # several times, and then some more
    assert seen[-1][1] > budget_of(folder, 0.5)


def test_tokens_follow_from_the_requests_alone(folder, monkeypatch):
    """Not from the store, readers or checks, nor from how long a read takes: all bits at once, where they are due."""
    budget = budget_of(folder)

    def told(**offload):
        with opened(folder, budget, **offload) as llm:
            steps = []
            return answers(llm, lambda: steps.append(bits_in(llm))), steps

    first, steps = told()
    for how in ({}, {"store": "mmap"}, {"direct": True, "readers": 0}, {"check": "always", "policy": "lru"}):
        again, same = told(**how)
        assert same == steps
        assert torch.equal(again, first)
    read = MoreBits._read

    def late(self):
        time.sleep(0.02)
        return read(self)

    monkeypatch.setattr(MoreBits, "_read", late)
    again, same = told()
    assert same == steps
    assert torch.equal(again, first)
    with opened(folder, budget, bits="2") as llm:
        in_two = answers(llm)
    assert torch.equal(in_two[:, 0], first[:, 0]) is False  # asked again, a prompt meets more bits
    assert torch.equal(in_two[:3, :3], first[:3, :3])


def test_experts_are_what_they_are_in_a_run_that_has_these_bits_from_the_start(folder):
    budget, window = budget_of(folder, 0.4), list(range(1, 60))
    with opened(folder, budget) as llm:
        answers(llm)
        bits, cache = bits_in(llm), llm.engine.experts.cache
        assert len({b for of in bits for b in of}) >= 2
        said = every_logit(llm.engine, window)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe.offload.nested.plan_bits", lambda *_: [list(of) for of in bits])
            with opened(folder, budget, bits="auto") as twin:
                assert bits_in(twin) == bits
                assert torch.equal(every_logit(twin.engine, window), said)
                for layer, of in enumerate(bits):
                    for expert, b in enumerate(of):
                        blueprint = twin.engine.blueprint
                        nbytes = at_level(blueprint.index.sites[layer], blueprint.index.layouts[layer], b).nbytes
                        slots = [
                            one.slab.of_layer(layer)[one.map.of_layer[layer][expert], :nbytes]
                            for one in (cache, twin.engine.experts.cache)
                        ]
                        assert torch.equal(*slots)


SHARED = Plan(num_experts=6, num_ranks=2, phy2log=np.array([[0, 1, 2, 3, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 4, 5]]))


def as_ranks(folder, plan, budget):
    """One rank, by who reads late, nobody or rank 1: what `as_rank` returns."""
    with process_groups() as groups:
        return [as_rank(folder, plan, budget, groups, late_rank) for late_rank in (None, 1)]


def as_rank(folder, plan, budget, groups, late_rank):
    """Logits of its answers, bits of its experts after each step, bytes of its slots, tokens of a last answer."""
    read = MoreBits._read

    def late(self):
        time.sleep(0.05)
        return read(self)

    offload, parallel = OffloadConfig(budget=f"{budget}B", bits="upgrade"), ParallelConfig(plan=plan)
    config = EngineConfig(dtype="float32", offload=offload, parallel=parallel, batch=BatchConfig(kv_tokens=512))
    with pytest.MonkeyPatch.context() as patch, LLM(folder, config, groups=groups) as llm:
        patch.setattr("moe.engine.upgrades.PERIOD", 12)
        patch.setattr(MoreBits, "_read", late if groups.rank == late_rank else read)
        assert any("dispatcher=auto is all_to_all: offload.bits=upgrade is set" in note for note in llm.engine.notes)
        cache, steps, held = llm.engine.experts.cache, [], experts_of_rank(SHARED, groups.rank)

        def own_bits():
            return [{e: of[e] for e in own} for own, of in zip(held, bits_in(llm))]

        params, logits, found = SamplingParams(max_tokens=24, ignore_eos=True), llm.engine.keep_logits(), []
        for prompts in ([PROMPTS[:1], PROMPTS[1:2]], [PROMPTS[2:], []]):
            requests = [llm.engine.add_request(prompt, params) for prompt in prompts[groups.rank]]
            llm.engine.start()
            while llm.engine.has_work:
                llm.engine.step()
                steps.append(own_bits())
            found += [torch.stack(logits[request.id]).tolist() for request in requests]
        patch.setattr("moe.engine.upgrades.PERIOD", 10**9)
        (last,) = llm.generate([PROMPTS[groups.rank]], SamplingParams(max_tokens=6, ignore_eos=True))
        cache.check()
        assert steps[-1] == own_bits()
        return found, steps, cache.slot_bytes, last.outputs[0].token_ids


def test_ranks_add_up_what_they_were_asked(folder, tmp_path):
    """Copies are alike in every step, whoever reads late; no rank takes more than its budget; answers are as alone."""
    SHARED.save(tmp_path / "plan.json")
    sizes = sizes_of(read_blueprint(folder).index)
    least, most = (sum(size[i] for size in sizes) * 4 for i in (0, -1))
    budget = int(least + 0.5 * (most - least))
    in_time, with_a_late_rank = zip(*spawn(2, as_ranks, folder, str(tmp_path / "plan.json"), budget))
    assert in_time == with_a_late_rank
    (_, first, *taken_first), (_, second, *taken_second) = in_time
    assert len(first) == len(second)
    for ours, theirs in zip(first, second):
        assert all(theirs[n].get(e, b) == b for n, of in enumerate(ours) for e, b in of.items())
    assert len({str(bits) for bits in first}) >= 3
    for steps, taken in ((first, taken_first[0]), (second, taken_second[0])):
        assert taken == sum(sizes[n][LEVELS.index(b)] for n, of in enumerate(steps[-1]) for b in of.values()) <= budget
        assert taken > least
    bits = [[(a | b)[e] for e in range(6)] for a, b in zip(first[-1], second[-1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.offload.nested.plan_bits", lambda *_: bits)
        with opened(folder, most * 2, bits="auto") as llm:
            said = llm.generate(PROMPTS[:2], SamplingParams(max_tokens=6, ignore_eos=True))
    assert [o.outputs[0].token_ids for o in said] == [taken_first[1], taken_second[1]]


def test_evaluation_sees_more_bits(base, folder):
    windows = [torch.randint(64, (24,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]
    with opened(folder, budget_of(folder, 1.0)) as llm, LLM(base / "original", EngineConfig(dtype="float32")) as exact:
        before = evaluate(llm, windows[:1], against=exact)
        for _ in range(6):
            evaluate(llm, windows, against=exact)
        after = evaluate(llm, windows[:1], against=exact)
    assert after.kl < before.kl / 10


def test_a_damaged_plane_is_an_error_and_no_other_answer(folder, monkeypatch):
    """The step that needs it fails; once the file is mended, the next goes on as if nothing had been."""
    budget = budget_of(folder)
    with opened(folder, budget) as llm:
        undisturbed = answers(llm)
    index = read_blueprint(folder).index
    places = []
    for layer, site in enumerate(index.sites):
        begin = at_level(site, index.layouts[layer], 2).nbytes
        places += [(index.segments(layer, e)[0].path, index.segments(layer, e)[0].offset + begin) for e in range(6)]

    def flip():
        for path, at in places:
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))

    with opened(folder, budget) as llm:
        flip()
        failed, step = [], llm.engine.step

        def again():
            try:
                step()
            except OSError as error:
                failed.append(str(error))
                flip()

        monkeypatch.setattr(llm.engine, "step", again)
        assert torch.equal(answers(llm), undisturbed)
        assert len(failed) == 1
        assert "checksum" in failed[0]


usage = st.lists(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 3), st.lists(st.floats(0, 1e6), min_size=5, max_size=5)),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80, deadline=None)
@given(usage, st.integers(0, 300))
def test_more_bits_are_never_fewer_and_end_with_the_budget(layers, more):
    worth = [[Sensitivity(of[0], tuple(of[1:]), uses) for _, uses, of in layer] for layer in layers]
    counts = [[count for count, *_ in layer] for layer in layers]
    sizes = [[10 + i, 14 + i, 20 + i, 40 + i] for i in range(len(layers))]
    bits = [[2] * len(layer) for layer in layers]
    budget = sum(size[0] * len(of) for size, of in zip(sizes, bits)) + more

    def left(bits):
        return budget - sum(size[LEVELS.index(b)] for size, of in zip(sizes, bits) for b in of)

    for _ in range(40):
        then = more_bits(counts, worth, sizes, bits, budget)
        assert all(a <= b for now, of in zip(bits, then) for a, b in zip(now, of))
        assert left(then) >= 0
        idle = [n for n, of in zip(counts, then) for n, b in zip(n, of) if b > 2]
        assert all(idle), "an expert that was never asked"
        spent, cheapest = left(bits) - left(then), min(b - a for size in sizes for a, b in pairwise(size))
        assert spent <= left(bits) // 2 or left(bits) // 2 < 20 + cheapest
        if then == bits:
            return
        bits = then
    raise AssertionError("it never comes to an end")


def test_who_is_asked_more_gets_the_next_bit_first():
    alike = Sensitivity(10.0, (1.0, 0.3, 0.1, 0.0), 5)
    sizes, two = [[10, 14, 20, 40]], [[2, 2, 2]]
    assert more_bits([[1, 9, 2]], [[alike] * 3], sizes, two, 30 + 8) == [[2, 3, 2]]
    assert more_bits([[1, 9, 2]], [[alike] * 3], sizes, two, 30 + 28) == [[2, 4, 3]]
    unknown = Sensitivity(0.0, (0.0,) * 4, 0)  # calibration never asked it: like the others of its layer
    assert more_bits([[1, 9, 2]], [[alike, unknown, alike]], sizes, two, 30 + 8) == [[2, 3, 2]]
    assert more_bits([[0, 0, 0]], [[alike] * 3], sizes, two, 1000) == two


def test_where_it_is_refused(folder, capsys):
    with pytest.raises(ValueError, match=r"a slot on a GPU.*offload.bits=2, 3, 4 or 8"):
        check_bits("upgrade", "file", torch.device("cuda"), is_fixed=True)
    with pytest.raises(ValueError, match="hold each a second time"):
        opened(folder, budget_of(folder), store="ram")
    with pytest.raises(ValueError, match="must hold 2 bits of every expert"):
        opened(folder, budget_of(folder, 0) - 1)
    blueprint, plan = read_blueprint(folder), Plan.contiguous(2, 6, 2)
    offload = OffloadConfig(bits="upgrade", budget="1MB")
    for moves in (True, False):
        config = EngineConfig(offload=offload, placement=PlacementConfig(online=moves))
        with pytest.raises(ValueError, match="online move experts"):
            read_model(blueprint, config, Share(plan, 0, may_change=not moves))
    told = ["--set", "offload.bits=upgrade", "--set", f"offload.budget={budget_of(folder)}B"]
    files = folder / "config.json", folder / "out"  # never read
    for command in (["generate", folder, "--prompt", "a", "--verify"], ["batch", folder, *files, "--verify", 1]):
        assert main([str(word) for word in (*command, *told)]) == 2
        assert "no other run to verify it by" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="upgrade shares out a number of bytes"):
        read_model(blueprint, replace(config, offload=replace(offload, budget="0.5")))


def test_prefixes_are_not_shared(folder):
    prompt = list(range(40))
    for bits, is_shared in (("auto", True), ("upgrade", False)):
        with opened(folder, budget_of(folder), bits=bits) as llm:
            for _ in range(2):
                llm.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True))
            assert (llm.engine.stats.shared_tokens > 0) == is_shared
