"""Slots have the memory that the KV cache does not use: the default, where no offload.budget says what they may take.

KV takes memory from slots when sequences need it, and gives it back some time after they have ended. What it may have
at most is what it would have had for itself, so that a request that fits there is never refused or put back for the
slots' sake; and slots never have fewer than beside that.

    needed   = blocks of running sequences at their next step, and of those that may begin then
             + blocks kept for prompts that begin the same way, where prompts lately did (`KEEP_SHARE`)
    grows    at once, when fewer are there, to what the next `AHEAD` tokens of each sequence need
    shrinks  every `PERIOD` steps to the most that was needed in them, if slots gain a `LEAST_GAIN` of theirs, or become
             one for each expert: those that lack are then read meanwhile

Costs a sum over the running sequences a step; when the border moves, what one_memory.py says. Among ranks that have
requests of their own each moves its own border, and asks nobody; a coherent run, whose ranks must have equal KV, lends
none.
"""

from itertools import islice

from moe.engine.one_memory import OneMemory, SplitStats
from moe.engine.requests import Request

AHEAD = 64  # tokens of each sequence
PERIOD = 64  # steps from one look to the next
LEAST_GAIN = 1 / 32  # of the slots that there are
KEEP_SHARE = 0.05  # of prompt tokens that were found computed: from there on what is kept is worth its memory
ENOUGH = 8  # prompts that must have come without, before it is held for worthless


class LentKV:
    """Of one process, alone and in one generation of ranks after another. `step` must be called before each step is
    planned. meets: it is about to join ranks; KV has all that it may until then."""

    def __init__(self, one: OneMemory, *, meets: bool) -> None:
        self.one = one
        self.lends = False
        self.keeps = True  # whether blocks of ended sequences are worth their memory
        self._steps = self._most = 0
        self._begun = self._counted()
        if not meets:
            self.use()
            one.experts.fill(at_once=True)

    @property
    def stats(self) -> SplitStats:
        return self.one.stats

    def use(self, more: int = 0, *, lends: bool = True) -> None:
        """From here on the slots are for the experts that this process has now, alone or among ranks.

        more: bytes that both have beside what they had, as far as they can use them. lends: whether slots may have
        memory of KV.
        """
        self.one.memory = max(self.one.memory, min(self.one.memory + more, self.one.most))
        self.lends = lends
        self._take(self._needed()[1] if lends else self.one.kv.pool.room)

    def step(self) -> None:
        """Between two steps: KV gets what the next one needs, and from time to time slots what it does not."""
        if not self.lends:
            return
        needed, ahead = self._needed()
        if needed > self.one.kv.pool.num_blocks:
            self._take(ahead)
        self._most, self._steps = max(self._most, ahead), self._steps + 1
        if self._steps >= PERIOD:
            self._look()
        self.one.experts.fill()

    def make_room(self, blocks: int) -> None:
        """So many that nobody uses, or as many as there may be."""
        pool = self.one.kv.pool
        if self.lends and blocks > pool.num_available:
            self._take(pool.num_used + blocks)

    def _look(self) -> None:
        self._judge_kept()
        slots, own = self.one.experts.cache.num_slots, sum(self.one.experts.num_own)
        beside = self.one.slots_beside(min(self._most, self.one.kv.pool.room))
        if beside >= slots * (1 + LEAST_GAIN) or beside == own > slots:
            self._take(self._most)
        self._steps = self._most = 0

    def _judge_kept(self) -> None:
        prompts, tokens, shared = (b - a for a, b in zip(self._begun, self._counted()))
        if shared > KEEP_SHARE * tokens:
            self.keeps, self._begun = True, self._counted()
        elif prompts >= ENOUGH:
            self.keeps, self._begun = False, self._counted()

    def _take(self, blocks: int) -> None:
        """So many blocks, and what is left of the memory beside whole slots."""
        pool = self.one.kv.pool
        slots = self.one.slots_beside(min(max(blocks, pool.num_used, 1), pool.room))
        self.one.give(self.one.blocks_beside(slots), slots)

    def _needed(self) -> tuple[int, int]:
        """Blocks at the next step, and some steps later."""
        scheduler, pool = self.one.scheduler, self.one.kv.pool
        places = max(0, scheduler.places - len(scheduler.running))
        coming = list(islice(scheduler.waiting, places))
        used = pool.num_used + (pool.num_kept if self.keeps else 0)
        needed = used + sum(self._lacking(r, 1) for r in [*scheduler.running, *coming])
        ahead = used + sum(self._lacking(r, AHEAD) for r in [*scheduler.running, *coming])
        return min(needed, pool.room), min(ahead, pool.room)

    def _lacking(self, request: Request, more: int) -> int:
        tokens = len(request.tokens) + more
        return max(0, -(-tokens // self.one.kv.pool.block_size) - len(request.blocks))

    def _counted(self) -> tuple[int, int, int]:
        scheduler = self.one.scheduler
        return scheduler.num_begun, scheduler.begun_tokens, scheduler.shared_tokens
