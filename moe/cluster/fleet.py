"""The actors of a cluster: started in bundles of a placement group, watched by their lines, ended by a helper there."""

import logging
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch._C._distributed_c10d import TCPStore

from moe.cluster.host import NodeKeeper, actor_class
from moe.cluster.lines import Lines
from moe.cluster.messages import HostInfo, Together, Where
from moe.cluster.policy import ClusterError, first_sentence
from moe.config import EngineConfig

log = logging.getLogger(__name__)

_TOLD_S = 5.0  # without room
Resources = dict[str, float]


@dataclass(slots=True, eq=False)
class Bundles:
    """A placement group. Ray is asked for it by the fleet's own thread."""

    count: int
    group: PlacementGroup | None = None  # not asked for yet
    is_placed: bool = False  # as far as was looked
    look: Future[tuple[Resources, Resources] | None] | None = None


@dataclass(slots=True, eq=False)
class Host:
    """One actor. Its number is never used again, so that what a lost one says late belongs to nobody."""

    number: int
    bundles: Bundles
    bundle: int  # of those
    is_growth: bool = False  # asked for by a change of the number of hosts, not by a loss
    asked: float = 0.0  # by `Lines.now`: when it was asked for, or last had no room
    actor: Any = None  # until Ray was asked for it
    ready: Any = None  # a reference for `Fleet.done` and `Fleet.answer`: its HostInfo, when it has loaded
    info: HostInfo | None = None
    placed: int = 0  # number of the last `Placed` of it that has come
    is_over: bool = False  # it was given up: what it may still say counts for nothing


class HostEnded(ClusterError):
    """A host raised, or ended, instead of answering. cause: what it raised, if a user can do something about it."""

    def __init__(self, sentence: str, cause: Exception | None = None) -> None:
        super().__init__(sentence)
        self.cause = cause


class Fleet:
    """Starts hosts, asks them and ends them: all that a crew needs of Ray, which is initialised already."""

    def __init__(self, folder: str | Path, config: EngineConfig, name: str, weights: str) -> None:
        self.folder, self.config = str(Path(folder).resolve()), config
        here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        word = secrets.token_hex(16)
        self.lines = Lines(here, word)
        self._store = TCPStore(here, 0, is_master=True, wait_for_workers=False)
        self.where = Where(here, self.lines.port, word, secrets.token_hex(6), self._store.port, weights)
        self._group_name = group_prefix(name)
        if name:
            give_back_groups(name)
        asked = config.cluster
        gpus = asked.gpus_per_host
        if gpus is None:
            gpus = float(config.device != "cpu" and _cluster_has("GPU"))
        self._labels = asked.label_selector()
        self._bundle = {"CPU": asked.cpus_per_host} | ({"GPU": gpus} if gpus else {})
        self._actor_class = actor_class()
        self._keepers: dict[str, Any] = {}
        # Whatever Ray's head is asked for, in order; where it does not answer, hosts that live serve on.
        self._asks = ThreadPoolExecutor(1, thread_name_prefix="moe-asks")
        self._groups: list[Bundles] = []
        self._free: list[tuple[Bundles, int]] = []  # bundles whose host has ended: the next host takes one
        self._next = self._starts = 0

    def start(self, count: int, num_ranks: int, *, is_growth: bool = False) -> list[Host]:
        """Hosts that load, each a share of `num_ranks`, as soon as Ray has room for them. Waits for nobody."""
        places = [self._free.pop() for _ in range(min(count, len(self._free)))]
        if missing := count - len(places):
            bundles = Bundles(missing)
            self._groups.append(bundles)
            places += [(bundles, index) for index in range(missing)]
        self._starts += 1
        together = Together(count, self._starts)
        hosts, asked = [], self.lines.now()  # of all together, so that those without room are told in one sentence
        for bundles, index in places:
            host = Host(self._next, bundles, index, is_growth=is_growth, asked=asked)
            self._next += 1
            host.ready = self._asks.submit(self._launch, host, num_ranks, together)
            hosts.append(host)
        return hosts

    def _launch(self, host: Host, num_ranks: int, together: Together) -> Any:
        """A reference of Ray's to its HostInfo."""
        if host.is_over:
            raise HostEnded("it was given up before Ray was asked for it")
        bundles = host.bundles
        if bundles.group is None:
            bundles.group = placement_group(
                [self._bundle] * bundles.count,
                strategy=self.config.cluster.strategy,
                bundle_label_selector=[self._labels] * bundles.count if self._labels else None,
                name=self._group_name and self._group_name + secrets.token_hex(4),
            )
        place = PlacementGroupSchedulingStrategy(bundles.group, placement_group_bundle_index=host.bundle)
        host.actor = self._actor_class.options(
            scheduling_strategy=place, num_cpus=self._bundle["CPU"], num_gpus=self._bundle.get("GPU", 0)
        ).remote(self.folder, self.config, host.number, (host.number, num_ranks), self.where, together=together)
        return host.actor.ready.remote()

    def check_room(self, hosts: Sequence[Host]) -> None:
        """Raises ValueError if `hosts` have no place after `cluster.room_s`; ClusterError if Ray does not answer."""
        limit = self.config.cluster.room_s
        told_s = min(_TOLD_S, limit / 2)
        for host in hosts:
            self._wait_for(host.ready)
            assert host.bundles.group is not None
            if not host.bundles.group.wait(timeout_seconds=told_s):
                log.warning(
                    "%s; there may be room within cluster.room_s (%g s)", self._no_room_for(host, told_s), limit
                )
                if not host.bundles.group.wait(timeout_seconds=limit - told_s):
                    raise ValueError(self._no_room_for(host, limit))

    def _no_room_for(self, host: Host, after_s: float) -> str:
        return self.no_room(host.bundles.count, self._wait_for(self._asks.submit(self.resources)), after_s)

    def _wait_for(self, asked: Future[Any]) -> Any:
        """What Ray said, where nothing can go on without it."""
        try:
            return asked.result(limit := self.config.cluster.answer_s)
        except TimeoutError:
            raise ClusterError(
                f"Ray's head has not answered for {limit:g} s (cluster.answer_s); see whether its gcs_server runs"
            ) from None

    def homeless(self, hosts: Iterable[Host]) -> tuple[list[Host], str]:
        """Those of `hosts` that have no place `cluster.room_s` after they were asked for, as soon as Ray says so, and
        the sentence. Each is told once in that time."""
        now, found, why = self.lines.now(), list[Host](), ""
        for host in hosts:
            bundles = host.bundles
            if bundles.is_placed or now - host.asked <= self.config.cluster.room_s:
                continue
            if bundles.look is None:
                bundles.look = self._asks.submit(self._look, bundles)
            elif bundles.look.done():
                if (there := bundles.look.result(0)) is None:
                    bundles.is_placed = True
                else:
                    host.asked = now
                    found.append(host)
                    why = self.no_room(len(found), there, self.config.cluster.room_s)
        for host in found:
            host.bundles.look = None
        return found, why

    def _look(self, bundles: Bundles) -> tuple[Resources, Resources] | None:
        """None if they have a place; else what the cluster has."""
        return None if self.has_place(bundles) else self.resources()

    def has_place(self, bundles: Bundles) -> bool:
        """Whether Ray has room for all of them."""
        return bundles.group is not None and placement_group_table(bundles.group)["state"] == "CREATED"

    def resources(self) -> tuple[Resources, Resources]:
        """What the cluster has, and what of it is free."""
        return ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]

    def no_room(self, count: int, there: tuple[Resources, Resources], after_s: float) -> str:
        """A sentence: what `count` hosts ask for, and what there is."""
        labelled = f" on nodes labelled {self._labels}" if self._labels else ""
        have, free = ({k: round(resources.get(k, 0.0), 2) for k in self._bundle} for resources in there)
        return (
            f"Ray has no room for {count} bundles of {self._bundle}{labelled}: after {after_s:g} s "
            f"the cluster has {have}, of which {free} are free; ask for fewer hosts, or give them less "
            "(cluster.cpus_per_host, cluster.gpus_per_host)"
        )

    def done(self, references: Sequence[Any], wait_s: float = 0.0) -> list[Any]:
        """Those of `references` that have come or failed: all by now, or the first within `wait_s`."""
        asked = [one for one in references if isinstance(one, Future)]
        if failed := [one for one in asked if one.done() and one.exception(0) is not None]:
            return failed
        by_ray = {one.result(0) if isinstance(one, Future) else one: one for one in references if _is_asked(one)}
        if not by_ray:
            wait(asked, timeout=wait_s, return_when=FIRST_COMPLETED)
            return []
        done, _ = ray.wait(list(by_ray), num_returns=1 if wait_s else len(by_ray), timeout=wait_s)
        return [by_ray[one] for one in done]

    def answer(self, reference: Any) -> Any:
        """Of one that is done. Raises HostEnded."""
        try:
            if isinstance(reference, Future):
                reference = reference.result(0)
            return ray.get(reference, timeout=self.config.cluster.answer_s)
        except HostEnded:
            raise
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, (ValueError, OSError)) else None
            raise HostEnded(first_sentence(error), cause) from None
        except (ValueError, ray.exceptions.RayError) as error:  # what it was asked for is nothing that Ray can give
            raise HostEnded(first_sentence(error), error if isinstance(error, ValueError) else None) from None

    def kill(self, host: Host) -> None:
        """Ends a host now, whatever it does; also one that is stopped. Does not wait to see it dead: one that is out of
        reach ends when it hears of it. No effect the second time."""
        if host.is_over:
            return
        host.is_over = True
        self.lines.hang_up(host.number)
        self._asks.submit(self._kill, host, self._give_back(host))

    def _kill(self, host: Host, emptied: Bundles | None) -> None:
        try:
            if host.info is not None:
                self._keeper(host.info.node).kill.remote(host.info.pid)
            if host.actor is not None:
                ray.kill(host.actor)
            if emptied is not None and emptied.group is not None:
                remove_placement_group(emptied.group)
        except Exception as error:  # of any kind: it is given up anyway
            log.warning("host %d may still run: %s", host.number, first_sentence(error))

    def close(self, hosts: Sequence[Host]) -> None:
        """Where Ray's head does not answer, they end when they hear of it."""
        for host in hosts:
            host.is_over = True
        ended = self._asks.submit(self._end_all, hosts)
        self._asks.shutdown(wait=False)
        if not wait([ended], timeout=self.config.cluster.answer_s).done:
            log.warning("Ray's head does not answer: hosts may be there for some time")
        elif (error := ended.exception(0)) is not None:
            log.warning("hosts may be there for some time: %s", first_sentence(error))

    def _end_all(self, hosts: Sequence[Host]) -> None:
        for actor in (*(host.actor for host in hosts), *self._keepers.values()):
            if actor is not None:
                ray.kill(actor)
        for bundles in self._groups:
            if bundles.group is not None:
                remove_placement_group(bundles.group)

    def _keeper(self, node: str) -> Any:
        if node not in self._keepers:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._keepers[node] = ray.remote(NodeKeeper).options(num_cpus=0, scheduling_strategy=where).remote()
        return self._keepers[node]

    def _give_back(self, host: Host) -> Bundles | None:
        """Its bundle is for the next host. Returns its bundles if they have no host any more: they are for Ray."""
        place = host.bundles, host.bundle
        if host.bundles not in self._groups or place in self._free:
            return None
        self._free.append(place)
        if sum(bundles is host.bundles for bundles, _ in self._free) < host.bundles.count:
            return None
        self._free = [other for other in self._free if other[0] is not host.bundles]
        self._groups.remove(host.bundles)
        return host.bundles


def _is_asked(reference: Any) -> bool:
    """Whether Ray was asked for it already."""
    return not isinstance(reference, Future) or reference.done()


def _cluster_has(kind: str) -> bool:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get(kind, 0) > 0


def group_prefix(controller: str) -> str:
    """Of the names of placement groups of the controller of this name."""
    return f"moe-{controller}-" if controller else ""


def give_back_groups(controller: str) -> None:
    """Bundles of a controller that has ended, and whoever is still in them: Ray keeps them as long as the driver that
    started it."""
    for number, found in placement_group_table().items():
        if found["name"].startswith(group_prefix(controller)) and found["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number))))
