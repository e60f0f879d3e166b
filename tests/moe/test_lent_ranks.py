"""KV's memory lent to slots beside other ranks: each moves its own border, and no token changes; not in coherent runs,
and not where a launch over ranks needs what is in slots."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

import moe.engine.assemble as assemble
import moe.engine.device as device
import moe.engine.join as join
import moe.engine.lent_kv as lent_kv
from moe.comm.errors import LostPeer
from moe.comm.membership import Generation, connect, join_groups, leave_groups, process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.engine import Engine
from moe.engine.lent_kv import LentKV
from moe.engine.share import Share
from moe.layer.runners import Resident
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.moe.moe_cases import TINYMOE, random_prompts
from tests.moe.test_moving_split import resident
from tests.patience import PATIENCE_S

SHAPE = 6, 16  # layers, experts
EXPERT = 144 << 10
BLOCK = 16 * 2304  # bytes: 6 layers of K and V, 3 heads of 32 in bf16
KV_TOKENS = 640
LENGTHS = (90, 130, 3, 170, 40, 112, 65, 80, 1, 133, 60, 5)
PROMPTS = random_prompts(LENGTHS, vocab_size=500)
PARAMS = [SamplingParams(temperature=0, max_tokens=8 + 5 * n % 23, ignore_eos=True) for n in range(len(PROMPTS))]


def config(dispatcher: str = "all_to_all", budget: str | None = None) -> EngineConfig:
    return EngineConfig(
        threads=1,
        offload=OffloadConfig(budget=budget, prefetch="off"),
        batch=BatchConfig(max_tokens=48, max_sequences=3, kv_tokens=KV_TOKENS),
        parallel=ParallelConfig(dispatcher=dispatcher),
    )


@pytest.fixture(scope="module")
def said():
    with LLM(TINYMOE, config(budget="1.0")) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def little_memory(slots: int) -> None:
    """Of this process, a rank of a test: for KV and so many slots. It moves what it can as often as it can."""
    room = KV_TOKENS // 16 * BLOCK + slots * EXPERT
    assemble.free_room = lambda *_: room
    join.free_room = lambda *_: 0  # of what is beside it
    device.free_memory = lambda *_: 4 * room
    lent_kv.PERIOD, lent_kv.AHEAD = 4, 2


def step(engine: Engine, fixed: int) -> int:
    """One, and every law after it; slots. fixed: slots beside all of KV."""
    engine.step()
    split = engine.loaded.split
    assert isinstance(split, LentKV)
    assert engine.why_not_whole() is None
    assert split.one.nbytes <= split.one.memory == KV_TOKENS // 16 * BLOCK + fixed * EXPERT
    return engine.state().slots


def serve_on_ranks(dispatcher: str, counts: list[int]) -> tuple[dict[int, list[int]], list[int]]:
    """What was said; the slots after every step. counts: of slots of each rank beside all of KV."""
    fixed = counts[int(os.environ["RANK"])]
    little_memory(fixed)
    with process_groups() as groups:
        with LLM(TINYMOE, config(dispatcher), groups=groups) as llm:
            own = {i: llm.engine.add_request(PROMPTS[i], PARAMS[i]) for i in range(groups.rank, len(PROMPTS), 2)}
            slots = [llm.engine.state().slots]
            llm.engine.start()
            while llm.engine.has_work:
                slots.append(step(llm.engine, fixed))
            assert llm.engine.scheduler.num_put_back == 0
            return {i: r.tokens[r.num_prompt :] for i, r in own.items()}, slots


@pytest.mark.parametrize("dispatcher", ["all_to_all", "hierarchical", "coherent"])
def test_each_rank_moves_its_own_border(said, dispatcher):
    """Ranks with unequal memory; one has room for more than its half of the experts where KV leaves it."""
    counts = [9, 44]
    for fixed, (tokens, slots) in zip(counts, spawn(2, serve_on_ranks, dispatcher, counts)):
        assert all(tokens[i] == said[i] for i in tokens)
        if dispatcher == "coherent":
            assert set(slots) == {fixed}
        else:
            assert min(slots) >= fixed < max(slots) <= 48
            assert len(set(slots)) > 2


def fills_ahead(lacking: int) -> tuple[bool, bool, int]:
    """Whether all of a rank's experts are resident at first, and when its slots are filled with nothing computed; how
    many reads that took. lacking: of its experts."""
    with process_groups() as groups:
        settings = replace(config(), offload=OffloadConfig(prefetch="off", readers=2))
        with LLM(TINYMOE, settings, groups=groups) as llm:
            experts, cache = llm.engine.experts, llm.engine.experts.cache
            own = [layer * 16 + expert for layer, of in enumerate(experts.parallel.hosted) for expert in of]
            before = isinstance(experts.runner, Resident)
            cache.unpin()
            cache.map.evict(np.array(own[::2][:lacking]))
            experts.settle()
            assert experts.runner is experts.waves
            fills = cache.map.num_fills
            for _ in range(8):
                experts.fill()
                cache.ahead.finish()
                cache.check()
            experts.settle()
            return before, isinstance(experts.runner, Resident), cache.map.num_fills - fills


def test_ranks_whose_experts_have_slots_fill_them_ahead():
    assert spawn(2, fills_ahead, 20) == [(True, True, 20)] * 2


def serve_coherently(beside: int) -> tuple[dict[int, list[int]], int, int]:
    """What was said; blocks of KV for all ranks' requests, and for a rank's own. beside: bytes that are free."""
    little_memory(9)
    join.free_room = lambda *_: beside + 9 * EXPERT + 48 * BLOCK  # what is to come is free
    assemble.free_room = lambda *_: 9 * EXPERT + 48 * BLOCK
    batch = BatchConfig(max_tokens=48, max_sequences=3)
    with process_groups() as groups:
        settings = replace(config("coherent"), batch=batch, max_context=256)
        with LLM(TINYMOE, settings, groups=groups) as llm:
            own = {i: llm.engine.add_request(PROMPTS[i], PARAMS[i]) for i in range(groups.rank, len(PROMPTS), 2)}
            llm.engine.start()
            while llm.engine.has_work:
                llm.engine.step()
                assert llm.engine.why_not_whole() is None
            pools = llm.engine.scheduler.pool, llm.engine.loaded.memory.scheduler.pool
            return {i: r.tokens[r.num_prompt :] for i, r in own.items()}, *(pool.room for pool in pools)


@pytest.mark.parametrize(("beside", "blocks"), [(0, 48), (20 * BLOCK, 68), (100 * BLOCK, 76)])
def test_kv_of_all_ranks_requests_takes_what_slots_were_counted_beside_and_what_is_free(said, beside, blocks):
    """At most a quarter of all, 76 blocks."""
    for tokens, room, own in spawn(2, serve_coherently, beside):
        assert all(tokens[i] == said[i] for i in tokens)
        assert (room, own) == (blocks, 48)


def lives_on(dispatchers: list[str]) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
    """Three ranks, one of which is killed; the two others, by another dispatcher; one alone. Slots: (least, most) of
    each generation."""
    rank, store = int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    little_memory(9)
    engine = Engine(TINYMOE, config(), share=Share(Plan.contiguous(*SHAPE, 3), rank))
    own, seen = {}, []

    def serve(dispatcher: str, steps: int | None, *requests: int) -> None:
        own.update({i: engine.add_request(PROMPTS[i], PARAMS[i]) for i in requests})
        engine.start()
        slots = []
        while engine.has_work and steps != 0:
            slots.append(step(engine, 9))
            steps = None if steps is None else steps - 1
        seen.append((min(slots), max(slots)))

    groups = join_groups(store, Generation(1, ("a",) * 3), rank, meet_s=PATIENCE_S)
    engine.join(groups, Plan.contiguous(*SHAPE, 3))
    serve(dispatchers[0], 14, rank, rank + 3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LostPeer):
        [step(engine, 9) for _ in range(1000)]
    assert engine.why_not_whole() is None
    leave_groups(groups, wait=False)
    for number, dispatcher in enumerate(dispatchers[1:], 2):
        parallel = ParallelConfig(dispatcher=dispatcher)
        object.__setattr__(engine.loaded.read.config, "parallel", parallel)  # as `auto` may choose for these ranks
        groups = join_groups(store, Generation(number, ("a", "a")), rank // 2, meet_s=PATIENCE_S)
        engine.join(groups, Plan.random(*SHAPE, 2, seed=number))
        if dispatcher == "coherent":  # which has another KV
            kv = engine.loaded.memory.runner.kv.layers
            assert sum(map(resident, (t for layer in kv for t in (layer.keys, layer.values)))) == 0
        serve(dispatcher, 12, 2 + rank // 2 + 2 * number)
        leave_groups(groups)
    engine.join(None)
    serve("alone", None)
    assert engine.scheduler.pool.num_used == 0
    assert engine.loaded.split.stats.splits > 4
    engine.close()
    return {i: r.tokens[r.num_prompt :] for i, r in own.items()}, seen


@pytest.mark.parametrize("dispatchers", [["all_to_all"] * 3, ["all_to_all", "coherent", "all_to_all"]])
def test_generations_change_while_memory_is_lent(said, dispatchers):
    """A rank is lost in the middle of it; the experts of the others are others from then on."""
    first, _, third = spawn(3, lives_on, dispatchers, may_die=[1])
    for tokens, seen in (first, third):
        assert all(tokens[i] == said[i] for i in tokens)
        for dispatcher, (least, most) in zip([*dispatchers, "alone"], seen):
            assert least >= 9
            assert (most > 9) == (dispatcher != "coherent"), (dispatcher, seen)
