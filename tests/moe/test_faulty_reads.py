"""Slow, failing, short and reordered reads, requests cancelled at any step: tokens stay, for every store, policy,
predictor and schedule, nothing waits for ever, and the slots' laws hold after every step."""

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain, product, repeat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_parallel import prompts_of, tokens_alone

import moe.offload.cache as cache_module
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.layer_major import Workload
from moe.llm import LLM
from moe.offload.stores import FileStore, MmapStore, RamStore
from moe.params import SamplingParams
from tests.families import tiny_checkpoint

PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
ACTS = ("plain", "slow", "fail", "short")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))
    prompts = prompts_of(5)
    return folder, prompts, tokens_alone(folder, prompts)


@dataclass
class Faults:
    """What happens to the reads that come next, whichever thread they come from, then nothing; `done` counts."""

    acts: list[str]

    def __post_init__(self) -> None:
        self.lock, self.halved = threading.Lock(), threading.local()
        self.coming, self.done = chain(self.acts, repeat("plain")), Counter()

    def act(self) -> None:
        with self.lock:
            act = next(self.coming)
            self.done[act] += 1
        self.halved.now = act == "short"
        if act == "slow":
            time.sleep(0.002)  # others overtake it
        if act == "fail":
            raise OSError(5, "the disk is gone", "shard-7")

    def preadv(self, file, parts, offset):
        """Half of the first part at most, where this read is a short one."""
        if getattr(self.halved, "now", False) and len(parts[0]) > 1:
            parts = [parts[0][: len(parts[0]) // 2]]
        return _preadv(file, parts, offset)


_preadv = os.preadv


def faulty(monkeypatch, faults):
    """Every store's reads act first, whole and in parts; a short one is a file's."""

    def acts_first(real):
        def read(self, layer, expert, out):
            faults.act()
            return real(self, layer, expert, out)

        return read

    for kind, name in product((FileStore, MmapStore, RamStore), ("read_into", "read_parts")):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, acts_first(getattr(kind, name)))
    monkeypatch.setattr(os, "preadv", faults.preadv)


@st.composite
def configs(draw):
    prefetch = draw(st.sampled_from(["off", "transition", "router", "learned", "auto"]))
    sequences = draw(st.sampled_from([1, 2, 7]))
    return EngineConfig(
        dtype="float32",
        offload=OffloadConfig(
            budget=draw(st.sampled_from(["1 expert", "3", "0.25", "0.5", "0.75"])),
            policy=draw(st.sampled_from(["lru", "lfu"])),
            store=draw(st.sampled_from(["file", "file", "mmap", "ram"])),
            readers=draw(st.integers(prefetch not in ("off", "auto"), 3)),
            prefetch=prefetch,
        ),
        batch=BatchConfig(
            max_tokens=48,
            max_sequences=sequences,
            pool=draw(st.sampled_from([None, sequences + 3])),
            packed=draw(st.booleans()),
            kv_tokens=1024,
        ),
    )


@st.composite
def moving(draw):
    """One memory for KV and slots, and to how many sequences it moves before each step, 0 = not."""
    offload = OffloadConfig(
        budget=draw(st.sampled_from(["192KiB", "288KiB"])),
        store=draw(st.sampled_from(["file", "mmap", "ram"])),
        readers=draw(st.integers(1, 3)),
        prefetch=draw(st.sampled_from(["off", "router", "learned"])),
    )
    moves = draw(st.lists(st.integers(0, 9), min_size=1, max_size=20))
    return EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(schedule="layer_major")), moves


@pytest.mark.heavy
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config_and_moves=st.one_of(st.tuples(configs(), st.just([])), moving()),
    acts=st.lists(st.sampled_from([*["plain"] * 8, *ACTS]), min_size=1, max_size=40).filter(
        lambda a: set(a) != {"fail"}
    ),
    cancelled=st.dictionaries(st.integers(0, 30), st.integers(0, 6), max_size=3),
)
def test_no_token_changes_whatever_reads_do(mixtral, config_and_moves, acts, cancelled):
    (folder, prompts, expected), (config, moves) = mixtral, config_and_moves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "INLINE_READ_BYTES", 0)
        with LLM(folder, config, workload=work_of(prompts)) as llm:
            if llm.engine.experts.lookahead is not None:
                llm.engine.experts.lookahead.prefetcher._trial = None
            faults = Faults(acts)
            faulty(patch, faults)
            said = serve(llm, prompts, cancelled, moves)
            patch.undo()
            cache = llm.engine.experts.cache
            assert llm.engine.why_not_whole() is None
            cache.ahead.finish()
            cache.check()
            again = [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS, use_tqdm=False)]
    assert said == expected
    assert again == expected


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_others_of_a_failed_step_say_what_they_would_have(mixtral, packed, layers, monkeypatch):
    """A read that fails in any layer, of any request of a step: nobody is asked for again, the step is."""
    folder, prompts, expected = mixtral
    batch = BatchConfig(max_tokens=48, max_sequences=7, kv_tokens=1024, packed=packed)
    offload = OffloadConfig(budget="1 expert", store="ram", readers=0, prefetch="off")
    with LLM(folder, EngineConfig(dtype="float32", offload=offload, batch=batch)) as llm:
        fails = 0
        for number in range(5, 200, 40):
            with monkeypatch.context() as patch:
                faulty(patch, Faults(["plain"] * number + ["fail"] * layers))
                running = [llm.add(prompt, PARAMS) for prompt in prompts]
                while any(one.request.finish_reason is None for one in running):
                    try:
                        llm.step()
                    except OSError:
                        fails += 1
                assert [one.token_ids for one in running] == expected, number
    assert fails == 5 * layers


@pytest.mark.parametrize("store", ["file", "ram"])
@pytest.mark.parametrize("act", ["slow", "fail", "short"])
def test_nor_while_kv_and_slots_move(mixtral, act, store, monkeypatch):
    folder, prompts, expected = mixtral
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    offload = OffloadConfig(budget="240KiB", store=store, readers=2, prefetch="router")
    config = EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(schedule="layer_major"))
    with LLM(folder, config, workload=work_of(prompts)) as llm:
        llm.engine.experts.lookahead.prefetcher._trial = None
        for number in (0, 17, 60):
            with monkeypatch.context() as patch:
                faults = Faults([*["plain"] * number, act, *["plain"] * 9, act, act])
                faulty(patch, faults)
                assert serve(llm, prompts, {}, [7, 1, 4, 0, 0, 2]) == expected, number
                assert faults.done[act] == 3
        assert llm.engine.loaded.split.stats.splits > 9


@pytest.mark.parametrize("family", ["switch_transformers", "jamba"])
def test_so_do_those_that_keep_another_state(family, tmp_path, monkeypatch):
    """An encoder's output, and recurrent layers'."""
    folder, prompts = tiny_checkpoint(family, tmp_path), prompts_of(3)
    offload = OffloadConfig(budget="1 expert", store="ram", readers=0, prefetch="off")
    with LLM(folder, EngineConfig(dtype="float32", offload=offload)) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(prompts, PARAMS, use_tqdm=False)]
        for number in (5, 31):
            with monkeypatch.context() as patch:
                faulty(patch, Faults(["plain"] * number + ["fail"]))
                running, fails = [llm.add(prompt, PARAMS) for prompt in prompts], 0
                while any(one.request.finish_reason is None for one in running):
                    try:
                        llm.step()
                    except OSError:
                        fails += 1
                assert fails == 1
                assert [one.token_ids for one in running] == expected, number


def work_of(prompts) -> Workload:
    return Workload([len(prompt) for prompt in prompts], [PARAMS.max_tokens] * len(prompts))


def serve(llm, prompts, cancelled, moves=()):
    """All prompts' answers; what is cancelled, or lost by a failed read, is asked for again. No run is endless.

    moves: numbers of sequences that KV and slots are split for, again and again.
    """
    running = {n: llm.add(prompt, PARAMS) for n, prompt in enumerate(prompts)}
    said: list[list[int] | None] = [None] * len(prompts)
    for step in range(1000):
        if not running:
            return said
        if (n := cancelled.get(step)) in running:
            llm.abort([running[n]])
            running[n] = llm.add(prompts[n], PARAMS)
        if moves and (sequences := moves[step % len(moves)]):
            llm.engine.loaded.split.take(sequences)
        try:
            llm.step()
        except OSError as error:
            if "the disk is gone" not in str(error):
                raise
        cache, split = llm.engine.experts.cache, llm.engine.loaded.split
        assert llm.engine.why_not_whole() is None
        assert split is None or split.one.nbytes <= split.shared.memory
        stats = cache.stats
        accounted = sum(cache.ahead.unused.values()) + sum(
            s.useful_bytes + s.late_bytes + s.wasted_bytes for s in stats
        )
        assert sum(s.prefetch_bytes for s in stats) == accounted
        for n, one in list(running.items()):
            if one.request.finish_reason == "length":
                said[n] = one.token_ids
                del running[n]
            elif one.request.finish_reason is not None:
                running[n] = llm.add(prompts[n], PARAMS)
    raise AssertionError(f"after 1000 steps {sorted(running)} have no answer")
