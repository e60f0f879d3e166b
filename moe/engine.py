"""The engine: requests in, one step after another, tokens out.

add_request ─▶ Scheduler ─▶ chunks ─▶ Runner ─▶ logits ─▶ Sampler ─▶ next token, or finished
                                         │ per layer
                                         └─ router ─▶ SlotExperts ─▶ ExpertCache ─▶ ExpertStore
"""

import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.attention import ATTENTION_NAME
from moe.coherent import CoherentRunner, Costs, Replicas, measure_link, why_coherent, why_not_coherent
from moe.comm.groups import Groups
from moe.comm.wire import Traffic
from moe.config import EngineConfig, ParallelConfig
from moe.experts import SlotExperts, layer_kernels
from moe.kernels.weights import ExpertWeights
from moe.kv import BlockPool
from moe.model import Blueprint, load_dense, read_blueprint
from moe.norms import compile_norms
from moe.offload.budget import resolve_slots
from moe.offload.cache import ExpertCache, LayerStats
from moe.offload.stores import ExpertStore, FileStore, MmapStore, RamStore, available_memory
from moe.parallel import DispatcherName, ExpertParallel
from moe.placement.plan import Plan
from moe.recorder import TraceRecorder
from moe.runner import PackedRunner, Runner, SequentialRunner, make_paged_kv, run_a_token, why_not_packed
from moe.sampling import Choice, Sampler, SamplingParams
from moe.scheduler import Chunk, FinishReason, Scheduler, Sequence

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class StepStats:
    """What steps cost. A step that computes any prompt tokens counts as prefill."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    pure_decode_tokens: int = 0  # of the steps that decode_seconds counts
    decode_seconds: float = 0.0
    shared_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    first_token_seconds: list[float] = field(default_factory=list)


class Engine:
    """One model in this process. Not thread-safe; one thread adds requests and steps.

    With `groups` the experts are shared by their ranks, and every call of `start` and `step` is a collective.

    Raises ValueError for a folder, a budget or a setting that cannot be served.
    """

    def __init__(self, folder: str | Path, config: EngineConfig | None = None, groups: Groups | None = None) -> None:
        self.config = config or EngineConfig()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.blueprint = read_blueprint(folder)
        self.device = _device(self.config.device)
        self.parallel = None if groups is None else _make_parallel(groups, self.blueprint, self.config.parallel)
        self.notes = _notes(self.blueprint)
        reason = why_not_packed(self.blueprint.skeleton)
        self.is_packed = reason is None and self.config.batch.packed
        if reason is not None:
            self.notes.append(f"sequences run one at a time, not packed: {reason}")
        dtype = _DTYPES.get(self.config.dtype) or _own_dtype(self.blueprint)
        self.model = load_dense(self.blueprint, dtype, "eager").to(self.device)
        if self.device.type == "cpu" and self.config.kernel != "reference":
            compile_norms(self.model)
        self.max_context = min(n for n in (self.config.max_context, self.blueprint.max_context, 1 << 30) if n)
        self.scheduler, self.runner = self._make_runner()
        self.experts = self._make_experts()
        self.coherent = self._make_coherent()
        self.eos_ids = _eos_ids(self.model)
        self.stats = StepStats()
        self.recorder: TraceRecorder | None = None
        self.last_logits: dict[int, list[Tensor]] | None = None  # by sequence, when `keep_logits` was called
        self._started: dict[int, float] = {}
        self.next_id = 0

    def step(self) -> list[Sequence]:
        """Computes one batch. Returns the sequences that got a token, finished ones included."""
        start = time.perf_counter()
        chunks, joins = self._plan_step()
        logits = self.runner.forward(chunks) if chunks else torch.empty(0)
        for _ in range(joins):
            self._join()
        self._record(chunks)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        choices = self._choose(chunks, logits.cpu())
        stepped = [self._accept(c.sequence, choice) for c, choice in zip((c for c in chunks if c.samples), choices)]
        self._count(chunks, start)
        return [sequence for sequence in stepped if sequence.owner == self.rank]

    def start(self) -> None:
        """Begins a run of steps after which `has_work` is false. With ranks: a collective, before the first step."""
        if self.parallel is not None:
            self.parallel.agree(1, 0)

    @property
    def has_work(self) -> bool:
        """Whether this rank, or any, has something to compute or to hand over."""
        return self.scheduler.has_work if self.parallel is None else not self.parallel.agreement.is_over

    @property
    def rank(self) -> int:
        return 0 if self.parallel is None else self.parallel.groups.rank

    @property
    def traffic(self) -> list[Traffic]:
        """What this rank has sent, by part of the engine."""
        if self.parallel is None:
            return []
        moved = self.coherent.traffic if self.coherent is not None else []
        return [self.parallel.dispatcher.traffic, *moved]

    def check_request(self, tokens: Seq[int], params: SamplingParams) -> None:
        """Raises ValueError for a prompt of token ids that cannot ever run."""
        vocabulary = self.model.config.get_text_config().vocab_size
        if not tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        if bad := next((t for t in tokens if not 0 <= t < vocabulary), None):
            raise ValueError(f"prompt token {bad} is outside the vocabulary of {vocabulary}")
        if len(tokens) >= self.max_context:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.max_context} with at least one for "
                "the answer; shorten it"
            )
        pool = self.scheduler.pool
        longest = min(len(tokens) + params.max_tokens, self.max_context)
        if -(-longest // pool.block_size) > pool.num_blocks:
            raise ValueError(
                f"prompt and answer take {longest} tokens, the KV cache holds {pool.num_blocks * pool.block_size}; "
                "raise batch.kv_tokens or lower max_tokens"
            )

    def add_request(self, tokens: Seq[int], params: SamplingParams) -> Sequence:
        """Queues a prompt of token ids. Raises ValueError if it cannot ever run."""
        self.check_request(tokens, params)
        sequence = Sequence(
            id=self.next_id,
            tokens=list(tokens),
            params=params,
            num_prompt=len(tokens),
            sampler=Sampler(params),
            owner=self.rank,
            place=self.rank,
        )
        self.next_id += 1
        self._started[sequence.id] = time.perf_counter()
        if self.replicas is not None:
            self.replicas.add(sequence)
        else:
            self.scheduler.add(sequence)
        return sequence

    def stop(self, sequence: Sequence) -> None:
        """Ends a sequence that is complete by its text (a stop string); no effect on a finished one."""
        if sequence.finish_reason is None:
            self._end(sequence, "stop")

    def abort(self, sequence: Sequence) -> None:
        """Drops a sequence, waiting or running; no effect on a finished one."""
        if sequence.finish_reason is None:
            self._started.pop(sequence.id, None)
            self._end(sequence, "abort")

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if self.replicas is not None:
            self.replicas.end(sequence)  # in the next step, with all ranks
        else:
            self.scheduler.drop(sequence)

    def record(self) -> TraceRecorder:
        """From now on every token's routing is kept; prefixes are no longer shared, so that none is left out."""
        if self.coherent is not None:
            raise ValueError("a coherent run does not record its routing; set parallel.dispatcher=all_to_all")
        if self.experts is None:
            raise ValueError(f"{self.blueprint.folder} has no experts in slots: there is no routing to record")
        if self.blueprint.config.is_encoder_decoder:
            raise ValueError(
                f"{self.blueprint.folder} is an encoder-decoder: its layers see different tokens, which a trace cannot "
                "hold"
            )
        if self.scheduler.has_work:
            raise ValueError("requests are running; record from their start")
        self.scheduler.pool.sharing = False
        self.experts.recording = True
        num_experts = max(site.num_experts for site in self.blueprint.index.sites)
        self.recorder = TraceRecorder(num_experts, self.blueprint.folder.name)
        return self.recorder

    def keep_logits(self) -> dict[int, list[Tensor]]:
        """From now on the logits of every sampled token are kept, fp32 [V] each, by sequence."""
        if self.coherent is not None:
            raise ValueError("in a coherent run logits stay on other ranks; set parallel.dispatcher=all_to_all")
        self.last_logits = {}
        return self.last_logits

    def layer_stats(self) -> list[LayerStats]:
        return [] if self.experts is None else self.experts.cache.stats

    def close(self) -> None:
        if self.experts is not None:
            self.experts.cache.close()
            self.experts.cache.store.close()

    def _choose(self, chunks: Seq[Chunk], logits: Tensor) -> list[Choice]:
        """The next token of every chunk that samples. logits: as the runner gives them, on the CPU."""
        if self.coherent is not None:
            return self.coherent.choose(chunks, logits) if chunks else []
        sampling = [(c.sequence, row) for c, row in zip(chunks, logits) if c.samples]
        if self.last_logits is not None:
            for sequence, row in sampling:
                self.last_logits.setdefault(sequence.id, []).append(row.clone())
        return [sequence.sampler.choose(row, sequence.tokens) for sequence, row in sampling]

    def _accept(self, sequence: Sequence, choice: Choice) -> Sequence:
        params, token = sequence.params, choice.token
        if choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
        sequence.tokens.append(token)
        if sequence.num_output == 1 and sequence.owner == self.rank:
            self.stats.first_token_seconds.append(time.perf_counter() - self._started.pop(sequence.id))
        is_end = token in self.eos_ids and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            sequence.finish_reason = "stop"
        elif sequence.num_output >= params.max_tokens or len(sequence.tokens) >= self.max_context:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)
            if self.replicas is not None:
                self.replicas.forget(sequence)
            if sequence.owner == self.rank:
                self.stats.shared_tokens += sequence.num_shared
                self.stats.preemptions += sequence.num_preempted
        return sequence

    def _plan_step(self) -> tuple[list[Chunk], int]:
        """The chunks of this step, and how many forwards of other ranks this one must join in it."""
        if self.parallel is None:
            return self.scheduler.schedule(), 0
        if self.replicas is not None:
            self.parallel.agree(int(self.scheduler.has_work or any(self.parallel.heard)), 0)
            self.replicas.hear(self.scheduler)
            return self.scheduler.schedule(), 0
        chunks = self.scheduler.schedule()
        own = self.runner.num_forwards(chunks)
        return chunks, max(self.parallel.agree(own, sum(c.end - c.start for c in chunks)).forwards) - own

    @torch.inference_mode()
    def _join(self) -> None:
        assert self.experts is not None
        self.experts.join(self.blueprint.index.sites[0].hidden_size, self.model.dtype, self._dispatch_shapes)

    def _record(self, chunks: Seq[Chunk]) -> None:
        if self.recorder is not None and self.experts is not None and chunks:
            self.recorder.add(chunks, self.experts.take_routing())

    def _count(self, chunks: Seq[Chunk], start: float) -> None:
        seconds = time.perf_counter() - start
        own = [c for c in chunks if c.sequence.owner == self.rank]
        prompt = sum(max(0, min(c.end, c.sequence.num_prompt) - c.start) for c in own)
        self.stats.steps += 1
        self.stats.prefill_tokens += prompt
        self.stats.decode_tokens += sum(c.end - c.start for c in own) - prompt
        if any(c.start < c.sequence.num_prompt for c in chunks):
            self.stats.prefill_seconds += seconds
        else:
            self.stats.pure_decode_tokens += len(own)
            self.stats.decode_seconds += seconds

    def _make_runner(self) -> tuple[Scheduler, Runner]:
        batch = self.config.batch
        kv_of_a_token: list[tuple[Tensor, Tensor]] = []
        with _detached_experts(self.model, self.blueprint) as shapes:
            if self.is_packed:
                kv_of_a_token = run_a_token(self.model)
            self.kv_token_bytes = sum(t.numel() * t.itemsize for layer in kv_of_a_token for t in layer)
            if self.parallel is not None and not self.is_packed:
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device))
            self._dispatch_shapes = list(shapes)
        is_coherent = self._is_coherent()
        if not self.is_packed:
            unlimited = BlockPool(batch.max_sequences, self.max_context, sharing=False)
            return Scheduler(batch, unlimited, can_chunk=False), SequentialRunner(self.model)
        self.model.set_attn_implementation(ATTENTION_NAME)
        if is_coherent:
            assert self.parallel is not None
            self.replicas = Replicas(self.parallel)
            ranks = self.parallel.groups.world_size  # what was meant for one rank, for the requests of all
            batch = replace(batch, max_tokens=batch.max_tokens * ranks, max_sequences=batch.max_sequences * ranks)
        tokens = batch.kv_tokens
        if tokens is None:
            affordable = available_memory() // 4 // max(1, self.kv_token_bytes)
            tokens = min(batch.max_sequences * self.max_context, affordable)
        num_blocks = max(1, -(-tokens // batch.block_size))
        if self.replicas is not None and self.parallel is not None:
            num_blocks = self.parallel.smallest(num_blocks)
        pool = BlockPool(num_blocks, batch.block_size, batch.prefix_sharing)
        self.kv_bytes = num_blocks * batch.block_size * self.kv_token_bytes
        kv = make_paged_kv(self.model, pool)
        if self.replicas is not None:
            kv.prepare(kv_of_a_token)
        return Scheduler(batch, pool), PackedRunner(self.model, kv)

    def _is_coherent(self) -> bool:
        """Whether this run decodes coherently, with the reason in `notes` where it was not simply told."""
        wanted = self.config.parallel.dispatcher
        if self.parallel is None or wanted not in ("auto", "coherent"):
            return False
        reason = why_not_coherent(self.model.config, self.max_context, self.is_packed)
        if wanted == "coherent":
            if reason is not None:
                raise ValueError(f"parallel.dispatcher=coherent cannot serve {self.blueprint.folder}: {reason}")
            return True
        is_coherent = False
        if reason is None:
            groups, num_layers = self.parallel.groups, self.model.config.num_hidden_layers
            costs = Costs(
                kv_bytes=self.kv_token_bytes / num_layers,
                result_bytes=4 * self.model.config.hidden_size,
                p=self.parallel.share_elsewhere(),
                top_k=self.blueprint.top_k,
                num_ranks=groups.world_size,
            )
            is_coherent, reason = why_coherent(costs, self.config.batch.max_sequences, lambda: measure_link(groups))
            is_coherent = bool(self.parallel.smallest(int(is_coherent)))
        self.notes.append(f"parallel.dispatcher=auto is {'coherent' if is_coherent else 'all_to_all'}: {reason}")
        return is_coherent

    def _own_experts(self) -> list[list[int]]:
        """The logical experts that this rank serves, by layer."""
        if self.parallel is None:
            return [list(range(site.num_experts)) for site in self.blueprint.index.sites]
        return self.parallel.hosted()

    kv_bytes = 0
    replicas: Replicas | None = None  # in a coherent run

    def _make_coherent(self) -> CoherentRunner | None:
        if self.replicas is None or self.experts is None or not isinstance(self.runner, PackedRunner):
            return None
        sites = [site.module for site in self.blueprint.index.sites]
        self.runner = coherent = CoherentRunner(self.runner, self.experts, sites, self.config.parallel.broadcast_tokens)
        return coherent

    def _make_experts(self) -> SlotExperts | None:
        blueprint, offload = self.blueprint, self.config.offload
        if not blueprint.experts:
            return None
        blob_bytes = max(layout.nbytes for layout in blueprint.index.layouts)
        available = available_memory() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
        own = self._own_experts()
        num_slots = resolve_slots(
            offload.budget,
            blob_bytes=blob_bytes,
            total_experts=sum(map(len, own)),
            available_bytes=max(0, available - self.kv_bytes)
            * 9
            // 10,  # activations, buffers, the rest of the machine
        )
        store: ExpertStore
        if offload.store == "mmap":
            store = MmapStore(blueprint.index)
        else:
            store = FileStore(blueprint.index, direct=offload.direct)
            if offload.store == "ram":
                files = store
                parallel = self.parallel
                store = RamStore.read_from(files) if parallel is None else parallel.share_host_copy(files)
                files.close()
        cache = ExpertCache(store, num_slots, policy=offload.policy, num_readers=offload.readers, device=self.device)
        if num_slots == sum(map(len, own)):
            cache.preload(own)
        weights = [ExpertWeights(*cache.views(i), e.activation) for i, e in enumerate(blueprint.experts)]
        table = Path(self.config.crossover_table).expanduser()
        counts = [site.num_experts for site in blueprint.index.sites]
        kernels = layer_kernels(self.config.kernel, weights, counts, blueprint.top_k, self.model.dtype, table)
        experts = SlotExperts(cache, kernels, self.parallel)
        for layer, site in enumerate(blueprint.index.sites):
            self.model.get_submodule(site.module).compute = experts.layer(layer)
        return experts


@contextmanager
def _detached_experts(model: Any, blueprint: Blueprint) -> Iterator[list[tuple[int, int]]]:
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


def _make_parallel(groups: Groups, blueprint: Blueprint, config: ParallelConfig) -> ExpertParallel:
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


def _notes(blueprint: Blueprint) -> list[str]:
    text = blueprint.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    declared = max((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), default=0)
    if blueprint.experts:
        return []
    if declared > 1:
        return [
            f"{blueprint.config.model_type} keeps its {declared} experts in modules that cannot be served from slots: "
            "the whole model is in memory"
        ]
    return ["this model is dense: it has no experts, the whole model is in memory"]


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        raise ValueError(f"device ({name!r}) is no device of torch; give cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"device ({name!r}) cannot be used: torch sees no GPU here; give cpu")
    return device


def _own_dtype(blueprint: Blueprint) -> torch.dtype:
    declared = getattr(blueprint.config, "dtype", None)
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    if isinstance(declared, torch.dtype) and declared in _DTYPES.values():
        return declared
    stored = {info.dtype for info in blueprint.checkpoint.tensors.values()} & set(_DTYPES.values())
    return next(iter(stored)) if len(stored) == 1 else torch.float32


def _eos_ids(model: Any) -> set[int]:
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return {eos} if isinstance(eos, int) else set(eos)
    return set()


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far (ru_maxrss would begin with that of the process before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
