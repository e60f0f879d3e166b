"""Requests that decode by turns: nobody waits long, alike ones meet, and no token changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import LLM, SamplingParams
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.requests import Chunk, Request, step_of
from moe.engine.scheduler import Scheduler
from moe.engine.turns import PATIENCE, Turns
from moe.layer.routing import Routing
from moe.models.kv import BlockPool
from tests.distributed import spawn
from tests.moe.moe_cases import TINYMOE


def requests(count: int) -> list[Request]:
    return [Request(i, [0, 1], SamplingParams(max_tokens=9), 1) for i in range(count)]


def route(turns: Turns, chunks: list[Chunk], ids: np.ndarray) -> None:
    """ids: [L, T, K]."""
    step = step_of(chunks)
    turns.forwards.begin(step)
    for layer, of_layer in enumerate(ids):
        routed = torch.from_numpy(of_layer)
        weights = torch.ones_like(routed, dtype=torch.float32)
        turns.forwards.routed(torch.empty(0), Routing(layer, routed, weights), step)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(1, 8), st.integers(0, 99))
def test_nobody_is_passed_over_for_long(count, size, seed):
    rng = np.random.default_rng(seed)
    running, turns = requests(count), Turns([6, 5], count)
    bound, waited = (PATIENCE + 1) * -(-count // size), dict.fromkeys(range(count), 0)
    for _ in range(3 * bound):
        chosen = turns.choose(running, size)
        assert len(chosen) == min(size, count) == len({r.id for r in chosen})
        chunks = [Chunk(r, 0, int(rng.integers(1, 4))) for r in chosen]
        route(turns, chunks, rng.integers(-1, 5, (2, sum(c.end for c in chunks), 2)))
        for number in waited:
            waited[number] = 0 if number in {r.id for r in chosen} else waited[number] + 1
        assert max(waited.values()) < bound


@pytest.mark.parametrize("num_blocks", range(11, 24))
def test_blocks_that_others_hold_stop_nobody_for_ever(num_blocks):
    """Whose turn it is may have no block, because those who are passed over have them all."""
    config = BatchConfig(max_sequences=1, pool=3, block_size=1, kv_tokens=num_blocks, max_tokens=8)
    pool = BlockPool(num_blocks, 1, sharing=False)
    scheduler = Scheduler(config, pool, turns=Turns([4], 3))
    running = [Request(i, [0, 1], SamplingParams(max_tokens=8), 2) for i in range(3)]
    for request in running:
        scheduler.add(request)
    for _ in range(200):
        for chunk in scheduler.schedule():  # asserts that there is one
            scheduler.computed(chunk)
            if chunk.samples:
                chunk.request.tokens.append(1)
                if chunk.request.num_output == 8:
                    scheduler.finish(chunk.request, "length")
        pool.check()
        if not scheduler.has_work:
            break
    assert [request.finish_reason for request in running] == ["length"] * 3
    assert pool.num_used == 0


def test_those_that_share_experts_meet():
    """Two kinds, told apart by their experts alone, beginning in any order."""
    rng = np.random.default_rng(1)
    running, turns = requests(16), Turns([8] * 3, 16)
    kind = rng.permutation([0, 1] * 8)
    first = [Chunk(r, 0, 12) for r in running]
    route(turns, first, np.stack([rng.integers(0, 4, (16 * 12, 2)) + 4 * np.repeat(kind, 12)[:, None]] * 3))
    mixed = 0
    for _ in range(12):
        chosen = turns.choose(running, 4)
        mixed += len({int(kind[r.id]) for r in chosen}) - 1
        chunks = [Chunk(r, 12, 13) for r in chosen]
        route(turns, chunks, np.stack([rng.integers(0, 4, (4, 2)) + 4 * kind[[r.id for r in chosen]][:, None]] * 3))
    assert mixed == 0


def test_who_ended_leaves_no_trace_and_rows_are_used_again():
    running, turns = requests(3), Turns([4], 3)
    for _ in range(5):
        route(turns, [Chunk(r, 0, 1) for r in running], np.zeros((1, 3, 1), np.int64))
        for request in running:
            turns.forget(request)
        assert not turns._row_of
        assert not turns._counts.any()
        assert not turns._tokens.any()
        running = [Request(r.id + 3, [0, 1], r.params, 1) for r in running]


def test_what_an_interrupted_step_left_is_not_counted():
    running, turns = requests(2), Turns([4, 4], 2)
    step = step_of([Chunk(running[1], 0, 5)])
    turns.forwards.begin(step)
    turns.forwards.routed(None, Routing(0, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)), step)
    turns.choose(running, 1)
    route(turns, [Chunk(running[0], 0, 1)], np.ones((2, 1, 1), np.int64))
    assert turns._counts[0].tolist() == [0, 1, 0, 0] * 2
    assert not turns._counts[1].any()


@pytest.mark.parametrize("budget", ["0.25", "1.0"])
def test_no_token_changes(budget):
    prompts = [f"{who} said" for who in ("ROMEO", "def add(a, b):", "Lily", "Natalia sold 48", "KING", "One day")] * 3
    params = [SamplingParams(max_tokens=6, temperature=0.8 * (i % 2), seed=i) for i in range(len(prompts))]
    config = EngineConfig(dtype="float32", offload=OffloadConfig(budget=budget))
    with LLM(TINYMOE, config) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(TINYMOE, replace(config, batch=BatchConfig(max_sequences=3, pool=12))) as llm:
        found = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
        assert llm.engine.why_not_whole() is None
    assert found == expected


def test_a_pool_that_gives_no_choice_or_has_no_experts_is_refused():
    with pytest.raises(ValueError, match=r"batch\.pool \(4\) must be > batch\.max_sequences \(4\)"):
        BatchConfig(max_sequences=4, pool=4)


def serve_by_turns(prompts: list[list[int]]) -> list[list[int]]:
    batch = BatchConfig(max_sequences=2, pool=5)
    config = EngineConfig(dtype="float32", offload=OffloadConfig(budget="0.25"), batch=batch)
    with process_groups() as groups:
        own = prompts[:1] if groups.rank else prompts[1:]
        with LLM(TINYMOE, config, groups=groups) as llm:
            return [o.outputs[0].token_ids for o in llm.generate(own, SamplingParams(max_tokens=5), use_tqdm=False)]


def test_two_ranks_with_unequal_shares_say_the_same():
    prompts = [list(range(3 + i, 9 + 2 * i)) for i in range(7)]
    with LLM(TINYMOE, EngineConfig(dtype="float32")) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=5), use_tqdm=False)]
    first, second = spawn(2, serve_by_turns, prompts)
    assert second + first == expected
