"""KV and slots that share one memory while an offline batch runs: tokens stay whatever moves, nothing is lost, no byte
is taken twice; and it moves where that reads less."""

import ctypes
import mmap
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.engine.moving_split as moving_split
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.layer_major import Uniform, Workload
from moe.engine.moving_split import Measured, MovingSplit, _some
from moe.engine.requests import Request
from moe.layer.routing import NOBODY, RoutedLayer, Span, StepContext
from moe.llm import LLM
from moe.metrics import totals
from moe.models.kv import BlockPool, PagedKV
from moe.params import SamplingParams
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import TINYMOE, check_whole, random_prompts
from tests.moe.test_layer_major import SIZES

PROMPTS = random_prompts((9, 30, 3, 17, 40, 12, 25, 8, 1, 33), vocab_size=500)
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 3, 20, 9, 1, 16, 7, 30, 5, 11)]
WORK = Workload([len(p) for p in PROMPTS], [p.max_tokens for p in PARAMS])


def layer_major(budget="2.5MiB", work=WORK) -> LLM:
    offload = OffloadConfig(budget=budget, prefetch="off")
    return LLM(
        TINYMOE, EngineConfig(threads=1, batch=BatchConfig(schedule="layer_major"), offload=offload), workload=work
    )


def tokens_of(outputs):
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def said():
    with LLM(TINYMOE, EngineConfig(threads=1, offload=OffloadConfig(budget="1.0"))) as llm:
        return tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


@pytest.fixture(scope="module")
def llm():
    with layer_major() as one:
        yield one


def resident(memory: torch.Tensor) -> int:
    """Bytes of whole pages that the system holds for these addresses."""
    page = mmap.PAGESIZE
    begin = memory.data_ptr() // page * page
    pages = -(-(memory.data_ptr() + memory.nbytes - begin) // page)
    found = (ctypes.c_ubyte * pages)()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * page), found)
    return page * sum(one & 1 for one in found)


def check(llm: LLM, split: MovingSplit) -> None:
    """Every law of both, and that together they have what they may."""
    assert llm.engine.why_not_whole() is None
    state, pool = llm.engine.state(), llm.engine.scheduler.pool
    assert split.one.nbytes == state.slot_bytes + pool.num_blocks * 16 * 2304 <= split.shared.memory
    used = {b for r in llm.engine.scheduler.running for b in r.blocks}
    assert len(used) == pool.num_used <= pool.num_blocks <= pool.room
    assert 1 <= state.slots <= 96


@settings(max_examples=12, deadline=None)
@given(moves=st.lists(st.integers(-14, 14), min_size=1, max_size=40), cancelled=st.sets(st.integers(0, 20), max_size=2))
def test_no_token_changes_whatever_moves(llm, said, moves, cancelled):
    split = llm.engine.loaded.split
    running = [llm.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
    for step in range(1000):
        if not llm.engine.has_work:
            break
        if sequences := moves[step % len(moves)]:  # at once, or when no more run
            split.take(-sequences) if sequences < 0 else split.move(sequences)
        if step in cancelled and running[step % 10].request.finish_reason is None:
            llm.abort([running[step % 10]])
        llm.step()
        check(llm, split)
    for one, tokens in zip(running, said):
        assert one.token_ids == tokens or one.request.finish_reason == "abort"
    check_whole(llm)


def test_memory_follows_the_border():
    """The pages of KV and slots, not only their numbers."""
    prompts, params = random_prompts([300] * 10, vocab_size=500), SamplingParams(temperature=0, max_tokens=4)
    with layer_major("8MiB", Workload([300] * 10, [4] * 10)) as llm:
        split, pool = llm.engine.loaded.split, llm.engine.scheduler.pool
        kv = [t for layer in split.kv.layers for t in (layer.keys, layer.values)]
        seen = []
        for sequences in (10, 1, 10, 1):
            running = [llm.add(prompt, params) for prompt in prompts]
            split.take(sequences)
            for _ in range(3):
                llm.step()
            llm.abort(running)
            slots, blocks = split.experts.cache.slot_bytes, pool.num_blocks * 16 * 2304
            pages = resident(split.experts.cache.slab.memory), sum(map(resident, kv))
            assert pages[0] <= slots + (2 << 20), (pages, slots)  # where pages are large, one lies over the border
            assert pages[1] <= blocks + len(kv) * 2 * mmap.PAGESIZE, (pages, blocks)
            seen.append(pages)
        check(llm, split)
    assert seen[1][0] > 2 * seen[2][0]
    assert seen[0][1] > 2 * seen[1][1]
    assert seen[2][1] > 2 * seen[3][1]


def test_answers_that_end_early_leave_their_memory(monkeypatch):
    """They may have 120 tokens and have 10: more of them share a step, and at last experts get their KV."""
    prompts = random_prompts([12] * 60, vocab_size=500)
    lengths, params = (
        [1 + n * 7 % 20 for n in range(60)],
        SamplingParams(temperature=0, max_tokens=120, ignore_eos=True),
    )
    read, said = {}, {}
    for name, gain in {"moves": 0.1, "stays": 1.0}.items():
        monkeypatch.setattr(moving_split, "LEAST_GAIN", gain)
        with layer_major("3MiB", Workload([12] * 60, [120] * 60)) as llm:
            split, asked = llm.engine.loaded.split, [llm.add(prompt, params) for prompt in prompts]
            slots, length_of = [llm.engine.state().slots], dict(zip(map(id, asked), lengths))
            while llm.engine.has_work:
                llm.abort(
                    [e.generation for e in llm.step() if len(e.generation.token_ids) == length_of[id(e.generation)]]
                )
                slots.append(llm.engine.state().slots)
                check(llm, split)
            said[name], read[name] = (
                [one.token_ids for one in asked],
                sum(s.bytes_read for s in llm.engine.layer_stats()),
            )
            sums = {metric.name: value for metric, value in totals(llm.engine.metric_sources()).items()}
            assert [sums[f] for f in ("splits", "kv_gained_bytes", "slots_gained_bytes")] == [*astuple(split.stats)]
            assert (split.stats.splits > 1) == (name == "moves")
            assert (slots[-1] > slots[0]) == (name == "moves")
    assert said["moves"] == said["stays"]
    assert list(map(len, said["moves"])) == lengths
    assert read["moves"] < 0.8 * read["stays"]


def test_how_long_answers_are():
    """Fifty have ended at two tokens, five have three and go on, six have none yet; none may have more than eight."""
    lengths = moving_split.AnswerLengths()
    most = np.full(11, 8)
    now = np.array([0, *[3] * 5, *[0] * 5])
    assert lengths.expected(now, most).tolist() == [8] * 11
    for n in range(50):
        lengths.add(Request(n, [1, 2, 3], SamplingParams(seed=0), 1, finish_reason="stop"))
    goes_on = 1 - 50 / (50 + 5 + moving_split.PRIOR_ANSWERS)  # beyond two
    new = int(np.ceil(2 + 6 * goes_on))
    assert lengths.expected(now, most).tolist() == [new] + [8] * 5 + [new] * 5
    assert 2 < new < 8
    lengths.caution = 1.5
    assert lengths.expected(now, most)[0] == int(np.ceil(1.5 * (2 + 6 * goes_on)))
    lengths.add(Request(50, [1] * 9, SamplingParams(seed=0), 1, finish_reason="length"))
    assert lengths.expected(np.array([9]), np.array([20])).tolist() == [20]
    assert lengths.expected(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_a_request_that_nobody_foretold_has_room_made_for_it():
    with layer_major(work=Workload([8] * 4, [8] * 4)) as llm:
        pool, split = llm.engine.scheduler.pool, llm.engine.loaded.split
        most = pool.room * 16
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2))
        split.take(1)
        longest = SamplingParams(temperature=0, max_tokens=most - 3, ignore_eos=True)
        assert len(llm.generate([[1, 2, 3]], longest, use_tqdm=False)[0].outputs[0].token_ids) == most - 3
        check(llm, split)
        with pytest.raises(ValueError, match=f"the KV cache holds {most}"):
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=most))


def serve_on_ranks(folder, by_rank, moves):
    """One rank's answers, how often it moved, and who dispatched; it has slots for few of its experts."""
    offload = OffloadConfig(budget="62KiB", prefetch="off")
    config = EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(schedule="layer_major"))
    with process_groups() as groups:
        own = by_rank[groups.rank]
        work = Workload([len(prompt) for prompt in own], [8] * len(own))
        with LLM(folder, config, groups=groups, workload=work) as llm:
            running = [llm.add(prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)) for prompt in own]
            llm.engine.start()
            split, step = llm.engine.loaded.split, 0
            while llm.engine.has_work:
                if split is not None and moves[step % len(moves)]:
                    split.move(moves[step % len(moves)])
                llm.step()
                assert llm.engine.why_not_whole() is None
                assert split is None or split.one.nbytes <= split.shared.memory
                step += 1
            splits = None if split is None else split.stats.splits
            answers, dispatcher = [one.token_ids for one in running], llm.engine.config.parallel.dispatcher
            if split is not None:
                counted = [(split.sizes.num_ranks, len(split.demand._shares), sum(split.sizes.num_experts))]
                llm.engine.join(None)
                running = llm.add(own[0], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
                while llm.engine.has_work:
                    llm.step()
                    assert llm.engine.why_not_whole() is None
                    assert split.one.nbytes <= split.shared.memory
                assert running.token_ids == answers[0]
                counted.append((split.sizes.num_ranks, len(split.demand._shares), sum(split.sizes.num_experts)))
                experts = llm.engine.blueprint.num_experts
                assert counted == [(2, experts // 2, experts // 2), (1, experts, experts)]
            return answers, splits, dispatcher


@pytest.mark.parametrize("shares", [(slice(0, None, 2), slice(1, None, 2)), (slice(0, 0), slice(0, None))])
def test_each_rank_splits_its_own_memory(shares, tmp_path):
    """Also where one of them has no request."""
    folder, prompts = tiny_checkpoint("deepseek_v3", tmp_path), random_prompts((5, 1, 37, 20, 3, 11, 8), seed=2)
    with LLM(folder, EngineConfig(dtype="float32")) as llm:
        expected = tokens_of(llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    answers = spawn(2, serve_on_ranks, str(folder), [prompts[share] for share in shares], [3, 0, 1, 0, 0, 2])
    for (tokens, splits, dispatcher), share in zip(answers, shares):
        assert tokens == expected[share]
        assert dispatcher == "all_to_all"
        assert (splits is None) == (not tokens) or splits > 2


def routed(ids, num_tokens):
    return StepContext((Span(NOBODY, 0, num_tokens, 0),)), [
        RoutedLayer(np.array(layer, np.int16), np.ones(np.shape(layer), np.float32)) for layer in ids
    ]


def test_what_was_not_seen_is_as_foretold_beforehand():
    measured, uniform = Measured(SIZES), Uniform(SIZES)
    for tokens in (1, 5, 64):
        assert measured(tokens, 0) == pytest.approx(uniform(tokens, 0))
        assert measured(tokens, 16) == 0
        passing = round(8 * (1 - 0.75**tokens))  # of a layer, while they are computed
        for slots in range(passing, 16):
            assert measured(tokens, slots) == pytest.approx(uniform(tokens, slots - passing))


def test_what_was_seen_is_what_a_slot_is_worth():
    """Two layers of eight experts; tokens ask for the first two of one, for all of the other. Two pass through."""
    measured = Measured(SIZES._replace(expert_bytes=[64, 32]))
    tokens = 4000
    every = np.arange(2 * tokens).reshape(tokens, 2) % 8
    measured.learn(*routed([every % 2, every], tokens))
    measured.look(1, 6, 1.0)
    assert measured(1, 2) == pytest.approx(2 * 64 + 2 * 32, rel=0.02)
    assert measured(1, 4) == pytest.approx(2 * 32, rel=0.05)  # the two that everyone asks for are kept
    assert measured(1, 8) == pytest.approx(4 / 8 * 2 * 32, rel=0.1)
    assert measured(8, 0) == pytest.approx(2 * 64 + 8 * 32 * (1 - 0.75**8), rel=0.05)
    measured.look(1, 4, 0.25)  # the two could have had half of all, and had a quarter
    assert measured.efficiency == pytest.approx(0.75, rel=0.02)
    assert measured(1, 4) == pytest.approx(2 * 32 + 0.25 * 2 * 64, rel=0.05)


@given(st.integers(1, 60), st.integers(0, 3000))
def test_numbers_that_are_looked_at(fewest, more):
    found = _some(fewest, fewest + more)
    assert found[0] == fewest
    assert found[-1] == fewest + more
    assert all(a < b <= max(a + 1, 1.16 * a + 1) for a, b in pairwise(found))


def test_what_blocks_take_is_what_they_are():
    """To the byte: of every number of blocks of every number that there is room for."""
    like = torch.zeros(1, 3, 1, 5)
    for room in range(1, 70):
        kv = PagedKV(2, BlockPool(1, 16, sharing=False, room=room), torch.device("cpu"))
        kv.prepare([(like, like)] * 2)
        assert [kv.taken_by(n) for n in range(room + 1)] == [n * 2 * 2 * 16 * 15 * 4 for n in range(room + 1)]
