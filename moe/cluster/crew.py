"""The hosts of a cluster: which serve, which wait, which load, and one generation after another of those that serve.

SERVING ─ a host is lost, has come, or is wanted no more ─▶ SETTLING: leave or be freed ─▶ next generation
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from torch._C._distributed_c10d import TCPStore

from moe.cluster.fleet import Fleet, Host, HostEnded
from moe.cluster.ledger import Ledger, most_dealt
from moe.cluster.messages import Ended, Placed, Serve
from moe.cluster.plans import Placements
from moe.cluster.policy import ClusterError, FailurePolicy, Refused, State
from moe.cluster.stats import ClusterStats, Noted
from moe.config import EngineConfig
from moe.engine.limits import Limits
from moe.placement.plan import Plan

log = logging.getLogger(__name__)

_LOOK_S = 0.25  # between two questions to Ray and two looks at beats; a line that closes is seen at once
_FREED_S = 0.2  # for the others to leave by themselves where one host is lost


class Crew:
    """The hosts of `fleet`, and what they are told; `ledger` has what they are to answer. One thread.

    begin: a plan over the config's. Raises ValueError for what cannot be served or placed, and ClusterError for a host
    that does not load.
    """

    def __init__(
        self, fleet: Fleet, config: EngineConfig, num_hosts: int, ledger: Ledger, begin: Plan | None = None
    ) -> None:
        self.config, self.ledger, self.target = config, ledger, num_hosts
        self.policy, self.state, self.generation = FailurePolicy(config.cluster), State.STARTING, 0
        self.placements = Placements(config.parallel.plan, begin)
        self.counts, self.noted, self._next_look = ClusterStats(), list[Noted](), 0.0
        self._store: TCPStore | None = None  # of the generation that serves
        self.fleet, self.lines = fleet, fleet.lines
        self.alive: list[Host] = []  # by rank
        self.spare: list[Host] = []  # loaded
        self.loading: dict[Any, Host] = {}
        self._serving: dict[Any, Host] = {}
        self._placing: dict[Any, Host] = {}  # asked for their `Placed`
        self._limits: Limits | None = None
        self._refusal = ""  # why no host would load: none is started by itself
        try:
            self._start(num_hosts + config.cluster.spares)
            self.fleet.check_room(list(self.loading.values()))
            self._wait_for_first()
        except BaseException:
            self.close()
            raise

    @property
    def limits(self) -> Limits:
        assert self._limits is not None, "set by the first hosts"
        return self._limits

    @property
    def plan(self) -> Plan | None:
        """Of the generation that serves, or served last, as it is now."""
        return self.placements.plan

    def scale(self, num_hosts: int) -> None:
        """From some step on `num_hosts` serve: more are started, or the last ones leave in order."""
        if num_hosts < 1:
            raise ValueError(f"hosts ({num_hosts}) must be >= 1")
        self.placements.check(num_hosts)
        self.target, self._refusal = num_hosts, ""
        there = len(self.alive) + len(self.spare) + len(self.loading)
        self._start(max(0, num_hosts + self.config.cluster.spares - there), is_growth=True)
        if num_hosts < len(self.alive):
            self._change(self.alive[:num_hosts])

    def close(self) -> None:
        """Ends the hosts. No effect the second time."""
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self.fleet.close([*self.alive, *self.spare, *self.loading.values()])
            self.lines.close()

    def pump(self, wait_s: float) -> None:
        """One look at everything that hosts have to say, and at what became of them.

        Raises ClusterError when too few hosts are left and none may be started.
        """
        if self.state is State.WAITING and not self.loading:
            raise ClusterError(self._why_over())
        self.lines.wait(wait_s)
        self._hear()
        if time.monotonic() < self._next_look and not any(map(self._is_closed, (*self.alive, *self.spare))):
            return
        self._next_look = time.monotonic() + _LOOK_S
        self._ask_for_placed()
        done = self.fleet.done([*self._serving, *self._placing, *self.loading])
        for reference in done:
            if reference in self._placing:
                self._has_placed(reference)
            elif reference in self.loading:
                self._loaded(reference)
        self._drop_homeless()
        self._drop_stuck()
        if self._drop_dead_spares():
            self._take_back(self.alive)
            self._replace(len(self.alive))
        lost = [host for host in self.alive if self._is_lost(host)]
        ended = [self._serving[r] for r in done if r in self._serving]
        if lost or ended:
            self._change([host for host in self.alive if host not in lost])
        elif self.spare and len(self.alive) < self.target and self._fits([*self.alive, *self.spare][: self.target]):
            self._change(self.alive)

    def deal(self) -> None:
        """Requests from the queue to hosts that have room."""
        if self.state is State.SERVING:
            dealt = self.ledger.deal([host.number for host in self.alive], most_dealt(self.config.batch))
            for host in self.alive:
                if host.number in dealt:
                    host.actor.submit.remote(dealt[host.number])

    def cancel(self, number: int, request: int) -> None:
        """Tells host `number` that nobody waits for the request any more."""
        for host in (*self.alive, *self.spare):
            if host.number == number:
                host.actor.cancel.remote([request])

    def counted(self) -> ClusterStats:
        """The counts, with the gauges as they are now."""
        counts = self.counts
        counts.hosts, counts.generations = len(self.alive), self.generation
        counts.queued_requests, counts.open_requests = self.ledger.num_queued, len(self.ledger)
        counts.placement = self.placements.stats
        return counts

    def _hear(self) -> None:
        """What hosts have said; the words of one that was given up are of no request any more."""
        for number, said in self.lines.take_words():
            self.ledger.hear(number, said)

    def _ask_for_placed(self) -> None:
        for host in self.alive:
            line = self.lines.get(host.number)
            if line is not None and line.placed > host.placed and host not in self._placing.values():
                self._placing[host.actor.placed.remote()] = host

    def _has_placed(self, reference: Any) -> None:
        host = self._placing.pop(reference)
        try:
            self._take_placed(host, self.fleet.answer(reference))
        except HostEnded:
            return  # its line says so too, or its `serve`

    def _take_placed(self, host: Host, placed: Placed | None) -> None:
        if placed is not None and placed.number > host.placed:
            host.placed = placed.number
            if placed.generation == self.generation:
                for note in self.placements.moved(placed):
                    self._note(f"placement: {note}", [host], {})

    def _start(self, count: int, *, is_growth: bool = False) -> None:
        hosts = self.fleet.start(count, self.target, is_growth=is_growth) if count else []
        self.loading |= {host.ready: host for host in hosts}

    def _replace(self, num_alive: int) -> None:
        if self._refusal:
            return
        waiting = len(self.loading) + len(self.spare)
        self._start(self.policy.hosts_to_start(self.target, num_alive, waiting))

    def _drop_homeless(self) -> None:
        """Growth that Ray has no room for is given up; a replacement waits for room while others serve.

        Raises ClusterError if nobody serves.
        """
        homeless, why = self.fleet.homeless(self.loading.values())
        if not homeless:
            return
        self._note(why, homeless, {})
        if self.state is State.WAITING and len(homeless) == len(self.loading):
            raise ClusterError(f"{why}; no host is left that serves, and finished work is kept")
        grown = [host for host in homeless if host.is_growth]
        self.loading = {reference: host for reference, host in self.loading.items() if host not in grown}
        for host in grown:
            self.fleet.kill(host)
        self.target = max(1, len(self.alive), self.target - len(grown))

    def _wait_for_first(self) -> None:
        """Until all hosts of the start have loaded. Raises what made one of them fail."""
        while self.loading:
            for reference in self.fleet.done(list(self.loading), _LOOK_S):
                host = self.loading[reference]  # closed with the others if it did not load
                try:
                    host.info = self.fleet.answer(reference)
                except HostEnded as error:
                    raise error.cause or ClusterError(f"host {host.number} did not load: {error}") from None
                del self.loading[reference]
                self.spare.append(host)
            for host in self.loading.values():
                if why := self._why_not_loading(host):
                    raise ClusterError(f"host {host.number} did not load: {why}")
            self.lines.wait(0.0)
        self.spare.sort(key=lambda host: host.number)
        serving, self.spare = self.spare[: self.target], self.spare[self.target :]
        if not self._fits(serving):
            have = sum(host.info.state.slots for host in serving if host.info is not None)
            raise ValueError(
                f"{len(serving)} hosts have slots for {have} experts, which is less than cluster.least_in_memory "
                f"({self.config.cluster.least_in_memory:g}) of all: give more hosts"
            )
        nodes = [host.info.node for host in serving if host.info is not None]
        self._form(sorted(serving, key=lambda h: nodes.index(h.info.node) if h.info else 0), {})  # node by node

    def _form(self, hosts: list[Host], seconds: dict[str, float]) -> None:
        """The next generation, of these hosts in this order."""
        self.generation += 1
        infos = [host.info for host in hosts if host.info is not None]
        nodes = tuple(info.node for info in infos)
        plan = self.placements.form([host.number for host in hosts], infos[0].shape, nodes)
        self._limits = min((info.limits for info in infos), key=lambda limits: limits.num_blocks)
        self.alive = hosts
        self._store = TCPStore(self.fleet.where.address, 0, is_master=True, wait_for_workers=False)
        for rank, host in enumerate(hosts):
            order = Serve(self.generation, self._store.port, nodes, rank, plan)
            self._serving[host.actor.serve.remote(order)] = host
            self.lines.begins(host.number)
        self.state = State.SERVING
        self._note("serves", hosts, seconds)

    def _loaded(self, reference: Any) -> None:
        host = self.loading.pop(reference)
        try:
            host.info = self.fleet.answer(reference)
            self.spare.append(host)
        except HostEnded as error:
            if isinstance(error.cause, Refused):
                self._refusal = str(error)
            self._does_not_load(host, str(error))

    def _drop_stuck(self) -> None:
        """Hosts that load and give no sign of life any more, or take too long: stopped, or a file system that hangs."""
        for reference, host in list(self.loading.items()):
            if why := self._why_not_loading(host):
                del self.loading[reference]
                self._does_not_load(host, f"{why}: killed")

    def _why_not_loading(self, host: Host) -> str | None:
        line = self.lines.get(host.number)
        silent = None if line is None else self.lines.since(line)[0]
        return self.policy.why_not_loading(silent, self.lines.now() - host.asked)

    def _does_not_load(self, host: Host, why: str) -> None:
        """Another is loaded in its place; where none may be, nobody waits for it any more."""
        self._note(f"a host did not load: {why}", [host], {})
        self._lose([host])
        self._replace(len(self.alive))
        if host.is_growth and (self._refusal or not self.config.cluster.replaces):
            self.target = max(1, len(self.alive), self.target - 1)

    def _is_lost(self, host: Host) -> bool:
        """By its line: closed, or silent for longer than the policy allows; then it is killed."""
        line = self.lines.get(host.number)
        if line is None or line.is_closed:
            return line is not None
        silent, stuck = self.lines.since(line)
        is_busy = host in self.alive and self.ledger.load(host.number) > 0
        if self.policy.is_hung(silent, stuck, is_busy, line.paces):
            self._note(f"silent for {silent:.1f} s, no step for {stuck:.1f} s: killed", [host], {})
            self.fleet.kill(host)
            return True
        return False

    def _change(self, wanted: Sequence[Host]) -> None:
        """Ends this generation and starts the next with those of `wanted` that are left, and with spares."""
        self.state, started = State.SETTLING, time.monotonic()
        leaving = [host for host in self.alive if host not in wanted and not self._is_closed(host)]
        before, survivors = self.alive, self._settle()
        self._hear()
        lost = [host for host in before if host not in survivors]
        survivors = [host for host in survivors if host not in leaving]
        self.alive = []
        self._lose(lost)
        for host in leaving:
            self.fleet.kill(host)
        places = self.target - len(survivors)
        self._drop_dead_spares()
        self._take_back(survivors)
        joining, self.spare = self.spare[: max(0, places)], self.spare[max(0, places) :]
        self._replace(len(survivors) + len(joining))
        if self._fits([*survivors, *joining]):
            seconds = time.monotonic() - started
            self.counts.settle_time.add(seconds)
            self._form([*survivors, *joining], {"settle": seconds})
        else:  # whoever is left keeps its requests and their KV until others have come
            self.spare = [*survivors, *joining, *self.spare]
            self.state = State.WAITING
            self._note("waits for hosts", self.spare, {})

    def _fits(self, hosts: Sequence[Host]) -> bool:
        """Whether they have slots for as much of the experts as is asked for."""
        infos = [host.info for host in hosts if host.info is not None]
        least = self.config.cluster.least_in_memory
        return bool(infos) and sum(info.state.slots for info in infos) >= least * infos[0].shape[0] * infos[0].shape[1]

    def _why_over(self) -> str:
        infos = [host.info for host in self.spare if host.info is not None]
        if self._refusal:
            return f"{self._refusal}; too few hosts are left to serve, and finished work is kept"
        if not infos:
            return f"all {self.counts.lost_hosts} hosts are lost, none is started; finished work is kept"
        slots, all_experts = sum(info.state.slots for info in infos), infos[0].shape[0] * infos[0].shape[1]
        return (
            f"{len(infos)} of {self.target} hosts are left, with slots for {slots} of {all_experts} experts, and none "
            f"is started; finished work is kept: start with more hosts, or lower cluster.least_in_memory "
            f"({self.config.cluster.least_in_memory:g})"
        )

    def _settle(self) -> list[Host]:
        """Every host leaves the generation by itself, is freed from a wait, or is killed. Returns who is left."""
        left: list[Host] = []
        # Where one is lost, the others need not be waited for: they leave at once, or wait for a peer that lives.
        patience = _FREED_S if any(map(self._is_closed, self.alive)) else self.config.cluster.leave_s
        for host in self._serving.values():
            host.actor.leave.remote(self.generation)
        until, freed = self.lines.now() + patience, None
        while self._serving:
            if freed is None and self.lines.now() > until:
                self._free()
                freed = self.lines.now()
            for reference in self.fleet.done(list(self._serving), 0.01):
                host = self._serving.pop(reference)
                try:
                    ended: Ended = self.fleet.answer(reference)
                except HostEnded as error:
                    self._note(f"ended: {error}", [host], {})
                    continue
                left.append(host)
                self._last_words(host, ended)
                self.placements.left(host.number, self.alive.index(host), ended.plan)
                self._note(f"left: {ended.lost or 'in order'}", [host], ended.seconds)
            self.lines.wait(0.0)
            for reference, host in list(self._serving.items()):
                if self._is_lost(host) or (freed is not None and self._does_not_leave(host, self.lines.now() - freed)):
                    del self._serving[reference]
        return [host for host in self.alive if host in left]

    def _free(self) -> None:
        """Whoever serves still: from a peer that will not answer, or from waiting for one that will not come."""
        for host in self._serving.values():
            host.actor.interrupt.remote(self.generation)
        self._store = None  # its end is seen at once by all who meet there

    def _does_not_leave(self, host: Host, since_freed_s: float) -> bool:
        """By its beats it lives, and nothing holds it but its own step; given up after the policy's limit."""
        line = self.lines.get(host.number)
        if line is None or not self.policy.does_not_leave(since_freed_s, line.paces):
            return False
        self._note(f"does not leave after {since_freed_s:.1f} s: killed", [host], {})
        self.fleet.kill(host)
        return True

    def _last_words(self, host: Host, ended: Ended) -> None:
        """They are on the line before the generation ends for it; what were late would be said again."""
        if not self.lines.wait_for_words(host.number, ended.said, self.config.cluster.leave_s):
            self._note("its last words are late", [host], {})
        self._take_placed(host, ended.placed)

    def _lose(self, hosts: Sequence[Host]) -> None:
        self.counts.lost_hosts += len(hosts)
        for host in hosts:
            self.fleet.kill(host)
            self._note("lost", [host], {})
        if (count := self.counts.lost_hosts) > self.config.cluster.max_losses:
            raise ClusterError(f"{count} hosts were lost, more than {self.config.cluster.max_losses}; see the notes")

    def _drop_dead_spares(self) -> bool:
        """A spare that has ended would be missed only when it is needed. Returns whether there was one."""
        dead = [host for host in self.spare if self._is_lost(host)]
        self.spare = [host for host in self.spare if host not in dead]
        self._lose(dead)
        return bool(dead)

    def _take_back(self, alive: Sequence[Host]) -> None:
        """Requests of hosts that are neither `alive` nor wait are for others."""
        self.counts.replayed_requests += self.ledger.take_back(host.number for host in (*alive, *self.spare))

    def _is_closed(self, host: Host) -> bool:
        line = self.lines.get(host.number)
        return line is not None and line.is_closed

    def _note(self, what: str, hosts: Sequence[Host], seconds: dict[str, float]) -> None:
        noted = Noted(time.time(), what, tuple(host.number for host in hosts), self.generation, seconds)
        self.noted.append(noted)
        log.info(noted.told())
