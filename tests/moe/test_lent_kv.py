"""The default split of memory: slots have what KV does not use. No token changes, nobody is put back for it, and it
moves when sequences need KV, and back when they have ended."""

import errno
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.engine.assemble as assemble
import moe.engine.device as device
import moe.engine.lent_kv as lent_kv
import moe.offload.cache as cache_module
import moe.offload.slab as slab
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.lent_kv import LentKV
from moe.engine.to_come import bytes_to_come
from moe.evaluate import every_logit
from moe.layer.runners import Resident
from moe.llm import LLM
from moe.offload.stores import aligned_bytes
from moe.params import SamplingParams
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import TINYMOE, random_prompts
from tests.moe.test_faulty_reads import Faults, faulty
from tests.moe.test_mixed_formats import int4, write_pair

MEMORY = 12 << 20  # for KV and experts, beside the dense weights; all experts are 13.5 MiB
BLOCK = 16 * 2304  # bytes: 6 layers of K and V, 3 heads of 32 in bf16
PROMPTS = random_prompts((9, 130, 3, 17, 40, 112, 25, 8, 1, 33), vocab_size=500)
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 3, 20, 9, 1, 16, 7, 30, 5, 90)]


def little(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(device, "free_memory", lambda device, sharers=1: MEMORY)
    patch.setattr(assemble, "free_room", lambda device, config, sizes, sharers=1: MEMORY * 9 // 10)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    little(monkeypatch)


def make(*, budget=None, prefetch="off", **batch) -> LLM:
    offload = OffloadConfig(budget=budget, prefetch=prefetch)
    return LLM(TINYMOE, EngineConfig(threads=1, batch=BatchConfig(**batch), offload=offload))


def lent(llm: LLM) -> LentKV:
    split = llm.engine.loaded.split
    assert isinstance(split, LentKV)
    return split


def fixed_slots(llm: LLM) -> int:
    """Of a KV that has all it may."""
    return lent(llm).one.slots_beside(llm.engine.scheduler.pool.room)


def tokens_of(outputs):
    return [o.outputs[0].token_ids for o in outputs]


def check(llm: LLM) -> None:
    engine, one = llm.engine, lent(llm).one
    assert engine.why_not_whole() is None
    pool, state = engine.scheduler.pool, engine.state()
    assert one.nbytes == state.slot_bytes + pool.num_blocks * BLOCK <= one.memory
    assert pool.num_used <= pool.num_blocks <= pool.room == state.blocks
    assert fixed_slots(llm) <= state.slots <= 96
    assert bytes_to_come(engine.loaded, pool) <= one.memory


@pytest.fixture(scope="module")
def said():
    with LLM(TINYMOE, EngineConfig(threads=1, offload=OffloadConfig(budget="1.0"))) as llm:
        return tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


@settings(max_examples=10, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 30), min_size=10, max_size=10),
    cancelled=st.sets(st.integers(0, 40), max_size=3),
    batch=st.sampled_from([{"max_sequences": 1}, {"max_sequences": 3}, {}, {"max_sequences": 3, "pool": 8}]),
    prefetch=st.sampled_from(["off", "router"]),
)
def test_no_token_changes_and_nobody_is_put_back(said, gaps, cancelled, batch, prefetch):
    """Requests come one after another, some are cancelled; KV for all that can run is there."""
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        patch.setattr(lent_kv, "PERIOD", 8)
        with make(prefetch=prefetch, max_tokens=64, **batch) as llm:
            running, coming = [], list(zip(gaps, PROMPTS, PARAMS))
            for step in range(2000):
                while coming and (not coming[0][0] or not llm.engine.has_work):
                    running.append(llm.add(*coming.pop(0)[1:]))
                if not llm.engine.has_work:
                    break
                if coming:
                    coming[0] = (coming[0][0] - 1, *coming[0][1:])
                if step in cancelled and running[-1].request.finish_reason is None:
                    llm.abort([running[-1]])
                llm.step()
                check(llm)
            assert llm.engine.scheduler.num_put_back == 0
            for one, tokens in zip(running, said):
                assert one.token_ids == tokens or one.request.finish_reason == "abort"


@st.composite
def little_of_everything(draw):
    """A config of little KV, and the slots beside all of it, from one on."""
    sequences, pool = draw(st.sampled_from([(1, None), (3, None), (6, None), (1, 3), (3, 8)]))
    batch = BatchConfig(
        max_sequences=sequences,
        pool=pool,
        max_tokens=draw(st.sampled_from([sequences, 9, 64])),
        block_size=draw(st.sampled_from([1, 3, 16])),
        kv_tokens=draw(st.sampled_from([160, 400])),
        prefix_sharing=draw(st.booleans()),
    )
    offload = OffloadConfig(
        policy=draw(st.sampled_from(["lru", "lfu"])),
        store=draw(st.sampled_from(["file", "mmap"])),
        prefetch=draw(st.sampled_from(["off", "transition", "router", "learned"])),
        readers=draw(st.integers(1, 3)),
    )
    return EngineConfig(threads=1, batch=batch, offload=offload), draw(st.sampled_from([1, 2, 5, 24, 70]))


@pytest.mark.heavy
@settings(max_examples=20, deadline=None)
@given(
    config_and_slots=little_of_everything(),
    acts=st.lists(st.sampled_from([*["plain"] * 8, "slow", "fail", "short"]), max_size=40),
    cancelled=st.dictionaries(st.integers(0, 60), st.integers(0, 9), max_size=3),
    pace=st.sampled_from([(1, 1), (2, 64), (8, 2), (64, 64)]),
)
def test_no_token_changes_whatever_comes(said, config_and_slots, acts, cancelled, pace):
    """Reads that fail, reads ahead under way when their slot is taken back, KV that is too little for all, one slot."""
    config, slots = config_and_slots
    blocks = -(-config.batch.kv_tokens // config.batch.block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "free_room", lambda *_: blocks * config.batch.block_size * 2304 + slots * 144 * 1024)
        patch.setattr(lent_kv, "PERIOD", pace[0])
        patch.setattr(lent_kv, "AHEAD", pace[1])
        patch.setattr(cache_module, "INLINE_READ_BYTES", 0)
        with LLM(TINYMOE, config) as llm:
            if (lookahead := llm.engine.experts.lookahead) is not None:
                lookahead.prefetcher._trial = None
            faulty(patch, Faults(acts))
            running = [llm.add(*request) for request in zip(PROMPTS, PARAMS)]
            one, cache = lent(llm).one, llm.engine.experts.cache
            for step in range(4000):
                if not llm.engine.has_work:
                    break
                if step in cancelled:
                    llm.abort([running[cancelled[step]]])
                try:
                    llm.step()
                except OSError as error:
                    if "the disk is gone" not in str(error):
                        raise
                assert llm.engine.why_not_whole() is None
                assert one.nbytes == one.kv.taken_by(one.kv.pool.num_blocks) + cache.slot_bytes <= one.memory
            for generation, tokens in zip(running, said):
                assert generation.token_ids == tokens or generation.request.finish_reason == "abort"
            assert one.kv.pool.num_used == 0
            cache.ahead.finish()
            cache.check()


def test_memory_goes_where_it_is_needed(monkeypatch):
    """A short sequence leaves nearly all to slots, sixteen long ones have their KV, and later slots have it again."""
    monkeypatch.setattr(lent_kv, "PERIOD", 8)
    with make(prefix_sharing=False) as llm:
        pool, at_first = llm.engine.scheduler.pool, llm.engine.state().slots
        assert at_first > 1.25 * fixed_slots(llm)
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        assert llm.engine.state().slots == at_first
        tokens = pool.room // 16 * pool.block_size
        many = random_prompts([tokens - 8] * 16, vocab_size=500)
        llm.generate(many, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        assert (pool.num_blocks, llm.engine.state().slots) == (pool.room, fixed_slots(llm))
        assert llm.engine.scheduler.num_put_back == 0
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=24, ignore_eos=True), use_tqdm=False)
        assert llm.engine.state().slots > 0.95 * at_first
        assert lent(llm).stats.splits >= 3
        assert lent(llm).stats.kv_gained_bytes > 0 < lent(llm).stats.slots_gained_bytes


@pytest.mark.parametrize("is_chat", [False, True])
def test_kept_blocks_have_memory_where_prompts_share(is_chat, monkeypatch):
    """A chat's turns find what was computed, as with a KV that has all it may; of prompts alone nothing is kept."""
    monkeypatch.setattr(lent_kv, "PERIOD", 8)
    params, found, begun = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), [], []
    for lends in (True, False):
        if not lends:
            monkeypatch.setattr(assemble, "_lent_kv", lambda *given: None)
        with make() as llm:
            talk = PROMPTS[1]
            for turn, fresh in enumerate(random_prompts([40] * 24, vocab_size=500)):
                prompt = [*talk, *fresh][-480:] if is_chat and turn < 8 else [*talk, *fresh] if is_chat else fresh * 4
                if is_chat:
                    talk = talk + fresh[:8] if turn < 8 else talk
                llm.generate([prompt], params, use_tqdm=False)
                if lends:
                    check(llm)
            scheduler = llm.engine.scheduler
            found.append(scheduler.shared_tokens), begun.append(scheduler.begun_tokens)
            if lends:
                assert lent(llm).keeps == is_chat
                if not is_chat:
                    assert scheduler.pool.num_kept < scheduler.pool.room // 4
    assert begun[0] == begun[1]
    assert found[0] == found[1]
    assert (found[0] > 0.5 * begun[0]) == is_chat


def test_what_is_told_stays():
    with make(budget="30 experts") as llm:
        assert llm.engine.loaded.split is None
        assert llm.engine.state().slots == 30
    with make(kv_tokens=64) as llm:
        assert llm.engine.scheduler.pool.room == 4
        with pytest.raises(ValueError, match="the KV cache holds 64"):
            llm.engine.check_request([1] * 60, SamplingParams(max_tokens=5))
        lent(llm)


FEW = EngineConfig(dtype="float32", threads=1, batch=BatchConfig(kv_tokens=160, max_sequences=2, max_tokens=16))


def with_room(folder, slots: int, patch: pytest.MonkeyPatch) -> LLM:
    """Beside KV for 160 tokens there is room for so many slots of the largest."""
    with LLM(folder, replace(FEW, offload=OffloadConfig(budget="1 expert"))) as llm:
        nbytes = llm.engine.loaded.memory.kv_bytes + slots * llm.engine.experts.cache.blob_bytes
    patch.setattr(assemble, "free_room", lambda *_: nbytes)
    return LLM(folder, FEW)


def says_the_same(folder, llm: LLM) -> None:
    """As with all experts in memory, while the border moves: after short prompts one comes that takes all of the KV."""
    with LLM(folder, replace(FEW, offload=OffloadConfig(budget="1.0"))) as twin:
        compare(llm, twin)


def compare(llm: LLM, twin: LLM) -> None:
    one, cache, slots = lent(llm).one, llm.engine.experts.cache, []
    for lengths in ((5, 3), (120, 30), (9, 2)):
        prompts = random_prompts(lengths)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        running = [llm.add(prompt, params) for prompt in prompts]
        while llm.engine.has_work:
            llm.step()
            assert llm.engine.why_not_whole() is None
            assert cache.slot_bytes + one.kv.taken_by(one.kv.pool.num_blocks) == one.nbytes <= one.memory
            slots.append(cache.num_slots)
        assert [r.token_ids for r in running] == tokens_of(twin.generate(prompts, params, use_tqdm=False))
    assert min(slots) == fixed_slots(llm)


def test_sizes_of_experts_that_share_slots(tmp_path, monkeypatch):
    """Two slots are too few for one of each size; more are, when KV leaves its memory, as large as those two."""
    folder, _ = write_pair("qwen3_moe", tmp_path, lambda key: int4 if "layers.1.mlp.experts." in key else None)
    with with_room(folder, 2, monkeypatch) as llm:
        cache = llm.engine.experts.cache
        assert (len({layout.nbytes for layout in cache.store.layouts}), len(cache.slab.runs)) == (2, 1)
        assert cache.num_slots > 3 > fixed_slots(llm)
        monkeypatch.undo()
        says_the_same(folder, llm)


def test_where_addresses_are_limited_slots_are_as_many_as_beside_kv(tmp_path, monkeypatch):
    folder, limit = tiny_checkpoint("qwen3_moe", tmp_path), 9 * 8192

    def limited(nbytes: int, huge: bool = True):
        if nbytes > limit:
            raise OSError(errno.ENOMEM, "addresses")
        return aligned_bytes(nbytes, huge)

    monkeypatch.setattr(slab, "aligned_bytes", limited)
    with with_room(folder, 7, monkeypatch) as llm:
        cache = llm.engine.experts.cache
        assert cache.blob_bytes == 8192
        assert cache.map.room == cache.num_slots == fixed_slots(llm) == 7
        monkeypatch.undo()
        says_the_same(folder, llm)


def test_a_window_to_evaluate_has_room():
    with make() as llm:
        pool = llm.engine.scheduler.pool
        tokens = random_prompts([pool.room * pool.block_size], vocab_size=500)[0]
        assert pool.num_blocks < pool.room
        assert every_logit(llm.engine, tokens).shape == (len(tokens), llm.engine.loaded.dense.vocabulary)
        with pytest.raises(ValueError, match="does not fit the KV cache"):
            every_logit(llm.engine, [*tokens, 1])
        assert pool.num_used == 0


@pytest.mark.parametrize("memory", [15 << 20, 17 << 20])
@pytest.mark.parametrize("readers", [0, 2])
def test_where_each_expert_has_a_slot_all_are_read_and_stay(said, memory, readers, monkeypatch):
    """From the start, and again some time after KV has needed its memory; no request waits for those."""
    monkeypatch.setattr(lent_kv, "PERIOD", 8)
    monkeypatch.setattr(assemble, "free_room", lambda *_: memory)
    monkeypatch.setattr(device, "free_memory", lambda *_: memory)
    offload = OffloadConfig(prefetch="off", readers=readers)
    with LLM(TINYMOE, EngineConfig(threads=1, offload=offload, batch=BatchConfig(prefix_sharing=False))) as llm:
        experts, pool = llm.engine.experts, llm.engine.scheduler.pool
        assert isinstance(experts.runner, Resident)
        assert fixed_slots(llm) < experts.cache.num_slots == 96
        many = random_prompts([pool.room // 16 * pool.block_size - 8] * 16, vocab_size=500)
        llm.generate(many, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        assert experts.runner is experts.waves
        assert (experts.cache.map.slot_of < 0).sum() == 96 - fixed_slots(llm)
        llm.add(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
        for _ in range(200):
            llm.step()
            check(llm)
            experts.cache.ahead.finish()
        assert isinstance(experts.runner, Resident) == bool(readers)
        assert tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == said


def test_what_cannot_be_read_and_nobody_asks_for_is_left_alone(monkeypatch):
    """Until slots change: then it is tried again."""
    monkeypatch.setattr(assemble, "free_room", lambda *_: 15 << 20)
    monkeypatch.setattr(device, "free_memory", lambda *_: 15 << 20)
    with LLM(TINYMOE, EngineConfig(threads=1, offload=OffloadConfig(prefetch="off", readers=2))) as llm:
        experts, cache = llm.engine.experts, llm.engine.experts.cache
        cache.unpin()
        cache.map.evict(np.array([37, 90]))
        experts.settle()
        assert experts.runner is experts.waves
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(["fail"] * 1000)
            faulty(patch, faults)
            for _ in range(100):
                for _ in range(3):  # steps that pass while it is read are no tries
                    experts.fill()
                cache.ahead.finish()
            assert faults.done["fail"] == 2 * 16
        experts.fill()
        assert not cache.ahead.is_reading
        experts.settle()
        experts.fill()
        cache.ahead.finish()
        cache.check()
        experts.settle()
        assert isinstance(experts.runner, Resident)
