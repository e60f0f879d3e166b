"""A controller that outlives whoever asked for it: a detached actor with a name, for a service and for `moe ray`.

    service ─ RemoteEngine ─▶ Resident (ClusterEngine in a thread) ─▶ hosts

One session at a time hands in requests. A new one (a server that was started again) takes over the hosts as they are,
and what the one before had asked for is dropped.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from moe.cluster.address import connect_ray
from moe.cluster.controller import ClusterEngine
from moe.cluster.desk import Desk, Outbox
from moe.cluster.fleet import give_back_groups
from moe.cluster.ledger import most_dealt
from moe.cluster.messages import Dealt, Said
from moe.cluster.policy import ClusterError, FailurePolicy, first_sentence
from moe.cluster.stats import ClusterStats, ClusterStatus
from moe.config import BatchConfig, EngineConfig
from moe.engine.limits import Limits
from moe.placement.plan import Plan

NAMESPACE = "moe"
CONTROL = ("served", "attach", "submit", "cancel", "collect", "scale", "status")
_LOOK_S = 0.1  # between two looks at what somebody waits for
_IDLE_S = 0.1  # between two looks at the hosts while nobody asks for anything


@dataclass(frozen=True, slots=True)
class Attached:
    """What a session must know. batch: of all hosts together; status, counts: as they are;
    weights: the fingerprint of what hosts load."""

    limits: Limits
    notes: tuple[str, ...]
    batch: BatchConfig
    status: ClusterStatus
    counts: ClusterStats
    weights: str


class Session(NamedTuple):
    """Of whoever hands in requests. name: "" = of nobody yet."""

    name: str
    desk: Desk
    outbox: Outbox

    @staticmethod
    def new(name: str, few: int = 0) -> "Session":
        """few: as of `Desk`."""
        outbox = Outbox()
        return Session(name, Desk(outbox.tell, few=few), outbox)


class Collected(NamedTuple):
    """As `Outbox.collect`; plan: that is served now, if this session was not told it yet."""

    first: int
    said: list[Said]
    plan: Plan | None


class Resident:
    """`ClusterEngine(folder, config, num_hosts)`, made and stepped by its own thread. All else may come from any.

    begin: the plan to begin with, of the controller that was lost; None: `parallel.plan`. weights: as `ClusterEngine`.
    """

    def __init__(
        self, name: str, folder: str, config: EngineConfig, num_hosts: int, begin: Plan | None, weights: str
    ) -> None:
        self.folder = folder
        self._session = Session.new("")
        self._arguments = name, config, num_hosts, begin, weights
        self._told: Plan | None = None  # to the session
        self._engine: ClusterEngine | None = None
        self._over: Exception | None = None
        self._orders: list[Callable[[], None]] = []
        self._changed = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="moe-resident", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> ClusterEngine:
        if self._over is not None:
            raise self._over
        if self._engine is None:
            raise ClusterError("the hosts load the model")
        return self._engine

    # From any thread.

    def served(self) -> str:
        """The model's folder."""
        return self.folder

    def attach(self, session: str) -> Attached:
        """From now on requests of this session alone are served. Raises what making the engine raised."""
        limits = self._arguments[1].cluster  # the caller gives up sooner, and leaves this controller as it is
        self._order(lambda: self._take_over(session), FailurePolicy(limits).controller_starts_s() + limits.answer_s)
        engine = self.engine
        return Attached(engine.limits, tuple(engine.notes), engine.config.batch, *self.status(), engine.weights)

    def submit(self, session: str, requests: list[Dealt]) -> None:
        self._of(session).desk.submit(requests)

    def cancel(self, session: str, ids: list[int]) -> None:
        self._of(session).desk.cancel(ids)

    def collect(self, session: str, after: int, wait_s: float) -> Collected:
        """As `Outbox.collect`."""
        first, said = self._of(session).outbox.collect(after, wait_s)
        plan = None if self._engine is None or self._engine.plan is self._told else self._engine.plan
        self._told = plan or self._told
        return Collected(first, said, plan)

    def scale(self, num_hosts: int) -> None:
        """As `ClusterEngine.scale`; hosts come and go afterwards, as `status` shows."""
        self._order(lambda: self.engine.scale(num_hosts), self._arguments[1].cluster.answer_s)

    def status(self) -> tuple[ClusterStatus, ClusterStats]:
        return self.engine.status(), self.engine.crew.counted()

    def _of(self, name: str) -> Session:
        if self._over is not None:
            raise self._over
        if name != (session := self._session).name:
            raise ClusterError("another server has taken this cluster over; only one at a time hands in requests")
        return session

    def _order(self, order: Callable[[], None], limit_s: float) -> None:
        """Done by the thread that steps, before its next step. Raises what the order raises, and ClusterError if it is
        not done within `limit_s`."""
        done, raised = threading.Event(), list[BaseException]()

        def obey() -> None:
            try:
                order()
            except Exception as error:  # it is the caller's
                raised.append(error)
            done.set()

        with self._changed:
            self._orders.append(obey)
        deadline = time.monotonic() + limit_s
        while not done.wait(_LOOK_S):
            if self._over is not None:
                raise self._over
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the hosts load, or a step lasts: after {limit_s:g} s it is not done yet; look at `moe ray status`"
                )
        if raised:
            raise raised[0]

    # In the thread that steps.

    def _run(self) -> None:
        try:
            name, config, num_hosts, begin, weights = self._arguments
            self._engine = ClusterEngine(self.folder, config, num_hosts, name=name, begin=begin, weights=weights)
            while True:
                with self._changed:
                    orders, self._orders = self._orders, []
                for order in orders:
                    order()
                desk = self._session.desk
                desk.hand_over(self.engine)
                stepped = self.engine.step()
                desk.stepped(stepped, may_hold=self.engine.has_work)
                if not self.engine.has_work:
                    desk.wait(_IDLE_S, lambda: bool(self._orders))
        except Exception as error:  # whoever asks next is told
            self._over = error

    def _take_over(self, session: str) -> None:
        self._session.desk.clear(self.engine)
        self._session, self._told = Session.new(session, most_dealt(self.engine.config.batch) // 2), None


class ControllerEnded(ClusterError):
    """Its process, or its node, is gone."""


class ControllerSilent(ClusterError):
    """It did not answer in time: stopped, or out of reach."""


class Controllers:
    """All that a service's end and `moe ray` ask of Ray: the detached controller `name` of the cluster at `address`.

    address: None = the cluster that this process is in, or a new local one, which ends with this process. Raises
    ValueError if there is none.
    """

    def __init__(self, name: str, address: str | None = None) -> None:
        self.name = name
        self._starts_ray = connect_ray(address)

    def find(self) -> Any:
        """The actor. Raises ValueError if this cluster has none of this name."""
        if (actor := self._actor()) is None:
            raise ValueError(
                f"no controller {self.name!r} runs in this Ray cluster; `moe serve MODEL --hosts N` starts one, and a "
                "batch file has its own in its driver"
            )
        return actor

    def start(self, folder: str, config: EngineConfig, num_hosts: int, begin: Plan | None, weights: str) -> Any:
        """The actor, started if it is not there; `attach` waits until its hosts have loaded."""
        methods = {m: ray.method(concurrency_group="control")(getattr(Resident, m)) for m in CONTROL}
        options: dict[str, Any] = {"concurrency_groups": {"control": 8}, "max_restarts": 0, "max_task_retries": 0}
        actor: Any = ray.remote(**options)(type("Controller", (Resident,), methods))
        named = {"name": self.name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        return actor.options(**named, num_cpus=0).remote(self.name, folder, config, num_hosts, begin, weights)

    def has_come(self, reference: Any, wait_s: float) -> bool:
        """Whether its answer is there, within `wait_s`."""
        done, _ = ray.wait([reference], timeout=wait_s)
        return bool(done)

    def answer(self, reference: Any, limit_s: float) -> Any:
        """What it answers. Raises what it raised, ControllerSilent after `limit_s`, and ControllerEnded."""
        try:
            return ray.get(reference, timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            raise ControllerSilent(
                f"the controller {self.name!r} did not answer within {limit_s:g} s: its process may be stopped, or its "
                "node out of reach; `moe ray stop` ends it, and a server that is started again begins with another"
            ) from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            is_told = isinstance(cause, (ValueError, OSError, ClusterError))
            raise cause if is_told else ClusterError(first_sentence(error)) from None
        except ray.exceptions.RayActorError as error:
            raise ControllerEnded(f"the controller {self.name!r} ended: {first_sentence(error)}") from None

    def stop(self, limit_s: float) -> None:
        """Ends it, if it is there, and its hosts; another of this name may be started then. Raises ClusterError if Ray
        has it still after `limit_s`."""
        if not ray.is_initialized():  # Ray would start a cluster to look for it
            return
        deadline = time.monotonic() + limit_s
        while (actor := self._actor()) is not None:
            ray.kill(actor)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray has not ended the controller {self.name!r} after {limit_s:g} s; see `ray status`"
                )
            time.sleep(_LOOK_S)
        give_back_groups(self.name)

    def close(self) -> None:
        """Ends Ray where it was started here."""
        if self._starts_ray and ray.is_initialized():
            ray.shutdown()

    def _actor(self) -> Any | None:
        try:
            return ray.get_actor(self.name, namespace=NAMESPACE)
        except ValueError:
            return None
