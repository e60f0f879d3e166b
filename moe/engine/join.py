"""The last stage: a loaded model takes its place among ranks. It can be done again, with other peers or another plan.

Everything that holds a group is made here, from one generation's groups, and thrown away with them: dispatcher,
control, gathers, launch. What stays are the model, the slots and, where tokens go home again, KV blocks and requests.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch.distributed as dist

from moe.comm.control import Control
from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.lost import in_collective
from moe.config import ParallelConfig
from moe.engine.assemble import Loaded
from moe.engine.coherent import CoherentRunner
from moe.engine.coherent_choice import Costs, measure_link, why_coherent, why_not_coherent
from moe.engine.device import Sharers, free_room, num_blocks
from moe.engine.layer_major import sizes_of
from moe.engine.lent_kv import LentKV
from moe.engine.mirror import RequestMirror
from moe.engine.modes import Alone, Coherent, Ranks, StepMode
from moe.engine.online import OnlinePlacement
from moe.engine.runner import PackedRunner, make_paged_kv
from moe.engine.scheduler import Scheduler
from moe.engine.share import Share
from moe.engine.to_come import bytes_to_come
from moe.kernels.names import KernelName
from moe.layer.experts import chosen_kernel
from moe.layer.parallel import ExpertParallel
from moe.models.blueprint import Blueprint
from moe.models.kv import BlockPool
from moe.offload.budget import resolve_slots, slots_within
from moe.offload.fingerprint import fingerprint
from moe.offload.shared import SharedStore
from moe.placement.plan import Plan
from moe.placement.topology import Topology
from moe.placement.turn import Machine
from moe.placement.wire_format import DispatcherName, WireFormat


@dataclass(frozen=True, slots=True)
class Decisions:
    """What all ranks must do alike. num_blocks: of the KV pool, where all keep the same blocks."""

    is_coherent: bool = False
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A loaded model's place among ranks. parallel: None if alone. notes: what a user should know about it."""

    mode: StepMode
    parallel: ExpertParallel | None
    decisions: Decisions
    notes: tuple[str, ...]

    @property
    def rank(self) -> int:
        return 0 if self.parallel is None else self.parallel.groups.rank


def share_of(blueprint: Blueprint, groups: Groups, config: ParallelConfig) -> Share:
    """This rank's part of the plan that is configured. A collective. Raises ValueError for another model's or number of
    ranks, and where ranks found other weights in the folder."""
    _check_same_weights(blueprint, groups)
    num_layers, num_experts = shareable_shape(blueprint)
    if config.plan is None:
        plan = Plan.contiguous(num_layers, num_experts, groups.world_size)
    else:
        plan = Plan.load(config.plan)
    if (plan.num_layers, plan.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"{config.plan} places {plan.num_layers} layers of {plan.num_experts} experts, {blueprint.folder} has "
            f"{num_layers} of {num_experts}: it is the plan of another model"
        )
    if plan.num_ranks != groups.world_size:
        raise ValueError(
            f"the plan is for {plan.num_ranks} ranks, this run has {groups.world_size}; solve it again for them"
        )
    plan.check_ranks()
    host_copy = groups.name if groups.local is not None else ""
    return Share(plan, groups.rank, host_copy, Sharers.of(groups))


def shareable_shape(blueprint: Blueprint) -> tuple[int, int]:
    """(layers, experts of each). Raises ValueError for a model that ranks cannot share."""
    counts = {site.num_experts for site in blueprint.index.sites}
    if blueprint.config.is_encoder_decoder or len(counts) != 1:
        reason = "it is an encoder-decoder" if blueprint.config.is_encoder_decoder else "layers differ in experts"
        raise ValueError(f"{blueprint.folder} cannot be served by several ranks: {reason if counts else 'no experts'}")
    return len(blueprint.index.sites), counts.pop()


def _check_same_weights(blueprint: Blueprint, groups: Groups) -> None:
    """Before anything is loaded: ranks of other weights would answer with a mixture. A collective.

    Raises ValueError, on all ranks, naming those whose folder differs from rank 0's.
    """
    if groups.world_size == 1:
        return
    found = Control(groups).of_all(int(fingerprint(blueprint.checkpoint), 16) >> 1)  # 63 bits
    if others := [rank for rank, one in enumerate(found) if one != found[0]]:
        raise ValueError(
            f"{blueprint.folder}: rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} of {len(found)} found "
            "other weights or another config.json there than rank 0; give every node the same revision"
        )


def stay_alone(loaded: Loaded) -> Place:
    if loaded.experts.slots is not None:
        loaded.experts.slots.use_ranks(None)
    memory = loaded.memory
    mode = Alone(memory.scheduler, memory.runner, loaded.split, loaded.experts.upgrades)
    return Place(mode, None, Decisions(), ())


def settle(loaded: Loaded, place: Place) -> int:
    """What KV does not use is lent alone, too; among ranks it has been. A coherent run has another KV: the memory of
    this one is free meanwhile. Returns the bytes that are still to come."""
    if place.parallel is None and isinstance(loaded.split, LentKV):
        loaded.split.use()
    if place.decisions.is_coherent and loaded.read.device.type == "cpu":
        assert isinstance(loaded.memory.runner, PackedRunner), "why_not_coherent has refused others"
        loaded.memory.runner.kv.empty()
    return bytes_to_come(loaded, place.mode.scheduler.pool)


def join(loaded: Loaded, groups: Groups, plan: Plan, decisions: Decisions | None = None) -> Place:
    """Takes this rank's place in a generation. A collective: all its ranks must call, with the same arguments.

    decisions: None = the ranks decide together now. A rank whose share is larger than before has as many slots as the
    budget buys of it. Raises ValueError for what these ranks cannot do; after any error the model is alone.
    """
    slots, parallel_config = loaded.experts.slots, loaded.read.config.parallel
    assert slots is not None, "shareable_shape has refused a model without experts"
    is_hierarchical = parallel_config.dispatcher == "hierarchical"
    wire = WireFormat(dispatcher=_home(parallel_config), combine=parallel_config.combine)
    parallel = ExpertParallel(groups, plan, wire, parallel_config.broadcast_tokens)
    control = Control(groups)
    notes = []
    if is_hierarchical and not groups.is_even:
        notes.append(f"nodes {groups.nodes} have unequal numbers of ranks: tokens go in one step, not in two")
    if decisions is None:
        decisions, reason = decide(loaded, parallel, control)
        notes += [] if reason is None else [reason]
    with ExitStack() as undo:
        undo.callback(slots.use_ranks, None)
        slots.use_ranks(parallel)
        notes += _fill_slots(loaded, parallel, lends=_lends(loaded, parallel, decisions))
        mode = (_coherent_mode if decisions.is_coherent else _ranks_mode)(loaded, parallel, control, decisions)
        undo.callback(mode.close)
        notes += _offer_single_launch(loaded, parallel, control, decisions)
        place = Place(mode, parallel, decisions, tuple(notes))
        undo.pop_all()
    return place


def _home(config: ParallelConfig) -> DispatcherName:
    """Where tokens go home again."""
    return "hierarchical" if config.dispatcher == "hierarchical" else "all_to_all"


def _lends(loaded: Loaded, parallel: ExpertParallel, decisions: Decisions) -> bool:
    """Whether a rank may lend KV's memory to slots, and take slots back."""
    kernel = chosen_kernel(loaded.read.config.kernel, loaded.read.device)
    # Coherent ranks must have equal KV; a launch over ranks needs what is in slots to stay there.
    return not decisions.is_coherent and not (_is_launch(kernel) and parallel.groups.world_size > 1)


def _is_launch(kernel: KernelName) -> bool:
    """Whether one launch over all ranks may serve a step."""
    return kernel in ("single_launch", "measured")


def _fill_slots(loaded: Loaded, parallel: ExpertParallel, *, lends: bool) -> Sequence[str]:
    """As many slots as the budget buys of this rank's share, where that is more than there are; filled if all fit.

    lends: as of `LentKV.use`. Returns what a user should know.
    """
    slots, read = loaded.experts.slots, loaded.read
    assert slots is not None
    cache, counts, notes = slots.cache, [len(own) for own in parallel.hosted], []
    sizes, num_own = cache.slot_sizes, sum(counts)
    free = _free_beside(loaded, parallel.groups)
    most = min(max(cache.num_slots, slots_within(cache.slot_bytes + max(0, free), sizes, counts)), cache.map.room)
    if isinstance(loaded.split, LentKV):
        loaded.split.use(max(0, free), lends=lends)
    budget = read.config.offload.budget
    wanted = num_own
    if budget is not None and not read.blueprint.index.is_mixed:  # those have a slot each
        wanted = resolve_slots(budget, sizes=sizes, counts=counts)
    if wanted > max(most, cache.num_slots) and budget is not None:
        notes.append(f"offload.budget ({budget}) of {num_own} experts is {wanted} slots, there is room for {most}")
    if loaded.split is None and min(wanted, most) >= cache.num_slots:  # as many may have to be shared otherwise
        cache.limit.raise_to(min(wanted, most), counts)
    if not cache.map.num_lacking(parallel.hosted):
        cache.preload(parallel.hosted)
        slots.settle()
    return notes


def _free_beside(loaded: Loaded, groups: Groups) -> int:
    """Bytes beside what slots and KV have and will still take; may be negative. A collective of the node."""
    slots, read = loaded.experts.slots, loaded.read
    assert slots is not None
    # Slots that are still empty will take what is free now, like at the start, and so will KV.
    pool = loaded.memory.scheduler.pool
    to_come = slots.cache.empty_bytes if read.device.type != "cpu" else bytes_to_come(loaded, pool)
    of_model = sizes_of(read.blueprint, read.config.batch, loaded.dense.tried.kv_bytes, loaded.dense.vocabulary)
    return free_room(read.device, read.config, of_model, Sharers.of(groups)) - to_come


def forget_host_copy(loaded: Loaded, groups: Groups) -> None:
    """Once all ranks of the node have mapped their host copy, its name is of no use. A collective of the node."""
    slots = loaded.experts.slots
    if slots is not None and isinstance(slots.cache.store, SharedStore) and groups.local is not None:
        with in_collective(groups, Task("sharing the host's copy of the experts"), groups.local_ranks):
            dist.barrier(group=groups.local)
        slots.cache.store.forget_name()


def decide(loaded: Loaded, parallel: ExpertParallel, control: Control) -> tuple[Decisions, str | None]:
    """What these ranks do alike, and the reason where it was not simply told. Maybe a collective.

    Raises ValueError where they were told to decode coherently and cannot.
    """
    config, dense = loaded.read.config, loaded.dense
    wanted, folder = config.parallel.dispatcher, loaded.read.blueprint.folder
    if wanted not in ("auto", "coherent"):
        return Decisions(), None
    reason = why_not_coherent(dense.model.config, dense.max_context, is_packed=dense.is_packed)
    if config.offload.prefetch not in ("auto", "off"):
        reason = f"offload.prefetch={config.offload.prefetch} is set, which follows tokens that stay on their rank"
    if config.batch.pool is not None:
        reason = f"batch.pool={config.batch.pool} is set, which follows the routing of a rank's own requests"
    if config.placement.online:
        reason = "placement.online is set, which follows tokens that go home again"
    if config.offload.bits == "upgrade":
        reason = "offload.bits=upgrade is set, which counts what every rank asks of experts, of the tokens that it has"
    if config.routing.pregate != "off":
        reason = (
            f"routing.pregate={config.routing.pregate} is set, which needs what the layer before saw of every token"
        )
    if wanted == "coherent" and reason is not None:
        raise ValueError(f"parallel.dispatcher=coherent cannot serve {folder}: {reason}")
    is_coherent, told = wanted == "coherent", None
    if wanted == "auto":
        if reason is None:
            costs = Costs(
                kv_bytes=dense.tried.kv_bytes / dense.model.config.num_hidden_layers,
                result_bytes=dense.model.dtype.itemsize * dense.model.config.hidden_size,
                p=parallel.share_elsewhere(),
                top_k=loaded.read.blueprint.top_k,
                num_ranks=parallel.groups.world_size,
            )
            groups = parallel.groups
            pays, reason = why_coherent(costs, config.batch.max_sequences, lambda: measure_link(groups))
            is_coherent = bool(control.smallest(int(pays)))
        told = f"parallel.dispatcher=auto is {'coherent' if is_coherent else 'all_to_all'}: {reason}"
    if not is_coherent:
        return Decisions(), told
    batch, sharers = config.batch.for_ranks(parallel.groups.world_size), Sharers.of(parallel.groups)
    blocks = num_blocks(loaded.read.device, batch, dense.tried.kv_bytes, dense.max_context, sharers)
    if loaded.read.device.type == "cpu":  # in the place of a rank's own KV, beside which its slots were counted
        own = loaded.memory.scheduler.pool
        beside = max(0, _free_beside(loaded, parallel.groups)) // (own.block_size * dense.tried.kv_bytes)
        blocks = min(blocks, own.room + beside)
    return Decisions(True, control.smallest(blocks)), told


def _ranks_mode(loaded: Loaded, parallel: ExpertParallel, control: Control, decisions: Decisions) -> StepMode:
    slots = loaded.experts.slots
    assert slots is not None
    return Ranks(
        loaded.memory.scheduler,
        loaded.memory.runner,
        control=control,
        parallel=parallel,
        experts=slots,
        shapes=loaded.dense.tried.dispatch_shapes,
        hidden_size=loaded.read.blueprint.index.sites[0].hidden_size,
        dtype=loaded.dense.model.dtype,
        online=_online(loaded, parallel, control),
        split=loaded.split,
        upgrades=loaded.experts.upgrades,
    )


def _online(loaded: Loaded, parallel: ExpertParallel, control: Control) -> OnlinePlacement | None:
    """What re-balances the ranks while they run, where the config asks for it."""
    config, slots = loaded.read.config, loaded.experts.slots
    if not config.placement.online or parallel.groups.world_size == 1:
        return None
    assert slots is not None
    nodes, is_cpu = parallel.groups.nodes, loaded.read.device.type == "cpu"
    like = Topology.preset("laptopx1" if is_cpu else "h200x1")
    topology = replace(like, node_of_rank=nodes, fast_bytes=None, host_bytes=None, name="run")
    sizes = loaded.sizes
    few = slots.cache.num_slots < sum(len(own) for own in parallel.hosted)
    machine = Machine(
        sizes=sizes,
        wire=WireFormat(dispatcher=_home(config.parallel), combine=config.parallel.combine),
        topology=topology,
        # On a CPU an expert's work on a few tokens is the reading of its weights, at about 40 GB/s.
        pair_seconds=sizes.expert_bytes / 40e9 if is_cpu else 2e-7,
        fast_slots=slots.cache.num_slots if few else None,
    )
    return OnlinePlacement(control, parallel, slots.routing, machine, config.placement)


def _coherent_mode(loaded: Loaded, parallel: ExpertParallel, control: Control, decisions: Decisions) -> StepMode:
    """Schedulers and KV blocks must be equal on all ranks: both are new, requests are said again by their owners."""
    slots, dense = loaded.experts.slots, loaded.dense
    assert slots is not None
    assert decisions.num_blocks is not None, decisions
    batch = loaded.read.config.batch.for_ranks(parallel.groups.world_size)
    pool = BlockPool(decisions.num_blocks, batch.block_size, batch.prefix_sharing)
    kv = make_paged_kv(dense.model, pool)
    kv.prepare(dense.tried.kv)
    sites = [site.module for site in loaded.read.blueprint.index.sites]
    packed = loaded.memory.runner
    assert isinstance(packed, PackedRunner), "why_not_coherent has refused others"
    runner = CoherentRunner(packed.over(kv), slots, sites)
    return Coherent(Scheduler(batch, pool), runner, control, RequestMirror(control, loaded.grammars))


def _offer_single_launch(
    loaded: Loaded, parallel: ExpertParallel, control: Control, decisions: Decisions
) -> Sequence[str]:
    """Lets one launch over all ranks serve steps of few tokens, where the kernel asks for it. With ranks: a collective.

    Returns what a user should know. Raises ValueError, on all ranks, where kernel=single_launch was told and cannot be.
    """
    config, slots, weights = loaded.read.config, loaded.experts.slots, loaded.experts.weights
    kernel, num_ranks = chosen_kernel(config.kernel, loaded.read.device), parallel.groups.world_size
    if slots is None or num_ranks == 1 or not _is_launch(kernel):
        return []
    from moe.layer.single_launch import RankLaunch, why_not_single_launch  # triton is an optional extra on the CPU

    dispatcher = "coherent" if decisions.is_coherent else config.parallel.dispatcher
    reason = why_not_single_launch(slots, control, weights, dispatcher)
    if reason is not None:
        if kernel == "single_launch":
            raise ValueError(f"kernel=single_launch cannot serve {num_ranks} ranks: {reason}; or set kernel=grouped")
        return [f"kernel=measured is grouped over {num_ranks} ranks: {reason}"]
    launch = RankLaunch(slots, control, weights, loaded.dense.tried.dispatch_shapes, loaded.dense.model.dtype)
    if kernel == "measured":
        launch.use_measured(parallel.plan.num_experts, config.crossover_path)
    parallel.launch = launch
    return []
