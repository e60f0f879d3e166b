"""Many hosts as one engine: the controller has the requests, the hosts the experts, and any host may be lost.

`ClusterEngine` has the face of `Engine` (add_request, step, finish), so that `LLM`, batch files and a service use it
alike. It owns the store, the number of the generation, the plan, and every request with its tokens so far; hosts are
told what to serve and say what they have sampled. Losing a host, adding one and taking one away are one path:

    SERVING ─ a host is lost, has come, or is wanted no more ─▶ SETTLING: leave or be freed ─▶ next generation
"""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from torch._C._distributed_c10d import TCPStore

from moe.cluster.fleet import Fleet, Host, Placing
from moe.cluster.ledger import Ledger
from moe.cluster.lines import Lines
from moe.cluster.messages import Ended, Said, Serve, Where
from moe.cluster.plans import Hosted, first_plan, plan_for
from moe.cluster.policy import ClusterError, FailurePolicy, State, first_sentence
from moe.cluster.stats import ClusterStats, Noted
from moe.config import EngineConfig
from moe.engine.limits import Limits
from moe.engine.requests import Request
from moe.engine.stats import StepStats
from moe.models.blueprint import Blueprint, read_blueprint
from moe.offload.cache import LayerStats
from moe.outputs import FinishReason
from moe.params import SamplingParams
from moe.placement.plan import Plan

log = logging.getLogger(__name__)

_POLL_S = 0.5  # a long poll's length
_TICK_S = 0.05  # between two looks at the lines


class ClusterEngine:
    """The model in `folder` on `num_hosts` actors of a Ray cluster. One thread at a time.

    address: of the cluster, None = the one that this process is in, or a new local one. room_s: until Ray must have
    placed all hosts. Raises ValueError for what cannot be served or placed; `step` raises ClusterError when no host is
    left and none may be started.
    """

    control = None  # ranks are not this process's,
    experts = None  # nor are slots

    def __init__(
        self,
        folder: str | Path,
        config: EngineConfig,
        num_hosts: int,
        *,
        address: str | None = None,
        placing: Placing | None = None,
        policy: FailurePolicy | None = None,
        meet_s: float = 10.0,
        room_s: float = 60.0,
    ) -> None:
        if num_hosts < 1:
            raise ValueError(f"hosts ({num_hosts}) must be >= 1")
        # What callers keep in flight: as much as all hosts together take.
        self.config = replace(config, batch=config.batch.for_ranks(num_hosts))
        self._host_config, self.policy, self.target = config, policy or FailurePolicy(), num_hosts
        self.blueprint: Blueprint = read_blueprint(folder)
        self.state, self.generation = State.STARTING, 0
        self.plan: Plan | None = None
        self.stats, self.counts, self.next_id = StepStats(), ClusterStats(), 0
        self.noted: list[Noted] = []
        self._starts_ray = not ray.is_initialized()
        if self._starts_ray:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._store = TCPStore(here, 0, is_master=True, wait_for_workers=False)
        word = secrets.token_hex(16)
        self._lines = Lines(here, word)
        where = Where(here, self._store.port, self._lines.port, word, secrets.token_hex(6))
        path = str(Path(folder).resolve())
        self._fleet = Fleet(path, config, where, self._lines, placing or Placing(), meet_s)
        self._alive: list[Host] = []  # by rank
        self._spare: list[Host] = []  # loaded
        self._loading: dict[Any, Host] = {}
        self._serving: dict[Any, Host] = {}
        self._collecting: dict[Any, Host] = {}
        self._held: dict[int, Hosted] = {}  # by host: what the last plan gave it
        self._ledger = Ledger()
        self._limits: Limits | None = None
        try:
            self._start(num_hosts + self.policy.spares)
            self._fleet.check_room(room_s)
            self._wait_for_first()
        except BaseException:
            self.close()
            raise

    # The face of an engine.

    @property
    def limits(self) -> Limits:
        assert self._limits is not None, "set by the first hosts"
        return self._limits

    @property
    def notes(self) -> list[str]:
        infos = [host.info for host in self._alive if host.info is not None]
        nodes = len({info.node for info in infos})
        return [*(infos[0].notes if infos else ()), f"{len(infos)} hosts on {nodes} nodes serve the experts"]

    @property
    def max_context(self) -> int:
        return self.limits.max_context

    @property
    def has_work(self) -> bool:
        return len(self._ledger) > 0

    def start(self) -> None:
        """Nothing is agreed: hosts step by themselves."""

    def check_request(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for a prompt of token ids that cannot ever run."""
        self.limits.check(tokens, params)

    def add_request(self, tokens: Sequence[int], params: SamplingParams) -> Request:
        """Queues a prompt of token ids. Raises ValueError if it cannot ever run."""
        self.limits.check(tokens, params)
        request = Request(self.next_id, list(tokens), self.limits.resolved(params, len(tokens)), len(tokens))
        self.next_id += 1
        self._ledger.add(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """As `Engine.finish`: nothing more is said of the request."""
        if request.finish_reason == "length" and reason == "stop":
            request.finish_reason = reason
        if request.finish_reason is None:
            number = self._ledger.finish(request, reason)
            for host in self._alive:
                if host.number == number:
                    host.actor.cancel.remote([request.id])

    def step(self) -> list[Request]:
        """Waits shortly for what hosts say. Returns the requests that moved: each has one token more, or ended."""
        if self.state is State.CLOSED:
            raise ClusterError("the cluster is closed; load the model again")
        started = time.perf_counter()
        self._deal()
        self._pump(0.0 if self._ledger.has_news else _TICK_S)
        stepped = self._ledger.hand_out()
        self.stats.steps += 1
        self.stats.decode_tokens += len(stepped)
        self.stats.decode_seconds += time.perf_counter() - started
        return stepped

    def scale(self, num_hosts: int) -> None:
        """From some step on `num_hosts` serve: more are started, or the last ones leave in order."""
        if num_hosts < 1:
            raise ValueError(f"hosts ({num_hosts}) must be >= 1")
        self.target = num_hosts
        self._start(max(0, num_hosts + self.policy.spares - len(self._alive) - len(self._spare) - len(self._loading)))
        if num_hosts < len(self._alive):
            self._change(self._alive[:num_hosts])

    def why_not_whole(self) -> str | None:
        return None  # requests are counted here alone: nothing can be left half done

    def layer_stats(self) -> list[LayerStats]:
        """Of the slots of this process: none."""
        return []

    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        """The records that count, for `moe/metrics.py`."""
        self.counts.hosts, self.counts.generations = len(self._alive), self.generation
        self.counts.queued_requests, self.counts.open_requests = self._ledger.num_queued, len(self._ledger)
        return [(self.stats, {}), (self.counts, {})]

    def keep_logits(self) -> None:
        raise ValueError("logits stay on the hosts; load the model without hosts")

    def record(self) -> None:
        raise ValueError("routing stays on the hosts; record without hosts")

    def close(self) -> None:
        """Ends the hosts, and Ray where it was started here. No effect the second time."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._fleet.close([*self._alive, *self._spare, *self._loading.values()])
        self._lines.close()
        if self._starts_ray:
            ray.shutdown()

    def _deal(self) -> None:
        if self.state is State.SERVING:
            dealt = self._ledger.deal([host.number for host in self._alive], 4 * self._host_config.batch.num_running)
            for host in self._alive:
                if host.number in dealt:
                    host.actor.submit.remote(dealt[host.number])

    def _hear(self, host: Host, first: int, said: Sequence[Said]) -> None:
        """What a host said from number `first` on, some of it maybe known."""
        self._ledger.hear(host.number, said[max(0, host.seen - first) :])
        host.seen = max(host.seen, first + len(said))

    # Hosts.

    def _start(self, count: int) -> None:
        hosts = self._fleet.start(count, self.target) if count else []
        self._loading |= {self._fleet.ask_ready(host): host for host in hosts}

    def _replace(self, num_alive: int) -> None:
        waiting = len(self._loading) + len(self._spare)
        self._start(self.policy.hosts_to_start(self.target, num_alive, waiting))

    def _wait_for_first(self) -> None:
        """Until all hosts of the start have loaded. Raises what made one of them fail."""
        for reference, host in list(self._loading.items()):
            try:
                host.info = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, (ValueError, OSError)) else ClusterError(str(error))) from None
            except ray.exceptions.RayActorError as error:
                raise ClusterError(f"host {host.number} ended while it loaded: {first_sentence(error)}") from None
            del self._loading[reference]
            self._spare.append(host)
        serving, self._spare = self._spare[: self.target], self._spare[self.target :]
        self._form(serving, {})

    def _form(self, hosts: list[Host], seconds: dict[str, float]) -> None:
        """The next generation, of these hosts in this order."""
        self.generation += 1
        infos = [host.info for host in hosts if host.info is not None]
        held, shape = [self._held.get(host.number) for host in hosts], infos[0].shape
        plan = plan_for(held, shape) if self._held else first_plan(self.config.parallel.plan, shape, len(hosts))
        self.plan = plan
        self._held = {host.number: plan.hosted[:, :, rank] for rank, host in enumerate(hosts)}
        self._limits = min((info.limits for info in infos), key=lambda limits: limits.num_blocks)
        nodes = tuple(info.node for info in infos)
        self._alive = hosts
        for rank, host in enumerate(hosts):
            order = Serve(self.generation, nodes, rank, plan)
            self._serving[host.actor.serve.remote(order)] = host
            if host not in self._collecting.values():
                self._collecting[host.actor.collect.remote(host.seen, _POLL_S)] = host
        self.state = State.SERVING
        self._note("serves", hosts, seconds)

    def _pump(self, wait_s: float) -> None:
        """One look at everything that hosts have to say, and at what became of them."""
        references = [*self._serving, *self._collecting, *self._loading]
        if self.state is State.WAITING and not self._loading:
            raise ClusterError(f"all {self.counts.lost_hosts} hosts are lost, none is started; finished work is kept")
        done, _ = ray.wait(references, num_returns=1, timeout=wait_s)
        for reference in done:
            if reference in self._collecting:
                self._collected(reference)
            elif reference in self._loading:
                self._loaded(reference)
        if self._drop_dead_spares():
            self._replace(len(self._alive))
        lost = [host for host in self._alive if self._is_lost(host)]
        ended = [self._serving[r] for r in done if r in self._serving]
        if lost or ended:
            self._change([host for host in self._alive if host not in lost])
        elif self._spare and len(self._alive) < self.target and self.state is not State.CLOSED:
            self._change(self._alive)

    def _collected(self, reference: Any) -> None:
        host = self._collecting.pop(reference)
        try:
            self._hear(host, *ray.get(reference))
        except ray.exceptions.RayError:
            return  # its line says so too, or its `serve`
        if host in self._alive:
            self._collecting[host.actor.collect.remote(host.seen, _POLL_S)] = host

    def _loaded(self, reference: Any) -> None:
        host = self._loading.pop(reference)
        try:
            host.info = ray.get(reference)
            self._spare.append(host)
        except ray.exceptions.RayError as error:
            self._note(f"a host did not load: {first_sentence(error)}", [host], {})
            self._lose([host])
            self._replace(len(self._alive))

    def _is_lost(self, host: Host) -> bool:
        """By its line: closed, or silent for longer than the policy allows; then it is killed."""
        line = self._lines.get(host.number)
        if line is None or line.is_closed:
            return line is not None
        at = time.monotonic()
        is_busy = self._ledger.load(host.number) > 0
        if self.policy.is_hung(at - line.heard, at - line.moved, is_busy, line.paces):
            self._note(f"silent for {at - line.heard:.1f} s: killed", [host], {})
            self._fleet.kill(host)
            return True
        return False

    def _change(self, wanted: Sequence[Host]) -> None:
        """Ends this generation and starts the next with those of `wanted` that are left, and with spares."""
        self.state, started = State.SETTLING, time.monotonic()
        leaving = [host for host in self._alive if host not in wanted and not self._is_closed(host)]
        before, survivors = self._alive, self._settle()
        for host in survivors:
            self._last_words(host)
        lost = [host for host in before if host not in survivors]
        survivors = [host for host in survivors if host not in leaving]
        self._alive = []
        self._collecting = {r: h for r, h in self._collecting.items() if h in survivors}
        self._lose(lost)
        for host in leaving:
            self._fleet.kill(host)
        self.counts.replayed_requests += self._ledger.take_back(host.number for host in survivors)
        places = self.target - len(survivors)
        self._drop_dead_spares()
        joining, self._spare = self._spare[: max(0, places)], self._spare[max(0, places) :]
        self._replace(len(survivors) + len(joining))
        if survivors or joining:
            seconds = time.monotonic() - started
            self.counts.settle_time.add(seconds)
            self._form([*survivors, *joining], {"settle": seconds})
        else:
            self.state = State.WAITING
            self._note("waits for hosts", [], {})

    def _settle(self) -> list[Host]:
        """Every host leaves the generation by itself, is freed from a wait, or is killed. Returns who is left."""
        left: list[Host] = []
        # Where one is lost, the others need not be waited for: they leave at once, or wait for a peer that lives.
        patience = _TICK_S * 4 if any(map(self._is_closed, self._alive)) else self.policy.leave_s
        limit, measures = time.monotonic() + patience, ["leave", "interrupt", "kill"]
        next_measure = 0
        while self._serving:
            if next_measure == 0 or time.monotonic() > limit:
                self._take_measure(measures[min(next_measure, 2)])
                limit = time.monotonic() + (patience if next_measure == 0 else self.policy.leave_s)
                next_measure += 1
            done, _ = ray.wait(list(self._serving), num_returns=1, timeout=0.01)
            for reference in done:
                host = self._serving.pop(reference)
                try:
                    ended: Ended = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._note(f"ended: {first_sentence(error)}", [host], {})
                    continue
                left.append(host)
                self._note(f"left: {ended.lost or 'in order'}", [host], ended.seconds)
            for reference, host in list(self._serving.items()):
                if self._is_closed(host):
                    del self._serving[reference]
        return [host for host in self._alive if host in left]

    def _take_measure(self, measure: str) -> None:
        for host in self._serving.values():
            if measure == "leave":
                host.actor.leave.remote(self.generation)
            elif measure == "interrupt":
                host.actor.interrupt.remote(self.generation)
            else:
                self._note("does not leave: killed", [host], {})
                self._fleet.kill(host)

    def _last_words(self, host: Host) -> None:
        try:
            self._hear(host, *ray.get(host.actor.collect.remote(host.seen, 0.0), timeout=self.policy.leave_s))
        except ray.exceptions.RayError as error:
            self._note(f"its last words are lost: {first_sentence(error)}", [host], {})

    def _lose(self, hosts: Sequence[Host]) -> None:
        self.counts.lost_hosts += len(hosts)
        for host in hosts:
            self._fleet.kill(host)
            self._note("lost", [host], {})
        if (count := self.counts.lost_hosts) > self.policy.max_losses:
            raise ClusterError(f"{count} hosts were lost, more than {self.policy.max_losses}; see the notes")

    def _drop_dead_spares(self) -> bool:
        """A spare that has ended would be missed only when it is needed. Returns whether there was one."""
        dead = [host for host in self._spare if self._is_closed(host)]
        self._spare = [host for host in self._spare if host not in dead]
        self._lose(dead)
        return bool(dead)

    def _is_closed(self, host: Host) -> bool:
        return (line := self._lines.get(host.number)) is not None and line.is_closed

    def _note(self, what: str, hosts: Sequence[Host], seconds: dict[str, float]) -> None:
        noted = Noted(time.time(), what, tuple(host.number for host in hosts), self.generation, seconds)
        self.noted.append(noted)
        log.info("generation %d, hosts %s: %s", noted.generation, list(noted.hosts), what)
