"""`batch.schedule=layer_major`: how one memory is split between KV and experts' slots when all requests are known.

A step computes all its sequences layer by layer and reads an expert once for all of them, so a wider step reads less
for each token; but KV of more sequences leaves fewer slots. Counted in bytes read, if all experts are asked for alike:

    read(n)   = (1 - slots(n) / N) x sum over layers of e E (steps(n) d(n) + chunks(n) d(tokens of a chunk))
    d(n)      = 1 - (1 - K / E)^n: share of a layer's experts that n tokens ask for
    slots(n)  = what the KV of the n longest sequences leaves, so that none is ever computed twice
    steps(n)  = of decoding: all answers' tokens by n, but no fewer than the longest answer has
    chunks(n) = of prompts: their tokens by those of a step

N experts of e bytes, E a layer, K a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from moe.config import BatchConfig, EngineConfig
from moe.models.blueprint import Blueprint
from moe.offload.budget import format_bytes, parse_budget, resolve_slots, slots_within
from moe.offload.slot_runs import slab_bytes

USUAL = 16  # sequences of a step where nobody says how many: what the choice is compared with


class Workload(NamedTuple):
    """All requests of a run, every sample one. prompts: tokens of each; answers: the most of each, None = what fits."""

    prompts: Sequence[int]
    answers: Sequence[int | None]

    def within(self, max_context: int) -> "Workload":
        """As a model of that context computes them; what it cannot take at all is left out."""
        pairs = [(p, a) for p, a in zip(self.prompts, self.answers) if p < max_context]
        rooms = [max_context - p if a is None else min(a, max_context - p) for p, a in pairs]
        return Workload([p for p, _ in pairs], rooms)


class Sizes(NamedTuple):
    """expert_bytes, num_experts: by layer. kv_bytes: of a token in all layers; row_bytes: of a sequence in a step.

    max_tokens: of a step, unless it has more sequences.
    """

    expert_bytes: Sequence[int]
    num_experts: Sequence[int]
    top_k: int
    kv_bytes: int
    row_bytes: int
    block_size: int
    max_tokens: int

    @property
    def least_slots(self) -> int:
        """What one token computes with, and as many that are read meanwhile."""
        return min(2 * self.top_k, sum(self.num_experts))

    def slab(self, slots: int) -> int:
        return slab_bytes(self.expert_bytes, self.num_experts, slots)


class Split(NamedTuple):
    """sequences: of a step; kv_tokens: room for as many of the longest; read_bytes: expected of the whole run."""

    sequences: int
    kv_tokens: int
    slots: int
    read_bytes: float


def splits(work: Workload, sizes: Sizes, memory: float, room: float) -> Iterator[Split]:
    """One for each number of sequences from 1 on that fits.

    memory: bytes for KV and slots; room: for these and the rows of a step.
    """
    kv_tokens = 0
    for n, kv in enumerate(sorted(_kv_tokens(work, sizes), reverse=True), 1):
        kv_tokens += kv
        left = min(memory, room - n * sizes.row_bytes) - kv_tokens * sizes.kv_bytes
        slots = slots_within(max(0.0, left), sizes.expert_bytes, sizes.num_experts)
        if slots < sizes.least_slots:
            return
        yield Split(n, kv_tokens, slots, read_bytes(work, sizes, n, slots))


def best_split(work: Workload, sizes: Sizes, memory: float, room: float) -> Split:
    """The one that reads least; of equals that of fewer steps, then of fewer sequences. Arguments as of `splits`.

    Raises ValueError where not even one sequence fits.
    """
    found = min(
        splits(work, sizes, memory, room),
        key=lambda s: (s.read_bytes, _num_steps(work, s.sequences), s.sequences),
        default=None,
    )
    if found is None:
        longest = max(_kv_tokens(work, sizes))
        raise ValueError(
            f"batch.schedule=layer_major has {format_bytes(max(0.0, min(memory, room - sizes.row_bytes)))} for KV and "
            f"experts together, and needs {format_bytes(longest * sizes.kv_bytes)} for the longest request ({longest} "
            f"tokens) and {format_bytes(sizes.slab(sizes.least_slots))} for {sizes.least_slots} experts; raise "
            "offload.budget, free memory, or give the requests a smaller max_tokens"
        )
    return found


def read_bytes(work: Workload, sizes: Sizes, sequences: int, slots: int) -> float:
    """Expected of the whole run, with so many sequences a step."""
    tokens = sum(work.prompts)
    chunk = max(1, min(tokens, max(sizes.max_tokens, sequences)))
    steps, chunks = _num_steps(work, sequences), -(-tokens // chunk)
    total = 0.0
    for nbytes, count in zip(sizes.expert_bytes, sizes.num_experts):
        other = max(0.0, 1 - sizes.top_k / count)
        total += nbytes * count * (steps * (1 - other**sequences) + chunks * (1 - other**chunk))
    return total * (1 - slots / sum(sizes.num_experts))


def split_memory(
    config: EngineConfig, work: Workload | None, sizes: Sizes, room: float
) -> tuple[EngineConfig, str | None]:
    """`config` with sequences, KV and slots chosen for this work, and a sentence that says them; None for no work.

    offload.budget is the memory of KV and slots together, None = all of `room`. Raises ValueError where the work is not
    known, or does not fit.
    """
    if work is None:
        raise ValueError(
            "batch.schedule=layer_major must know all requests beforehand: use it with `moe batch`, or give "
            "LLM(workload=…); else leave it out"
        )
    if not work.prompts:
        return replace(config, batch=replace(config.batch, schedule="as_they_come")), None
    memory = room
    if config.offload.budget is not None:
        memory = _bytes_of(config.offload.budget, sizes)
        most = sizes.slab(sum(sizes.num_experts)) + sum(_kv_tokens(work, sizes)) * sizes.kv_bytes
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
        max_tokens=max(config.batch.max_tokens, best.sequences),
        kv_tokens=best.kv_tokens,
        schedule="as_they_come",
    )
    offload = replace(config.offload, budget=f"{best.slots} experts")
    than = "" if usual is None else f"; with {USUAL} sequences {format_bytes(usual.read_bytes)}"
    return replace(config, batch=batch, offload=offload), (
        f"batch.schedule=layer_major has {format_bytes(min(memory, room))} for KV and experts: of {len(work.prompts)} "
        f"requests {best.sequences} share a step, their KV has {format_bytes(best.kv_tokens * sizes.kv_bytes)}, and "
        f"{best.slots} of {sum(sizes.num_experts)} experts {format_bytes(sizes.slab(best.slots))}, which reads least: "
        f"about {format_bytes(best.read_bytes)}{than}"
    )


def why_not_split(blueprint: Blueprint, is_packed: bool, is_alone: bool) -> str | None:
    """Why there is nothing to choose for a model; None if there is."""
    if not blueprint.experts:
        return "it has no experts in slots"
    if blueprint.index.is_mixed:
        return "offload.bits=auto keeps all experts in slots"
    if not is_packed:
        return "its sequences run one at a time"
    return None if is_alone else "ranks and hosts choose for themselves who computes what"


def sizes_of(blueprint: Blueprint, batch: BatchConfig, kv_bytes: int, vocabulary: int) -> Sizes:
    """kv_bytes: of a token in all layers."""
    return Sizes(
        expert_bytes=[layout.nbytes for layout in blueprint.index.layouts],
        num_experts=[site.num_experts for site in blueprint.index.sites],
        top_k=blueprint.top_k,
        kv_bytes=kv_bytes,
        row_bytes=2 * 4 * vocabulary,  # logits and scores, fp32
        block_size=batch.block_size,
        max_tokens=batch.max_tokens,
    )


def _bytes_of(budget: str, sizes: Sizes) -> float:
    parsed = parse_budget(budget)
    if parsed.kind == "bytes":
        return parsed.value
    return sizes.slab(resolve_slots(budget, sizes=sizes.expert_bytes, counts=sizes.num_experts))


def _kv_tokens(work: Workload, sizes: Sizes) -> list[int]:
    """Of each sequence at its end, in whole blocks."""
    size = sizes.block_size
    return [-(-(prompt + (answer or 0)) // size) * size for prompt, answer in zip(work.prompts, work.answers)]


def _num_steps(work: Workload, sequences: int) -> int:
    """Of decoding; the first token of an answer is the last chunk's."""
    tokens = [max(0, (answer or 0) - 1) for answer in work.answers]
    return max(-(-sum(tokens) // sequences), max(tokens))
