"""Moves one memory between KV and slots while an offline batch runs, by what each has been seen to cost.

`layer_major.py` chooses beforehand, from sizes alone. In the run it is known better what a step reads:

    d(t, slots) = Σ over experts of e p(t)  -  η Σ over those that are kept of e p(t)
    p(t)        = 1 - (1 - q)^t: that one of t tokens asks for the expert; q, the share of tokens that did
    kept        = the most asked for, as many as there are slots beside those that a layer's misses pass through
    η           = hits by those that these would have had: what the policy makes of a slot

so that a slot more saves what the most wanted expert without one costs, and a sequence more what the step is shared by.
How long answers become is measured too (`AnswerLengths`): beforehand each counts with the most that it may have. And at
the end fewer sequences than fit leave their KV to the experts. Every `PERIOD` steps the split that reads least for the
rest of the run is found again, and taken if that saves `LEAST_GAIN` of the reading and steps do wait for reads: below
that it stays, so that it does not swing. Where KV was too little, and a request was put back to be computed again
later, every answer counts as longer from then on.

For more slots the split waits until as many requests have ended as must: none is put back for it.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe.engine.layer_major import Left, Shared, Sizes, read_bytes
from moe.engine.one_memory import OneMemory, SplitStats
from moe.engine.requests import Request
from moe.engine.scheduler import Scheduler
from moe.layer.experts import SlotExperts
from moe.layer.routing import RoutedLayer, StepContext, WholeForwards
from moe.models.kv import PagedKV
from moe.offload.budget import format_bytes
from moe.placement.plan import Plan

log = logging.getLogger(__name__)

PERIOD = 8  # steps from one look to the next
LEAST_GAIN = 0.1  # of what is left to read
PRIOR_TOKENS = 16.0  # that all experts are asked for alike counts as so many tokens
MEMORY = 0.5  # of what was seen before a look, the weight at the next
FINENESS = 1.15  # from one number of sequences that is looked at to the next
PRIOR_ANSWERS = 4.0  # that answers have the most tokens they may counts as so many that have
CAUTION = 1.25  # times the tokens of an answer, each time that KV was too little

Floats = npt.NDArray[np.float64]


class Measured:
    """What steps have been seen to ask for; a `Demand`."""

    def __init__(self, sizes: Sizes) -> None:
        counts = sizes.chosen_from
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._bytes = np.repeat(np.array(sizes.expert_bytes, np.float64), counts)
        self._alike = np.repeat([min(1.0, sizes.top_k / count) for count in counts], counts)
        self._counts: Floats = np.zeros(sum(counts))
        self._counts_of = np.split(self._counts, self._first[1:-1])  # views, by layer
        self._tokens, self.efficiency = 0.0, 1.0
        self.use([range(count) for count in counts], 1)

    def use(self, own: Sequence[Sequence[int]], num_ranks: int) -> None:
        """From here on these experts are this rank's, by layer, and tokens of so many ranks come to them."""
        self._own = np.concatenate([a + np.asarray(experts, np.int64) for a, experts in zip(self._first, own)])
        self._num_ranks = num_ranks
        self._order()

    def learn(self, step: StepContext, layers: Sequence[RoutedLayer]) -> None:
        """What a forward's tokens asked for."""
        self._tokens += step.num_tokens
        for counts, layer in zip(self._counts_of, layers):
            counts += np.bincount(layer.topk_ids[layer.topk_ids >= 0], minlength=len(counts))

    def look(self, tokens: float, slots: int, hit_share: float) -> None:
        """Takes what was learnt. tokens, slots: of a step on average; hit_share: of what was asked, by count."""
        self._order()
        asked = self._asked(tokens)
        could = asked[: self._num_kept(asked, slots)].sum() / asked.sum()
        seen = min(1.0, hit_share / could) if could > 0 else 1.0
        self.efficiency += (1 - MEMORY) * (seen - self.efficiency)
        self._counts *= MEMORY
        self._tokens *= MEMORY

    def __call__(self, tokens: int, slots: int) -> float:
        asked = self._asked(tokens)
        nbytes, kept = asked * self._sorted_bytes, self._num_kept(asked, slots)
        return float(nbytes.sum() - self.efficiency * nbytes[:kept].sum())

    def _order(self) -> None:
        """The most asked for first."""
        counts, alike = self._counts[self._own], self._alike[self._own]
        shares = (counts + PRIOR_TOKENS * alike) / (self._tokens + PRIOR_TOKENS)
        order = np.argsort(-shares, kind="stable")
        self._shares, self._sorted_bytes = np.minimum(shares[order], 1.0), self._bytes[self._own][order]

    def _num_kept(self, asked: Floats, slots: int) -> int:
        passing = 0 if slots >= len(asked) else round(float(asked.sum()) / len(self._counts_of))
        return max(0, slots - passing)

    def _asked(self, tokens: float) -> Floats:
        asked: Floats = 1 - (1 - self._shares) ** (tokens * self._num_ranks)
        return asked


class AnswerLengths:
    """How many tokens answers have: Kaplan and Meier's estimate, where one that goes on counts as far as it came."""

    def __init__(self) -> None:
        self.caution = 1.0
        self._ended = Counter[int]()
        self._stopped = Counter[int]()  # at the most they may have, which says nothing of longer ones

    def add(self, request: Request) -> None:
        """An answer is complete."""
        (self._stopped if request.finish_reason == "length" else self._ended)[request.num_output] += 1

    def expected(self, now: npt.NDArray[np.int64], most: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of answers at their ends. now: those that they have, most: those that they may have; both [N]."""
        size = 1 + max([int(most.max(initial=1)), *self._ended, *self._stopped])
        ended = np.bincount([*self._ended.elements()], minlength=size)
        come = ended + np.bincount([*self._stopped.elements()], minlength=size) + np.bincount(now, minlength=size)
        at_risk = np.cumsum(come[::-1])[::-1] + PRIOR_ANSWERS
        goes_on = np.cumprod(1 - ended / at_risk)  # [l]: that there are more than l
        total = np.concatenate([[0.0], np.cumsum(goes_on)])
        more = (total[most] - total[now]) / goes_on[now]
        found: npt.NDArray[np.int64] = np.minimum(now + np.ceil(self.caution * more).astype(np.int64), most)
        return found


class MovingSplit:
    """One memory's KV and slots, on the host. `step` must be called before each step is planned.

    Counts with the experts that this process has, alone or among ranks, whenever that changes.
    """

    def __init__(self, shared: Shared, scheduler: Scheduler, kv: PagedKV, experts: SlotExperts) -> None:
        self.shared, self.scheduler, self.kv, self.experts = shared, scheduler, kv, experts
        sizes = self.sizes = shared.sizes
        self.one = OneMemory(shared.memory, scheduler, kv, experts)
        self.demand, self.lengths = Measured(sizes), AnswerLengths()
        self._plan: Plan | None  # that these are of
        self._follow()
        self._seen: list[Request] = []
        self._put_back = 0
        experts.routing.observers.append(WholeForwards(len(sizes.num_experts), self._learn))
        self._steps = self._tokens = 0
        self._before = self._counted()
        self._wanted: int | None = None  # sequences of the split that waits until no more run

    @property
    def stats(self) -> SplitStats:
        return self.one.stats

    def step(self) -> None:
        """Between two steps: looks again where it is time, and moves what may be moved."""
        parallel = self.experts.parallel
        if self._plan is not (None if parallel is None else parallel.plan):
            self._follow()
        for request in self._seen:
            if request.finish_reason is not None and request.num_output:
                self.lengths.add(request)
        self._seen = self._open
        longest = max((self._end(request) for request in self._open), default=0)
        needed = -(-longest // self.sizes.block_size)
        if needed > self.kv.pool.num_blocks:  # none of those that were foretold, or the last that was longest
            self._move(self._fitting([needed], self.scheduler.places), needed)
        if self._wanted is None and self._steps >= PERIOD:
            self._look()
        if self._wanted is not None and len(self.scheduler.running) <= self._wanted:
            if self._open:
                self.take(self._wanted)
            self._wanted = None

    def _follow(self) -> None:
        """Counts with the experts that are this rank's now, and with whose tokens come to them."""
        parallel, counts = self.experts.parallel, self.sizes.chosen_from
        self._plan = None if parallel is None else parallel.plan
        own = [range(count) for count in counts] if parallel is None else parallel.hosted
        num_ranks = 1 if parallel is None else parallel.groups.world_size
        self.sizes = self.sizes._replace(num_experts=[len(of) for of in own], num_ranks=num_ranks)
        self.demand.use(own, num_ranks)

    def move(self, sequences: int) -> None:
        """Takes the split of so many sequences, as soon as no more run."""
        self._wanted = sequences
        self.scheduler.let_in(min(self.scheduler.places, sequences))

    def left(self) -> Left:
        """Of the requests that are open, and of those that are still to come, with answers as long as it seems."""
        sizes, work, come = self.sizes, self.shared.work, self.scheduler.num_added
        rows = [
            (r.num_prompt, self._end(r) - r.num_prompt, r.num_output, min(r.num_computed, r.num_prompt))
            for r in self._open
        ]
        rows += [(p, a or 0, 0, 0) for p, a in zip(work.prompts[come:], work.answers[come:])]
        prompts, most, now, computed = np.array(rows, np.int64).reshape(-1, 4).T
        answers = self.lengths.expected(now, most)
        more = answers - np.maximum(now, 1)  # the first is the prompt's last chunk's
        ends = sorted((sizes.in_blocks(int(tokens)) for tokens in prompts + answers), reverse=True)
        return Left(
            ends,
            int((computed < prompts).sum()),
            int((prompts - computed).sum()),
            int(more.clip(min=0).sum()),
            int(more.max(initial=0)),
        )

    def _look(self) -> None:
        tokens, steps, now = self._tokens, self._steps, self._counted()
        hits, misses, nbytes, stall = (b - a for a, b in zip(self._before, now))
        self._steps = self._tokens = 0
        self._before = now
        if min(hits, misses, nbytes) < 0 or hits + misses == 0 or tokens == 0:  # somebody began to count anew
            return
        if self.scheduler.num_put_back > self._put_back:
            self._put_back, self.lengths.caution = self.scheduler.num_put_back, self.lengths.caution * CAUTION
        cache, left = self.experts.cache, self.left()
        self.demand.look(tokens / steps, cache.num_slots, hits / (hits + misses))
        if not left.kv_tokens or stall <= 0:
            return
        present = self._expected(left, self.scheduler.places, cache.num_slots)
        blocks = np.cumsum(left.kv_tokens) // self.sizes.block_size
        running = len(self.scheduler.running)
        fewest = running if running == len(blocks) else 1  # at the end none can wait for others
        best, sequences = min(
            (self._expected(left, n, slots), n)
            for n in _some(fewest, len(blocks))
            if (slots := self._slots_beside(int(blocks[n - 1]), n)) >= self.sizes.least_slots or n == fewest
        )
        if best < (1 - LEAST_GAIN) * present:
            log.info(
                "%d sequences a step in place of %d: %s to read in place of %s",
                *(sequences, self.scheduler.places, format_bytes(best), format_bytes(present)),
            )
            self.move(sequences)

    def _expected(self, left: Left, sequences: int, slots: int) -> float:
        sequences = min(sequences, len(left.kv_tokens))
        return read_bytes(left, self.demand, sequences, max(self.scheduler.config.max_tokens, sequences), slots)

    def take(self, sequences: int) -> None:
        """Takes the split of so many sequences now, as far as those that run leave it KV. There must be requests."""
        blocks = np.cumsum(self.left().kv_tokens) // self.sizes.block_size
        sequences = self._fitting(blocks.tolist(), min(sequences, len(blocks)))
        self._move(sequences, int(blocks[sequences - 1]))

    def _fitting(self, blocks: Sequence[int], sequences: int) -> int:
        """As many sequences, or as many fewer as leave enough slots. blocks: of 1, 2, … sequences, then as many."""
        while sequences > 1:
            slots = self._slots_beside(blocks[min(sequences, len(blocks)) - 1], sequences)
            if slots >= self.sizes.least_slots:
                break
            sequences -= 1
        return sequences

    def _move(self, sequences: int, blocks: int) -> None:
        """So many blocks from now on, if no more are used, and slots in the memory that they leave."""
        pool = self.kv.pool
        blocks = min(max(blocks, pool.num_used), pool.room)
        self.scheduler.let_in(sequences)
        self.one.give(blocks, self._slots_beside(blocks, sequences))

    def _slots_beside(self, blocks: int, sequences: int) -> int:
        """The most that the memory holds beside so many blocks, and the rows of a step."""
        shared = self.shared
        room = min(shared.memory, shared.room - sequences * self.sizes.row_bytes)
        return min(self.sizes.slots_in(room - self.kv.taken_by(blocks)), self.experts.cache.map.room)

    @property
    def _open(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _end(self, request: Request) -> int:
        """Tokens that it has at its end."""
        assert request.params.max_tokens is not None, "a request that was added has a limit"
        return min(request.num_prompt + request.params.max_tokens, self.shared.max_context)

    def _learn(self, step: StepContext, layers: Sequence[RoutedLayer]) -> None:
        self._steps += 1
        self._tokens += step.num_tokens
        self.demand.learn(step, layers)

    def _counted(self) -> tuple[int, int, int, float]:
        stats = self.experts.cache.stats
        return (
            sum(s.hits for s in stats),
            sum(s.misses for s in stats),
            sum(s.bytes_read for s in stats),
            sum(s.stall_seconds for s in stats),
        )


def _some(fewest: int, most: int) -> list[int]:
    """Numbers from `fewest` to `most`, each a little more than the last."""
    found, n = [], float(fewest)
    while n < most:
        found.append(int(n))
        n = max(n * FINENESS, n + 1)
    return [*found, most]
