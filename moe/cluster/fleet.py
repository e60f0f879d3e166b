"""The actors of a cluster: started in bundles of a placement group, watched by their lines, ended by a helper there."""

import logging
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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

from moe.cluster.host import NodeKeeper, actor_class
from moe.cluster.lines import Lines
from moe.cluster.messages import HostInfo, Where
from moe.cluster.policy import ClusterError, first_sentence
from moe.config import EngineConfig

log = logging.getLogger(__name__)

_LAST_KILLS_S = 2.0  # for those that were begun when all ends


@dataclass(slots=True, eq=False)
class Host:
    """One actor. Its number is never used again, so that what a lost one says late belongs to nobody."""

    number: int
    actor: Any
    group: Any
    bundle: int  # of the group
    info: HostInfo | None = None
    placed: int = 0  # number of the last `Placed` of it that has come
    is_growth: bool = False  # asked for by a change of the number of hosts, not by a loss
    asked: float = 0.0  # by `Lines.now`: when Ray was asked for it, or last had no room for it
    is_placed: bool = False  # as far as was looked
    is_over: bool = False  # it was given up: what it may still say counts for nothing


class HostEnded(ClusterError):
    """A host raised, or ended, instead of answering. cause: what it raised, if a user can do something about it."""

    def __init__(self, sentence: str, cause: Exception | None = None) -> None:
        super().__init__(sentence)
        self.cause = cause


class Fleet:
    """Starts hosts, asks them and ends them: all that a crew needs of Ray, which is initialised already."""

    def __init__(self, folder: str | Path, config: EngineConfig, name: str) -> None:
        self.folder, self.config = str(Path(folder).resolve()), config
        here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        word = secrets.token_hex(16)
        self.lines = Lines(here, word)
        self.where = Where(here, self.lines.port, word, secrets.token_hex(6))
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
        # Killing asks Ray's head for this and that; where it does not answer, hosts that live serve on.
        self._kills = ThreadPoolExecutor(1, thread_name_prefix="moe-kills")
        self._groups: list[Any] = []
        self._free: list[tuple[Any, int]] = []  # bundles of groups whose host has ended: the next host takes one
        self._last: list[Any] = []  # groups of the hosts that were started last
        self._next = 0

    def start(self, count: int, num_ranks: int, *, is_growth: bool = False) -> list[Host]:
        """Hosts that load, each a share of `num_ranks`, as soon as Ray has room for them."""
        places = [self._free.pop() for _ in range(min(count, len(self._free)))]
        if missing := count - len(places):
            labels = [self._labels] * missing if self._labels else None
            group = placement_group(
                [self._bundle] * missing,
                strategy=self.config.cluster.strategy,
                bundle_label_selector=labels,
                name=self._group_name and self._group_name + secrets.token_hex(4),
            )
            self._groups.append(group)
            places += [(group, index) for index in range(missing)]
        self._last = [group for group, _ in places]
        hosts, asked = [], self.lines.now()  # of all together, so that those without room are told in one sentence
        for group, index in places:
            number, self._next = self._next, self._next + 1
            bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor = self._actor_class.options(
                scheduling_strategy=bundle, num_cpus=self._bundle["CPU"], num_gpus=self._bundle.get("GPU", 0)
            ).remote(self.folder, self.config, number, (number, num_ranks), self.where)
            hosts.append(Host(number, actor, group, index, is_growth=is_growth, asked=asked))
        return hosts

    def check_room(self) -> None:
        """Raises ValueError if the last hosts that were started have no place after `cluster.room_s`."""
        for group in self._last:
            if not group.wait(timeout_seconds=self.config.cluster.room_s):
                raise ValueError(self.no_room(group.bundle_count))

    def homeless(self, hosts: Iterable[Host]) -> list[Host]:
        """Those of `hosts` that have no place `cluster.room_s` after Ray was asked. Each is told once in that time."""
        now, found = self.lines.now(), []
        for host in hosts:
            if not host.is_placed and now - host.asked > self.config.cluster.room_s:
                host.is_placed = self.has_place(host)
                if not host.is_placed:
                    host.asked = now
                    found.append(host)
        return found

    def has_place(self, host: Host) -> bool:
        """Whether Ray has room for it, and for those that were started with it."""
        return bool(placement_group_table(host.group)["state"] == "CREATED")

    def resources(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the cluster has, and what of it is free."""
        return ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]

    def no_room(self, count: int) -> str:
        """A sentence: what `count` hosts ask for, and what there is."""
        labelled = f" on nodes labelled {self._labels}" if self._labels else ""
        have, free = ({k: round(resources.get(k, 0.0), 2) for k in self._bundle} for resources in self.resources())
        return (
            f"Ray has no room for {count} bundles of {self._bundle}{labelled}: after {self.config.cluster.room_s:g} s "
            f"the cluster has {have}, of which {free} are free; ask for fewer hosts, or give them less"
        )

    def ask_ready(self, host: Host) -> Any:
        """A reference to its HostInfo, which comes when it has loaded."""
        return host.actor.ready.remote()

    def done(self, references: Sequence[Any], wait_s: float = 0.0) -> list[Any]:
        """Those of `references` that have come or failed: all by now, or the first within `wait_s`."""
        if not references:
            return []
        done: list[Any]
        done, _ = ray.wait(list(references), num_returns=1 if wait_s else len(references), timeout=wait_s)
        return done

    def answer(self, reference: Any) -> Any:
        """Of one that is done. Raises HostEnded."""
        try:
            return ray.get(reference, timeout=self.config.cluster.answer_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, (ValueError, OSError)) else None
            raise HostEnded(first_sentence(error), cause) from None
        except ray.exceptions.RayError as error:
            raise HostEnded(first_sentence(error)) from None

    def kill(self, host: Host) -> None:
        """Ends a host now, whatever it does; also one that is stopped. One that is out of reach ends when it hears of
        it."""
        self.lines.hang_up(host.number)
        self._kills.submit(self._kill, host, self._give_back(host))

    def _kill(self, host: Host, group: PlacementGroup | None) -> None:
        try:
            if host.info is not None:
                self._keeper(host.info.node).kill.remote(host.info.pid)
            ray.kill(host.actor)
            if group is not None:
                remove_placement_group(group)
        except Exception as error:  # of any kind: it is given up anyway
            log.warning("host %d may still run: %s", host.number, first_sentence(error))

    def _keeper(self, node: str) -> Any:
        if node not in self._keepers:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._keepers[node] = ray.remote(NodeKeeper).options(num_cpus=0, scheduling_strategy=where).remote()
        return self._keepers[node]

    def close(self, hosts: Sequence[Host]) -> None:
        wait([self._kills.submit(lambda: None)], timeout=_LAST_KILLS_S)
        self._kills.shutdown(wait=False, cancel_futures=True)
        for host in hosts:
            ray.kill(host.actor)
        for keeper in list(self._keepers.values()):
            ray.kill(keeper)
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()
        self._free.clear()

    def _give_back(self, host: Host) -> PlacementGroup | None:
        """Its bundle is for the next host. Returns its group if that has no host any more: it is for Ray."""
        place = host.group, host.bundle
        if host.group not in self._groups or place in self._free:
            return None
        self._free.append(place)
        if sum(group is host.group for group, _ in self._free) < host.group.bundle_count:
            return None
        self._free = [other for other in self._free if other[0] is not host.group]
        self._groups.remove(host.group)
        emptied: PlacementGroup = host.group
        return emptied


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
