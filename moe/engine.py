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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.attention import ATTENTION_NAME
from moe.comm.groups import Groups
from moe.config import EngineConfig, ParallelConfig
from moe.experts import SlotExperts, layer_kernels
from moe.kernels.weights import ExpertWeights
from moe.kv import BlockPool
from moe.model import Blueprint, load_dense, read_blueprint
from moe.offload.budget import resolve_slots
from moe.offload.cache import ExpertCache, LayerStats
from moe.offload.stores import ExpertStore, FileStore, MmapStore, RamStore, available_memory
from moe.parallel import ExpertParallel
from moe.placement.plan import Plan
from moe.recorder import TraceRecorder
from moe.runner import PackedRunner, Runner, SequentialRunner, kv_bytes_per_token, make_paged_kv, why_not_packed
from moe.sampling import Sampler, SamplingParams
from moe.scheduler import Chunk, Scheduler, Sequence

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
        self.max_context = min(n for n in (self.config.max_context, self.blueprint.max_context, 1 << 30) if n)
        self.scheduler, self.runner = self._make_runner()
        self.experts = self._make_experts()
        self.eos_ids = _eos_ids(self.model)
        self.stats = StepStats()
        self.recorder: TraceRecorder | None = None
        self.last_logits: dict[int, list[Tensor]] | None = None  # by sequence, when `keep_logits` was called
        self._started: dict[int, float] = {}
        self.next_id = 0

    def step(self) -> list[Sequence]:
        """Computes one batch. Returns the sequences that got a token, finished ones included."""
        start = time.perf_counter()
        chunks = self.scheduler.schedule()
        joins = self._agree(chunks)
        logits = self.runner.forward(chunks) if chunks else torch.empty(0)
        for _ in range(joins):
            self._join()
        self._record(chunks)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        stepped = [self._sample(c.sequence, row) for c, row in zip(chunks, logits.cpu()) if c.samples]
        self._count(chunks, start)
        return stepped

    def start(self) -> None:
        """Begins a run of steps after which `has_work` is false. With ranks: a collective, before the first step."""
        if self.parallel is not None:
            self.parallel.agree(1, 0)

    @property
    def has_work(self) -> bool:
        """Whether this rank, or any, has something to compute or to hand over."""
        return self.scheduler.has_work if self.parallel is None else not self.parallel.agreement.is_over

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
        )
        self.next_id += 1
        self._started[sequence.id] = time.perf_counter()
        self.scheduler.add(sequence)
        return sequence

    def stop(self, sequence: Sequence) -> None:
        """Ends a sequence that is complete by its text (a stop string); no effect on a finished one."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "stop"
            self.scheduler.finish(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drops a sequence that is not finished."""
        self._started.pop(sequence.id, None)
        self.scheduler.abort(sequence)

    def record(self) -> TraceRecorder:
        """From now on every token's routing is kept; prefixes are no longer shared, so that none is left out."""
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
        self.last_logits = {}
        return self.last_logits

    def layer_stats(self) -> list[LayerStats]:
        return [] if self.experts is None else self.experts.cache.stats

    def close(self) -> None:
        if self.experts is not None:
            self.experts.cache.close()
            self.experts.cache.store.close()

    def _sample(self, sequence: Sequence, logits: Tensor) -> Sequence:
        if self.last_logits is not None:
            self.last_logits.setdefault(sequence.id, []).append(logits.clone())
        params = sequence.params
        token = sequence.sampler.sample(logits, sequence.tokens)
        logprobs = sequence.sampler.logprobs(logits, token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        sequence.tokens.append(token)
        if sequence.num_output == 1:
            self.stats.first_token_seconds.append(time.perf_counter() - self._started.pop(sequence.id))
        is_end = token in self.eos_ids and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            sequence.finish_reason = "stop"
        elif sequence.num_output >= params.max_tokens or len(sequence.tokens) >= self.max_context:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self.stats.shared_tokens += sequence.num_shared
            self.stats.preemptions += sequence.num_preempted
            self.scheduler.finish(sequence)
        return sequence

    def _agree(self, chunks: Seq[Chunk]) -> int:
        """How many forwards of other ranks this one must join in this step."""
        if self.parallel is None:
            return 0
        own = self.runner.num_forwards(chunks)
        return max(self.parallel.agree(own, sum(c.end - c.start for c in chunks)).forwards) - own

    @torch.inference_mode()
    def _join(self) -> None:
        assert self.experts is not None
        self.experts.join(self.blueprint.index.sites[0].hidden_size, self.model.dtype, self._dispatch_shapes)

    def _record(self, chunks: Seq[Chunk]) -> None:
        if self.recorder is not None and self.experts is not None and chunks:
            self.recorder.add(chunks, self.experts.take_routing())

    def _count(self, chunks: Seq[Chunk], start: float) -> None:
        seconds = time.perf_counter() - start
        prompt = sum(max(0, min(c.end, c.sequence.num_prompt) - c.start) for c in chunks)
        self.stats.steps += 1
        self.stats.prefill_tokens += prompt
        self.stats.decode_tokens += sum(c.end - c.start for c in chunks) - prompt
        if prompt:
            self.stats.prefill_seconds += seconds
        else:
            self.stats.pure_decode_tokens += len(chunks)
            self.stats.decode_seconds += seconds

    def _make_runner(self) -> tuple[Scheduler, Runner]:
        batch = self.config.batch
        with _detached_experts(self.model, self.blueprint) as shapes:
            self.kv_token_bytes = kv_bytes_per_token(self.model) if self.is_packed else 0
            if self.parallel is not None and not self.is_packed:
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device))
            self._dispatch_shapes = list(shapes)
        if not self.is_packed:
            unlimited = BlockPool(batch.max_sequences, self.max_context, sharing=False)
            return Scheduler(batch, unlimited, can_chunk=False), SequentialRunner(self.model)
        self.model.set_attn_implementation(ATTENTION_NAME)
        tokens = batch.kv_tokens
        if tokens is None:
            affordable = available_memory() // 4 // max(1, self.kv_token_bytes)
            tokens = min(batch.max_sequences * self.max_context, affordable)
        num_blocks = max(1, -(-tokens // batch.block_size))
        pool = BlockPool(num_blocks, batch.block_size, batch.prefix_sharing)
        self.kv_bytes = num_blocks * batch.block_size * self.kv_token_bytes
        return Scheduler(batch, pool), PackedRunner(self.model, make_paged_kv(self.model, pool))

    def _own_experts(self) -> list[list[int]]:
        """The logical experts that this rank serves, by layer."""
        if self.parallel is None:
            return [list(range(site.num_experts)) for site in self.blueprint.index.sites]
        return self.parallel.hosted()

    kv_bytes = 0

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
    return ExpertParallel(groups, plan, config.dispatcher, config.broadcast_tokens)


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
