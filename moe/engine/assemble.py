"""What an engine is made of: from a folder and a config to a model, its memory, its experts and their ranks.

Blueprint ─▶ dense model ─▶ one token tried ─▶ KV pool ─▶ slots for what memory is left ─▶ store, cache, kernels
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.comm.groups import Groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.coherent import Costs, measure_link, why_coherent, why_not_coherent
from moe.engine.runner import run_a_token
from moe.kernels.weights import ExpertWeights
from moe.layer.experts import SlotExperts, chosen_kernel, layer_kernels
from moe.layer.lookahead import Lookahead, router_guess, transition_guess
from moe.layer.parallel import DispatcherName, ExpertParallel
from moe.models.blueprint import Blueprint
from moe.models.dense_cpu import compile_dense
from moe.models.kv import BlockPool
from moe.models.load import load_dense
from moe.offload.budget import resolve_slots
from moe.offload.cache import ExpertCache
from moe.offload.stores import ExpertStore, FileStore, MmapStore, RamStore, available_memory
from moe.placement.plan import Plan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TriedToken(NamedTuple):
    """What a forward of one token showed. kv: its keys and values by layer, none where it does not run packed.

    dispatch_shapes: (rows per token, K of a row) of every layer's experts.
    """

    kv: list[tuple[Tensor, Tensor]]
    dispatch_shapes: list[tuple[int, int]]

    @property
    def kv_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for layer in self.kv for t in layer)


def find_device(name: str | None) -> torch.device:
    """None: the first GPU, else the CPU. Raises ValueError for one that torch does not have here."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        raise ValueError(f"device ({name!r}) is no device of torch; give cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"device ({name!r}) cannot be used: torch sees no GPU here; give cpu")
    return device


def notes_on(blueprint: Blueprint) -> list[str]:
    """What a user should know about how this model is served."""
    text = blueprint.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    declared = max((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), default=0)
    formats = [] if blueprint.format_note is None else [blueprint.format_note]
    if blueprint.experts:
        return formats
    if declared > 1:
        return formats + [
            f"{blueprint.config.model_type} keeps its {declared} experts in modules that cannot be served from slots: "
            "the whole model is in memory"
        ]
    return formats + ["this model is dense: it has no experts, the whole model is in memory"]


def make_parallel(groups: Groups, blueprint: Blueprint, config: ParallelConfig) -> ExpertParallel:
    """This rank's part of the plan. Raises ValueError for a model that ranks cannot share, or another model's plan."""
    counts = {site.num_experts for site in blueprint.index.sites}
    if blueprint.config.is_encoder_decoder or len(counts) != 1:
        reason = "it is an encoder-decoder" if blueprint.config.is_encoder_decoder else "layers differ in experts"
        raise ValueError(f"{blueprint.folder} cannot be served by several ranks: {reason if counts else 'no experts'}")
    num_layers, num_experts = len(blueprint.index.sites), counts.pop()
    if config.plan is None:
        plan = Plan.contiguous(num_layers, num_experts, groups.world_size)
    else:
        plan = Plan.load(config.plan)
    if (plan.num_layers, plan.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"{config.plan} places {plan.num_layers} layers of {plan.num_experts} experts, {blueprint.folder} has "
            f"{num_layers} of {num_experts}: it is the plan of another model"
        )
    home: DispatcherName = "hierarchical" if config.dispatcher == "hierarchical" else "all_to_all"
    return ExpertParallel(groups, plan, home, config.broadcast_tokens)


def make_model(blueprint: Blueprint, config: EngineConfig, device: torch.device) -> Any:
    """The dense part, loaded; its experts have no weights and no compute yet."""
    dtype = _DTYPES.get(config.dtype) or _own_dtype(blueprint)
    model = load_dense(blueprint, dtype, "eager").to(device)
    if device.type == "cpu" and config.kernel != "reference":
        compile_dense(model)
    return model


def try_a_token(model: Any, blueprint: Blueprint, is_packed: bool, is_parallel: bool) -> TriedToken:
    """Runs one token with experts that return zeros, where anyone needs to know what it shows."""
    kv: list[tuple[Tensor, Tensor]] = []
    with _zero_experts(model, blueprint) as shapes:
        if is_packed:
            kv = run_a_token(model)
        elif is_parallel:
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return TriedToken(kv, list(shapes))


def decide_coherent(
    parallel: ExpertParallel, model: Any, blueprint: Blueprint, config: EngineConfig, tried: TriedToken, context: int
) -> tuple[bool, str | None]:
    """Whether this run decodes coherently, and the reason where it was not simply told. Maybe a collective.

    context: the longest sequence. Raises ValueError where it was told to and cannot.
    """
    wanted = config.parallel.dispatcher
    if wanted not in ("auto", "coherent"):
        return False, None
    reason = why_not_coherent(model.config, context, is_packed=bool(tried.kv))
    if config.offload.prefetch != "off":
        reason = f"offload.prefetch={config.offload.prefetch} is set, which follows tokens that stay on their rank"
    if wanted == "coherent":
        if reason is not None:
            raise ValueError(f"parallel.dispatcher=coherent cannot serve {blueprint.folder}: {reason}")
        return True, None
    is_coherent = False
    if reason is None:
        groups = parallel.groups
        costs = Costs(
            kv_bytes=tried.kv_bytes / model.config.num_hidden_layers,
            result_bytes=4 * model.config.hidden_size,
            p=parallel.share_elsewhere(),
            top_k=blueprint.top_k,
            num_ranks=groups.world_size,
        )
        is_coherent, reason = why_coherent(costs, config.batch.max_sequences, lambda: measure_link(groups))
        is_coherent = bool(parallel.smallest(int(is_coherent)))
    return is_coherent, f"parallel.dispatcher=auto is {'coherent' if is_coherent else 'all_to_all'}: {reason}"


def for_all_ranks(batch: BatchConfig, num_ranks: int) -> BatchConfig:
    """What was meant for one rank, for a scheduler that has the requests of all."""
    return replace(batch, max_tokens=batch.max_tokens * num_ranks, max_sequences=batch.max_sequences * num_ranks)


def make_pool(batch: BatchConfig, kv_token_bytes: int, context: int, shared_by: ExpertParallel | None) -> BlockPool:
    """KV blocks as configured, by default for full sequences of full length within a quarter of free memory.

    shared_by: ranks that all keep the same blocks; the least of them counts. Then a collective.
    """
    tokens = batch.kv_tokens
    if tokens is None:
        tokens = min(batch.max_sequences * context, available_memory() // 4 // max(1, kv_token_bytes))
    num_blocks = max(1, -(-tokens // batch.block_size))
    if shared_by is not None:
        num_blocks = shared_by.smallest(num_blocks)
    return BlockPool(num_blocks, batch.block_size, batch.prefix_sharing)


def make_experts(
    blueprint: Blueprint, model: Any, config: EngineConfig, parallel: ExpertParallel | None, reserved_bytes: int
) -> SlotExperts | None:
    """Slots, filled where all fit, and every layer's compute put into `model`. None for a model without experts.

    reserved_bytes: that others will still take of the memory that is free now.
    """
    if not blueprint.experts:
        return None
    device, offload = model.device, config.offload
    if parallel is None:
        own = [list(range(site.num_experts)) for site in blueprint.index.sites]
    else:
        own = parallel.hosted()
    num_own = sum(map(len, own))
    available = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    num_slots = resolve_slots(
        offload.budget,
        blob_bytes=max(layout.nbytes for layout in blueprint.index.layouts),
        total_experts=num_own,
        available_bytes=max(0, available - reserved_bytes) * 9 // 10,  # activations, buffers, the rest of the machine
    )
    store = _make_store(blueprint, offload, parallel)
    cache = ExpertCache(store, num_slots, policy=offload.policy, num_readers=offload.readers, device=device)
    if num_slots == num_own:
        cache.preload(own)
    weights = expert_weights(blueprint, cache)
    table = Path(config.crossover_table).expanduser()
    counts = [site.num_experts for site in blueprint.index.sites]
    kernel = chosen_kernel(config.kernel, device)
    if is_over_ranks(parallel) and kernel in ("fused", "measured"):
        kernel = "grouped"  # for the steps that no launch over all ranks takes
    kernels = layer_kernels(kernel, weights, counts, blueprint.top_k, model.dtype, table)
    experts = SlotExperts(cache, kernels, parallel, _make_lookahead(blueprint, model, offload, cache, parallel))
    for layer, site in enumerate(blueprint.index.sites):
        model.get_submodule(site.module).compute = experts.layer(layer)
    return experts


def expert_weights(blueprint: Blueprint, cache: ExpertCache) -> list[ExpertWeights]:
    """Every layer's weights as kernels take them: views of all slots."""
    layers = zip(blueprint.experts, blueprint.index.layouts, strict=True)
    return [layout.weights(cache.views(n), found.activation) for n, (found, layout) in enumerate(layers)]


def is_over_ranks(parallel: ExpertParallel | None) -> bool:
    """Whether the experts are spread over more than this rank."""
    return parallel is not None and parallel.groups.world_size > 1


def offer_single_launch(
    blueprint: Blueprint,
    model: Any,
    config: EngineConfig,
    *,
    experts: SlotExperts | None,
    tried: TriedToken,
    is_coherent: bool,
) -> list[str]:
    """Lets one launch over all ranks serve steps of few tokens, where the kernel asks for it. With ranks: a collective.

    Returns what a user should know. Raises ValueError, on all ranks, where kernel=fused was told and cannot be.
    """
    parallel, kernel = None if experts is None else experts.parallel, chosen_kernel(config.kernel, model.device)
    if experts is None or parallel is None or not is_over_ranks(parallel) or kernel not in ("fused", "measured"):
        return []
    from moe.layer.single_launch import RankLaunch, why_not_single_launch  # triton is an optional extra on the CPU

    weights = expert_weights(blueprint, experts.cache)
    dispatcher = "coherent" if is_coherent else config.parallel.dispatcher
    reason = why_not_single_launch(experts, weights, dispatcher)
    if reason is not None:
        if kernel == "fused":
            raise ValueError(
                f"kernel=fused cannot serve {parallel.groups.world_size} ranks: {reason}; or set kernel=grouped"
            )
        return [f"kernel=measured is grouped over {parallel.groups.world_size} ranks: {reason}"]
    launch = RankLaunch(experts, weights, tried.dispatch_shapes, model.dtype)
    if kernel == "measured":
        launch.use_measured(parallel.plan.num_experts, Path(config.crossover_table).expanduser())
    parallel.launch = launch
    return []


def eos_ids(model: Any) -> set[int]:
    """The tokens that end a text."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return {eos} if isinstance(eos, int) else set(eos)
    return set()


def _make_lookahead(
    blueprint: Blueprint, model: Any, offload: OffloadConfig, cache: ExpertCache, parallel: ExpertParallel | None
) -> Lookahead | None:
    if offload.prefetch == "off":
        return None
    sites, top_k = blueprint.index.sites, blueprint.top_k
    if offload.prefetch == "router":
        guess = router_guess(model, sites, top_k)
    else:
        guess = transition_guess([site.num_experts for site in sites], top_k)
    return Lookahead(cache, guess, parallel)


def _make_store(blueprint: Blueprint, offload: OffloadConfig, parallel: ExpertParallel | None) -> ExpertStore:
    if offload.store == "mmap":
        return MmapStore(blueprint.index, check=offload.check)
    files = FileStore(blueprint.index, direct=offload.direct, check=offload.check)
    if offload.store != "ram":
        return files
    store = RamStore.read_from(files) if parallel is None else parallel.share_host_copy(files)
    files.close()
    return store


@contextmanager
def _zero_experts(model: Any, blueprint: Blueprint) -> Iterator[Sequence[tuple[int, int]]]:
    """Inside this block experts return zeros, so that the dense part can run before the slots exist.

    Yields each layer's (rows per token, K of a row) as experts are dispatched, filled by the first forward.
    """
    modules = [model.get_submodule(site.module) for site in blueprint.index.sites]
    shapes = [(1, 1)] * len(modules)

    def zeros(layer: int) -> Any:
        def compute(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, scale_input: bool) -> Tensor:
            top_k = topk_ids.shape[1]
            shapes[layer] = (top_k, 1) if scale_input else (1, top_k)
            return torch.zeros_like(x)

        return compute

    for layer, module in enumerate(modules):
        module.compute = zeros(layer)
    try:
        yield shapes
    finally:
        for module in modules:
            module.compute = None


def _own_dtype(blueprint: Blueprint) -> torch.dtype:
    declared = getattr(blueprint.config, "dtype", None)
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    if isinstance(declared, torch.dtype) and declared in _DTYPES.values():
        return declared
    stored = {info.dtype for info in blueprint.checkpoint.tensors.values()} & set(_DTYPES.values())
    return next(iter(stored)) if len(stored) == 1 else torch.float32
