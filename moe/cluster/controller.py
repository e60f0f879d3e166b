"""Many hosts as one engine: the controller has the requests, the hosts the experts, and any host may be lost.

It owns every request with its tokens so far; hosts are told what to serve and say what they have sampled.
"""

from pathlib import Path
from typing import Any

import ray

from moe.cluster.address import check_inside, connect_ray
from moe.cluster.crew import Crew
from moe.cluster.fleet import Fleet
from moe.cluster.front import Front
from moe.cluster.policy import ClusterError, State
from moe.cluster.shown import status_of
from moe.cluster.stats import ClusterStatus, Noted
from moe.config import EngineConfig
from moe.engine.requests import Request
from moe.engine.stats import State as EngineState
from moe.placement.plan import Plan


class ClusterEngine(Front):
    """The model in `folder` on `num_hosts` actors of a Ray cluster. One thread at a time.

    address: of the cluster, None = the one that this process is in, or a new local one. name: of a controller that
    may have been here before; what it left is given back. begin: the plan that it served with, over `parallel.plan`.
    weights: the fingerprint of those that its requests began with; "" = of `folder` as it is here and now.
    Raises ValueError for what cannot be served or placed; `step` raises ClusterError when no host is left and none may
    be started.
    """

    def __init__(
        self,
        folder: str | Path,
        config: EngineConfig,
        num_hosts: int,
        *,
        address: str | None = None,
        name: str = "",
        begin: Plan | None = None,
        weights: str = "",
    ) -> None:
        super().__init__(folder, config, num_hosts)
        self.weights = weights or self.weights
        self._why_over: str | None = None
        check_inside(address)
        self._starts_ray = connect_ray(address)
        try:
            self.crew = Crew(Fleet(folder, config, name, self.weights), config, num_hosts, self.ledger, begin)
            self.limits = self.crew.limits
        except BaseException:
            if self._starts_ray:
                ray.shutdown()
            raise

    @property
    def notes(self) -> list[str]:
        infos = [host.info for host in self.crew.alive if host.info is not None]
        nodes = len({info.node for info in infos})
        return [
            *(infos[0].notes if infos else ()),
            f"{len(infos)} hosts on {nodes} node{'s' * (nodes > 1)} serve the experts",
        ]

    @property
    def noted(self) -> list[Noted]:
        """What happened to hosts."""
        return self.crew.noted

    @property
    def plan(self) -> Plan | None:
        """Of the generation that serves, or served last."""
        return self.crew.plan

    def exchange(self, wait_s: float) -> None:
        if self.crew.state is State.CLOSED:
            raise ClusterError("the cluster is closed; load the model again")
        self.crew.deal()
        try:
            self.crew.pump(wait_s)
        except ClusterError as error:
            self._why_over = str(error)
            self.crew.close()  # those that are left are of no use
            raise
        self.limits = self.crew.limits

    def drop(self, request: Request, host: int) -> None:
        self.crew.cancel(host, request.id)

    def scale(self, num_hosts: int) -> None:
        """From some step on `num_hosts` serve: more are started, or the last ones leave in order."""
        self.crew.scale(num_hosts)

    def why_not_whole(self) -> str | None:
        return self._why_over  # requests are counted here alone: nothing can be left half done

    def status(self) -> ClusterStatus:
        """Hosts, generation, plan and load, as `moe ray status` shows them."""
        return status_of(self.crew, self.blueprint.folder.name)

    def state(self) -> EngineState:
        """Of all hosts together."""
        return self.status().engine_state(self.blueprint.num_experts)

    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        """The records that count, for `moe/metrics.py`."""
        counts = self.crew.counted()
        return [(self.stats, {}), (counts, {}), (counts.placement, {})]

    def close(self) -> None:
        """Ends the hosts, and Ray where it was started here. No effect the second time."""
        self.crew.close()
        if self._starts_ray and ray.is_initialized():
            ray.shutdown()
