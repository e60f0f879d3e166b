"""An engine that is elsewhere: for a process that hands its requests to a resident controller.

It keeps every request with its tokens so far, as a controller does for its hosts: when the controller itself is lost,
another is started and goes on where that one was.
"""

import logging
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.cluster.front import Front
from moe.cluster.ledger import most_dealt
from moe.cluster.policy import ClusterError, FailurePolicy
from moe.cluster.resident import Attached, ControllerEnded, Controllers, ControllerSilent
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
    """The model in `folder`, served by a detached controller; it is started with `num_hosts` if it is not there.

    Raises ValueError for what cannot be served, and if the controller serves another model; ClusterError when the
    cluster cannot go on. Takes `controllers` over.
    """

    def __init__(self, folder: str | Path, config: EngineConfig, num_hosts: int, controllers: Controllers) -> None:
        self.controllers, self._arguments = controllers, (str(Path(folder).resolve()), config, num_hosts)
        self._why_over: str | None = None
        self._is_closed = False
        self._look_after = 0.0  # when a look may be worth its wait again
        self._plan: Plan | None = None  # as the controller told it last; another begins with it
        try:
            super().__init__(folder, config, num_hosts)
            self.notes = list(self._attach().notes)
        except BaseException:
            controllers.close()
            raise

    def _attach(self) -> Attached:
        """To the controller of our name, as a new session."""
        self._is_attached = False
        self._collecting: Any = None
        self._session, self._seen, self._waited = secrets.token_hex(8), 0, 0.0
        policy, answer = FailurePolicy(self.config.cluster), self.controllers.answer
        self._actor, folder = self.controllers.start(*self._arguments, self._plan, self.weights), self._arguments[0]
        if (other := answer(self._actor.served.remote(), policy.starts_s())) != folder:
            raise ValueError(
                f"the controller {self.controllers.name!r} serves {other}, not {folder}; give another --controller, or "
                "end it with `moe ray stop`"
            )
        try:
            attached: Attached = answer(self._actor.attach.remote(self._session), policy.controller_starts_s())
        except (ControllerSilent, ControllerEnded):
            raise
        except (ValueError, OSError, ClusterError):
            # It has no hosts: what it is told is what making them raised.
            self.controllers.stop(self.config.cluster.answer_s)
            raise
        if attached.weights != self.weights:
            raise ValueError(
                f"the controller {self.controllers.name!r} serves {folder} as it was before its weights or config.json "
                f"changed (fingerprint {attached.weights}, now {self.weights}); end it with `moe ray stop`"
            )
        self.limits, self._status = attached.limits, (attached.status, attached.counts)
        self.config = replace(self.config, batch=attached.batch)
        self._is_attached = True
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
        if not self._is_attached:  # a successor that did not take us on: nothing is known of it
            self._start_another("it did not begin to serve")
        dealt = self.ledger.deal([_CONTROLLER], most_dealt(self.config.batch))
        for requests in dealt.values():
            self._actor.submit.remote(self._session, requests)
        if self._collecting is None:
            self._collecting = self._actor.collect.remote(self._session, self._seen, _POLL_S)
        started = time.monotonic()
        if self.controllers.has_come(self._collecting, wait_s):
            self._take(self._collecting)
            return
        # Not the time since it was asked: this process may have been stopped meanwhile.
        self._waited += min(wait_s, time.monotonic() - started)
        if self._waited > self.config.cluster.answer_s + _POLL_S:
            self._start_another(f"no answer for {self._waited:.1f} s, more than cluster.answer_s")

    def _take(self, reference: Any) -> None:
        """What the controller has collected for us."""
        self._collecting, self._waited = None, 0.0
        try:
            first, said, plan = self.controllers.answer(reference, self.config.cluster.answer_s)
        except ControllerEnded as error:
            self._start_another(str(error))
            return
        except (ValueError, OSError, ClusterError) as error:
            self._why_over = str(error)
            raise
        self._plan = plan or self._plan
        self.ledger.hear(_CONTROLLER, said[max(0, self._seen - first) :])
        self._seen = max(self._seen, first + len(said))

    def _start_another(self, why: str) -> None:
        log.warning("the controller %r is lost (%s); another is started", self.controllers.name, why)
        self.controllers.stop(self.config.cluster.answer_s)  # it may be stopped, or out of reach
        self.ledger.take_back([])
        self._attach()

    def drop(self, request: Request, host: int) -> None:
        self._actor.cancel.remote(self._session, [request.id])

    def scale(self, num_hosts: int) -> None:
        """As `ClusterEngine.scale`."""
        self.controllers.answer(self._actor.scale.remote(num_hosts), 2 * self.config.cluster.answer_s)

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
        if not self._is_closed:
            self._is_closed = True
            try:
                if self._why_over is None:
                    self.controllers.stop(self.config.cluster.answer_s)
            finally:
                self.controllers.close()

    def _look(self) -> tuple[ClusterStatus, ClusterStats]:
        try:
            if time.monotonic() > self._look_after:
                self._status = self.controllers.answer(self._actor.status.remote(), _STATUS_S)
        except (ValueError, OSError, ClusterError):  # it loads, is stopped, or has no hosts any more
            self._look_after = time.monotonic() + _STATUS_S
        return self._status
