"""The engine: requests in, one step after another, tokens out.

add_request ─▶ Scheduler ─▶ chunks ─▶ Runner ─▶ logits ─▶ Sampler ─▶ next token, or finished
                                         │ per layer
                                         └─ router ─▶ SlotExperts ─▶ ExpertCache ─▶ ExpertStore
"""

import secrets
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe.comm.groups import Groups
from moe.comm.wire import Traffic
from moe.config import EngineConfig
from moe.engine import assemble
from moe.engine.coherent import CoherentRunner, Replicas
from moe.engine.recorder import TraceRecorder
from moe.engine.requests import Chunk, Request
from moe.engine.runner import PackedRunner, Runner, SequentialRunner, make_paged_kv, planned_runner
from moe.engine.sampling import Choice, Sampler
from moe.engine.scheduler import Scheduler
from moe.models.attention import ATTENTION_NAME
from moe.models.blueprint import read_blueprint
from moe.models.kv import BlockPool
from moe.models.neighbours import why_not_packed
from moe.offload.cache import LayerStats
from moe.outputs import FinishReason
from moe.params import MAX_SEED, SamplingParams


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

    def rate_text(self) -> str:
        """Tokens a second so far, for a progress line."""
        seconds = self.prefill_seconds + self.decode_seconds
        return f"{(self.prefill_tokens + self.decode_tokens) / seconds if seconds else 0:.0f} tokens/s"


class Engine:
    """One model in this process. Not thread-safe; one thread adds requests and steps.

    With `groups` the experts are shared by their ranks, and every call of `start` and `step` is a collective.

    Raises ValueError for a folder, a budget or a setting that cannot be served.
    """

    def __init__(self, folder: str | Path, config: EngineConfig | None = None, groups: Groups | None = None) -> None:
        self.config = config = config or EngineConfig()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.blueprint = read_blueprint(folder)
        self.notes = assemble.notes_on(self.blueprint)
        device = assemble.find_device(config.device)
        self.parallel = None if groups is None else assemble.make_parallel(groups, self.blueprint, config.parallel)
        self.max_context = min(n for n in (config.max_context, self.blueprint.max_context, 1 << 30) if n)
        reason = why_not_packed(self.blueprint.skeleton, self.max_context)
        self.is_packed = reason is None and config.batch.packed
        if reason is not None:
            self.notes.append(f"sequences run one at a time, not packed: {reason}")
        self.model = assemble.make_model(self.blueprint, config, device)
        tried = assemble.try_a_token(self.model, self.blueprint, self.is_packed, self.parallel is not None)
        self._dispatch_shapes = tried.dispatch_shapes
        self.replicas = self._make_replicas(tried)
        self.scheduler, self.runner, kv_bytes = self._make_runner(tried)
        self.experts = assemble.make_experts(self.blueprint, self.model, config, self.parallel, kv_bytes)
        self.notes += assemble.offer_single_launch(
            self.blueprint,
            self.model,
            config,
            experts=self.experts,
            tried=tried,
            is_coherent=self.replicas is not None,
        )
        self.coherent: CoherentRunner | None = None
        if self.replicas is not None:
            assert self.experts is not None
            assert isinstance(self.runner, PackedRunner)
            sites = [site.module for site in self.blueprint.index.sites]
            self.coherent = CoherentRunner(self.runner, self.experts, sites)
            self.runner = self.coherent
        self.eos_ids = assemble.eos_ids(self.model)
        self.stats = StepStats()
        self.recorder: TraceRecorder | None = None
        self.last_logits: dict[int, list[Tensor]] | None = None  # by request, when `keep_logits` was called
        self._started: dict[int, float] = {}
        self.next_id = 0

    def step(self) -> list[Request]:
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
        stepped = [self._accept(c.request, choice) for c, choice in zip((c for c in chunks if c.samples), choices)]
        self._count(chunks, start)
        return [request for request in stepped if request.owner == self.rank]

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
        if self.experts is not None and self.experts.lookahead is not None:
            moved = self.experts.lookahead.traffic
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
        for name in ("allowed_token_ids", "logit_bias"):
            if bad := next((t for t in getattr(params, name) or () if not 0 <= t < vocabulary), None):
                raise ValueError(f"{name} names token {bad}, outside the vocabulary of {vocabulary}")
        pool = self.scheduler.pool
        wanted = 1 if params.max_tokens is None else params.max_tokens
        longest = min(len(tokens) + wanted, self.max_context)
        if -(-longest // pool.block_size) > pool.num_blocks:
            raise ValueError(
                f"prompt and answer take {longest} tokens, the KV cache holds {pool.num_blocks * pool.block_size}; "
                "raise batch.kv_tokens or lower max_tokens"
            )

    def add_request(self, tokens: Seq[int], params: SamplingParams) -> Request:
        """Queues a prompt of token ids; without a seed it draws its own. Raises ValueError if it cannot ever run."""
        self.check_request(tokens, params)
        pool = self.scheduler.pool
        room = min(self.max_context, pool.num_blocks * pool.block_size) - len(tokens)
        seed = secrets.randbelow(MAX_SEED)
        params = params.resolved(seed=seed, max_tokens=max(1, room), end_token_ids=self.eos_ids)
        request = Request(
            id=self.next_id,
            tokens=list(tokens),
            params=params,
            num_prompt=len(tokens),
            sampler=Sampler(params, len(tokens)),
            owner=self.rank,
            place=self.rank,
        )
        self.next_id += 1
        self._started[request.id] = time.perf_counter()
        if self.replicas is not None:
            self.replicas.add(request)
        else:
            self.scheduler.add(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, waiting or running: "stop" if its text is complete, "abort" if it is wanted no more.

        Of a finished one nothing changes, but that "stop" explains more than "length".
        """
        if request.finish_reason == "length" and reason == "stop":
            request.finish_reason = reason
        if request.finish_reason is not None:
            return
        self._started.pop(request.id, None)
        if self.replicas is not None:
            self.replicas.finish(request, reason)  # in the next step, with all ranks
        else:
            self.scheduler.finish(request, reason)

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
        """From now on the logits of every sampled token are kept, fp32 [V] each, by request."""
        if self.coherent is not None:
            raise ValueError("in a coherent run logits stay on other ranks; set parallel.dispatcher=all_to_all")
        self.last_logits = {}
        return self.last_logits

    def layer_stats(self) -> list[LayerStats]:
        return [] if self.experts is None else self.experts.cache.stats

    def why_not_whole(self) -> str | None:
        """What is wrong with the bookkeeping of blocks and slots; None if nothing is."""
        try:
            self.scheduler.pool.check()
            if self.experts is not None:
                self.experts.cache.check()
        except AssertionError as error:
            return str(error) or "a count does not add up"
        return None

    def close(self) -> None:
        if self.experts is not None:
            self.experts.cache.close()
            self.experts.cache.store.close()

    def _choose(self, chunks: Seq[Chunk], logits: Tensor) -> list[Choice]:
        """The next token of every chunk that samples. logits: as the runner gives them, on the CPU."""
        if self.coherent is not None:
            return self.coherent.choose(chunks, logits) if chunks else []
        sampling = [(c.request, row) for c, row in zip(chunks, logits) if c.samples]
        if self.last_logits is not None:
            for request, row in sampling:
                self.last_logits.setdefault(request.id, []).append(row.clone())
        return [request.sampler.choose(row, request.tokens) for request, row in sampling]

    def _accept(self, request: Request, choice: Choice) -> Request:
        if choice.error is None:
            if choice.logprobs is not None:
                request.logprobs.append(choice.logprobs)
            request.tokens.append(choice.token)
            if request.num_output == 1 and request.owner == self.rank:
                self.stats.first_token_seconds.append(time.perf_counter() - self._started.pop(request.id))
        request.error = choice.error
        if (reason := self._why_finished(request)) is not None:
            self.scheduler.finish(request, reason)
            if self.replicas is not None:
                self.replicas.forget(request)
            if request.owner == self.rank:
                self._started.pop(request.id, None)
                self.stats.shared_tokens += request.num_shared
                self.stats.preemptions += request.num_preempted
        return request

    def _why_finished(self, request: Request) -> FinishReason | None:
        params = request.params
        if request.error is not None:
            return "error"
        if request.tokens[-1] in params.end_token_ids and request.num_output > params.min_tokens:
            return "stop"
        assert params.max_tokens is not None
        is_full = request.num_output >= params.max_tokens or len(request.tokens) >= self.max_context
        return "length" if is_full else None

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
        own = [c for c in chunks if c.request.owner == self.rank]
        prompt = sum(max(0, min(c.end, c.request.num_prompt) - c.start) for c in own)
        self.stats.steps += 1
        self.stats.prefill_tokens += prompt
        self.stats.decode_tokens += sum(c.end - c.start for c in own) - prompt
        if any(c.start < c.request.num_prompt for c in chunks):
            self.stats.prefill_seconds += seconds
        else:
            self.stats.pure_decode_tokens += len(own)
            self.stats.decode_seconds += seconds

    def _make_replicas(self, tried: assemble.TriedToken) -> Replicas | None:
        """What holds the requests of all ranks, in a coherent run."""
        if self.parallel is None:
            return None
        is_coherent, reason = assemble.decide_coherent(
            self.parallel, self.model, self.blueprint, self.config, tried, self.max_context
        )
        self.notes += [reason] if reason is not None else []
        return Replicas(self.parallel) if is_coherent else None

    def _make_runner(self, tried: assemble.TriedToken) -> tuple[Scheduler, Runner, int]:
        """The third: bytes of the KV cache, which commits them as it fills."""
        batch = self.config.batch
        if not self.is_packed:
            unlimited = BlockPool(batch.max_sequences, self.max_context, sharing=False)
            return Scheduler(batch, unlimited, can_chunk=False), SequentialRunner(self.model), 0
        self.model.set_attn_implementation(ATTENTION_NAME)
        shared_by = None if self.replicas is None else self.parallel
        if shared_by is not None:
            batch = assemble.for_all_ranks(batch, shared_by.groups.world_size)
        pool = assemble.make_pool(batch, tried.kv_bytes, self.max_context, shared_by)
        kv = make_paged_kv(self.model, pool)
        if shared_by is not None:
            kv.prepare(tried.kv)
        if kv.device.type == "cpu" and self.config.kernel != "reference" and shared_by is None:
            runner = planned_runner(self.model, kv, tried.kv, self.max_context)
        else:
            runner = PackedRunner(self.model, kv)
        return Scheduler(batch, pool), runner, pool.num_blocks * pool.block_size * tried.kv_bytes


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far (ru_maxrss would begin with that of the process before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
