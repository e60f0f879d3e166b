"""`batch.schedule=layer_major`: how one memory is split between KV and experts' slots when all requests are known.

A step computes all its sequences layer by layer and reads an expert once for all of them, so a wider step reads less
for each token; but KV of more sequences leaves fewer slots. Counted in bytes read:

    read(n)   = steps(n) d(n) + chunks(n) d(tokens of a chunk)
    d(t)      = what a step of t tokens reads. Before the run (`Uniform`): (1 - slots / N) x sum over layers of
                e E (1 - (1 - K / E)^t), as if all experts were asked for alike; in it as measured (moving_split.py)
    slots(n)  = what the KV of the n longest sequences leaves, so that none is ever computed twice
    steps(n)  = of decoding: all answers' tokens by n, but no fewer than the longest answer has
    chunks(n) = of prompts: their tokens by those of a step, which come with n sequences

N experts of e bytes, E a layer, K a token.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from moe.config import BatchConfig, EngineConfig
from moe.models.blueprint import Blueprint
from moe.offload.budget import format_bytes, parse_budget, resolve_slots, slots_within
from moe.offload.slot_runs import slab_bytes

USUAL = 16  # sequences of a step where nobody says how many: what the choice is compared with
SHARE_OF_STEP = 1 / 16  # of the room, what tokens of prompts in a step may take; the tenth beside the room holds it


class Workload(NamedTuple):
    """All requests of a run, every sample one. prompts: tokens of each; answers: the most of each, None = what fits."""

    prompts: Sequence[int]
    answers: Sequence[int | None]

    def within(self, max_context: int) -> "Workload":
        """As a model of that context computes them; what it cannot take at all is left out."""
        pairs = [(p, a) for p, a in zip(self.prompts, self.answers) if p < max_context]
        rooms = [max_context - p if a is None else min(a, max_context - p) for p, a in pairs]
        return Workload([p for p, _ in pairs], rooms)


class Left(NamedTuple):
    """What a run has still to compute.

    kv_tokens: of each sequence at its end, in whole blocks, longest first. num_prompts: sequences whose prompts are
    part of prompt_tokens. answer_tokens: of all, longest_answer: of one; the first is the last chunk's and not counted.
    """

    kv_tokens: Sequence[int]
    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    longest_answer: int

    def num_steps(self, sequences: int) -> int:
        """Of decoding."""
        return max(-(-self.answer_tokens // sequences), self.longest_answer)

    def chunk(self, sequences: int, max_tokens: int) -> int:
        """Tokens of prompts in a step."""
        coming = -(-self.prompt_tokens * min(sequences, self.num_prompts) // max(1, self.num_prompts))
        return max(1, min(max(max_tokens, sequences), coming))


class Sizes(NamedTuple):
    """expert_bytes, num_experts: by layer, of those that are this rank's; chosen_from: of all that a token may ask for.
    num_ranks: whose tokens come to them. kv_bytes: of a token in all layers; row_bytes: of a sequence in a step;
    token_bytes: of a token in a step, while it is computed; read_bytes: of the largest expert in files.
    """

    expert_bytes: Sequence[int]
    num_experts: Sequence[int]
    chosen_from: Sequence[int]
    num_ranks: int
    top_k: int
    kv_bytes: int
    row_bytes: int
    token_bytes: int
    block_size: int
    read_bytes: int = 0

    @property
    def least_slots(self) -> int:
        """What one token computes with, and as many that are read meanwhile; of each size of experts one at least."""
        of_size, total = Counter[int](), sum(self.num_experts)
        for nbytes, count in zip(self.expert_bytes, self.num_experts):
            of_size[nbytes] += count
        return min(max(2 * self.top_k, -(-total // min(n for n in of_size.values() if n))), total)

    def slab(self, slots: int) -> int:
        return slab_bytes(self.expert_bytes, self.num_experts, slots)

    def slots_in(self, nbytes: float) -> int:
        return slots_within(max(0.0, nbytes), self.expert_bytes, self.num_experts)

    def in_blocks(self, tokens: int) -> int:
        """Tokens that whole blocks for so many hold."""
        return -(-tokens // self.block_size) * self.block_size

    def step_tokens(self, prompt_tokens: int, room: float) -> int:
        """Of a step: as many as prompts have and the room for them holds, but what is usual at least."""
        most = int(room * SHARE_OF_STEP // self.token_bytes)
        return max(BatchConfig().max_tokens, min(prompt_tokens, most))


class Demand(Protocol):
    """What a step reads."""

    def __call__(self, tokens: int, slots: int) -> float:
        """Bytes, expected of a step of so many tokens beside so many slots."""


class Uniform(NamedTuple):
    """All experts are asked for alike, slots hold any of them, and other ranks' steps have as many tokens."""

    sizes: Sizes

    def __call__(self, tokens: int, slots: int) -> float:
        sizes, asked = self.sizes, 0.0
        for nbytes, count, of in zip(sizes.expert_bytes, sizes.num_experts, sizes.chosen_from):
            asked += nbytes * count * (1 - max(0.0, 1 - sizes.top_k / of) ** (tokens * sizes.num_ranks))
        return asked * (1 - slots / sum(self.sizes.num_experts))


class Split(NamedTuple):
    """sequences, max_tokens: of a step; kv_tokens: room for as many of the longest; read_bytes: expected of the run."""

    sequences: int
    max_tokens: int
    kv_tokens: int
    slots: int
    read_bytes: float


def read_bytes(left: Left, demand: Demand, sequences: int, max_tokens: int, slots: int) -> float:
    """Expected of all that is left, with so many sequences and tokens a step."""
    chunk = left.chunk(sequences, max_tokens)
    steps, chunks = left.num_steps(sequences), -(-left.prompt_tokens // chunk)
    return steps * demand(sequences, slots) + chunks * demand(chunk, slots)


def left_of(work: Workload, sizes: Sizes) -> Left:
    """All of it."""
    answers = [max(0, (answer or 0) - 1) for answer in work.answers]
    kv_tokens = [sizes.in_blocks(prompt + (answer or 0)) for prompt, answer in zip(work.prompts, work.answers)]
    return Left(
        sorted(kv_tokens, reverse=True), len(kv_tokens), sum(work.prompts), sum(answers), max(answers, default=0)
    )


def splits(work: Workload, sizes: Sizes, memory: float, room: float) -> Iterator[Split]:
    """One for each number of sequences from 1 on that fits.

    memory: bytes for KV and slots; room: for these and the rows of a step.
    """
    left, demand, kv_tokens = left_of(work, sizes), Uniform(sizes), 0
    usual = sizes.step_tokens(left.prompt_tokens, room)
    for n, kv in enumerate(left.kv_tokens, 1):
        kv_tokens += kv
        rest = min(memory, room - n * sizes.row_bytes) - kv_tokens * sizes.kv_bytes
        slots = sizes.slots_in(rest)
        if slots < sizes.least_slots:
            return
        tokens = max(usual, n)
        yield Split(n, tokens, kv_tokens, slots, read_bytes(left, demand, n, tokens, slots))


def best_split(work: Workload, sizes: Sizes, memory: float, room: float) -> Split:
    """The one that reads least; of equals that of fewer steps, then of fewer sequences. Arguments as of `splits`.

    Raises ValueError where not even one sequence fits.
    """
    left = left_of(work, sizes)
    found = min(
        splits(work, sizes, memory, room),
        key=lambda s: (s.read_bytes, left.num_steps(s.sequences), s.sequences),
        default=None,
    )
    if found is None:
        longest = left.kv_tokens[0]
        raise ValueError(
            f"batch.schedule=layer_major has {format_bytes(max(0.0, min(memory, room - sizes.row_bytes)))} for KV and "
            f"experts together, and needs {format_bytes(longest * sizes.kv_bytes)} for the longest request ({longest} "
            f"tokens) and {format_bytes(sizes.slab(sizes.least_slots))} for {sizes.least_slots} experts; raise "
            "offload.budget, free memory, or give the requests a smaller max_tokens"
        )
    return found


class Shared(NamedTuple):
    """What KV and slots share. memory: bytes of both; room: of both and the rows of a step; work: all requests, as a
    context of max_context tokens holds them.
    """

    sizes: Sizes
    memory: float
    room: float
    work: Workload
    max_context: int

    @property
    def most_blocks(self) -> int:
        """Of KV, if slots are as few as they may be; no more than all requests need."""
        bytes_of_block = self.sizes.block_size * self.sizes.kv_bytes
        left = min(self.memory, self.room - self.sizes.row_bytes) - self.sizes.slab(self.sizes.least_slots)
        needed = sum(left_of(self.work, self.sizes).kv_tokens) // self.sizes.block_size
        return min(int(left // bytes_of_block), needed)


def split_memory(
    config: EngineConfig, work: Workload | None, sizes: Sizes, room: float, max_context: int
) -> tuple[EngineConfig, Shared | None, str | None]:
    """`config` with sequences, tokens, KV and slots chosen for this work, what they share, and a sentence that says it;
    neither for no work.

    offload.budget is the memory of KV and slots together, None = all of `room`. Raises ValueError where the work is not
    known, or does not fit.
    """
    if work is None:
        raise ValueError(
            "batch.schedule=layer_major must know all requests beforehand: use it with `moe batch`, or give "
            "LLM(workload=…); else leave it out"
        )
    work = work.within(max_context)
    if not work.prompts:
        return replace(config, batch=replace(config.batch, schedule="as_they_come")), None, None
    memory = room
    if config.offload.budget is not None:
        memory = _bytes_of(config.offload.budget, sizes)
        most = sizes.slab(sum(sizes.num_experts)) + sum(left_of(work, sizes).kv_tokens) * sizes.kv_bytes
        if min(memory, most) > room:
            raise ValueError(
                f"offload.budget ({config.offload.budget} = {format_bytes(memory)}), of KV and experts with "
                f"batch.schedule=layer_major, is more than the memory left after dense weights ({format_bytes(room)}); "
                "lower it"
            )
    best = best_split(work, sizes, memory, room)
    usual = next((s for s in splits(work, sizes, memory, room) if s.sequences == USUAL), None)
    batch = replace(
        config.batch,
        max_sequences=best.sequences,
        max_tokens=best.max_tokens,
        kv_tokens=best.kv_tokens,
        schedule="as_they_come",
    )
    offload = replace(config.offload, budget=f"{best.slots} experts")
    than = "" if usual is None else f"; with {USUAL} sequences {format_bytes(usual.read_bytes)}"
    return (
        replace(config, batch=batch, offload=offload),
        Shared(sizes, min(memory, room), room, work, max_context),
        f"batch.schedule=layer_major has {format_bytes(min(memory, room))} for KV and experts: of {len(work.prompts)} "
        f"requests {best.sequences} share a step of at most {best.max_tokens} tokens, their KV has "
        f"{format_bytes(best.kv_tokens * sizes.kv_bytes)}, and {best.slots} of {sum(sizes.num_experts)} experts "
        f"{format_bytes(sizes.slab(best.slots))}, which reads least: about {format_bytes(best.read_bytes)}{than}",
    )


def why_not_split(blueprint: Blueprint, is_packed: bool) -> str | None:
    """Why there is nothing to choose for a model; None if there is."""
    if not blueprint.experts:
        return "it has no experts in slots"
    if blueprint.index.is_mixed:
        return "offload.bits=auto and upgrade keep all experts in slots"
    if not is_packed:
        return "its sequences run one at a time"
    return None


def sizes_of(
    blueprint: Blueprint,
    batch: BatchConfig,
    kv_bytes: int,
    vocabulary: int,
    *,
    own: Sequence[int] | None = None,
    num_ranks: int = 1,
) -> Sizes:
    """kv_bytes: of a token in all layers; own: experts by layer that are this rank's, None: all."""
    sites = blueprint.index.sites
    widest = max(
        4 * site.hidden_size + blueprint.top_k * (site.hidden_size + 3 * site.intermediate_size) for site in sites
    )
    return Sizes(
        expert_bytes=[layout.nbytes for layout in blueprint.index.layouts],
        num_experts=[site.num_experts for site in sites] if own is None else own,
        chosen_from=[site.num_experts for site in sites],
        num_ranks=num_ranks,
        top_k=blueprint.top_k,
        kv_bytes=kv_bytes,
        row_bytes=2 * 4 * vocabulary,  # logits and scores, fp32
        token_bytes=2 * 4 * widest,  # rows of attention and of experts, fp32, and as much again
        block_size=batch.block_size,
        read_bytes=max((layout.nbytes for layout in blueprint.index.in_files.layouts), default=0),
    )


def _bytes_of(budget: str, sizes: Sizes) -> float:
    parsed = parse_budget(budget)
    if parsed.kind == "bytes":
        return parsed.value
    return sizes.slab(resolve_slots(budget, sizes=sizes.expert_bytes, counts=sizes.num_experts))
