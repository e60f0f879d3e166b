"""The engine: requests in, one step after another, tokens out.

add_request ─▶ Scheduler ─▶ chunks ─▶ Runner ─▶ logits ─▶ Sampler ─▶ next token, or finished
                                         │ per layer
                                         └─ router ─▶ SlotExperts ─▶ ExpertCache ─▶ ExpertStore
"""

import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.comm.control import Control
from moe.comm.groups import Groups
from moe.comm.wire import Traffic
from moe.config import EngineConfig
from moe.engine.assemble import Loaded, load, read_model
from moe.engine.choices import AutoChoice
from moe.engine.coherent import CoherentRunner
from moe.engine.join import Decisions, Place, forget_host_copy, join, settle, share_of, shareable_shape, stay_alone
from moe.engine.layer_major import Workload
from moe.engine.lent_kv import LentKV
from moe.engine.limits import Limits
from moe.engine.modes import Coherent, Ranks
from moe.engine.online import OnlinePlacement
from moe.engine.recorder import TraceRecorder
from moe.engine.requests import Chunk, Request
from moe.engine.sampling import Choice
from moe.engine.scheduler import Scheduler
from moe.engine.share import Share
from moe.engine.stats import State, StepStats
from moe.engine.to_come import bytes_to_come
from moe.layer.experts import SlotExperts
from moe.layer.parallel import ExpertParallel
from moe.models.blueprint import Blueprint, read_blueprint
from moe.offload.layer_stats import LayerStats
from moe.offload.memory import peak_rss_bytes
from moe.offload.promised import Promise
from moe.outputs import FinishReason
from moe.params import SamplingParams
from moe.placement.plan import Plan


class Engine:
    """One model in this process. Not thread-safe; one thread adds requests and steps.

    With `groups` the experts are shared by their ranks, and every call of `start` and `step` is a collective. `share`:
    what this process will have of the experts, for one that loads before it meets its peers (`join`). `work`: all
    requests that will come, if they are known. `config`, once loaded, has what batch.schedule=layer_major chose.

    Raises ValueError for a folder, a budget or a setting that cannot be served; then no thread, file or memory is left.
    """

    def __init__(
        self,
        folder: str | Path,
        config: EngineConfig | None = None,
        groups: Groups | None = None,
        *,
        share: Share | None = None,
        work: Workload | None = None,
    ) -> None:
        config = config or EngineConfig()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.parallel.plan is not None and groups is None and share is None:
            raise ValueError(
                f"parallel.plan ({config.parallel.plan}) places experts on ranks, this process is alone; start ranks "
                "by `torchrun -m moe.launch.torchrun` or a Ray cluster, or leave it out"
            )
        blueprint = read_blueprint(folder, trust_remote_code=config.trust_remote_code)
        if groups is not None:
            share = share_of(blueprint, groups, config.parallel)
        read = read_model(blueprint, config, share)
        self.loaded: Loaded = load(read, share, work)
        self.config = self.loaded.read.config
        self.eos_ids = self.loaded.dense.eos_ids
        self.stats = StepStats()
        self.last_logits: dict[int, list[Tensor]] | None = None  # by request, when `keep_logits` was called
        self._started: dict[int, float] = {}
        self.next_id = 0
        self.place: Place
        self._promise = Promise()
        self._take_first_place(groups, share)

    def step(self) -> list[Request]:
        """Computes one batch. Returns the requests that got a token, finished ones included."""
        start = time.perf_counter()
        mode = self.place.mode
        chunks = mode.plan()
        logits = mode.forward(chunks)
        self._keep(chunks, logits)
        for chunk in chunks:
            mode.scheduler.computed(chunk)
        choices = mode.choose(chunks, logits)
        stepped = [self._accept(c.request, choice) for c, choice in zip((c for c in chunks if c.samples), choices)]
        self._count(chunks, start)
        return [request for request in stepped if request.owner == self.rank]

    def join(self, groups: Groups | None, plan: Plan | None = None, decisions: Decisions | None = None) -> None:
        """Takes this process to a generation of ranks, or out of all (None), between two steps. A collective.

        The model and its slots stay, and so do this rank's requests: where tokens go home again they go on with their
        KV, in a coherent run they are computed again. The former groups may be gone already. plan: of these ranks,
        None = contiguous; decisions: None = the ranks decide now. Raises ValueError for a plan that does not fit, and
        CommError when a peer is lost; then it is alone, and may join again.
        """
        open_requests, before = self.place.mode.open_requests(), self.place.mode.scheduler
        self.place.mode.close()
        self.place = stay_alone(self.loaded)
        try:
            if groups is not None:
                self.place = self._place_in(groups, plan, decisions)
        finally:
            self._go_on_with(open_requests, before)
            self._promise.renew(settle(self.loaded, self.place))

    def _place_in(self, groups: Groups, plan: Plan | None, decisions: Decisions | None) -> Place:
        shape = shareable_shape(self.blueprint)
        plan = plan or Plan.contiguous(*shape, groups.world_size)
        if (plan.num_layers, plan.num_experts, plan.num_ranks) != (*shape, groups.world_size):
            raise ValueError(
                f"the plan is of {plan.num_layers} layers of {plan.num_experts} experts on {plan.num_ranks} ranks, "
                f"this generation needs {shape[0]} of {shape[1]} on {groups.world_size}"
            )
        return join(self.loaded, groups, plan, decisions)

    def _go_on_with(self, open_requests: Seq[Request], before: Scheduler) -> None:
        mode = self.place.mode
        if mode.scheduler is before:
            for request in open_requests:
                request.owner = request.place = self.rank
            return
        before.hand_over()
        for request in open_requests:
            request.begin_again(self.rank, self.loaded.grammars)
            mode.add(request)

    def start(self) -> None:
        """Begins a run of steps after which `has_work` is false. With ranks: a collective, before the first step."""
        self.place.mode.start()

    @property
    def has_work(self) -> bool:
        """Whether this rank, or any, has something to compute or to hand over."""
        return self.place.mode.has_work

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def traffic(self) -> list[Traffic]:
        """What this rank has sent, by part of the engine."""
        return self.place.mode.traffic

    @property
    def blueprint(self) -> Blueprint:
        return self.loaded.read.blueprint

    @property
    def model(self) -> Any:
        return self.loaded.dense.model

    @property
    def is_packed(self) -> bool:
        return self.loaded.dense.is_packed

    @property
    def max_context(self) -> int:
        return self.loaded.dense.max_context

    @property
    def experts(self) -> SlotExperts | None:
        return self.loaded.experts.slots

    @property
    def scheduler(self) -> Scheduler:
        return self.place.mode.scheduler

    @property
    def parallel(self) -> ExpertParallel | None:
        return self.place.parallel

    @property
    def control(self) -> Control | None:
        """The lock step with other ranks."""
        return self.place.mode.control

    @property
    def coherent(self) -> CoherentRunner | None:
        """What moves tokens, in a coherent run."""
        mode = self.place.mode
        return mode.runner if isinstance(mode, Coherent) else None

    @property
    def online(self) -> OnlinePlacement | None:
        """What changes the plan while the ranks run."""
        mode = self.place.mode
        return mode.online if isinstance(mode, Ranks) else None

    @property
    def choices(self) -> tuple[AutoChoice, ...]:
        """What was chosen where no setting said it."""
        return self.loaded.choices

    @property
    def notes(self) -> list[str]:
        """What a user should know about how this model is served."""
        return [*self.loaded.notes, *self.place.notes]

    @property
    def limits(self) -> Limits:
        pool = self.scheduler.pool
        return Limits(
            self.loaded.dense.vocabulary,
            self.max_context,
            pool.block_size,
            pool.room,
            frozenset(self.eos_ids),
            self.blueprint.config.is_encoder_decoder,
        )

    def check_request(self, tokens: Seq[int], params: SamplingParams) -> None:
        """Raises ValueError for a prompt of token ids that cannot ever run."""
        self.limits.check(tokens, params)

    def add_request(self, tokens: Seq[int], params: SamplingParams, num_prompt: int | None = None) -> Request:
        """Queues a prompt of token ids; without a seed it draws its own. Raises ValueError if it cannot ever run.

        num_prompt: how many of the tokens are the prompt, None = all; the others are the beginning of the answer, said
        elsewhere, which goes on as it would have there.
        """
        self.limits.check(tokens, params, num_prompt)
        num_prompt = num_prompt or len(tokens)
        request = Request(self.next_id, list(tokens), self.limits.resolved(params, num_prompt), num_prompt)
        request.begin_again(self.rank, self.loaded.grammars)
        self.next_id += 1
        self._started[request.id] = time.perf_counter()
        self.place.mode.add(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, waiting or running: "stop" if its text is complete, "abort" if it is wanted no more.

        Of a finished one nothing changes, but that "stop" explains more than "length".
        """
        if request.finish_reason == "length" and reason == "stop":
            request.finish_reason = reason
        if request.finish_reason is None:
            self._started.pop(request.id, None)
            self.place.mode.finish(request, reason)

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
        num_experts = max(site.num_experts for site in self.blueprint.index.sites)
        name = self.blueprint.folder.name
        recorder = TraceRecorder(len(self.blueprint.index.sites), num_experts, name, self.loaded.sizes)
        self.experts.routing.observers.append(recorder.forwards)
        return recorder

    def keep_logits(self) -> dict[int, list[Tensor]]:
        """From now on the logits of every sampled token are kept, fp32 [V] each, by request."""
        if self.coherent is not None:
            raise ValueError("in a coherent run logits stay on other ranks; set parallel.dispatcher=all_to_all")
        self.last_logits = {}
        return self.last_logits

    def state(self) -> State:
        cache = self.experts.cache if self.experts is not None else None
        pool = self.scheduler.pool
        return State(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks=pool.room,
            free_blocks=pool.num_to_have,
            slots=cache.num_slots if cache else 0,
            experts=self.blueprint.num_experts,
            slot_bytes=cache.slot_bytes if cache else 0,
            dense_bytes=self.loaded.dense.nbytes,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        """The records that count, and what tells them apart, for `moe/metrics.py`."""
        layers = [(stats, {"layer": str(layer)}) for layer, stats in enumerate(self.layer_stats())]
        traffic = [(one, {"part": str(part), "carries": one.carries}) for part, one in enumerate(self.traffic)]
        moved = [] if self.online is None else [(self.online.stats, dict[str, str]())]
        split = [] if self.loaded.split is None else [(self.loaded.split.stats, dict[str, str]())]
        bits = [] if (upgrades := self.loaded.experts.upgrades) is None else upgrades.metric_sources
        return [(self.stats, {}), (self.state(), {}), *moved, *split, *bits, *layers, *traffic]

    def layer_stats(self) -> list[LayerStats]:
        return [] if self.experts is None else self.experts.cache.stats

    def make_room(self, blocks: int) -> None:
        """So many blocks of KV that nobody uses, or as many as there may be: from slots, where they have its memory."""
        if isinstance(self.loaded.split, LentKV):
            self.loaded.split.make_room(blocks)

    def give_bits(self) -> None:
        """As before a step, for who computes without one: bits that are due to experts are there (`Upgrades.step`)."""
        if (upgrades := self.loaded.experts.upgrades) is not None:
            upgrades.step()

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
        self.place.mode.close()
        self.loaded.close()
        self._promise.close()

    def _take_first_place(self, groups: Groups | None, share: Share | None) -> None:
        with ExitStack() as undo:
            undo.callback(self._promise.close)
            undo.callback(self.loaded.close)
            self.place = stay_alone(self.loaded)
            if groups is not None and share is not None:
                forget_host_copy(self.loaded, groups)
                self.join(groups, share.plan)
            self._promise.renew(bytes_to_come(self.loaded, self.scheduler.pool))
            undo.pop_all()

    def _keep(self, chunks: Seq[Chunk], logits: Tensor) -> None:
        """Before anything of the step is accepted."""
        if self.last_logits is not None:
            for chunk, row in zip(chunks, logits):
                if chunk.samples:
                    self.last_logits.setdefault(chunk.request.id, []).append(row.to("cpu", copy=True))

    def _accept(self, request: Request, choice: Choice) -> Request:
        is_own = request.owner == self.rank
        if choice.error is None:
            if choice.logprobs is not None:
                request.logprobs.append(choice.logprobs)
            request.tokens.append(choice.token)
            started = self._started.pop(request.id, None) if is_own else None
            if started is not None:
                self.stats.time_to_first_token.add(time.perf_counter() - started)
        request.error = choice.error
        self.stats.failed_requests += choice.error is not None and request.owner == self.rank
        if (reason := self._why_finished(request)) is not None:
            self.scheduler.finish(request, reason)
            self.place.mode.ended(request)
            if is_own:
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
        if request.sampler.is_complete(request.tokens):
            return "stop"
        assert params.max_tokens is not None
        is_full = request.num_output >= params.max_tokens or len(request.tokens) >= self.max_context
        return "length" if is_full else None

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
            self.stats.pure_decode_steps += 1
            self.stats.decode_seconds += seconds
