"""One host of a cluster: a process that loads the model alone and serves one generation of ranks after another.

`serve` runs in the actor's one default thread, as long as the generation lasts. Everything else answers at once from
threads of its own (`CONTROL`): requests in, and `interrupt`, which frees `serve` from a peer that will not answer.
Tokens go out on the host's line, from the thread that steps: no step calls Ray, or wakes a thread. The class needs no
Ray; `actor_class` makes it an actor.
"""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe.cluster.desk import Desk
from moe.cluster.ledger import most_dealt
from moe.cluster.lines import Lifeline
from moe.cluster.messages import Beat, Dealt, Ended, HostInfo, Placed, Said, Serve, Together, Where
from moe.cluster.policy import Refused
from moe.comm.errors import CommError, LostPeer
from moe.comm.groups import Groups
from moe.comm.membership import Generation, connect, interrupt, join_groups, leave_groups
from moe.config import EngineConfig
from moe.engine.device import ALONE, Began, Sharers
from moe.engine.engine import Engine
from moe.engine.join import shareable_shape
from moe.engine.share import Share
from moe.models.blueprint import Blueprint, read_blueprint
from moe.models.kv import BlockPool
from moe.offload.fingerprint import fingerprint
from moe.placement.plan import Plan

CONTROL = ("submit", "cancel", "placed", "leave", "interrupt")
_IDLE_S = 0.005


class ExpertHost:
    """share: what it will have of the experts at first. sharers: hosts that load on this node now."""

    def __init__(
        self,
        folder: str,
        config: EngineConfig,
        host: int,
        share: tuple[int, int],
        where: Where,
        *,
        sharers: Sharers = ALONE,
    ) -> None:
        self.config, self.where, self.node = config, where, "here"
        self._pool: BlockPool | None = None  # until the model is loaded
        self._steps = 0
        self._leaves = self._freed = -1  # the generation that is to end; that ended while this host met the others
        self._placed: Placed | None = None
        self._groups: Groups | None = None
        # Before the model: one that is stopped while it loads is seen by its silence, as any other.
        self._lifeline = Lifeline(where.address, where.line_port, where.word, host, self.end)
        self._lifeline.start(self._beat)
        self.desk = Desk(self._lifeline.say, few=most_dealt(config.batch) // 2)
        blueprint = _read_blueprint(folder, config, where.weights)
        self.engine = Engine(folder, config, share=_share(blueprint, *share, where.job, sharers))
        self._pool = self.engine.scheduler.pool

    def end(self) -> None:
        """The controller is gone, or has given this host up: nothing that it computes is of use any more."""
        os._exit(1)

    def ready(self) -> HostInfo:
        engine = self.engine
        return HostInfo(
            pid=os.getpid(),
            node=self.node,
            limits=engine.limits,
            shape=shareable_shape(engine.blueprint),
            state=engine.state(),
            notes=tuple(engine.notes),
        )

    # From threads of their own.

    def submit(self, requests: list[Dealt]) -> None:
        self.desk.submit(requests)

    def cancel(self, ids: list[int]) -> None:
        self.desk.cancel(ids)

    def placed(self) -> Placed | None:
        """The last, if there was one."""
        return self._placed

    def _beat(self, said: Sequence[Said]) -> Beat:
        placed = 0 if self._placed is None else self._placed.number
        return Beat(self._steps, 0 if self._pool is None else self._pool.num_to_have, placed, said)

    def leave(self, generation: int) -> None:
        """All ranks end this generation after the step that they are in."""
        self._leaves = generation

    def interrupt(self, generation: int) -> None:
        """Frees `serve` from a peer. While the ranks still meet it is the end of their store that does."""
        self._freed = generation
        groups = self._groups
        if groups is not None and groups.generation == generation:
            interrupt(groups)

    # In the engine's thread.

    def serve(self, order: Serve) -> Ended:
        """Steps until the generation ends. Requests that are not finished then stay, with their KV where it can."""
        seconds: dict[str, float] = {}
        groups: Groups | None = None
        has_joined = False
        started = time.perf_counter()

        def ended(lost: str | None) -> Ended:
            self.desk.tell_all()
            parallel = self.engine.parallel if has_joined else None
            plan, placed = None if parallel is None else parallel.plan, self._placed
            is_old = placed is not None and placed.generation != order.generation
            return Ended(order.generation, lost, seconds, self._lifeline.num_said, plan, None if is_old else placed)

        try:
            groups = self._groups = join_groups(
                connect(self.where.address, order.store_port, self.config.cluster.meet_s),
                Generation(order.generation, order.nodes),
                order.rank,
                device=self.engine.loaded.read.device,
                meet_s=self.config.cluster.meet_s,
                connect_s=self.config.cluster.silence_s,  # all have come: who does not answer now is silent
                timeout_s=self.config.parallel.timeout_seconds,
                eager_bytes=self.config.parallel.eager_bytes,
            )
            seconds["meet"] = time.perf_counter() - started
            if self._freed == order.generation:
                raise LostPeer("the generation ended while its ranks met", generation=order.generation)
            self.engine.join(groups, order.plan)
            has_joined = True
            self._pool = self.engine.scheduler.pool
            seconds["join"] = time.perf_counter() - started - seconds["meet"]
            self._run(order.generation, seconds)
            leave_groups(groups)
            return ended(None)
        except CommError as error:
            if groups is not None:
                leave_groups(groups, wait=False)
            return ended(str(error))
        finally:
            self._groups = None

    def _run(self, generation: int, seconds: dict[str, float]) -> None:
        engine, started = self.engine, time.perf_counter()
        engine.start()
        control = engine.control
        assert control is not None
        while not control.agreement.is_last:
            self.desk.hand_over(engine)
            if self._leaves == generation:
                control.leave()
            stepped = engine.step()
            self._steps += 1
            self.desk.stepped(stepped, may_hold=engine.has_work)
            self._look_at_placement(generation)
            seconds.setdefault("first step", time.perf_counter() - started)
            if not engine.has_work:
                self.desk.wait(_IDLE_S, lambda: self._leaves == generation)

    def _look_at_placement(self, generation: int) -> None:
        """Says what is new of the plan and of the loop that changes it, on rank 0."""
        online, parallel, before = self.engine.online, self.engine.parallel, self._placed
        if online is None or online.loop is None or parallel is None:
            return
        is_known = before is not None and before.generation == generation and before.plan is parallel.plan
        if is_known and before is not None and len(before.notes) == len(online.loop.notes):
            return
        number = 1 if before is None else before.number + 1
        self._placed = Placed(generation, number, parallel.plan, replace(online.stats), tuple(online.loop.notes))


class NodeKeeper:
    """Ends a process of its node at once: `ray.kill` waits seconds for one that is stopped."""

    def kill(self, pid: int) -> None:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            return  # it ended by itself


def actor_class() -> Any:
    """`ExpertHost` as an actor: `serve` in one thread, `CONTROL` in four others."""
    import ray

    class Host(ExpertHost):
        """On the node that Ray put it on."""

        def __init__(self, *arguments: Any, together: Together) -> None:
            node, where = ray.get_runtime_context().get_node_id(), arguments[-1]
            here = replace(together, count=min(together.count, bundles_here()))
            self.refused: Refused | None = None
            try:
                super().__init__(*arguments, sharers=sharers_of(where, here, node))
            except Refused as error:
                self.refused = error  # `ready` raises it: of what a beginning raises Ray tells the text alone
            self.node = node

        def ready(self) -> HostInfo:
            if self.refused is not None:
                raise self.refused
            return super().ready()

    for name in CONTROL:
        setattr(Host, name, ray.method(concurrency_group="control")(getattr(ExpertHost, name)))
    options: dict[str, Any] = {"concurrency_groups": {"control": 4}, "max_restarts": 0, "max_task_retries": 0}
    return ray.remote(**options)(Host)


def sharers_of(where: Where, together: Together, node: str) -> Sharers:
    """Of the hosts that load at the same time those of this node, `together`."""
    if together.count == 1:
        return ALONE
    store, key = connect(where.address, where.store_port), f"began_{together.start}_{node}"
    return Sharers(together.count, began=Began.now(lambda own: store.compare_set(key, "", own).decode()))


def bundles_here() -> int:
    """Of the placement group of this actor, on its node."""
    import ray
    from ray.util.placement_group import placement_group_table

    nodes = placement_group_table(ray.util.get_current_placement_group())["bundles_to_node_id"]
    return list(nodes.values()).count(ray.get_runtime_context().get_node_id())


def _read_blueprint(folder: str, config: EngineConfig, wanted: str) -> Blueprint:
    """Raises Refused if the folder cannot be read, or is not as the run began with."""
    try:
        blueprint = read_blueprint(folder, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        raise Refused(str(error)) from error
    if wanted and (found := fingerprint(blueprint.checkpoint)) != wanted:
        raise Refused(
            f"{blueprint.folder} on {platform.node()} holds other weights or another config.json (fingerprint {found}) "
            f"than the run began with ({wanted}): give every node the same revision, and change it between runs only"
        )
    return blueprint


def _share(blueprint: Blueprint, rank: int, num_ranks: int, job: str, sharers: Sharers) -> Share:
    shape = shareable_shape(blueprint)
    return Share(Plan.contiguous(*shape, num_ranks), rank % num_ranks, job, sharers, may_change=True)
