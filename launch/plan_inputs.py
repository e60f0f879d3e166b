"""What the model of cost is asked about: sizes from a model's headers, and what its routing asks of slots and ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.models.blueprint import Blueprint
from moe.models.load import loaded_bytes
from moe.offload.in_place import in_place
from moe.offload.policy import Access, Lfu, misses_of
from moe.offload.predictor import Transitions
from moe.offload.prefetch import LEAST_EXPECTED
from moe.offload.stretches import reads_of
from moe.placement.cost import Sizes, Use, Visits
from moe.placement.machine import Machine, Reads
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.steps import Ints, steps_of
from moe.placement.trace import DECODE, RoutingTrace

_STEPS = 128  # of even routing, where there is no trace
Steps = Sequence[tuple[int, Ints]]


class _Attention(NamedTuple):
    """Of a layer: elements of a token's queries, as many as take part in q·k and p·v in the mean, and in the cache."""

    query_size: int
    cached: int


def _attention_of(text: Any) -> _Attention:
    heads = text.num_attention_heads
    if (latent := getattr(text, "kv_lora_rank", None)) is not None:  # keys and values are made of what is cached
        own = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim
        return _Attention(heads * own // 2, latent + text.qk_rope_head_dim)
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _Attention(heads * dim, 2 * (getattr(text, "num_key_value_heads", None) or heads) * dim)


def sizes_of(blueprint: Blueprint, *, on_cpu: bool = True) -> Sizes:
    """on_cpu: bf16 may become bf12. Raises ValueError for a model whose layers differ, or without experts in slots."""
    index = blueprint.index
    kinds = {(s.num_experts, s.hidden_size, s.intermediate_size, s.gated) for s in index.sites}
    if len(kinds) != 1 or len({layout.nbytes for layout in index.layouts}) != 1:
        raise ValueError(f"{blueprint.folder} has {len(kinds)} kinds of layers of experts; one is needed to plan")
    site, layout, text = index.sites[0], index.layouts[0], blueprint.config.get_text_config()
    inside = tuple(f"{site.module}." for site in index.sites)
    tables = {"embed_tokens", "wte", "word_embeddings"}
    weights = sum(
        tensor.numel()
        for name, tensor in blueprint.skeleton.named_parameters()
        if not name.startswith(inside) and not tables & set(name.split("."))
    )
    dtype = str(blueprint.dtype).removeprefix("torch.")
    short = on_cpu and blueprint.dtype == torch.bfloat16
    dense = loaded_bytes(blueprint, blueprint.dtype, short=short, shortens=index.stored is not None)
    attention = _attention_of(text)
    format_ = layout.gate_up_format
    files = in_place(index.in_files)
    reads = reads_of(files, direct=True)
    return Sizes(
        num_layers=len(index.sites),
        num_experts=site.num_experts,
        top_k=blueprint.top_k,
        hidden_size=site.hidden_size,
        query_size=attention.query_size,
        dense_weights=weights,
        dense_bytes=dense,
        dtype=dtype,
        expert_weights=(site.parts + 1) * site.hidden_size * site.intermediate_size,
        expert_bytes=layout.nbytes,
        stored_bytes=files.layouts[0].nbytes,
        expert_format=format_.code or str(format_.dtype).removeprefix("torch."),
        dense_format=dtype if index.stored is None else "bf12",
        kv_bytes=text.num_hidden_layers * attention.cached * blueprint.dtype.itemsize,
        reads=reads.number,
        copied_bytes=reads.copied_bytes,
    )


def even_routing(sizes: Sizes, sequences: int) -> RoutingTrace:
    """Every expert as likely as any other, drawn from a fixed seed."""
    random, parts = np.random.default_rng(0), []
    for _ in range(sequences):  # all at once would be a number for every expert that no token takes
        draw = random.random((_STEPS, sizes.num_layers, sizes.num_experts))
        parts.append(np.argsort(draw, axis=-1)[..., : sizes.top_k].astype(np.int16))
    ids = np.concatenate(parts)
    lengths = np.full(sequences, _STEPS, np.int32)
    return RoutingTrace(expert_ids=ids, sequence_lengths=lengths, num_experts=sizes.num_experts, model="even routing")


class Asked(NamedTuple):
    """Of each rank, in every layer of every step. away: share of the pairs that another rank than their token's has."""

    accesses: list[list[Access]]
    pairs: list[list[int]]
    away: float


def asked(trace: RoutingTrace, steps: Steps, ranks: int, plan: Plan | None = None) -> Asked:
    """plan: None = contiguous blocks. A step's tokens are dealt to the ranks in turn. Raises ValueError for a plan that
    does not fit the trace."""
    shape = trace.num_layers, trace.num_experts
    if plan is not None and (plan.num_layers, plan.num_experts, plan.num_ranks) != (*shape, ranks):
        raise ValueError(
            f"the plan is of {plan.num_layers} layers of {plan.num_experts} experts on {plan.num_ranks} ranks; the "
            f"routing has {shape[0]} of {shape[1]}, asked for {ranks}"
        )
    tables = None if plan is None else [ServingTable.of(plan, layer) for layer in range(trace.num_layers)]
    accesses: list[list[Access]] = [[] for _ in range(ranks)]
    pairs: list[list[int]] = [[] for _ in range(ranks)]
    elsewhere = total = 0
    for _, tokens in steps:
        home = np.arange(len(tokens)) % ranks
        for layer in range(trace.num_layers):
            ids = trace.expert_ids[tokens, layer].astype(np.int64)
            if plan is None or tables is None:
                rank_of = ids * ranks // trace.num_experts
            else:
                rank_of = choose_replicas(ids, home, tables[layer], home_first=True) // plan.physical_per_rank
            rank_of = np.where(ids >= 0, rank_of, -1)
            elsewhere += int(((rank_of != home[:, None]) & (ids >= 0)).sum())
            total += int((ids >= 0).sum())
            for rank in range(ranks):
                own = ids[rank_of == rank]
                accesses[rank].append(Access(layer, np.unique(own) + layer * trace.num_experts))
                pairs[rank].append(len(own))
    return Asked(accesses, pairs, elsewhere / max(1, total))


def replay(trace: RoutingTrace, use: Use, steps: Steps | None = None, plan: Plan | None = None) -> tuple[Visits, float]:
    """What ranks ask for in every layer of the decoding steps, in order, and the share of pairs that travel.

    Misses are those of the engine's policy from empty slots on; foreseen is what the transitions of the routing itself
    tell one layer ahead, which the next layer's router does at least as well. steps: (phase, tokens); None: `steps_of`.
    """
    experts, layers = trace.num_experts, trace.num_layers
    steps = list(steps_of(trace, use.sequences)) if steps is None else steps
    found = asked(trace, steps, use.ranks, plan)
    counted = np.flatnonzero(np.repeat([phase == DECODE for phase, _ in steps], layers))
    slots = max(1, use.slots // use.ranks)
    absent = np.zeros((use.ranks, len(steps) * layers), np.int64)
    foreseen = np.zeros_like(absent)
    if use.slots < layers * experts:  # else all are read at the start
        absent[:] = [misses_of(Lfu([experts] * layers), own, slots) for own in found.accesses]
        if use.ahead:
            told = _foreseen(trace, steps)
            for rank, own in enumerate(found.accesses):
                shares = [np.isin(a.keys, keys).mean() if len(a.keys) else 0.0 for a, keys in zip(own, told)]
                foreseen[rank] = np.rint(np.array(shares) * absent[rank])
    distinct = np.array([[len(a.keys) for a in own] for own in found.accesses])
    every = (distinct, absent, np.array(found.pairs), foreseen)
    return Visits(*(one[:, counted] for one in every)), found.away


def settled(visits: Visits) -> Visits:
    """The second half, when slots are full."""
    return Visits(*(one[:, one.shape[1] // 2 :] for one in visits))


def _foreseen(trace: RoutingTrace, steps: Steps) -> list[Ints]:
    """The keys that every layer of every step was expected to ask for."""
    guess = Transitions([trace.num_experts] * trace.num_layers, trace.top_k)
    told = []
    for _, tokens in steps:
        coming = np.empty(0, np.int64)
        for layer in range(trace.num_layers):
            told.append(coming + layer * trace.num_experts)
            expected = guess.expected(layer, trace.expert_ids[tokens, layer].astype(np.int64))
            coming = coming[:0] if expected is None else np.flatnonzero(expected >= LEAST_EXPECTED)
    return told


def with_disk(machine: Machine, disk: str, bytes_per_s: float) -> Machine:
    """The same machine with a disk that always gives so much."""
    reads = tuple(Reads(how, 1 << 20, 1, bytes_per_s) for how in ("direct", "buffered", "cached"))
    return replace(machine, disks={**machine.disks, disk: reads})
