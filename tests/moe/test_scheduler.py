"""Laws of the scheduler and the block pool, whatever comes in which order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import BatchConfig
from moe.engine.requests import Request
from moe.engine.scheduler import Scheduler
from moe.models.kv import BlockPool
from moe.params import SamplingParams


class World:
    """A scheduler with a model that writes each token into its block and checks that it finds its prefix there.

    The next token is a function of the tokens before it, so that equal prompts stay equal.
    """

    def __init__(self, config: BatchConfig, num_blocks: int, can_chunk: bool = True, room: int | None = None) -> None:
        self.config, self.can_chunk = config, can_chunk
        self.pool = BlockPool(num_blocks, config.block_size, config.prefix_sharing, room)
        self.scheduler = Scheduler(config, self.pool, can_chunk)
        self.memory: dict[tuple[int, int], int] = {}  # (block, place) -> token
        self.sequences: list[Request] = []
        self.admitted: list[int] = []
        self.steps = 0

    def add(self, prompt: list[int], num_new: int) -> Request:
        params = SamplingParams(max_tokens=num_new)
        request = Request(
            id=len(self.sequences),
            tokens=list(prompt),
            params=params,
            num_prompt=len(prompt),
        )
        self.sequences.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        chunks = self.scheduler.schedule()
        self.check(chunks, oldest)
        size = self.config.block_size
        for request, start, end in chunks:
            for place in range(start):
                found = self.memory.get((request.blocks[place // size], place % size))
                assert found == request.tokens[place], (request.id, place)
            for place in range(start, end):
                self.memory[request.blocks[place // size], place % size] = request.tokens[place]
        for chunk in chunks:
            self.scheduler.computed(chunk)
        for chunk in chunks:
            if chunk.samples:
                request = chunk.request
                request.tokens.append(sum(request.tokens) * 7 % 5)
                if request.num_output == request.params.max_tokens:
                    self.scheduler.finish(request, "length")
        self.pool.check()
        self.steps += 1

    def resize(self, num_blocks: int) -> None:
        moved = self.pool.resize(max(num_blocks, self.pool.num_used))
        self.pool.check()
        self.scheduler.renumber(moved)
        self.memory |= {(moved[b], place): token for (b, place), token in self.memory.items() if b in moved}
        self.memory = {at: token for at, token in self.memory.items() if at[0] < self.pool.num_blocks}

    def check(self, chunks, oldest) -> None:
        self.pool.check()
        assert bool(chunks) == self.scheduler.has_work
        ids = [c.request.id for c in chunks]
        assert len(set(ids)) == len(ids)
        assert len(self.scheduler.running) <= self.config.max_sequences
        size = sum(c.end - c.start for c in chunks)
        assert size <= self.config.max_tokens or (len(chunks) == 1 and not self.can_chunk)
        if oldest is not None:
            assert chunks[0].request is oldest  # the oldest always moves on: nobody starves
        for request, start, end in chunks:
            assert start == request.num_computed < end <= len(request.tokens)
            assert self.can_chunk or end == len(request.tokens)
            assert len(request.blocks) * self.config.block_size >= end
            written = set(request.blocks[start // self.config.block_size :])
            others = itertools.chain.from_iterable(s.blocks for s in self.scheduler.running if s is not request)
            assert not written & set(others), "a shared block is written"
            if request.id not in self.admitted:
                self.admitted.append(request.id)

    def run(self) -> None:
        bound = 20 + 20 * sum(len(s.tokens) + s.params.max_tokens for s in self.sequences) ** 2
        while self.scheduler.has_work:
            self.step()
            assert self.steps < bound
        assert self.pool.num_available == self.pool.num_blocks
        assert all(not s.blocks for s in self.sequences)


# Few different tokens, so that prompts begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=30)
requests = st.lists(st.tuples(prompts, st.integers(1, 9)), min_size=1, max_size=9)
configs = st.builds(
    lambda sequences, more, size, sharing: BatchConfig(
        max_tokens=sequences + more, max_sequences=sequences, block_size=size, prefix_sharing=sharing
    ),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(1, 7),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(configs, requests, st.integers(0, 12), st.data())
def test_every_sequence_finishes_and_nothing_is_lost(config, asked, spare, data):
    needed = max(-(-(len(p) + n) // config.block_size) for p, n in asked)
    world = World(config, needed + spare, room=needed + 12)
    for prompt, num_new in asked:
        world.add(prompt, num_new)
        for _ in range(data.draw(st.integers(0, 3))):
            if world.scheduler.has_work:
                world.step()
                world.resize(needed + data.draw(st.integers(0, 12)))
        unfinished = [s for s in world.sequences if s.finish_reason is None]
        if unfinished and data.draw(st.integers(0, 5)) == 0:
            world.scheduler.finish(data.draw(st.sampled_from(unfinished)), "abort")
    world.run()
    for request, (prompt, num_new) in zip(world.sequences, asked):
        if request.finish_reason == "abort":
            continue
        tokens = list(prompt)
        for _ in range(num_new):
            tokens.append(sum(tokens) * 7 % 5)
        assert request.tokens == tokens
        assert request.finish_reason == "length"
    finished = [s.id for s in world.sequences if s.finish_reason != "abort"]
    assert [i for i in world.admitted if i in finished] == finished  # first come, first served


@settings(max_examples=50, deadline=None)
@given(configs, requests)
def test_prompts_that_cannot_be_cut_are_computed_whole(config, asked):
    world = World(config, config.max_sequences * 60, can_chunk=False)
    for prompt, num_new in asked:
        world.add(prompt, num_new)
    world.run()
    assert world.admitted == [s.id for s in world.sequences]
    assert all(s.num_output == n for s, (_, n) in zip(world.sequences, asked))


def test_what_has_begun_elsewhere_goes_before_what_has_not():
    scheduler = Scheduler(BatchConfig(max_sequences=1), BlockPool(9, 16, True))
    for number, num_output in enumerate((0, 0, 2, 1, 0)):
        scheduler.add(Request(number, [1, 2, 3, 4], SamplingParams(seed=0), 4 - num_output))
    assert [request.id for request in scheduler.waiting] == [2, 3, 0, 1, 4]


def test_preemption_happens_and_the_youngest_goes():
    world = World(BatchConfig(max_tokens=64, max_sequences=4, block_size=4, prefix_sharing=False), 8)
    first, second = world.add([1] * 12, 20), world.add([2] * 12, 20)
    world.run()
    assert (first.num_preempted, second.num_preempted > 0) == (0, True)
    assert first.num_output == second.num_output == 20


def test_prefixes_are_shared_and_forgotten_oldest_first():
    world = World(BatchConfig(max_tokens=64, max_sequences=4, block_size=4), 8)
    first = world.add([1] * 9, 1)
    world.run()
    again, longer = world.add([1] * 9, 1), world.add([1] * 8 + [0] * 8, 1)
    world.run()
    assert (first.num_shared, again.num_shared, longer.num_shared) == (0, 8, 8)
    world.add([0] * 30, 2)  # takes every block
    world.run()
    last = world.add([1] * 9, 1)
    world.run()
    assert last.num_shared == 0


def test_a_prompt_of_whole_blocks_keeps_one_token_to_compute():
    world = World(BatchConfig(max_tokens=64, max_sequences=4, block_size=4), 8)
    world.add([1] * 8, 1)
    world.run()
    again = world.add([1] * 8, 1)
    world.run()
    assert again.num_shared == 4


def test_sharing_can_be_switched_off_while_running():
    world = World(BatchConfig(max_tokens=64, max_sequences=4, block_size=4), 8)
    world.add([1] * 9, 1)
    world.run()
    world.pool.sharing = False
    again = world.add([1] * 9, 3)
    world.run()
    assert again.num_shared == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), max_size=60))
def test_blocks_are_free_kept_or_used(num_blocks, sharing, operations):
    """Random takes, releases, matches and publications of prefixes over two tokens."""
    pool = BlockPool(num_blocks, 2, sharing)
    owned: list[tuple[list[int], list[int]]] = []  # blocks, tokens
    for kind, number in operations:
        if kind == 0 and pool.num_available:
            count = 1 + number % pool.num_available
            tokens = [(number >> i) & 1 for i in range(2 * count)]
            owned.append((pool.take(count), tokens))
        elif kind == 1 and owned:
            pool.release(owned.pop(number % len(owned))[0])
        elif kind == 2 and owned:
            blocks, tokens = owned[number % len(owned)]
            for index in range(len(blocks)):
                pool.publish(blocks, index, tokens[2 * index : 2 * index + 2])
        elif kind == 3:
            tokens = [(number >> i) & 1 for i in range(9)]
            blocks = pool.match(tokens)
            assert len(blocks) <= 4
            assert sharing or not blocks
            owned.append((blocks, tokens[: 2 * len(blocks)]))
        pool.check()
        used = {b for blocks, _ in owned for b in blocks}
        assert pool.num_available == num_blocks - len(used)
    for blocks, _ in owned:
        pool.release(blocks)
    pool.check()
    assert pool.num_available == num_blocks


def test_pool_check_sees_a_lost_and_a_doubled_block():
    pool = BlockPool(4, 2)
    blocks = pool.take(2)
    pool._users[blocks[0]] = 0
    with pytest.raises(AssertionError):
        pool.check()
    pool._users[blocks[0]] = 1
    pool._free.append(blocks[1])
    with pytest.raises(AssertionError):
        pool.check()
