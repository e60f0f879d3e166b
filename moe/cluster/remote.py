"""An engine that is elsewhere: for a process that hands its requests to a resident controller.

It keeps every request with its tokens so far, as a controller does for its hosts: when the controller itself is lost,
another is started and goes on where that one was.
"""

import contextlib
import logging
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from moe.cluster.controller import connect_ray
from moe.cluster.front import Front
from moe.cluster.policy import ClusterError, FailurePolicy, first_sentence
from moe.cluster.resident import Attached, answer_of, start_resident, stop_resident
from moe.cluster.stats import ClusterStats, ClusterStatus, Noted
from moe.config import EngineConfig
from moe.engine.requests import Request
from moe.engine.stats import State
from moe.placement.plan import Plan

log = logging.getLogger(__name__)

_POLL_S = 0.5  # a long poll's length
_STATUS_S = 2.0  # how long a look at the cluster may take
_CONTROLLER = 0  # its number in the ledger


class RemoteEngine(Front):
    """The model in `folder`, served by the detached controller `name`; it is started with `num_hosts` if it is not
    there. address: of the cluster, None = that of this process, or a new local one, which ends with this process.

    Raises ValueError for what cannot be served, and if the controller serves another model; ClusterError when the
    cluster cannot go on.
    """

    def __init__(
        self, folder: str | Path, config: EngineConfig, num_hosts: int, name: str, *, address: str | None = None
    ) -> None:
        super().__init__(folder, config, num_hosts)
        self.name, self._arguments = name, (str(Path(folder).resolve()), config, num_hosts)
        self._why_over: str | None = None
        self._is_closed = False
        self._plan: Plan | None = None  # as the controller told it last; another begins with it
        self._status: tuple[ClusterStatus, ClusterStats] | None = None
        self._starts_ray = connect_ray(address)
        try:
            self.notes = list(self._attach().notes)
        except BaseException:
            if self._starts_ray:
                ray.shutdown()
            raise

    def _attach(self) -> Attached:
        """To the controller of our name, as a new session."""
        self._collecting: Any = None
        self._session, self._seen, self._waited = secrets.token_hex(8), 0, 0.0
        policy = FailurePolicy(self.config.cluster)
        self._actor, folder = start_resident(self.name, *self._arguments, self._plan), self._arguments[0]
        try:
            if (other := answer_of(self.name, self._actor.served.remote(), policy.starts_s())) != folder:
                raise ValueError(
                    f"the controller {self.name!r} serves {other}, not {folder}; give another --controller, or end it "
                    "with `moe ray stop`"
                )
            reference = self._actor.attach.remote(self._session)
            attached: Attached = answer_of(self.name, reference, policy.controller_starts_s())
        except ray.exceptions.RayTaskError as error:
            # It has no hosts: what it is told is what making them raised.
            stop_resident(self.name, self.config.cluster.answer_s)
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"the controller {self.name!r} ended: {first_sentence(error)}") from None
        self.limits = attached.limits
        self.config = replace(self.config, batch=attached.batch)
        return attached

    @property
    def noted(self) -> list[Noted]:
        """What happened to hosts last."""
        return list(self.status().noted)

    @property
    def plan(self) -> Plan | None:
        """Of the generation that serves, or served last."""
        return self.status().plan

    def exchange(self, wait_s: float) -> None:
        try:
            dealt = self.ledger.deal([_CONTROLLER], 4 * self.config.batch.num_running)
            for requests in dealt.values():
                self._actor.submit.remote(self._session, requests)
            if self._collecting is None:
                self._collecting = self._actor.collect.remote(self._session, self._seen, _POLL_S)
            started = time.monotonic()
            done, _ = ray.wait([self._collecting], timeout=wait_s)
            if not done:
                # Not the time since it was asked: this process may have been stopped meanwhile.
                self._waited += min(wait_s, time.monotonic() - started)
                if self._waited > self.config.cluster.answer_s + _POLL_S:
                    self._give_up_controller()
            else:
                self._collecting, self._waited = None, 0.0
                first, said, plan = ray.get(done[0], timeout=self.config.cluster.answer_s)
                self._plan = plan or self._plan
                self.ledger.hear(_CONTROLLER, said[max(0, self._seen - first) :])
                self._seen = max(self._seen, first + len(said))
        except ray.exceptions.RayTaskError as error:
            self._why_over = str(_cause(error))
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            self._start_another(first_sentence(error))

    def _give_up_controller(self) -> None:
        """It is stopped, or out of reach."""
        with contextlib.suppress(ValueError):  # it ended meanwhile
            stop_resident(self.name, self.config.cluster.answer_s)
        self._start_another(f"no answer for {self._waited:.1f} s, more than cluster.answer_s")

    def _start_another(self, why: str) -> None:
        log.warning("the controller %r is lost (%s); another is started", self.name, why)
        self.ledger.take_back([])
        self._attach()

    def drop(self, request: Request, host: int) -> None:
        self._actor.cancel.remote(self._session, [request.id])

    def scale(self, num_hosts: int) -> None:
        """As `ClusterEngine.scale`."""
        answer_of(self.name, self._actor.scale.remote(num_hosts), 2 * self.config.cluster.answer_s)

    def why_not_whole(self) -> str | None:
        return self._why_over

    def status(self) -> ClusterStatus:
        """What the controller says, or said last."""
        return self._look()[0]

    def state(self) -> State:
        """Of all hosts together."""
        return self.status().engine_state(self.blueprint.num_experts)

    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        """The records that count, for `moe/metrics.py`."""
        counts = self._look()[1]
        return [(self.stats, {}), (counts, {}), (counts.placement, {})]

    def close(self) -> None:
        """Ends the controller and its hosts, if no other server has taken them over, and Ray where it was started
        here. No effect the second time."""
        if ray.is_initialized() and not self._is_closed and self._why_over is None:
            self._is_closed = True
            with contextlib.suppress(ValueError):  # somebody has ended it
                stop_resident(self.name, self.config.cluster.answer_s)
            if self._starts_ray:
                ray.shutdown()

    def _look(self) -> tuple[ClusterStatus, ClusterStats]:
        try:
            self._status = ray.get(self._actor.status.remote(), timeout=_STATUS_S)
        except ray.exceptions.RayError:
            if self._status is None:
                raise
        assert self._status is not None
        return self._status


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    """What the controller raised, or what it could not carry to here."""
    cause = error.cause
    return cause if isinstance(cause, (ValueError, OSError, ClusterError)) else ClusterError(first_sentence(error))
