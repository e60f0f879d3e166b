"""What a process needs to serve a model, in stages that need no peer: read → dense → memory → experts.

    Blueprint ─▶ dense model, one token tried ─▶ KV pool, scheduler ─▶ slots in what memory is left: store, kernels

Each stage is a frozen record; `load` runs them and leaves nothing behind if one fails. The last stage, the ranks, is
apart (moe/engine/join.py), for it can be done again with other peers.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from moe.config import BatchConfig, EngineConfig
from moe.engine.choices import (
    AutoChoice,
    choose_keep,
    choose_reads,
    choose_threads,
    pack_offer,
    told_choices,
    why_not_ahead,
)
from moe.engine.device import ALONE, Sharers, find_device, free_room, num_blocks
from moe.engine.device_paths import use_paths
from moe.engine.foresight import Foresight
from moe.engine.grammar import Grammars
from moe.engine.known import probed
from moe.engine.layer_major import Shared, Workload, sizes_of, split_memory, why_not_split
from moe.engine.lent_kv import LentKV
from moe.engine.limits import context_of
from moe.engine.moving_split import MovingSplit
from moe.engine.notes import lossy_modes, notes_on
from moe.engine.one_memory import OneMemory, Split
from moe.engine.runner import (
    PackedRunner,
    Runner,
    SequentialRunner,
    make_paged_kv,
    paged_runner,
    planned_runner,
    why_threads_count,
)
from moe.engine.scheduler import Scheduler
from moe.engine.share import Share
from moe.engine.stores import make_store, open_store
from moe.engine.tried import TriedToken, try_a_token
from moe.engine.turns import Turns
from moe.engine.upgrades import Upgrades, make_upgrades
from moe.guard import check_threads
from moe.kernels.weights import ExpertWeights
from moe.layer.experts import SlotExperts, chosen_kernel, kernel_notes, layer_kernels
from moe.layer.routing import RoutingSeam
from moe.models.attention import ATTENTION_NAME
from moe.models.blueprint import Blueprint
from moe.models.dense_cpu import compile_dense
from moe.models.kv import BlockPool
from moe.models.load import load_dense, why_untied
from moe.models.neighbours import why_not_packed
from moe.offload.cache import ExpertCache
from moe.offload.in_place import in_place
from moe.offload.nested import check_bits, serve, slots_for
from moe.offload.short_floats import Shortened
from moe.placement.wire_format import ModelSizes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The model's files, looked at. notes: what a user should know about how it is served."""

    config: EngineConfig
    blueprint: Blueprint
    device: torch.device
    notes: tuple[str, ...]
    chosen: tuple[AutoChoice, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """All but the experts, in memory. routing: between its routers and experts; is_packed: requests share one row."""

    model: Any
    routing: RoutingSeam
    tried: TriedToken
    is_packed: bool
    max_context: int
    eos_ids: frozenset[int]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of the weights in memory, as they are kept: packed layers count their codes."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Who has which KV blocks. kv_bytes: of the KV cache, which commits them as it fills."""

    scheduler: Scheduler
    runner: Runner
    kv_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The slots of all layers, in place in the model; None for one without experts. notes: on their kernel.

    upgrades: what gives them more bits while the model runs.
    """

    slots: SlotExperts | None
    weights: tuple[ExpertWeights, ...]
    notes: tuple[str, ...] = ()
    choices: tuple[AutoChoice, ...] = ()
    upgrades: Upgrades | None = None

    def close(self) -> None:
        if self.upgrades is not None:
            self.upgrades.more.close()
        if self.slots is not None:
            self.slots.cache.close()
            self.slots.cache.store.close()


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that one process can serve, or share with peers that it has not met yet."""

    read: Read
    dense: Dense
    memory: Memory
    experts: Experts
    grammars: Grammars
    chosen: tuple[AutoChoice, ...] = ()
    split: Split | None = None  # of KV and slots, where it moves while the model runs

    @property
    def choices(self) -> tuple[AutoChoice, ...]:
        """What was chosen where no setting said it."""
        return (*self.chosen, *self.experts.choices, *self.read.chosen)

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the model is served."""
        return [*self.read.notes, *self.dense.notes, *self.experts.notes]

    @property
    def sizes(self) -> ModelSizes:
        """What makes bytes of tokens and experts. Of a model that has experts in slots."""
        index = self.read.blueprint.index
        return ModelSizes(
            hidden_size=index.sites[0].hidden_size,
            dtype=str(self.dense.model.dtype).removeprefix("torch."),
            expert_bytes=max(layout.nbytes for layout in index.layouts),
        )

    def close(self) -> None:
        self.experts.close()


def load(read: Read, share: Share | None = None, work: Workload | None = None) -> Loaded:
    """The stages after `read_model` but for the ranks; meets nobody but to count memory with `share.sharers`. share:
    None = all experts. work: all requests that will come, if they are known.

    Raises ValueError for a folder, a budget or a setting that cannot be served; then no thread, file or memory is left.
    """
    dense = load_model(read, tries_experts=share is not None)
    shared = None
    if read.config.batch.schedule == "layer_major":
        read, shared = _split_memory(read, dense, work, share)
    memory = make_memory(read, dense, shared.most_blocks if shared else None, share.sharers if share else ALONE)
    threads = _settle_threads(read, memory.runner, is_alone=share is None)
    to_come = memory.kv_bytes if read.device.type == "cpu" else 0  # a GPU has allocated its whole cache by now
    with ExitStack() as undo:
        experts = make_experts(read, dense, to_come, share)
        undo.callback(experts.close)
        if memory.scheduler.turns is not None and experts.slots is not None:
            memory.scheduler.turns.watch(experts.slots)
        trusts = read.config.trust_remote_code
        grammars = Grammars(read.blueprint.folder, dense.vocabulary, dense.eos_ids, trusts)
        graphs = use_paths(read.config, read.device, memory.runner, experts.slots, dense.max_context)
        chosen = tuple(one for one in (threads, graphs) if one is not None)
        split = _moving_split(shared, dense, memory, experts) or _lent_kv(read, dense, memory, experts, share)
        loaded = Loaded(read, dense, memory, experts, grammars, chosen, split)
        undo.pop_all()
    return loaded


def _split_memory(read: Read, dense: Dense, work: Workload | None, share: Share | None) -> tuple[Read, Shared | None]:
    """With sequences, KV and slots as they serve `work`, a note that says so, and what may move while it runs."""
    reason, config = why_not_split(read.blueprint, dense.is_packed), read.config
    if share is not None and config.parallel.dispatcher == "coherent":
        reason = "parallel.dispatcher=coherent gives every rank the KV of all ranks' requests"
    if reason is not None:
        raise ValueError(f"batch.schedule=layer_major cannot serve {read.blueprint.folder}: {reason}; leave it out")
    if share is not None and config.parallel.dispatcher == "auto":
        config = replace(config, parallel=replace(config.parallel, dispatcher="all_to_all"))
    own, num_ranks = (None, 1) if share is None else ([len(of) for of in share.experts], share.plan.num_ranks)
    kv_bytes = dense.tried.kv_bytes
    sizes = sizes_of(read.blueprint, config.batch, kv_bytes, dense.vocabulary, own=own, num_ranks=num_ranks)
    room = free_room(read.device, config, sizes, ALONE if share is None else share.sharers)
    config, shared, said = split_memory(config, work, sizes, room, dense.max_context)
    if said is not None and read.device.type != "cpu":
        shared, said = None, f"{said}; on a GPU it stays so"
    return replace(read, config=config, notes=(*read.notes, *([] if said is None else [said]))), shared


def _moving_split(shared: Shared | None, dense: Dense, memory: Memory, experts: Experts) -> MovingSplit | None:
    if shared is None:
        return None
    assert isinstance(memory.runner, PackedRunner), "why_not_split has refused others"
    assert experts.slots is not None, "why_not_split has refused a model without experts"
    memory.runner.kv.prepare(dense.tried.kv)  # addresses only
    return MovingSplit(shared, memory.scheduler, memory.runner.kv, experts.slots)


def _lent_kv(read: Read, dense: Dense, memory: Memory, experts: Experts, share: Share | None) -> LentKV | None:
    """Where nobody said what experts may take, and they would take more."""
    slots, runner = experts.slots, memory.runner
    if slots is None or read.device.type != "cpu" or read.config.offload.budget is not None:
        return None
    if why_not_split(read.blueprint, dense.is_packed) is not None or not slots.cache.map.num_lacking():
        return None
    assert isinstance(runner, PackedRunner), "why_not_split has refused others"
    runner.kv.prepare(dense.tried.kv)  # addresses only
    both = runner.kv.taken_by(runner.kv.pool.room) + slots.cache.slot_bytes
    return LentKV(OneMemory(both, memory.scheduler, runner.kv, slots), meets=share is not None)


def _settle_threads(read: Read, runner: Runner, is_alone: bool) -> AutoChoice | None:
    """Takes what the figures choose. None on a GPU, or where a setting says it."""
    if read.device.type != "cpu":
        return None
    why_not = why_threads_count(runner) if is_alone else "ranks share the cores"
    chosen = choose_threads(read.config, probed(read.config), why_not)
    if chosen is not None:
        torch.set_num_threads(chosen.value)
    return chosen


def read_model(blueprint: Blueprint, config: EngineConfig, share: Share | None = None) -> Read:
    """share: None = all experts. Raises ValueError for what cannot be served, UnusableError as `check_threads` says."""
    check_threads(config.threads)
    offload, device = config.offload, find_device(config.device)
    is_fixed = share is None or not (share.may_change or config.placement.online)
    check_bits(offload.bits, offload.store, device, is_fixed=is_fixed)
    held = None if share is None else share.held
    index = serve(blueprint.checkpoint, blueprint.index, offload.bits, offload.budget, held)
    blueprint = replace(blueprint, index=index)
    notes = (*notes_on(blueprint, config.dense, None if held is None else held.own), *lossy_modes(config))
    index, keep = choose_keep(config, blueprint, probed(config), device)
    return Read(config, replace(blueprint, index=index), device, notes, () if keep is None else (keep,))


def load_model(read: Read, tries_experts: bool) -> Dense:
    """tries_experts: whether anyone needs to know how they are dispatched."""
    blueprint, config = read.blueprint, read.config
    dtype = _DTYPES.get(config.dtype) or blueprint.dtype
    packed, compiled = config.dense == "packed", read.device.type == "cpu" and config.kernel != "reference"
    if packed and not compiled:
        raise ValueError("dense=packed needs the compiled kernels of the CPU; leave it at decoded")
    short = compiled and dtype == torch.bfloat16  # the same bits as decoded, of fewer bytes
    shortens = short and blueprint.index.stored is not None
    model = load_dense(blueprint, dtype, "eager", packed=packed, short=short, shortens=shortens).to(read.device)
    if compiled:
        compile_dense(model)
    context = context_of(config.max_context, blueprint.max_context, blueprint.config.get_text_config())
    reason = why_not_packed(blueprint.skeleton, context)
    is_packed = reason is None and config.batch.packed
    tried = try_a_token(model, blueprint, is_packed, tries_experts)
    if is_packed:
        model.set_attn_implementation(ATTENTION_NAME)
    notes = why_untied(blueprint, model)
    notes += [] if reason is None else [f"sequences run one at a time, not packed: {reason}"]
    return Dense(model, RoutingSeam(), tried, is_packed, context, blueprint.generation.eos_ids, tuple(notes))


def make_memory(read: Read, dense: Dense, most_blocks: int | None = None, sharers: Sharers = ALONE) -> Memory:
    """most_blocks: of KV, if there may be more later. sharers: as of `Share`."""
    batch, turns = read.config.batch, _turns(read.blueprint, read.config.batch)
    if not dense.is_packed:
        unlimited = BlockPool(batch.num_running, dense.max_context, sharing=False)
        return Memory(
            Scheduler(batch, unlimited, can_chunk=False, turns=turns), SequentialRunner(dense.model, dense.routing), 0
        )
    blocks = num_blocks(read.device, batch, dense.tried.kv_bytes, dense.max_context, sharers)
    # What was computed of a prefix in fewer bits is not what a request would compute of it now.
    sharing = batch.prefix_sharing and read.config.offload.bits != "upgrade"
    pool = BlockPool(blocks, batch.block_size, sharing, most_blocks)
    kv = make_paged_kv(dense.model, pool)
    kernel = chosen_kernel(read.config.kernel, read.device)
    if read.device.type != "cpu":
        kv.prepare(dense.tried.kv)  # before slots are counted in what is left
    runner: Runner = PackedRunner(dense.model, kv, dense.routing)
    if kernel != "reference":
        make = planned_runner if kernel == "cpu" else paged_runner
        runner = make(dense.model, kv, dense.routing, dense.tried.kv, dense.max_context)
    return Memory(Scheduler(batch, pool, turns=turns), runner, pool.num_blocks * pool.block_size * dense.tried.kv_bytes)


def _turns(blueprint: Blueprint, batch: BatchConfig) -> Turns | None:
    if batch.pool is None:
        return None
    if blueprint.config.is_encoder_decoder or not blueprint.experts:
        reason = "it is an encoder-decoder" if blueprint.experts else "it has no experts in slots"
        raise ValueError(f"batch.pool cannot serve {blueprint.folder}: {reason}; leave it out")
    return Turns([site.num_experts for site in blueprint.index.sites], batch.pool)


def make_experts(read: Read, dense: Dense, reserved_bytes: int, share: Share | None) -> Experts:
    """Slots, filled where all fit, and every layer's compute put into the model.

    reserved_bytes: that others will still take of the memory that is free now.
    """
    blueprint, config, model = read.blueprint, read.config, dense.model
    if not blueprint.experts:
        if config.routing.pregate != "off":
            raise ValueError(
                f"routing.pregate={config.routing.pregate} cannot serve {blueprint.folder}: it has no experts in "
                "slots; set routing.pregate=off"
            )
        return Experts(None, ())
    counts = [site.num_experts for site in blueprint.index.sites]
    own = [list(range(n)) for n in counts] if share is None else share.experts
    num_own = [len(experts) for experts in own]
    sizes = sizes_of(blueprint, config.batch, dense.tried.kv_bytes, dense.vocabulary)
    foresight = Foresight(blueprint, model, config)
    machine = probed(config)
    offload, choices = choose_reads(config.offload, blueprint, machine)

    def free() -> int:
        return max(0, free_room(read.device, config, sizes, share.sharers if share else ALONE) - reserved_bytes)

    # Once, whatever this rank alone has chosen: it is a collective. A host copy is no longer free, but read first.
    room = None if offload.store == "ram" else free()
    is_read_straight = offload.store == "file" and offload.direct and read.device.type == "cpu"
    told = offload.bits, offload.budget
    if is_read_straight and slots_for(*told, blueprint.index, own, room or 0) < sum(num_own):
        blueprint = replace(blueprint, index=in_place(blueprint.index))
    hidden = why_not_ahead(blueprint, machine, offload)
    with ExitStack() as undo:
        store = make_store(blueprint, offload, share)
        undo.callback(store.close)
        room = free() if room is None else room
        num_slots = slots_for(*told, blueprint.index, own, room)
        cache = ExpertCache(
            store,
            num_slots,
            own=num_own,
            policy=offload.policy,
            num_readers=offload.readers or 0,
            device=read.device,
        )
        undo.callback(cache.close)
        if num_slots == sum(num_own):
            cache.preload(own)
        weights = expert_weights(blueprint, cache)
        kernel = chosen_kernel(config.kernel, read.device)
        if share is not None and share.plan.num_ranks > 1 and kernel in ("single_launch", "measured"):
            kernel = "grouped"  # for the steps that no launch over all ranks takes
        kernels = layer_kernels(kernel, weights, counts, blueprint.top_k, model.dtype, config.crossover_path)
        lookahead, kind = foresight.lookahead(cache, may_pay=share is None and hidden is None)
        slots = SlotExperts(cache, kernels, dense.routing, lookahead)
        held = None if share is None else share.held
        upgrades = make_upgrades(blueprint, offload, slots, partial(open_store, offload), held)
        choices += told_choices(config, read.device, kind, kernel, hidden)
        if foresight.pregate is not None:
            slots.routing.stages.append(foresight.pregate)
        for layer, site in enumerate(blueprint.index.sites):
            model.get_submodule(site.module).compute = slots.layer(layer)
        short = model.dtype == torch.bfloat16
        offer = pack_offer(blueprint, machine, offload, may_be_short=short) if cache.can_evict else []
        notes = [*kernel_notes(kernel, weights, model.dtype), *offer]
        experts = Experts(slots, tuple(weights), tuple(notes), tuple(choices), upgrades)
        undo.pop_all()
    return experts


def expert_weights(blueprint: Blueprint, cache: ExpertCache) -> list[ExpertWeights]:
    """Every layer's weights as kernels take them: views of all slots."""
    layers, table = zip(blueprint.experts, blueprint.index.layouts, strict=True), None
    if isinstance(cache.store, Shortened):
        table = cache.store.table
    told = {} if table is None else dict.fromkeys(("gate_up.table", "down.table"), table.words)
    return [layout.weights(cache.views(n) | told, found.activation) for n, (found, layout) in enumerate(layers)]
