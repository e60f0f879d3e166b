"""`moe plan`: tokens/s, time to first token and memory of a model, from figures of `moe probe` and the model's sizes.

Which experts are in slots is replayed with the engine's own policy: on a trace of the model, or else on even routing,
which no cache can win anything on. Every line names the term that binds.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table

from moe.config import EngineConfig
from moe.engine.choices import choose_reads, probed
from moe.launch.console import out
from moe.models.blueprint import Blueprint, read_blueprint
from moe.offload.budget import format_bytes, parse_budget, slots_within
from moe.offload.memory import available_memory
from moe.offload.policy import Access, Lfu, misses_of
from moe.offload.predictor import Transitions
from moe.offload.prefetch import LEAST_EXPECTED
from moe.offload.stores import reads_of
from moe.placement.cost import Sizes, Terms, Use, Visits, decode_step, prefill_step
from moe.placement.machine import Machine, Reads, disk_of
from moe.placement.steps import Ints, steps_of
from moe.placement.topology import Link
from moe.placement.trace import DECODE, RoutingTrace

_STEPS = 128  # of even routing, where there is no trace


def run(args: argparse.Namespace) -> int:
    config = EngineConfig() if args.probe_file is None else EngineConfig(probe_file=args.probe_file)
    machine = probed(config)
    if machine is None:
        raise ValueError(f"nothing is known of this machine; run `moe probe {args.model}` first")
    blueprint = read_blueprint(args.model, trust_remote_code=args.trust_remote_code)
    sizes = sizes_of(blueprint)
    trace = even_routing(sizes, args.sequences) if args.trace is None else RoutingTrace.load(args.trace)
    offload, _ = choose_reads(config.offload, blueprint, machine)
    disk = disk_of(blueprint.folder)
    if args.nvme is not None:
        machine = with_disk(machine, disk, _bytes(args.nvme, "--nvme"))
    context = args.prompt + args.new // 2
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("ranks", "experts in memory", "tokens/s", "first token", "memory of a rank", "on disk", "binds"):
        table.add_column(name)
    rates: list[float] = []
    for ranks, is_shared in [(n, True) for n in args.ranks] + [(n, False) for n in args.ranks if n > 1]:
        slots = _slots(args, blueprint, sizes, ranks if is_shared else 1)
        use = Use(
            sequences=args.sequences if is_shared else -(-args.sequences // ranks),
            context=context,
            slots=slots,
            threads=args.threads,
            readers=offload.readers or 1,
            how="direct" if offload.direct else "cached",
            disk=disk,
            ranks=ranks if is_shared else 1,
            link=_link(args.link),
            ahead=float(ranks == 1 and offload.prefetch != "off"),
        )
        step = decode_step(sizes, machine, use, settled(replay(trace, use)))
        first = prefill_step(sizes, machine, replace(use, ranks=1), args.prompt)
        rates.append(args.sequences / step.total)
        held = slots // use.ranks * sizes.expert_bytes
        table.add_row(
            f"{ranks}" if is_shared else f"{ranks}, each a replica",
            f"{slots} of {sizes.num_layers * sizes.num_experts}",
            f"{rates[-1]:.1f}",
            f"{first.total * 1e3:.0f} ms ({first.binds})",
            f"{format_bytes(sizes.dense_bytes)} dense, {format_bytes(held)} slots, "
            f"{format_bytes(sizes.kv_bytes * (args.prompt + args.new) * use.sequences // use.ranks)} KV",
            format_bytes(blueprint.expert_bytes),
            told(step),
        )
    out.print(table)
    routing = "even routing is assumed, which no cache wins on (--trace tells)" if args.trace is None else args.trace
    out.print(f"experts in slots: {routing}; figures of {machine.name}, {machine.when}", markup=False)
    out.print("reading ahead hides what the routing itself foresees of waiting, one layer before", markup=False)
    if args.against is not None:
        out.print(f"measured {args.against:.1f} tokens/s: {rates[0] / args.against - 1:+.0%} off", markup=False)
    return 0


def told(step: Terms) -> str:
    """All terms, the largest first."""
    parts = sorted(step._asdict().items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in parts if seconds)


def sizes_of(blueprint: Blueprint) -> Sizes:
    """Raises ValueError for a model whose layers differ, or without experts in slots."""
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
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    format_ = layout.gate_up_format
    reads = reads_of(index, direct=True)
    return Sizes(
        num_layers=len(index.sites),
        num_experts=site.num_experts,
        top_k=blueprint.top_k,
        hidden_size=site.hidden_size,
        query_size=heads * dim,
        dense_weights=weights,
        dense_bytes=blueprint.dense_bytes,
        dtype=dtype,
        expert_weights=(site.parts + 1) * site.hidden_size * site.intermediate_size,
        expert_bytes=layout.nbytes,
        expert_format=format_.code or str(format_.dtype).removeprefix("torch."),
        kv_bytes=2 * text.num_hidden_layers * kv_heads * dim * blueprint.dtype.itemsize,
        reads=reads.number,
        copied_bytes=reads.copied_bytes,
    )


def even_routing(sizes: Sizes, sequences: int) -> RoutingTrace:
    """Every expert as likely as any other, drawn from a fixed seed."""
    draw = np.random.default_rng(0).random((sequences * _STEPS, sizes.num_layers, sizes.num_experts))
    ids = np.argsort(draw, axis=-1)[..., : sizes.top_k].astype(np.int16)
    lengths = np.full(sequences, _STEPS, np.int32)
    return RoutingTrace(expert_ids=ids, sequence_lengths=lengths, num_experts=sizes.num_experts, model="even routing")


Steps = Sequence[tuple[int, Ints]]


def replay(trace: RoutingTrace, use: Use, steps: Steps | None = None) -> Visits:
    """What ranks ask for in every layer of the decoding steps, in order. Experts lie on ranks in contiguous blocks.

    Misses are those of the engine's policy from empty slots on; foreseen is what the transitions of the routing itself
    tell one layer ahead, which the next layer's router does at least as well. steps: (phase, tokens); None: `steps_of`.
    """
    experts, layers = trace.num_experts, trace.num_layers
    steps = list(steps_of(trace, use.sequences)) if steps is None else steps
    by_rank = [list(_visits(trace, steps, rank, use.ranks)) for rank in range(use.ranks)]
    counted = np.flatnonzero(np.repeat([phase == DECODE for phase, _ in steps], layers))
    slots = max(1, use.slots // use.ranks)
    absent = [[0] * len(own) for own in by_rank]
    if use.slots < layers * experts:  # else all are read at the start
        absent = [misses_of(Lfu([experts] * layers), [a for a, _ in own], slots) for own in by_rank]
    told = _foreseen(trace, steps) if use.ahead and use.slots < layers * experts else None
    foreseen = np.zeros((use.ranks, len(counted)), np.int64)
    if told is not None:
        for rank, own in enumerate(by_rank):
            shares = [np.isin(a.keys, keys).mean() if len(a.keys) else 0.0 for (a, _), keys in zip(own, told)]
            foreseen[rank] = np.rint(np.array(shares) * absent[rank])[counted]
    return Visits(
        np.array([[len(a.keys) for a, _ in own] for own in by_rank])[:, counted],
        np.array(absent)[:, counted],
        np.array([[pairs for _, pairs in own] for own in by_rank])[:, counted],
        foreseen,
    )


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


def _visits(trace: RoutingTrace, steps: Steps, rank: int, ranks: int) -> Iterator[tuple[Access, int]]:
    for _, tokens in steps:
        for layer in range(trace.num_layers):
            ids = trace.expert_ids[tokens, layer].astype(np.int64).ravel()
            ids = ids[(ids >= 0) & (ids * ranks // trace.num_experts == rank)]
            yield Access(layer, np.unique(ids) + layer * trace.num_experts), len(ids)


def with_disk(machine: Machine, disk: str, bytes_per_s: float) -> Machine:
    """The same machine with a disk that always gives so much."""
    reads = tuple(Reads(how, 1 << 20, 1, bytes_per_s) for how in ("direct", "buffered", "cached"))
    return replace(machine, disks={**machine.disks, disk: reads})


def _slots(args: argparse.Namespace, blueprint: Blueprint, sizes: Sizes, ranks: int) -> int:
    total = sizes.num_layers * sizes.num_experts
    if args.slots is not None:
        if not 0 < args.slots <= 1:
            raise ValueError(f"--slots ({args.slots}) must lie in (0, 1]: a share of the experts")
        return max(ranks, int(args.slots * total))
    ram = available_memory() if args.ram is None else _bytes(args.ram, "--ram")
    kv = sizes.kv_bytes * (args.prompt + args.new) * args.sequences
    left = ram - ranks * sizes.dense_bytes - kv
    slots = slots_within(
        max(0, left), [x.nbytes for x in blueprint.index.layouts], [sizes.num_experts] * sizes.num_layers
    )
    if slots < ranks:
        raise ValueError(f"{format_bytes(ram)} hold no expert beside dense weights and KV cache; raise --ram")
    return slots


def _bytes(text: str, option: str) -> float:
    budget = parse_budget(text.removesuffix("/s"))
    if budget.kind != "bytes" or budget.value <= 0:
        raise ValueError(f"{option} ({text}) must be bytes, such as 3GB")
    return budget.value


def _link(text: str | None) -> Link | None:
    if text is None:
        return None
    rate, _, latency = text.partition(",")
    try:
        return Link(_bytes(rate, "--link"), float(latency or 0))
    except ValueError:
        raise ValueError(f"--link ({text}) must be BYTES/s,SECONDS, such as 10GB,2e-5") from None
